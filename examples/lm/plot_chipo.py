"""
χPO does not over-optimise where DPO does
=========================================

Offline preference data covers some responses well and others hardly at all. DPO's KL
regularisation is too weak to keep a policy away from the latter: with a small beta, or long
training, it moves all its mass onto a response that won its two comparisons by luck. χPO
(:func:`~sciml.lm.chipo_loss`) changes one thing, the link: ``z + log z`` of the density ratio
z = π / π_ref instead of ``log z``.

Here both learn from the same comparisons in the smallest setting with that trouble: a bandit with
two common arms and a hundred rare ones.
"""

# %%
# The arms: rewards 1 and 1/2 for the common ones (probability 0.4 each under the reference), 0 for
# the hundred rare ones. Pairs come from the reference, labels from Bradley and Terry's model. Equal
# comparisons are counted rather than repeated.
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from sciml.lm import chi2_optimal_policy, chipo_link, chipo_loss

REWARDS = torch.zeros(102)
REWARDS[:2] = torch.tensor([1.0, 0.5])
REF_LOGPS = torch.tensor([0.4, 0.4] + [0.002] * 100).log()


def comparisons(n_pairs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen arms, rejected arms and how often each comparison came, of n_pairs."""
    generator = torch.Generator().manual_seed(seed)
    arms = torch.multinomial(REF_LOGPS.exp(), 2 * n_pairs, True, generator=generator)
    first, second = arms.reshape(2, n_pairs)
    wins = torch.rand(n_pairs, generator=generator) < torch.sigmoid(
        REWARDS[first] - REWARDS[second]
    )
    pairs = torch.stack([torch.where(wins, first, second), torch.where(wins, second, first)])
    unique, counts = pairs.unique(dim=1, return_counts=True)
    return unique[0], unique[1], counts


# %%
# One softmax policy for each data set, all trained at once by the loss itself;
# ``chi_weight=0`` is DPO.
def train(data_sets: list[tuple[Tensor, Tensor, Tensor]], n_steps: int, **options: float) -> Tensor:
    """Policies of shape (number of data sets, number of arms)."""
    chosen, rejected = (torch.cat([d[i] for d in data_sets]) for i in (0, 1))
    run = torch.cat([torch.full_like(d[0], i) for i, d in enumerate(data_sets)])
    weight = torch.cat([d[2] / d[2].sum() for d in data_sets])
    logits = REF_LOGPS.repeat(len(data_sets), 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(n_steps):
        logps = logits.log_softmax(-1)
        losses = chipo_loss(
            logps[run, chosen], logps[run, rejected], REF_LOGPS[chosen], REF_LOGPS[rejected],
            reduction="none", validate=False, **options,
        )  # fmt: skip
        optimizer.zero_grad()
        (losses * weight).sum().backward()
        optimizer.step()
    return logits.detach().softmax(-1)


N_PAIRS, BETAS, N_SEEDS, N_STEPS = 3000, (1.0, 0.3, 0.1, 0.03, 0.01), 3, 1000
data = [comparisons(N_PAIRS, seed) for seed in range(N_SEEDS)]
print("expected reward of the reference: 0.60, of the best arm: 1.00")
print("beta   DPO reward  coverage   χPO reward  coverage")
scores: dict[str, list[float]] = {"DPO": [], "χPO": []}
for beta in BETAS:
    line = f"{beta:<5}"
    for name, chi_weight in (("DPO", 0.0), ("χPO", 1.0)):
        policy = train(data, N_STEPS, beta=beta, chi_weight=chi_weight)
        scores[name].append((policy @ REWARDS).mean().item())
        coverage = (policy**2 / REF_LOGPS.exp()).sum(-1).mean()  # E_π[π / π_ref]
        line += f" {scores[name][-1]:11.3f} {coverage:9.1f} "
    print(line)

# %%
# Why: what either may do with a reward it believes in. The optimum of DPO's objective is
# exponential in the reward, that of χPO linear.
reward = torch.linspace(0, 3, 100)
ref = torch.tensor([0.999, 0.001]).log()
two = torch.stack([torch.zeros(100), reward], dim=1)
chi2 = chi2_optimal_policy(ref.expand(100, 2), two, beta=0.3)[:, 1]
kl = (ref + two / 0.3).softmax(-1)[:, 1]

fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for name, values in scores.items():
    axes[0].semilogx(BETAS, values, "o-", label=name)
axes[0].axhline(0.6, color="grey", linewidth=0.8)
axes[0].set(xlabel="beta", ylabel="expected reward", title=f"{N_PAIRS} pairs")
axes[0].legend()
log_ratio = torch.linspace(-3, 2, 100)
axes[1].plot(log_ratio.exp(), log_ratio, label="log z (DPO)")
axes[1].plot(log_ratio.exp(), chipo_link(log_ratio), label="z + log z (χPO)")
axes[1].set(xlabel="z = π / π_ref", title="link")
axes[1].legend()
axes[2].semilogy(reward, kl, label="KL")
axes[2].semilogy(reward, chi2, label="χ² + KL")
axes[2].set(xlabel="believed reward", title="mass of an arm of 0.1 %, beta 0.3")
axes[2].legend()
fig.savefig("chipo.png")
plt.show()
