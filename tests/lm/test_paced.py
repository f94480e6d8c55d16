import json
import math
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import beta as beta_function

from sciml.lm import (
    Distiller,
    HiddenLogits,
    PassRateEstimator,
    PassRateWeighting,
    TwoStageKL,
    beta_kernel_weights,
    byte_language_model,
    generalized_jsd,
    gradient_snr,
    hard_filter_weights,
    paced_loss,
    plot_gradient_snr,
    token_kl,
    weighting_efficiency,
)

matplotlib.use("agg")

RATES = np.array([0.0, 0.125, 0.5, 0.75, 1.0])


def test_kernel_values_mode_and_integral():
    assert beta_kernel_weights(np.array([0.0, 0.5, 1.0]), normalize=None).tolist() == [0, 0.25, 0]
    grid = np.linspace(0, 1, 2001)
    for alpha, beta in ((1.0, 1.0), (2.0, 0.5), (0.7, 1.3)):
        kernel = partial(beta_kernel_weights, alpha=alpha, beta=beta, normalize=None)
        mode = alpha / (alpha + beta)
        assert abs(grid[kernel(grid).argmax()] - mode) < 1e-3
        area, _ = quad(lambda p, kernel=kernel: kernel(np.array([p]))[0], 0, 1)
        assert area == pytest.approx(beta_function(alpha + 1, beta + 1), rel=1e-6)
        scaled = beta_kernel_weights(np.array([mode]), alpha, beta, "max")
        assert scaled == pytest.approx(1.0)


def test_exponents_of_zero_weigh_all_alike():
    assert (beta_kernel_weights(RATES, 0, 0) == 1).all()
    assert beta_kernel_weights(RATES, 0, 1, None).tolist() == (1 - RATES).tolist()


def test_normalisation():
    weights = beta_kernel_weights(RATES)
    assert weights.mean() == pytest.approx(1)
    raw = beta_kernel_weights(RATES, normalize=None)
    np.testing.assert_allclose(weights, raw / raw.mean())
    assert (beta_kernel_weights(np.array([0.0, 1.0])) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [beta_kernel_weights, hard_filter_weights])
def test_tensors_come_back_as_tensors(function, dtype):
    weights = function(torch.tensor(RATES, dtype=dtype))
    assert weights.dtype == dtype
    np.testing.assert_allclose(weights.numpy(), function(RATES), rtol=1e-6)


def test_hard_filter():
    assert hard_filter_weights(RATES, normalize=None).tolist() == [0, 0, 1, 1, 0]
    assert hard_filter_weights(RATES, 0.0, 0.125, None).tolist() == [1, 1, 0, 0, 0]
    assert hard_filter_weights(RATES).mean() == 1


@given(st.floats(0, 1), st.integers(2, 12))
def test_estimated_kernel_is_biased_by_a_constant_factor(p, trials):
    """E[k (1 - k)] over binomial counts, summed exactly."""
    counts = np.arange(trials + 1)
    probability = [math.comb(trials, int(k)) * p**k * (1 - p) ** (trials - k) for k in counts]
    expected = np.dot(probability, beta_kernel_weights(counts / trials, normalize=None))
    assert expected == pytest.approx(p * (1 - p) * (1 - 1 / trials), abs=1e-12)


def test_pass_rates_follow_the_counts():
    estimator = PassRateEstimator(4)
    assert np.isnan(estimator.pass_rate()).all()
    estimator.update([0, 2], [8, 2], 8)
    np.testing.assert_array_equal(estimator.pass_rate(), [1, np.nan, 0.25, np.nan])
    estimator.update([2], [4], 4)  # the newest rollouts replace the older ones
    assert estimator.pass_rate()[2] == 1
    averaging = PassRateEstimator(1, decay=1.0)
    averaging.update([0], [2], 8)
    averaging.update([0], [4], 4)
    assert averaging.pass_rate() == pytest.approx(6 / 12)
    fading = PassRateEstimator(1, decay=0.5)
    fading.update([0], [2], 8)
    fading.update([0], [4], 4)
    assert fading.pass_rate() == pytest.approx((0.5 * 2 + 4) / (0.5 * 8 + 4))
    smooth = PassRateEstimator(2, prior=(1, 1))
    smooth.update([0], [8], 8)
    assert smooth.pass_rate() == pytest.approx([9 / 10, 1 / 2])


def test_problems_never_tried_need_a_choice():
    estimator = PassRateEstimator(3)
    estimator.update([0, 1], [4, 1], 8)
    with pytest.raises(ValueError, match="1 problems have no trial"):
        estimator.weights()
    seen = beta_kernel_weights(np.array([0.5, 0.125]), normalize=None)
    skip = np.append(seen, 0.0)
    np.testing.assert_allclose(estimator.weights(unseen="skip"), skip / skip.mean())
    uniform = np.append(seen, seen.mean())
    np.testing.assert_allclose(estimator.weights(unseen="uniform"), uniform / uniform.mean())
    np.testing.assert_allclose(estimator.weights(unseen="uniform", normalize=None), uniform)
    assert PassRateEstimator(2).weights(unseen="uniform").tolist() == [1, 1]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(
    "divergence",
    [token_kl, partial(token_kl, direction="reverse"), partial(generalized_jsd, beta=0.3)],
)
@pytest.mark.parametrize("fused", [False, True])
def test_paced_loss_is_the_weighted_mean_of_problem_losses(divergence, fused):
    hidden, head = draw(3, 4, 5).requires_grad_(), draw(7, 5, seed=1)
    teacher = draw(3, 4, 7, seed=2)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]]).bool()
    weights = torch.tensor([0.5, 2.0, 0.0]).double()
    student = HiddenLogits(hidden, head) if fused else hidden @ head.T
    each = torch.stack(
        [
            divergence(hidden[i] @ head.T, teacher[i], mask=mask[i], reduction="sum")
            for i in range(3)
        ]
    ) / mask.sum(1)
    expected = {
        "sum": (weights * each).sum(),
        "mean": (weights * each).mean(),
        "weighted": (weights * each).sum() / weights.sum(),
    }
    for reduction, want in expected.items():
        got = paced_loss(
            student, teacher, weights, mask=mask, divergence=divergence, reduction=reduction
        )
        torch.testing.assert_close(got, want)
        (gradient,) = torch.autograd.grad(got, hidden, retain_graph=True)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(want, hidden, retain_graph=True)[0]
        )
        assert (gradient[2] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "weighted", "sum"])
def test_weights_of_zero_give_no_gradient(reduction):
    student = draw(2, 3, 5).requires_grad_()
    loss = paced_loss(student, draw(2, 3, 5, seed=1), torch.zeros(2), reduction=reduction)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()
    uniform = torch.from_numpy(beta_kernel_weights(np.array([0.0, 0.3]), 0, 0))
    torch.testing.assert_close(
        paced_loss(student, draw(2, 3, 5, seed=1), uniform),
        token_kl(student, draw(2, 3, 5, seed=1)),
    )


@given(
    st.lists(st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)), min_size=1, max_size=8),
    st.floats(0.1, 10),
)
@settings(deadline=None)
def test_best_weights_are_signal_over_noise(problems, scale):
    signal, noise = np.array(problems).T
    best = signal / noise
    assert weighting_efficiency(scale * best, signal, noise) == pytest.approx(1)
    for i in range(len(best)):
        other = best.copy()
        other[i] *= 1.1
        assert weighting_efficiency(other, signal, noise) <= 1 + 1e-12


@given(
    st.floats(0.01, 0.95),
    st.lists(st.floats(-1, 1), min_size=2, max_size=12),
    st.integers(0, 10**6),
)
@settings(deadline=None)
def test_weights_off_by_delta_lose_at_most_delta_squared(delta, errors, seed):
    rng = np.random.default_rng(seed)
    signal, noise = rng.uniform(0.1, 2, len(errors)), rng.uniform(0.1, 2, len(errors))
    weights = signal / noise * (1 + delta * np.array(errors))
    assert weighting_efficiency(weights, signal, noise) >= 1 - delta**2 - 1e-12


@pytest.mark.parametrize("delta", [0.1, 0.5, 0.9])
def test_the_bound_on_robustness_is_attained(delta):
    """Two values 1 +- delta: half and half, and in the proportions that are worst."""
    half = weighting_efficiency([1 - delta, 1 + delta], [1, 1], [1, 1])
    assert half == pytest.approx(1 / (1 + delta**2))
    assert half == pytest.approx(1 - delta**2 / (1 + delta**2))
    shares = np.linspace(0.001, 0.999, 9999)
    # A share s of the information at 1 - delta: problems of noise 1 / s and 1 / (1 - s).
    efficiencies = [
        weighting_efficiency([(1 - delta) * s, (1 + delta) * (1 - s)], [1, 1], [1 / s, 1 / (1 - s)])
        for s in shares
    ]
    assert min(efficiencies) == pytest.approx(1 - delta**2, abs=1e-6)
    assert min(efficiencies) >= 1 - delta**2 - 1e-12
    assert shares[np.argmin(efficiencies)] == pytest.approx((1 + delta) / 2, abs=1e-3)


def test_gradient_snr_of_known_groups():
    rng = np.random.default_rng(0)
    n, d, noise = 40_000, 5, 0.5
    rates = rng.integers(9, size=n) / 8
    mean = np.outer(rates * (1 - rates), np.ones(d))
    gradients = mean + noise * rng.standard_normal((n, d))
    result = gradient_snr(gradients, rates)
    assert result.pass_rate.tolist() == [k / 8 for k in range(9)]
    assert result.n_problems.sum() == n
    want = (result.pass_rate * (1 - result.pass_rate)) ** 2 / noise**2
    np.testing.assert_allclose(result.snr, want, atol=0.03)
    some = gradients[rates == 0.5]
    plain = (some.mean(0) ** 2).sum() - some.var(0, ddof=1).sum() / len(some)
    assert result.snr[4] == pytest.approx(plain / some.var(0, ddof=1).sum())
    assert len(gradient_snr(gradients, rates, n_bins=3).snr) == 3
    assert gradient_snr([[1.0], [2.0]], [0.0, 1.0]).snr.shape == (0,)


def test_plot_of_gradient_snr():
    rates = np.repeat([0.0, 0.5, 1.0], 4)
    gradients = np.random.default_rng(0).standard_normal((12, 3))
    result = gradient_snr(gradients, rates)
    ax = plot_gradient_snr(result)
    points, kernel = ax.lines
    np.testing.assert_array_equal(points.get_ydata(), result.snr)
    assert kernel.get_ydata()[100] == pytest.approx(result.snr[1])
    assert kernel.get_ydata()[[0, -1]].tolist() == [0, 0]


def small_models():
    return (
        byte_language_model(hidden_size=16, num_layers=1, num_heads=2, random_state=1),
        byte_language_model(hidden_size=16, num_layers=1, num_heads=2, random_state=0),
    )


PROMPTS = [[65 + i] for i in range(6)]
ANSWERS = [0, 1, 0, 1, 5, 5]


def parity(response, answer):
    """Half of the problems can be solved, answer 5 never is."""
    return int(response[0]) % 2 == answer


def run(n_steps, weighting, **options):
    student, teacher = small_models()
    distiller = Distiller(
        student,
        teacher,
        objective=TwoStageKL(3),
        average="sequence",
        weighting=weighting,
        max_new_tokens=2,
        learning_rate=1e-2,
        random_state=0,
    ).fit(PROMPTS, n_steps=n_steps, batch_size=6, **options)
    return distiller, torch.cat([p.detach().flatten() for p in student.parameters()])


def test_weighting_follows_the_students_pass_rate():
    weighting = PassRateWeighting(ANSWERS, parity, n_rollouts=64, batch_size=50)
    distiller, _ = run(1, weighting)
    assert (np.abs(weighting.pass_rate_[:4] - 0.5) < 0.25).all()
    assert (weighting.pass_rate_[4:] == 0).all()
    entry = weighting.history_[0]
    assert entry["unsolved"] == pytest.approx(2 / 6)
    # Two tokens a response, but for a few that end at once.
    assert 0.95 * 6 * 64 * 2 < entry["generated_tokens"] <= 6 * 64 * 2
    # Unsolved problems are neither answered nor trained on.
    n_tokens = distiller.history_[0]["n_tokens"]
    assert 4 <= n_tokens <= 4 * 2
    assert distiller.n_generated_tokens_ == entry["generated_tokens"] + n_tokens
    weights = weighting.weights(distiller, 1)
    np.testing.assert_allclose(weights, beta_kernel_weights(weighting.pass_rate_))


def test_pass_rates_are_refreshed_when_due():
    steps = []

    class Recorder(PassRateWeighting):
        def refresh(self, distiller, step):
            steps.append(step)
            super().refresh(distiller, step)

    run(7, Recorder(ANSWERS, parity, n_rollouts=2, refresh_every=4, refresh_at=(3,)))
    assert steps == [0, 3, 4]
    steps.clear()
    run(3, Recorder(ANSWERS, parity, n_rollouts=2))
    assert steps == [0]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_weighted_run_resumes_bit_by_bit(tmp_path, stop):
    def weighting():
        return PassRateWeighting(ANSWERS, parity, n_rollouts=4, refresh_every=3)

    whole, expected = run(6, weighting())
    path = tmp_path / "run.safetensors"
    run(stop, weighting(), checkpoint=path)
    resumed, got = run(6, weighting(), resume_from=path)
    assert torch.equal(got, expected)
    assert resumed.history_ == whole.history_
    assert resumed.weighting.history_ == whole.weighting.history_
    state = json.loads(json.dumps(whole.weighting.state_dict()))
    assert state["pass_rate"] == whole.weighting.pass_rate_.tolist()


def test_objective_changes_at_the_switch():
    kinds = []

    def named(name):
        def objective(student_logits, teacher_logits, **options):
            kinds.append(name)
            return token_kl(student_logits, teacher_logits, **options)

        return objective

    student, teacher = small_models()
    schedule = TwoStageKL(2, named("first"), named("second"))
    Distiller(student, teacher, objective=schedule, max_new_tokens=1).fit(
        PROMPTS, n_steps=4, batch_size=2
    )
    assert kinds == ["first", "first", "second", "second"]


LOGITS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: beta_kernel_weights(np.array([1.1])), ValueError, "pass_rate must be in [0, 1]"),
        (lambda: beta_kernel_weights(np.array([-0.1])), ValueError, "pass_rate"),
        (lambda: beta_kernel_weights(np.array([np.nan])), ValueError, "pass_rate.*nan"),
        (lambda: beta_kernel_weights(np.array([[0.5]])), ValueError, "pass_rate must have shape"),
        (lambda: beta_kernel_weights(RATES, alpha=-1.0), ValueError, "alpha"),
        (lambda: beta_kernel_weights(RATES, beta=-0.5), ValueError, "beta"),
        (lambda: beta_kernel_weights(RATES, normalize="sum"), ValueError, "normalize"),
        (lambda: hard_filter_weights(RATES, 0.8, 0.2), ValueError, "high"),
        (lambda: PassRateEstimator(0), ValueError, "n_problems"),
        (lambda: PassRateEstimator(2, prior=(-1, 0)), ValueError, "prior"),
        (lambda: PassRateEstimator(2, decay=1.5), ValueError, "decay"),
        (lambda: PassRateEstimator(2).update([0, 0], 1, 2), ValueError, "once"),
        (lambda: PassRateEstimator(2).update([2], 1, 2), ValueError, "index"),
        (lambda: PassRateEstimator(2).update([0], 3, 2), ValueError, "successes"),
        (lambda: PassRateEstimator(2).update([0.5], 1, 2), ValueError, "integers"),
        (lambda: PassRateEstimator(2).weights(unseen="zero"), ValueError, "unseen"),
        (lambda: TwoStageKL(-1), ValueError, "switch_step"),
        (lambda: PassRateWeighting([1], n_rollouts=0), ValueError, "n_rollouts"),
        (lambda: PassRateWeighting([1], refresh_every=0), ValueError, "refresh_every"),
        (lambda: PassRateWeighting([1], refresh_at=(-1,)), ValueError, "refresh_at"),
        (lambda: run(1, PassRateWeighting([1], parity)), ValueError, "same length"),
        (
            lambda: run(1, PassRateWeighting(ANSWERS, parity, weight=lambda p: p - 1)),
            ValueError,
            "0 or larger",
        ),
        (lambda: paced_loss(LOGITS, LOGITS, torch.ones(3)), ValueError, "weights must have shape"),
        (lambda: paced_loss(LOGITS, LOGITS, -torch.ones(2)), ValueError, "weights must be 0"),
        (lambda: paced_loss(LOGITS[0], LOGITS[0], torch.ones(3)), ValueError, "batch, length"),
        (
            lambda: paced_loss(LOGITS, LOGITS, torch.ones(2), mask=torch.ones(2, 3)),
            ValueError,
            "mask must be a bool",
        ),
        (lambda: gradient_snr([[1.0]], [0.5, 0.5]), ValueError, "same length"),
        (lambda: gradient_snr([[np.nan]], [0.5]), ValueError, "gradients must be finite"),
        (lambda: weighting_efficiency([1.0], [1.0], [0.0]), ValueError, "noise"),
        (lambda: weighting_efficiency([0.0], [1.0], [1.0]), ValueError, "all 0"),
        (lambda: weighting_efficiency([1.0, 1.0], [1.0], [1.0]), ValueError, "same length"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message.replace("[0, 1]", r"\[0, 1\]")):
        call()
