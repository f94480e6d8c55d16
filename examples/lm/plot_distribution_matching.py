"""
Reward maximisation collapses, distribution matching does not
=============================================================

Fine-tuning a language model on a reward alone ends in a single sequence. With a KL penalty it is
variational inference of a target distribution, p(x) = pi_0(x) exp(r(x) / beta) / Z
(arXiv:2205.11275), and once p is named, other divergences lead to it too: DPG descends the forward
KL from samples.

Here the "language model" has 4 tokens and sequences of 5, so that everything can be compared with
the exact answer. The reward counts the token 3 and loves the rare string 2121.
"""

# %%
# A table of next-token logits after each of the 341 prefixes, and all 1024 sequences.
import itertools

import matplotlib.pyplot as plt
import torch

from sciml.lm import (
    RunningPartition,
    fdpg_loss,
    fdpg_weights,
    fit_moment_coefficients,
    kl_rl_loss,
    log_partition,
    reinforce_loss,
    target_log_score,
)

torch.set_num_threads(1)
V, LENGTH = 4, 5
sequences = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
powers = torch.tensor([V**i for i in reversed(range(LENGTH))])
prefixes = torch.stack(
    [sum(V**s for s in range(t)) + sequences[:, :t] @ powers[LENGTH - t :] for t in range(LENGTH)],
    dim=1,
)


def logps(table, rows=slice(None)):
    return table.log_softmax(-1)[prefixes[rows], sequences[rows]].sum(-1)


generator = torch.Generator().manual_seed(0)
n_prefixes = int(prefixes.max()) + 1
prior_table = 0.5 * torch.randn(n_prefixes, V, generator=generator, dtype=torch.float64)
prior = logps(prior_table)

windows = sequences.unfold(1, 4, 1)
has_string = (windows == torch.tensor([2, 1, 2, 1])).all(-1).any(-1)
reward = 0.2 * (sequences == 3).sum(1) + 2.0 * has_string
beta = 0.5
scores = target_log_score(prior, reward.double(), beta)
log_z = scores.logsumexp(0)
target = scores - log_z

# %%
# Four ways to train
# ------------------
# Equal samples for all: 64 sequences from the policy in each of 1000 steps.


def kl(p, q):
    return float(p.exp() @ (p - q))


def train(loss_of, scores, n_steps=1000, n=64):
    table = prior_table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table])
    partition, curve = RunningPartition(), []
    draw = torch.Generator().manual_seed(1)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / n_steps)
        policy = logps(table.detach())
        if step % 20 == 0 or step == n_steps - 1:
            entropy = -float(policy.exp() @ policy)
            curve.append((step, entropy, kl(policy, scores.log_softmax(0))))
        x = torch.multinomial(policy.exp(), n, replacement=True, generator=draw)
        z = partition.update(log_partition(scores[x], policy[x]))
        optimizer.zero_grad()
        loss_of(logps(table, x), x, policy[x], z).backward()
        optimizer.step()
    return logps(table.detach()), curve


methods = {
    "REINFORCE": lambda pi, x, q, z: reinforce_loss(pi, reward[x].double(), baseline="mean"),
    "KL-RL (reverse KL)": lambda pi, x, q, z: kl_rl_loss(
        pi, prior[x], reward[x].double(), beta, baseline="mean"
    ),
    "DPG (forward KL)": lambda pi, x, q, z: fdpg_loss(pi, scores[x], q, z),
    "DPG, baseline": lambda pi, x, q, z: fdpg_loss(pi, scores[x], q, z, baseline="z"),
}
policies, curves = {}, {}
print(f"{'':20} entropy  KL(pi||p)  KL(p||pi)  reward  share of 2121")
for name, loss_of in methods.items():
    policies[name], curves[name] = train(loss_of, scores)
    pi = policies[name]
    print(
        f"{name:20} {-float(pi.exp() @ pi):7.3f} {kl(pi, target):10.4f} {kl(target, pi):10.4f} "
        f"{float(pi.exp() @ reward.double()):7.3f} {float(pi.exp()[has_string].sum()):10.3f}"
    )
print(
    f"{'target':20} {-float(target.exp() @ target):7.3f} {0:10.4f} {0:10.4f} "
    f"{float(target.exp() @ reward.double()):7.3f} {float(target.exp()[has_string].sum()):10.3f}"
)

fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, curve in curves.items():
    steps, entropy, divergence = zip(*curve, strict=True)
    axes[0].plot(steps, entropy, label=name)
    axes[1].semilogy(steps, divergence, label=name)
axes[0].axhline(-float(target.exp() @ target), color="k", ls=":", label="target")
axes[0].set(xlabel="step", ylabel="entropy of the policy, nats")
axes[1].set(xlabel="step", ylabel="KL(policy || target)")
axes[0].legend()
fig.savefig("distribution_matching.png")

# %%
# What the baseline is good for
# -----------------------------
# Without it a sample's weight is P / (Z q), about one at the target; with it the weights vanish
# there. The variance of the weights at the policy that DPG ended with:
pi = policies["DPG (forward KL)"]
for baseline in (None, "z"):
    weights = fdpg_weights(pi, scores, pi, log_z, baseline=baseline)
    print(f"baseline {baseline!s:5} mean squared weight {float(pi.exp() @ weights**2):.3f}")

# %%
# A feature in half of the sequences
# ----------------------------------
# "Two ones in a row" is to occur in half of the sequences, with as little change as possible. The
# coefficient is fitted on samples of the prior, the policy trained by DPG.
feature = ((sequences[:, :-1] == 1) & (sequences[:, 1:] == 1)).any(1).double()[:, None]
x = torch.multinomial(prior.exp(), 2**14, replacement=True, generator=generator)
coefficient = fit_moment_coefficients(feature[x], torch.tensor([0.5]))
scores_half = target_log_score(prior, feature @ coefficient)
pi, _ = train(lambda pi, x, q, z: fdpg_loss(pi, scores_half[x], q, z, baseline="z"), scores_half)
exact = fit_moment_coefficients(feature, torch.tensor([0.5]), log_weights=prior, tol=1e-12)
projection = (prior + feature @ exact).log_softmax(0)
print(f"share in the prior {float(prior.exp() @ feature):.3f}, in the policy "
      f"{float(pi.exp() @ feature):.3f}")  # fmt: skip
print(f"KL from the prior {kl(pi, prior):.4f}, least possible {kl(projection, prior):.4f}")
plt.show()
