"""The published experiments in small; minutes each."""

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from torch.nn.functional import softshrink

from sciml.inverse import (
    FullyConnectedLPN,
    LearnedProximalNetwork,
    LPNPrior,
    ProximalMatchingSchedule,
    train_lpn,
)


def laplace(n, generator):
    u = torch.rand(n, 1, generator=generator) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


@pytest.mark.slow
def test_proximal_matching_finds_the_soft_threshold():
    def train(net, *stages):
        schedule = ProximalMatchingSchedule.from_stages(stages)
        train_lpn(net, laplace, sigma=1.0, schedule=schedule, batch_size=1000, random_state=0)
        return net

    generator = torch.Generator().manual_seed(0)
    start = FullyConnectedLPN(strong_convexity=0.005, generator=generator)
    squared = train(copy.deepcopy(start), ("l2", 800, 1e-3), ("l2", 300, 1e-4))
    absolute = train(copy.deepcopy(start), ("l1", 800, 1e-3), ("l1", 300, 1e-4))
    # The exact minimiser at gamma = 0.3 is still 0.052 off the soft threshold on the mean.
    matched = train(
        copy.deepcopy(absolute), (0.5, 800, 1e-3), (0.5, 300, 1e-4), (0.4, 800, 1e-4),
        (0.3, 1200, 1e-4), (0.3, 300, 2e-5),
    )  # fmt: skip
    y = torch.linspace(-3, 3, 601)[:, None]
    error = {
        name: float((net(y) - softshrink(y, 1.0)).abs().mean())
        for name, net in (("l2", squared), ("l1", absolute), ("matching", matched))
    }
    print(error)
    assert error["matching"] <= 0.5 * error["l1"]
    assert error["matching"] <= 0.4 * error["l2"]
    # Squared error finds the posterior mean instead, known in closed form: f(2) = 1.161.
    assert float(squared(torch.tensor([[2.0]]))) == pytest.approx(1.161, abs=0.08)
    assert float(squared(torch.tensor([[0.5]]))) == pytest.approx(0.241, abs=0.05)


@pytest.mark.slow
def test_learned_prior_of_digits_rises_with_noise_and_blur():
    digits = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:, None]
    digits = digits[np.random.default_rng(0).permutation(len(digits))]
    net = LearnedProximalNetwork(
        1,
        8,
        width=32,
        beta=10.0,
        strong_convexity=0.01,
        generator=torch.Generator().manual_seed(0),
    )
    schedule = ProximalMatchingSchedule(64, n_steps=1500)
    train_lpn(net, digits[:1500], sigma=0.05, schedule=schedule, batch_size=64, random_state=0)
    x = digits[1500:]
    prior = LPNPrior(net, tol=1e-4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    by_noise = torch.stack(
        [prior.fn((x + s * noise).clamp(0, 1)) for s in (0, 0.05, 0.1, 0.2, 0.3)]
    )
    blurred = [
        torch.tensor(np.stack([gaussian_filter(image[0].numpy(), s) for image in x]))[:, None]
        for s in (0.75, 1, 2, 4)
    ]
    by_blur = torch.stack([prior.fn(images) for images in (x, *blurred)])
    for values in (by_noise, by_blur):
        assert float((values.diff(dim=0) > 0).all(0).float().mean()) >= 0.95
