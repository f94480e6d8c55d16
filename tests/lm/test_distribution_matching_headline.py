"""The collapse of reward maximisation against KL control and DPG, on a model that is enumerated."""

import itertools

import numpy as np
import pytest
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

V, LENGTH, BETA = 4, 5, 0.5
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
POWERS = torch.tensor([V**i for i in reversed(range(LENGTH))])
PREFIXES = torch.stack(
    [sum(V**s for s in range(t)) + SEQUENCES[:, :t] @ POWERS[LENGTH - t :] for t in range(LENGTH)],
    dim=1,
)
HAS_STRING = (SEQUENCES.unfold(1, 4, 1) == torch.tensor([2, 1, 2, 1])).all(-1).any(-1)
REWARD = 0.2 * (SEQUENCES == 3).sum(1).double() + 2.0 * HAS_STRING


def logps(table, rows=slice(None)):
    return table.log_softmax(-1)[PREFIXES[rows], SEQUENCES[rows]].sum(-1)


def prior_table(seed):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(341, V, generator=generator, dtype=torch.float64)


def kl(p, q):
    return float(p.exp() @ (p - q))


def train(seed, loss_of, scores, n_steps=1000, n=64):
    table = prior_table(seed).requires_grad_()
    optimizer, partition = torch.optim.Adam([table]), RunningPartition()
    generator = torch.Generator().manual_seed(100 + seed)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / n_steps)
        policy = logps(table.detach())
        x = torch.multinomial(policy.exp(), n, replacement=True, generator=generator)
        z = partition.update(log_partition(scores[x], policy[x]))
        optimizer.zero_grad()
        loss_of(logps(table, x), x, policy[x], z).backward()
        optimizer.step()
    return table.detach()


def gradient_variance(table, weights):
    """Trace of the covariance of one sample's gradient, exact over all sequences."""
    table = table.clone().requires_grad_()
    pi, q = table.detach().softmax(-1), logps(table.detach()).exp()
    # The rows of a sequence's prefixes differ, each has the gradient onehot - pi.
    norms = (1 - 2 * pi[PREFIXES, SEQUENCES] + pi.square().sum(-1)[PREFIXES]).sum(1)
    (mean,) = torch.autograd.grad((q * weights * logps(table)).sum(), table)
    return float((q * weights**2 * norms).sum() - mean.square().sum())


@pytest.mark.slow
def test_collapse_and_what_prevents_it():
    rows, ratios = {}, {"DPG": [], "DPG, baseline": []}
    for seed in range(3):
        prior = logps(prior_table(seed))
        scores = target_log_score(prior, REWARD, BETA)
        log_z = scores.logsumexp(0)
        target = scores - log_z
        losses = {
            "REINFORCE": lambda pi, x, q, z: reinforce_loss(pi, REWARD[x], baseline="mean"),
            "KL-RL": lambda pi, x, q, z, prior=prior: kl_rl_loss(
                pi, prior[x], REWARD[x], BETA, baseline="mean"
            ),
            "DPG": lambda pi, x, q, z, scores=scores: fdpg_loss(pi, scores[x], q, z),
            "DPG, baseline": lambda pi, x, q, z, scores=scores: fdpg_loss(
                pi, scores[x], q, z, baseline="z"
            ),
        }
        for name, loss_of in losses.items():
            table = train(seed, loss_of, scores)
            pi = logps(table)
            entropy = -float(pi.exp() @ pi)
            row = [entropy, kl(pi, target), kl(target, pi), float(pi.exp() @ REWARD)]
            rows.setdefault(name, []).append(row)
            if name in ratios:
                variance = [
                    gradient_variance(table, fdpg_weights(pi, scores, pi, log_z, baseline=b))
                    for b in (None, "z")
                ]
                ratios[name].append(variance[0] / variance[1])
    for name, values in rows.items():
        mean, spread = np.mean(values, axis=0), np.std(values, axis=0)
        print(
            f"{name:14} entropy {mean[0]:.3f} ± {spread[0]:.3f}  KL(pi||p) {mean[1]:.4f} ± "
            f"{spread[1]:.4f}  KL(p||pi) {mean[2]:.4f} ± {spread[2]:.4f}  reward {mean[3]:.3f}",
            flush=True,
        )
    for name, values in ratios.items():
        print(
            f"variance of the gradient without / with baseline at the end of {name}: "
            f"{np.round(values, 1)}"
        )
    reinforce = np.array(rows["REINFORCE"])
    assert (reinforce[:, 0] < 0.1).all()
    assert (reinforce[:, 2] > 2).all()
    for name in ("KL-RL", "DPG", "DPG, baseline"):
        assert (np.array(rows[name])[:, 1] < 0.05).all(), name
    # Near convergence, that is; at the noisier end of plain DPG there is less to gain.
    assert min(ratios["DPG, baseline"]) >= 3
    assert np.mean(rows["DPG, baseline"], axis=0)[1] < np.mean(rows["DPG"], axis=0)[1]


@pytest.mark.slow
def test_feature_from_a_tenth_to_a_half():
    feature = ((SEQUENCES[:, :-1] == 1) & (SEQUENCES[:, 1:] == 1)).any(1).double()[:, None]
    for seed in range(3):
        prior = logps(prior_table(seed))
        # Shift the prior so that exactly a tenth of its sequences have the feature.
        tenth = fit_moment_coefficients(feature, torch.tensor([0.1]).double(), prior, tol=1e-12)
        prior = (prior + feature @ tenth).log_softmax(0)
        generator = torch.Generator().manual_seed(seed)
        x = torch.multinomial(prior.exp(), 2**14, replacement=True, generator=generator)
        coefficient = fit_moment_coefficients(feature[x], torch.tensor([0.5]).double())
        scores = target_log_score(prior, feature @ coefficient)
        table = train(
            seed,
            lambda pi, x, q, z, scores=scores: fdpg_loss(pi, scores[x], q, z, baseline="z"),
            scores,
        )
        pi = logps(table)
        half = fit_moment_coefficients(feature, torch.tensor([0.5]).double(), prior, tol=1e-12)
        projection = (prior + feature @ half).log_softmax(0)
        share, cost, least = float(pi.exp() @ feature), kl(pi, prior), kl(projection, prior)
        print(
            f"seed {seed}: 0.100 -> {share:.3f}; KL(pi||pi_0) {cost:.4f}, I-projection {least:.4f} "
            f"({100 * (cost / least - 1):+.1f} %)",
            flush=True,
        )
        assert abs(share - 0.5) <= 0.02
        assert cost == pytest.approx(least, rel=0.05)
