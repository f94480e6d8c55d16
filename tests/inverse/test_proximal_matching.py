"""The proximal matching loss, its limits, and the schedule of its width."""

import numpy as np
import pytest
import torch
from deepinv.loss import SupLoss
from hypothesis import given
from hypothesis import strategies as st

from sciml.inverse import ProximalMatchingLoss, ProximalMatchingSchedule, proximal_matching_loss

A = torch.randn(5, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
B = torch.randn(5, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_formula():
    squares = ((A - B).numpy().reshape(5, -1) ** 2).sum(1)
    expected = 1 - np.exp(-squares / 2.5**2)
    each = proximal_matching_loss(A, B, 2.5, reduction="none")
    np.testing.assert_allclose(each.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(proximal_matching_loss(A, B, 2.5), expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(
        proximal_matching_loss(A, B, 2.5, reduction="sum"), expected.sum(), rtol=1e-12
    )
    within = proximal_matching_loss(A, B, 0.7, "none", reduction_within="mean")
    np.testing.assert_allclose(within.numpy(), 1 - np.exp(-squares / 12 / 0.7**2), rtol=1e-12)


def test_limits():
    assert proximal_matching_loss(A, A, 0.1) == 0
    squares = (A - B).square().flatten(1).sum(1).mean()
    wide = proximal_matching_loss(A, B, 1e6)
    torch.testing.assert_close(wide * 1e12, squares, rtol=1e-9, atol=0)
    assert proximal_matching_loss(A, B, 1e-3) == 1


def test_wide_well_keeps_its_digits_in_float32():
    loss = proximal_matching_loss(A.float(), B.float(), 1e5)
    squares = (A - B).square().flatten(1).sum(1).mean()
    assert float(loss) == pytest.approx(float(squares) / 1e10, rel=1e-5)


def test_gradient():
    x = A.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: proximal_matching_loss(t, B, 3.0), (x,))


@given(st.floats(0.05, 100), st.floats(0, 50))
def test_between_zero_and_one_and_increasing_in_the_distance(gamma, distance):
    x = torch.zeros(1, 1, dtype=torch.float64)
    near = float(proximal_matching_loss(x + distance, x, gamma))
    far = float(proximal_matching_loss(x + 1.5 * distance, x, gamma))
    assert 0 <= near <= far <= 1


def test_the_minimiser_is_the_mode_where_squared_error_gives_the_mean():
    # Clean values 0 (70 %) and 1 (30 %), observed as one and the same y: which c is best?
    clean = torch.tensor([0.0] * 7 + [1.0] * 3)[:, None]
    grid = torch.linspace(-0.5, 1.5, 401)
    matching = [float(proximal_matching_loss(c.expand(10, 1), clean, 0.1)) for c in grid]
    squared = [float((c - clean).square().mean()) for c in grid]
    assert float(grid[int(np.argmin(matching))]) == pytest.approx(0.0, abs=1e-6)
    assert float(grid[int(np.argmin(squared))]) == pytest.approx(0.3, abs=1e-6)


def test_module_equals_function_and_serves_deepinv():
    loss = ProximalMatchingLoss(1.5, reduction="none")
    expected = proximal_matching_loss(A, B, 1.5, "none")
    assert torch.equal(loss(A, B), expected)
    assert torch.equal(SupLoss(metric=loss)(x_net=A, x=B), expected)
    assert "gamma=1.5" in repr(loss)


@pytest.mark.parametrize(
    ("n_features", "gammas"),
    [(28 * 28, [17.92, 8.96, 4.48, 2.24]), (3 * 128 * 128, [141.9, 70.9, 35.5, 17.7])],
)
def test_published_schedule(n_features, gammas):
    schedule = ProximalMatchingSchedule(n_features)
    assert schedule.n_steps == 40_000
    assert schedule(0) == schedule(19_999) == ("l1", 20_000, 1e-3)
    for k, gamma in enumerate(gammas):
        for step in (20_000 + 5000 * k, 24_999 + 5000 * k):
            assert schedule(step).loss == pytest.approx(gamma, rel=3e-3)
            assert schedule(step).learning_rate == 1e-4


def test_last_stage_takes_the_remainder():
    schedule = ProximalMatchingSchedule(4, n_steps=21, n_warmup=10, n_stages=3, gamma_min=1.0)
    assert [stage.n_steps for stage in schedule.stages] == [10, 3, 3, 5]
    assert [stage.loss for stage in schedule.stages] == ["l1", 4.0, 2.0, 1.0]
    assert schedule(20).loss == 1.0


def test_own_stages():
    schedule = ProximalMatchingSchedule.from_stages([("l2", 2, 1e-3), (0.5, 0, 1.0), (0.3, 1, 0.1)])
    assert [schedule(k).loss for k in range(3)] == ["l2", "l2", 0.3]
    assert schedule == eval(repr(schedule))
    assert hash(schedule) == hash(eval(repr(schedule)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: proximal_matching_loss(A, B, 0.0), "gamma"),
        (lambda: proximal_matching_loss(A, B, float("nan")), "gamma"),
        (lambda: proximal_matching_loss(A, B[:2], 1.0), "same shape"),
        (lambda: proximal_matching_loss(A, B, 1.0, "average"), "reduction"),
        (lambda: proximal_matching_loss(A, B, 1.0, "mean", "max"), "reduction_within"),
        (lambda: ProximalMatchingLoss(-1.0), "gamma"),
        (lambda: ProximalMatchingLoss(1.0, "mean", "max"), "reduction_within"),
        (lambda: ProximalMatchingSchedule(0), "n_features"),
        (lambda: ProximalMatchingSchedule(4, n_steps=5, n_warmup=6), "n_steps|n_warmup"),
        (lambda: ProximalMatchingSchedule(4, gamma_min=0.0), "gamma_min"),
        (lambda: ProximalMatchingSchedule(4, n_steps=5)(5), "step"),
        (lambda: ProximalMatchingSchedule.from_stages([]), "stages"),
        (lambda: ProximalMatchingSchedule.from_stages([("l3", 1, 0.1)]), "loss"),
        (lambda: ProximalMatchingSchedule.from_stages([(-1.0, 1, 0.1)]), "gamma"),
        (lambda: ProximalMatchingSchedule.from_stages([("l1", 1, 0.0)]), "learning_rate"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
