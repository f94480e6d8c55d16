"""Losses and estimates against enumeration of a language model with all its 1024 sequences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.lm import (
    RunningPartition,
    best_of_n_kl,
    effective_sample_size,
    estimate_kl,
    estimate_tv,
    fdpg_loss,
    fdpg_weights,
    kl_rl_loss,
    log_partition,
    quasi_rejection_accept,
    reinforce_loss,
    target_log_score,
)

V, LENGTH = 4, 5
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
DIVERGENCES = ("kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2")


def table_logps(table, sequences=SEQUENCES):
    """log pi of sequences; row `prefix` of the table holds the logits after a prefix."""
    rows, prefix, offset = table.log_softmax(-1), torch.zeros(len(sequences), dtype=torch.long), 0
    total = table.new_zeros(len(sequences))
    for t in range(LENGTH):
        total = total + rows[offset + prefix, sequences[:, t]]
        offset += V**t
        prefix = prefix * V + sequences[:, t]
    return total


def table(seed, scale=0.5, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    n_prefixes = sum(V**t for t in range(LENGTH))
    rows = scale * torch.randn(n_prefixes, V, generator=generator, dtype=torch.float64)
    return rows.requires_grad_(requires_grad)


def reward(seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(SEQUENCES), generator=generator, dtype=torch.float64)


def problem(beta=0.5):
    """Policy, log pi of all sequences, log P, log Z and log q of an unrelated proposal."""
    policy = table(0, requires_grad=True)
    scores = target_log_score(table_logps(table(1)), reward(), beta)
    return policy, table_logps(policy), scores, scores.logsumexp(0), table_logps(table(2))


def exact_divergence(name, logps, target):
    p, pi = target.exp(), logps.exp()
    m = (p + pi) / 2
    return {
        "kl": lambda: (p * (target - logps)).sum(),
        "reverse_kl": lambda: (pi * (logps - target)).sum(),
        "tv": lambda: 0.5 * (pi - p).abs().sum(),
        "js": lambda: (p * (target - m.log())).sum() + (pi * (logps - m.log())).sum(),
        "chi2": lambda: (p**2 / pi).sum() - 1,
        "reverse_chi2": lambda: (pi**2 / p).sum() - 1,
    }[name]()


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=atol)


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_kl_control_is_inference(beta):
    """E_pi[r] - beta KL(pi || pi_0) = -beta KL(pi || p) + beta log Z, and p attains beta log Z."""
    ref, r = table_logps(table(1)), reward()
    scores = target_log_score(ref, r, beta)
    log_z = scores.logsumexp(0)
    logps = table_logps(table(0))
    objective = (logps.exp() * (r - beta * (logps - ref))).sum()
    bound = -beta * exact_divergence("reverse_kl", logps, scores - log_z) + beta * log_z
    close(objective, bound)
    best = scores - log_z
    close((best.exp() * (r - beta * (best - ref))).sum(), beta * log_z)
    assert objective < beta * log_z
    close(log_z, (ref.exp() * (r / beta).exp()).sum().log())


def test_limits_of_beta():
    ref, r = table_logps(table(1)), reward()
    near_prior = target_log_score(ref, r, 1e8).log_softmax(0)
    torch.testing.assert_close(near_prior, ref, atol=1e-6, rtol=0)
    point = target_log_score(ref, r, 1e-5).log_softmax(0)
    assert point.argmax() == r.argmax()
    assert -(point.exp() * point.clamp(min=-1e9)).sum() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("baseline", [None, "z", 0.7])
@pytest.mark.parametrize("proposal", ["other", "policy", "prior"])
def test_expected_gradient_is_that_of_the_divergence(divergence, baseline, proposal):
    policy, logps, scores, log_z, other = problem()
    exact = exact_divergence(divergence, logps, scores - log_z)
    (expected,) = torch.autograd.grad(exact, policy, retain_graph=True)
    q = {"other": other, "policy": logps.detach(), "prior": table_logps(table(1))}[proposal]
    per_sample = fdpg_loss(
        logps, scores, q, log_z, divergence=divergence, baseline=baseline, reduction="none"
    )
    (ours,) = torch.autograd.grad((q.exp() * per_sample).sum(), policy)
    close(ours, expected)


def test_leave_one_out_baseline_is_unbiased():
    """All pairs of sequences of a small model, weighted by their probabilities."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    logps, q = logits.log_softmax(0), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    scores = torch.tensor([0.1, 1.0, -1.0], dtype=torch.float64)
    log_z = scores.logsumexp(0)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    for divergence in DIVERGENCES:
        loss = fdpg_loss(
            logps[pairs], scores[pairs], q[pairs], log_z.expand(9), divergence=divergence,
            baseline="mean", reduction="none",
        ).mean(-1)  # fmt: skip
        (ours,) = torch.autograd.grad(
            (q[pairs].sum(-1).exp() * loss).sum(), logits, retain_graph=True
        )
        exact = exact_divergence(divergence, logps, scores - log_z)
        close(ours, torch.autograd.grad(exact, logits, retain_graph=True)[0])
    loss = reinforce_loss(logps[pairs], scores[pairs], baseline="mean", reduction="none").mean(-1)
    (ours,) = torch.autograd.grad(
        (logps[pairs].sum(-1).exp().detach() * loss).sum(), logits, retain_graph=True
    )
    (exact_gradient,) = torch.autograd.grad(-(logps.exp() * scores).sum(), logits)
    close(ours, exact_gradient)


def test_hard_constraint():
    """P = pi_0 b with b in {0, 1}: gradients of the divergences that stay finite."""
    policy, logps, _, _, q = problem()
    allowed = (SEQUENCES == 3).any(1)
    scores = target_log_score(table_logps(table(1)), torch.where(allowed, 0.0, -math.inf).double())
    log_z = scores.logsumexp(0)
    p, pi = (scores - log_z).exp(), logps.exp()
    m = (p + pi) / 2
    finite = torch.where(allowed, scores - log_z, 0.0)
    exact = {
        "kl": (p * (finite - logps)).sum(),
        "tv": 0.5 * (pi - p).abs().sum(),
        "js": (p * (finite - m.log())).sum() + (pi * (logps - m.log())).sum(),
        "chi2": (p**2 / pi).sum(),
    }
    for divergence, value in exact.items():
        per_sample = fdpg_loss(logps, scores, q, log_z, divergence=divergence, reduction="none")
        (ours,) = torch.autograd.grad((q.exp() * per_sample).sum(), policy, retain_graph=True)
        close(ours, torch.autograd.grad(value, policy, retain_graph=True)[0])
    close(q.exp() @ ((scores - q).exp() / log_z.exp() * (finite - logps)), exact["kl"])
    for divergence in ("reverse_kl", "reverse_chi2"):
        with pytest.raises(ValueError, match="outside the target's support"):
            fdpg_loss(logps, scores, q, log_z, divergence=divergence)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "tv"])
def test_no_weight_at_the_target(divergence):
    _, _, scores, log_z, q = problem()
    weights = fdpg_weights(scores - log_z, scores, q, log_z, divergence=divergence, baseline="z")
    torch.testing.assert_close(weights, torch.zeros_like(weights), atol=1e-10, rtol=0)
    assert exact_divergence(divergence, scores - log_z, scores - log_z).abs() < 1e-10


def test_reverse_kl_is_kl_control_up_to_a_constant():
    policy, logps, scores, log_z, _ = problem(beta=0.5)
    ref, r = table_logps(table(1)), reward()
    weights = fdpg_weights(logps, scores, logps, log_z, divergence="reverse_kl")
    parametric = r - 0.5 * (logps.detach() - ref)
    difference = weights - parametric / 0.5
    close(difference, difference[:1].expand_as(difference))
    per_sample = kl_rl_loss(logps, ref, r, 0.5, baseline=0.2, reduction="none")
    (ours,) = torch.autograd.grad((logps.detach().exp() * per_sample).sum(), policy)
    logps = table_logps(policy)
    objective = (logps.exp() * (r - 0.5 * (logps - ref))).sum()
    close(ours, -torch.autograd.grad(objective, policy)[0])


def test_log_partition_is_unbiased():
    _, _, scores, log_z, q = problem()
    singles = log_partition(scores[:, None], q[:, None])
    close((q + singles).logsumexp(0), log_z)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(q.exp(), 200_000, replacement=True, generator=generator)
    assert abs(float(log_partition(scores[draws], q[draws]) - log_z)) < 0.01


def test_estimates_on_all_sequences():
    """With q uniform, the mean over all sequences is the exact sum."""
    _, logps, scores, log_z, _ = problem()
    uniform = torch.full_like(logps, -math.log(len(SEQUENCES)))
    target = scores - log_z
    for given_z in (log_z, None):
        close(estimate_kl(scores, logps, uniform, given_z), exact_divergence("kl", logps, target))
        close(estimate_tv(scores, logps, uniform, given_z), exact_divergence("tv", logps, target))
    close(log_partition(scores, uniform), log_z)
    assert estimate_kl(scores, target, uniform).abs() < 1e-12


def test_self_normalised_weights():
    _, logps, scores, _, q = problem()
    w = (scores - q).exp()
    close(fdpg_weights(logps, scores, q, self_normalize=True), len(w) * w / w.sum())
    # Any divergence is that of the two distributions on the samples.
    batch = slice(0, 7)
    for divergence in DIVERGENCES:
        p = (scores - q)[batch].log_softmax(0)
        logits = (logps.detach() - q)[batch].requires_grad_()
        (expected,) = torch.autograd.grad(
            exact_divergence(divergence, logits.log_softmax(0), p), logits
        )
        loss = fdpg_loss(
            logits + q[batch], scores[batch], q[batch], divergence=divergence, self_normalize=True
        )
        (ours,) = torch.autograd.grad(loss, logits)
        # Without the term of the policy's own normaliser, which samples from q do not know.
        weights = -7 * ours
        centred = -(weights / 7 - logits.softmax(0).detach() * weights.sum() / 7)
        close(centred, expected)


def test_clipped_ratios():
    _, logps, scores, log_z, q = problem()
    ratio, target = (logps - q).exp().detach(), (scores - log_z - q).exp()
    c = 0.9
    assert (ratio > c).any()
    assert (target > c).any()
    ours = fdpg_weights(logps, scores, q, log_z, baseline="z", clip_ratio=c)
    close(ours, target.clamp(max=c) - ratio.clamp(max=c))
    ours = fdpg_weights(logps, scores, q, log_z, divergence="chi2", clip_ratio=c)
    close(ours, ratio.clamp(max=c) * ((target / ratio).clamp(max=c) ** 2 - 1))
    ours = fdpg_weights(logps, scores, q, log_z, divergence="reverse_chi2", clip_ratio=c)
    close(ours, -ratio.clamp(max=c) * 2 * ((ratio / target).clamp(max=c) - 1))


def test_contexts():
    """Each row is a context with a Z of its own; a context whose target is empty is skipped."""
    _, logps, scores, _, q = problem()
    rows = [x[:12].reshape(3, 4).detach() for x in (logps, scores, q)]
    rows[1][1] = -math.inf
    log_z = log_partition(rows[1], rows[2])
    assert log_z[1] == -math.inf
    for divergence in DIVERGENCES:
        for baseline in (None, "mean", "z"):
            options = {"divergence": divergence, "baseline": baseline}
            ours = fdpg_weights(*rows, log_z, **options)
            assert (ours[1] == 0).all()
            for i in (0, 2):
                close(ours[i], fdpg_weights(*(x[i] for x in rows), log_z[i], **options))
    normalised = fdpg_weights(*rows, self_normalize=True)
    close(normalised.sum(-1), torch.tensor([4.0, 0.0, 4.0], dtype=torch.float64))
    kl = estimate_kl(rows[1][[0, 2]], rows[0][[0, 2]], rows[2][[0, 2]], log_z[[0, 2]])
    close(kl[1], estimate_kl(*(x[2] for x in (rows[1], rows[0], rows[2]))))


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(-100, 100))
@settings(max_examples=50, deadline=None)
def test_effective_sample_size_laws(values, shift):
    logw = torch.tensor(values, dtype=torch.float64)
    n_effective = effective_sample_size(logw)
    assert 1 - 1e-9 <= n_effective <= len(values) + 1e-9
    torch.testing.assert_close(effective_sample_size(logw + shift), n_effective)
    w = (logw - logw.max()).exp()
    torch.testing.assert_close(n_effective, w.sum() ** 2 / (w**2).sum())
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(torch.full((3,), -math.inf)) == 0


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_kl(n):
    """The exact law of the best of n of 1024 sequences with distinct rewards, and a simulation."""
    ref, r = table_logps(table(1)).exp(), reward()
    order = r.argsort()
    cumulative = ref[order].cumsum(0)
    best = cumulative**n - (cumulative - ref[order]).clamp(min=0) ** n
    kl = (best * (best / ref[order]).log()).sum()
    # The formula is the limit of infinitely many sequences, of which none has much probability.
    assert best_of_n_kl(n) == pytest.approx(float(kl), abs=0.02)
    generator = torch.Generator().manual_seed(n)
    draws = torch.multinomial(ref, 20_000 * n, replacement=True, generator=generator)
    chosen = r[draws].reshape(-1, n).max(1).values
    assert float(chosen.mean()) == pytest.approx(float(best @ r[order]), abs=0.01)


def test_quasi_rejection():
    _, _, scores, log_z, q = problem()
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(q.exp(), 400_000, replacement=True, generator=generator)
    bound = float((scores - q).max())
    keep = quasi_rejection_accept(scores[draws], q[draws], bound, generator=generator)
    assert float(keep.double().mean()) == pytest.approx(math.exp(float(log_z) - bound), rel=0.05)
    kept = torch.bincount(draws[keep], minlength=len(q)).double()
    tv = 0.5 * (kept / kept.sum() - (scores - log_z).exp()).abs().sum()
    assert tv < 2 * math.sqrt(len(q) / float(kept.sum()))
    lower = bound - 1.5
    keep = quasi_rejection_accept(scores[draws], q[draws], lower, generator=generator)
    expected = torch.minimum(q, scores - lower).logsumexp(0).exp()
    assert float(keep.double().mean()) == pytest.approx(float(expected), abs=0.005)


def test_running_partition():
    partition = RunningPartition()
    for z in (1.0, 3.0, 0.0):
        partition.update(math.log(z) if z else -math.inf)
    assert math.exp(partition.log_z()) == pytest.approx(4 / 3)
    partition.update(torch.tensor(5.0), context="b")
    assert partition.log_z("b") == 5
    other = RunningPartition(max_z=2)
    other.load_state_dict(partition.state_dict())
    assert other.log_z() == partition.log_z()
    assert other.log_z("b") == pytest.approx(math.log(2))
    assert RunningPartition().update(-math.inf) == -math.inf
    with pytest.raises(ValueError, match="context must have been updated, got 'c'"):
        other.log_z("c")
    with pytest.raises(ValueError, match="log_z"):
        other.update(math.nan)


def test_half_precision_and_constant_inputs():
    _, logps, scores, log_z, q = problem()
    halves = [x.detach().half() for x in (logps, scores, q)]
    leaf = halves[0].clone().requires_grad_()
    loss = fdpg_loss(leaf, halves[1], halves[2], float(log_z))
    assert loss.dtype == torch.float32
    loss.backward()
    assert leaf.grad.dtype == torch.float16
    saved = [x.detach().clone() for x in (logps, scores, q)]
    fdpg_loss(logps, scores, q, log_z, baseline="mean", clip_ratio=2.0)
    for before, after in zip(saved, (logps, scores, q), strict=True):
        assert torch.equal(before, after)
    for reduction, of in (("sum", torch.sum), ("mean", torch.mean)):
        whole = fdpg_loss(logps, scores, q, log_z, reduction=reduction)
        close(whole, of(fdpg_loss(logps, scores, q, log_z, reduction="none")))


LOGPS = torch.tensor([-1.0, -2.0, -3.0])


@pytest.mark.parametrize(
    ("match", "error", "call"),
    [
        ("beta must be in .*0", ValueError, lambda: target_log_score(LOGPS, LOGPS, 0.0)),
        ("beta must be in", ValueError, lambda: target_log_score(LOGPS, LOGPS, -1.0)),
        ("beta must be in", ValueError, lambda: kl_rl_loss(LOGPS, LOGPS, LOGPS, 0.0)),
        ("beta must be in", ValueError, lambda: target_log_score(LOGPS, LOGPS, math.inf)),
        ("reward.*NaN", ValueError, lambda: target_log_score(LOGPS, LOGPS * math.nan)),
        ("reward must be finite", ValueError, lambda: reinforce_loss(LOGPS, LOGPS * math.inf)),
        ("reward must have shape .3,", ValueError, lambda: reinforce_loss(LOGPS, LOGPS[:2])),
        ("log_z must be given", ValueError, lambda: fdpg_loss(LOGPS, LOGPS, LOGPS)),
        (
            "log_z must be None",
            ValueError,
            lambda: fdpg_loss(LOGPS, LOGPS, LOGPS, 0.0, self_normalize=True),
        ),
        (
            "target is zero on every sample",
            ValueError,
            lambda: fdpg_loss(LOGPS, LOGPS * math.inf, LOGPS, -math.inf),
        ),
        (
            "target is zero on every sample",
            ValueError,
            lambda: fdpg_loss(LOGPS, LOGPS * math.inf, LOGPS, self_normalize=True),
        ),
        ("log_z must not be -inf", ValueError, lambda: fdpg_weights(
            LOGPS.repeat(2, 1), LOGPS.repeat(2, 1), LOGPS.repeat(2, 1),
            torch.tensor([0.0, -math.inf]))),
        ("log_z.*shape .2,", ValueError, lambda: fdpg_loss(
            LOGPS.repeat(2, 1), LOGPS.repeat(2, 1), LOGPS.repeat(2, 1), torch.zeros(3))),
        ("log_z.*NaN", ValueError, lambda: fdpg_loss(LOGPS, LOGPS, LOGPS, math.nan)),
        (
            "proposal_logps must be finite.*cannot come from the proposal",
            ValueError,
            lambda: fdpg_loss(LOGPS, LOGPS, LOGPS * math.inf, 0.0),
        ),
        (
            "proposal_logps must be finite",
            ValueError,
            lambda: log_partition(LOGPS, torch.tensor([-1.0, -math.inf, -1.0])),
        ),
        ("policy_logps must be finite", ValueError, lambda: fdpg_loss(
            LOGPS * math.nan, LOGPS, LOGPS, 0.0)),
        ("proposal_logps must have the shape", ValueError, lambda: fdpg_loss(
            LOGPS, LOGPS, LOGPS[:2], 0.0)),
        ("target_log_scores must have shape", ValueError, lambda: fdpg_loss(
            LOGPS, LOGPS[:2], LOGPS, 0.0)),
        ("divergence must be one of", ValueError, lambda: fdpg_loss(
            LOGPS, LOGPS, LOGPS, 0.0, divergence="hellinger")),
        ("baseline must be one of", ValueError, lambda: fdpg_loss(
            LOGPS, LOGPS, LOGPS, 0.0, baseline="median")),
        ("baseline must be one of 'mean'", ValueError, lambda: reinforce_loss(
            LOGPS, LOGPS, baseline="z")),
        ("needs two samples", ValueError, lambda: fdpg_loss(
            LOGPS[:1], LOGPS[:1], LOGPS[:1], 0.0, baseline="mean")),
        ("clip_ratio", ValueError, lambda: fdpg_loss(LOGPS, LOGPS, LOGPS, 0.0, clip_ratio=0.0)),
        ("reduction", ValueError, lambda: fdpg_loss(LOGPS, LOGPS, LOGPS, 0.0, reduction="max")),
        ("overflow.*clip_ratio", ValueError, lambda: fdpg_loss(
            LOGPS, LOGPS + 200, LOGPS - 200, 0.0)),
        ("policy_logps must be a floating", TypeError, lambda: fdpg_loss(
            LOGPS.long(), LOGPS, LOGPS, 0.0)),
        ("target_log_scores must be a floating", TypeError, lambda: log_partition(
            [0.0, 0.0, 0.0], LOGPS)),
        ("with a sample, got .0,", ValueError, lambda: effective_sample_size(torch.zeros(0))),
        ("log_weights.*NaN", ValueError, lambda: effective_sample_size(LOGPS * math.nan)),
        ("-inf for all", ValueError, lambda: estimate_kl(LOGPS * math.inf, LOGPS, LOGPS)),
        ("n must be an integer", ValueError, lambda: best_of_n_kl(0)),
        ("max_z", ValueError, lambda: RunningPartition(max_z=0)),
        ("log_bound", ValueError, lambda: quasi_rejection_accept(LOGPS, LOGPS, math.inf)),
    ],
)  # fmt: skip
def test_bad_input(match, error, call):
    with pytest.raises(error, match=match):
        call()
