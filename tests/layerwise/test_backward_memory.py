"""Saved bytes of graphs small enough to count by hand."""

import pytest
import torch
from torch import nn

from sciml.layerwise import BackwardMemoryMonitor


def test_counts_activations_once_and_parameters_never():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(7, 3)
    with BackwardMemoryMonitor() as memory:
        net(x).sum().backward()
        first = memory.peak_bytes
        net(x).sum().backward()
    # The input (7 x 3) and the ReLU's output (7 x 5), which two operations save.
    assert first == memory.peak_bytes == 4 * (21 + 35)
    assert memory.total_bytes == 2 * first


def test_graphs_that_live_together_add_up():
    x = torch.ones(6, dtype=torch.float64, requires_grad=True)
    with BackwardMemoryMonitor() as memory:
        y, z = (2 * x).exp(), (3 * x).exp()
        assert memory.peak_bytes == 2 * 48
        y.sum().backward()
        del y, z
        (2 * x).exp()
    assert memory.peak_bytes == 2 * 48
    assert memory.total_bytes == 3 * 48


def test_views_and_expanded_tensors():
    x = torch.ones(4, requires_grad=True)
    big = torch.ones(1000)
    with BackwardMemoryMonitor() as memory:
        y = x * big[:4]
    assert memory.peak_bytes == 16  # not all that `big` has
    with BackwardMemoryMonitor() as memory:
        y = x * torch.ones(1).expand(4)
    assert memory.peak_bytes == 4
    assert y.requires_grad


def test_gradients_do_not_change():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)

    def f(x):
        return (x.tanh() * x.exp()).sum()

    [expected] = torch.autograd.grad(f(x), x)
    with BackwardMemoryMonitor():
        assert torch.autograd.gradcheck(f, x)
        [ours] = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_nothing_without_autograd():
    with BackwardMemoryMonitor() as memory, torch.no_grad():
        torch.ones(3, requires_grad=True).exp()
    assert memory.peak_bytes == memory.total_bytes == pytest.approx(0)
