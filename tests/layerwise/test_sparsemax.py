"""Sparsemax against a projection by bisection, its loss by known values and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sciml.layerwise import sparsemax, sparsemax_loss

scores = st.lists(st.floats(-50, 50), min_size=2, max_size=12)


def projection(z):
    """Project on the simplex: find the tau with sum max(z - tau, 0) = 1 by bisection."""
    low, high = z.min() - 1, z.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if (z - tau).clamp(min=0).sum() > 1 else (low, tau)
    return (z - tau).clamp(min=0)


@given(scores)
def test_equals_the_projection(values):
    z = torch.tensor(values, dtype=torch.float64)
    p = sparsemax(z)
    torch.testing.assert_close(p, projection(z), rtol=0, atol=1e-9)
    assert p.sum().item() == pytest.approx(1)
    assert (p >= 0).all()


def test_known_values():
    z = torch.tensor([[3.0, 0, 0], [2.0, 2, 2], [0.1, 0, -5]])
    expected = torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.55, 0.45, 0]])
    torch.testing.assert_close(sparsemax(z), expected)


@given(scores, st.integers(0, 1))
def test_gradient_of_the_loss_is_probability_less_target(values, label):
    z = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    loss = sparsemax_loss(z, torch.tensor([label]))
    loss.backward()
    expected = sparsemax(z.detach())
    expected[0, label] -= 1
    torch.testing.assert_close(z.grad, expected, rtol=0, atol=1e-9)
    assert loss.item() >= -1e-9


def test_loss_vanishes_at_margin_one_and_equals_the_conjugate_form():
    z = torch.tensor([[4.0, 3.0, 0.0]], dtype=torch.float64)
    assert sparsemax_loss(z, torch.tensor([0])).item() == pytest.approx(0, abs=1e-12)
    # Fenchel-Young form: z'p - |p|^2 / 2 + 1/2 - z_y.
    z = torch.tensor([[0.3, 0.1, -0.2, -3.0]], dtype=torch.float64)
    p = sparsemax(z)
    expected = (z * p).sum() - p.square().sum() / 2 + 0.5 - z[0, 2]
    assert sparsemax_loss(z, torch.tensor([2])).item() == pytest.approx(expected.item())
    assert sparsemax_loss(z + 1e3, torch.tensor([2])).item() == pytest.approx(expected.item())


def test_second_derivatives():
    z = torch.tensor([[0.3, 0.1, -0.2, -3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, z)
    assert torch.autograd.gradgradcheck(lambda z: sparsemax_loss(z, torch.tensor([1])), z)


def test_bad_input():
    with pytest.raises(ValueError, match="scores.*shape"):
        sparsemax_loss(torch.ones(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="same length"):
        sparsemax_loss(torch.ones(3, 2), torch.zeros(4, dtype=torch.long))
