"""Goodness loss, normalisation and the straight-through ReLU against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sciml.layerwise import goodness_loss, rms_normalize, straight_through_relu


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 2, 50])
def test_loss_of_zero_activations(width):
    zeros = torch.zeros(3, width, dtype=torch.float64)
    assert goodness_loss(zeros, torch.zeros(3)).item() == pytest.approx(
        math.log1p(math.exp(-width))
    )
    assert goodness_loss(zeros, torch.ones(3)).item() == pytest.approx(math.log1p(math.exp(width)))


def test_loss_equals_its_definition():
    a, positive = random(6, 4), torch.tensor([1.0, 0, 0, 1, 1, 0])
    logit = (a**2).sum(1) - 1.5
    probability = 1 / (1 + torch.exp(-logit))
    expected = -(positive * probability.log() + (1 - positive) * (1 - probability).log()).mean()
    torch.testing.assert_close(goodness_loss(a, positive, 1.5), expected)


@given(st.integers(1, 6), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_normalized_rows_have_mean_square_one(n, d, scale):
    x = scale * (random(n, d, seed=d).sign() + random(n, d, seed=n) / 10)
    torch.testing.assert_close(
        rms_normalize(x).square().mean(1), torch.ones(n).double(), rtol=1e-4, atol=0
    )


def test_zero_row_stays_zero():
    assert torch.equal(rms_normalize(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_straight_through_gradient_is_the_incoming_one_everywhere():
    x, weight = random(5, 7).requires_grad_(), random(5, 7, seed=1)
    output = straight_through_relu(x)
    assert torch.equal(output, x.detach().clamp(min=0))
    (output * weight).sum().backward()
    assert (x < 0).any()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("activation.*shape", lambda: goodness_loss(torch.ones(3), torch.ones(3))),
        ("positive.*shape", lambda: goodness_loss(torch.ones(3, 2), torch.ones(3, 1))),
        ("same length", lambda: goodness_loss(torch.ones(3, 2), torch.ones(4))),
        ("eps", lambda: rms_normalize(torch.ones(3, 2), -1.0)),
    ],
)
def test_bad_input(match, call):
    with pytest.raises(ValueError, match=match):
        call()
