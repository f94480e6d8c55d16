"""The bandit in which DPO over-optimises and χPO does not: five seeds, best beta over n."""

import pytest
import torch

from sciml.lm import chipo_loss

REWARDS = torch.zeros(102)
REWARDS[:2] = torch.tensor([1.0, 0.5])
REF = torch.tensor([0.4, 0.4] + [0.002] * 100)
METHODS = {"DPO": {"chi_weight": 0.0}, "χPO": {}, "χPO, r_max=1": {"r_max": 1.0}}


def comparisons(n_pairs, seed):
    """Chosen arm, rejected arm and share of each distinct comparison."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.multinomial(REF, 2 * n_pairs, True, generator=generator).view(2, -1)
    wins = torch.rand(n_pairs, generator=generator) < (REWARDS[first] - REWARDS[second]).sigmoid()
    pairs = torch.stack([torch.where(wins, first, second), torch.where(wins, second, first)])
    (chosen, rejected), counts = pairs.unique(dim=1, return_counts=True)
    return chosen, rejected, counts / n_pairs


def train(data_sets, n_steps, **options):
    chosen, rejected, weight = (torch.cat(column) for column in zip(*data_sets, strict=True))
    run = torch.cat([torch.full_like(d[0], i) for i, d in enumerate(data_sets)])
    logits = REF.log().repeat(len(data_sets), 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(n_steps):
        logps = logits.log_softmax(-1)
        losses = chipo_loss(
            logps[run, chosen], logps[run, rejected], REF[chosen].log(), REF[rejected].log(),
            reduction="none", validate=False, **options,
        )  # fmt: skip
        optimizer.zero_grad()
        (losses * weight).sum().backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def test_a_beta_that_ruins_dpo_leaves_chipo_above_the_reference():
    """One data set, fewer steps: the reference scores 0.6."""
    data = [comparisons(3000, 0)]
    dpo, chipo = (train(data, 600, beta=0.1, **METHODS[m])[0] for m in ("DPO", "χPO"))
    assert dpo @ REWARDS < 0.5
    assert chipo @ REWARDS > 0.8
    assert (dpo**2 / REF).sum() > 20 * (chipo**2 / REF).sum()


@pytest.mark.slow
def test_best_beta_of_chipo_beats_that_of_dpo():
    """Measured over n pairs and beta; the claim is asserted at 3000 pairs."""
    sizes, betas, n_seeds = (100, 300, 1000, 3000, 10_000), (1.0, 0.3, 0.1, 0.03, 0.01), 5
    data = [comparisons(n, seed) for n in sizes for seed in range(n_seeds)]
    reward, coverage = {}, {}
    for name, options in METHODS.items():
        for beta in betas:
            policy = train(data, 2000, beta=beta, **options).view(len(sizes), n_seeds, -1)
            reward[name, beta] = policy @ REWARDS
            coverage[name, beta] = (policy**2 / REF).sum(-1).mean(1)  # E_π[π / π_ref]
            print(f"{name:13} beta {beta:<5}", reward[name, beta].mean(1).tolist(), flush=True)
    print("\nexpected reward, mean of 5 seeds (columns: pairs)", *sizes)
    for (name, beta), values in reward.items():
        print(f"{name:13} beta {beta:<5}", *(f"{v:7.3f}" for v in values.mean(1)))
    print("coverage")
    for (name, beta), values in coverage.items():
        print(f"{name:13} beta {beta:<5}", *(f"{v:7.1f}" for v in values))
    print("regret of the best beta")
    best = {}
    for name in METHODS:
        means = torch.stack([reward[name, beta] for beta in betas])
        index = means.mean(-1).argmax(0)
        chosen = means[index, torch.arange(len(sizes))]
        best[name] = 1 - chosen.mean(-1)
        spread = chosen.std(-1)
        print(f"{name:13}", *(f"{b:.3f}±{s:.3f}" for b, s in zip(best[name], spread, strict=True)))
        print(f"{'beta':13}", *(betas[i] for i in index))
    at = sizes.index(3000)
    assert best["χPO"][at] <= best["DPO"][at] - 0.08
    assert coverage["DPO", 0.1][at] >= 20 * coverage["χPO", 0.1][at]
