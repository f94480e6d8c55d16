"""The invertible U-Net: exact both ways, true gradients, memory flat in depth."""

import pytest
import torch

from sciml.inverse.seismic import InvertibleUNet, cayley
from sciml.inverse.seismic.invertible_unet import _Downsampling


def perturbed(net, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net


def noise(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def saved_bytes(function):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return total


def test_published_parameter_count():
    assert sum(p.numel() for p in InvertibleUNet(128).parameters()) == 25_785_344


def test_cayley_is_orthogonal_and_differentiable():
    weight = noise(2, 4, 4).requires_grad_()
    q = cayley(weight)
    torch.testing.assert_close(q @ q.transpose(1, 2), torch.eye(4).double().expand(2, 4, 4))
    assert torch.det(q).detach().tolist() == pytest.approx([1, 1])
    assert torch.autograd.gradcheck(cayley, (weight,))
    # Also where the published training had the gradient's sign wrong.
    assert torch.autograd.gradcheck(cayley, (torch.zeros_like(weight).requires_grad_(),))


def test_downsampling_starts_as_haar():
    kernel = _Downsampling(1).kernel().detach().reshape(4, 4)
    torch.testing.assert_close(kernel @ kernel.T, torch.eye(4))
    torch.testing.assert_close(kernel.abs(), torch.full((4, 4), 0.5))
    assert len({tuple(row.sign().tolist()) for row in kernel}) == 4


def test_first_coupling_is_a_swap():
    net = InvertibleUNet(4, (1,))
    x = noise(1, 4, 3, 5, dtype=torch.float32)
    # Two couplings on one level, down and up: two swaps are the identity.
    torch.testing.assert_close(net(x), x)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_round_trip(size):
    net = perturbed(InvertibleUNet(16, (4, 4, 4, 4)))
    x = noise(1, 16, size, size, dtype=torch.float32)
    with torch.no_grad():
        assert (net.inverse(net(x)) - x).abs().max() < 1e-4
        assert (net(net.inverse(x)) - x).abs().max() < 1e-4
        assert (net(x) - x).abs().max() > 0.5


def test_size_70_is_no_bijection_and_says_so():
    x = noise(1, 8, 70, 70, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"divisible by 8 .*70 x 70.*crop"):
        InvertibleUNet(8)(x)
    net = perturbed(InvertibleUNet(8, padding="crop"))
    with torch.no_grad():
        y = net(x)
        with pytest.warns(UserWarning, match="70 x 70 image was padded to 72 x 72"):
            back = net.inverse(y)
    assert y.shape == x.shape
    assert (back - x).abs().max() > 0.01


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_reversible_gradients_equal_stored_ones(direction):
    plain = perturbed(InvertibleUNet(4, (2, 2, 1)).double())
    reversible = InvertibleUNet(4, (2, 2, 1), memory_efficient=True).double()
    reversible.load_state_dict(plain.state_dict())
    results = []
    for net in (plain, reversible):
        x = noise(2, 4, 8, 8).requires_grad_()
        y = getattr(net, direction)(x)
        (y * noise(2, 4, 8, 8, seed=2)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_reversible_works_with_a_frozen_input_and_frozen_weights():
    net = perturbed(InvertibleUNet(4, (2, 2), memory_efficient=True).double())
    frozen = next(net.parameters())
    frozen.requires_grad_(False)
    net(noise(1, 4, 4, 4)).sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in net.parameters() if p is not frozen)


def test_reversible_memory_is_flat_in_depth():
    def cost(couplings, memory_efficient):
        net = InvertibleUNet(8, (couplings, couplings), memory_efficient=memory_efficient)
        x = noise(1, 8, 32, 32, dtype=torch.float32).requires_grad_()
        return saved_bytes(lambda: net(x))

    flat = [cost(n, True) for n in (2, 4, 8, 16)]
    growing = [cost(n, False) for n in (2, 4, 8, 16)]
    assert max(flat) == min(flat) == 8 * 32 * 32 * 4
    assert growing[3] > 1.7 * growing[2] > 1.7**2 * growing[1]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="channels must be even, got 3"):
        InvertibleUNet(3)
    with pytest.raises(ValueError, match="architecture"):
        InvertibleUNet(4, ())
    with pytest.raises(ValueError, match=r"architecture\[1\].*0"):
        InvertibleUNet(4, (1, 0))
    with pytest.raises(ValueError, match="padding .*'reflect'"):
        InvertibleUNet(4, padding="reflect")
    with pytest.raises(ValueError, match=r"\(batch, 4, height, width\), got \(1, 3, 8, 8\)"):
        InvertibleUNet(4)(torch.zeros(1, 3, 8, 8))
