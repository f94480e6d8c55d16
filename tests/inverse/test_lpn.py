"""The networks are proximal operators: convex potentials, their gradients, the constraint."""

import copy
import itertools

import numpy as np
import pytest
import torch
from deepinv.models import ICNN, Denoiser
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sciml.inverse import FullyConnectedLPN, LearnedProximalNetwork, PatchLPN, ProximalOperator
from sciml.inverse.lpn import _softplus


def small_net(strong_convexity=0.05, seed=0, size=(8, 8), channels=1):
    """A convolutional network with weights large enough to matter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    net = LearnedProximalNetwork(
        channels,
        size,
        width=6,
        n_downsamples=2,
        beta=10.0,
        strong_convexity=strong_convexity,
        generator=generator,
    )
    with torch.no_grad():
        for weight in net.constrained_weights().values():
            weight.uniform_(-0.05, 0.1, generator=generator)
    return net.project_().double().eval()


def small_dense(strong_convexity=0.05, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = FullyConnectedLPN(
        d, hidden=12, n_layers=2, strong_convexity=strong_convexity, generator=generator
    )
    return net.double().eval()


NETS = {
    "conv": (small_net, (1, 8, 8)),
    "dense": (small_dense, (5,)),
    "patches": (lambda a=0.05: PatchLPN(small_net(a), overlap=4, batch_size=7), (1, 7, 9)),
}


def draw(shape, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (lambda: LearnedProximalNetwork(1, 28, width=64), 317_056),
        (lambda: LearnedProximalNetwork(3, 128, width=256), 7_235_713),
        (lambda: LearnedProximalNetwork(1, 128, width=256), 7_175_297),
        (lambda: FullyConnectedLPN(1, hidden=50, n_layers=4), 10_502),
    ],
)
def test_published_parameter_counts(net, count):
    assert sum(p.numel() for p in net().parameters()) == count


def published_28(c, h):
    """The layer table of the 28 x 28 network, layer by layer."""
    lin = [
        nn.Conv2d(c, h, 3, 1, 1, bias=False),
        nn.Conv2d(h, h, 3, 2, 1, bias=False),
        nn.Conv2d(h, h, 3, 1, 1, bias=False),
        nn.Conv2d(h, h, 3, 2, 1, bias=False),
        nn.Linear(49 * h, 64, bias=False),
        nn.Linear(64, 1, bias=False),
    ]
    res = [
        nn.Conv2d(c, h, 3, 2, 1),
        nn.Conv2d(c, h, 3, 1, 1),
        nn.Conv2d(c, h, 3, 2, 1),
        nn.Linear(49 * c, 64),
    ]
    return nn.ModuleDict({"lin": nn.ModuleList(lin), "res": nn.ModuleList(res)})


def potential_28(layers, x, beta, alpha):
    lin, res = layers["lin"], layers["res"]
    act = nn.Softplus(beta)
    half = F.avg_pool2d(x, 2)  # bilinear at factor 2 is the mean of 2 x 2
    quarter = F.avg_pool2d(x[..., 1:-1, 1:-1], 2, stride=4)  # mean of the central 2 x 2 of 4 x 4
    y = act(lin[0](x))
    y = act(lin[1](y) + res[0](x))
    y = act(lin[2](y) + res[1](half))
    y = act(lin[3](y) + res[2](half))
    y = act(lin[4](y.flatten(1)) + res[3](quarter.flatten(1)))
    return lin[5](y)[:, 0] + alpha * x.square().flatten(1).sum(1)


def published_128(c, h):
    """The layer table of the 128 x 128 network: its head is a 16 x 16 convolution."""
    lin = [nn.Conv2d(c, h, 3, 1, 1)]
    lin += [nn.Conv2d(h, h, 3, s, 1, bias=False) for s in (2, 1, 2, 1, 2)]
    lin += [nn.Conv2d(h, 64, 16, 1, 0, bias=False), nn.Linear(64, 1)]
    res = [nn.Conv2d(c, h, 3, s, 1) for s in (2, 1, 2, 1, 2)] + [nn.Conv2d(c, 64, 16)]
    return nn.ModuleDict({"lin": nn.ModuleList(lin), "res": nn.ModuleList(res)})


def potential_128(layers, x, beta, alpha):
    lin, res = layers["lin"], layers["res"]
    act = nn.Softplus(beta)
    y = act(lin[0](x))
    for k, side in enumerate((128, 64, 64, 32, 32, 16)):
        image = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        y = act(lin[k + 1](y) + res[k](image))
    y = y.mean((2, 3))
    return lin[7](y)[:, 0] + alpha * x.square().flatten(1).sum(1)


@pytest.mark.parametrize(
    ("make", "potential", "size"),
    [(published_28, potential_28, 28), (published_128, potential_128, 128)],
    ids=["28", "128"],
)
def test_equals_the_published_layer_tables(make, potential, size):
    torch.manual_seed(0)
    layers = make(2, 4).double()
    with torch.no_grad():
        for layer in layers["lin"][1:]:
            layer.weight.abs_()
    net = LearnedProximalNetwork(2, size, width=4, beta=10.0, strong_convexity=0.01).double()
    net.load_state_dict(layers.state_dict())  # same names, and the convolution head is accepted
    x = torch.rand(2, 2, size, size, dtype=torch.float64, requires_grad=True)
    psi = potential(layers, x, 10.0, 0.01)
    torch.testing.assert_close(net.potential(x), psi, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(psi.sum(), x)
    torch.testing.assert_close(net(x.detach()), gradient, rtol=1e-10, atol=1e-12)


def test_dense_network_equals_matrix_formulas():
    net = small_dense(0.05)
    weights = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    sigmoid = lambda t: 1 / (1 + np.exp(-10 * t))  # noqa: E731
    softplus = lambda t: np.log1p(np.exp(10 * t)) / 10  # noqa: E731
    x = draw((5,), 1)[0].numpy()
    z0 = weights["lin.0.weight"] @ x
    z1 = weights["lin.1.weight"] @ softplus(z0) + weights["res.0.weight"] @ x
    z1 += weights["res.0.bias"]
    z2 = weights["lin.2.weight"] @ softplus(z1) + weights["res.1.weight"] @ x
    z2 += weights["res.1.bias"]
    psi = weights["lin.3.weight"] @ softplus(z2) + weights["res.2.weight"] @ x
    psi += weights["res.2.bias"] + 0.05 * x @ x
    # Backwards, by hand.
    g2 = weights["lin.3.weight"][0] * sigmoid(z2)
    g1 = weights["lin.2.weight"].T @ g2 * sigmoid(z1)
    g0 = weights["lin.1.weight"].T @ g1 * sigmoid(z0)
    f = weights["lin.0.weight"].T @ g0 + weights["res.0.weight"].T @ g1
    f += weights["res.1.weight"].T @ g2 + weights["res.2.weight"][0] + 0.1 * x
    point = torch.tensor(x)[None]
    np.testing.assert_allclose(net.potential(point).detach().numpy(), psi, rtol=1e-8)
    np.testing.assert_allclose(net(point)[0].detach().numpy(), f, rtol=1e-7)


def test_softplus_makes_no_denormal_numbers_and_stays_convex():
    x = torch.linspace(-2, 1, 30_001).requires_grad_()
    value = _softplus(x, 100.0)
    torch.testing.assert_close(value, F.softplus(x, 100.0), rtol=1e-6, atol=1e-15)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert (slope.diff() >= -1e-6).all()
    tiny = torch.finfo(torch.float32).tiny
    for numbers in (value.detach(), slope):
        assert ((numbers == 0) | (numbers >= tiny)).all()
    (plain,) = torch.autograd.grad(F.softplus(x, 100.0).sum(), x)
    assert ((plain > 0) & (plain < tiny)).any()


@pytest.mark.parametrize("name", NETS)
def test_potential_is_convex_along_segments(name):
    make, shape = NETS[name]
    net, a, b = make(), draw(shape, 40, 1), draw(shape, 40, 2)
    with torch.no_grad():
        middle = net.potential((a + b) / 2)
        ends = (net.potential(a) + net.potential(b)) / 2
    # Strong convexity c ||x||^2 leaves a gap of c ||a - b||^2 / 4.
    gap = 0.05 * (a - b).flatten(1).square().sum(1) / 4
    assert (middle <= ends - gap + 1e-10).all()


@pytest.mark.parametrize("name", NETS)
def test_output_is_the_gradient_of_the_potential(name):
    make, shape = NETS[name]
    net, x, v = make(), draw(shape, 3, 1), draw(shape, 3, 2)
    step = 1e-5
    with torch.no_grad():
        difference = (net.potential(x + step * v) - net.potential(x - step * v)) / (2 * step)
    torch.testing.assert_close((net(x) * v).flatten(1).sum(1), difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NETS)
def test_jacobian_is_symmetric_with_eigenvalues_of_at_least_twice_c(name):
    make, shape = NETS[name]
    net, x = make(), draw(shape, 1)
    jacobian = torch.autograd.functional.jacobian(net, x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-9, atol=1e-11)
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    assert eigenvalues[0] >= 2 * 0.05 - 1e-10
    assert eigenvalues[-1] > 2 * 0.05 + 1e-3, "the network adds nothing: the test sees nothing"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30))
def test_monotone(seed, scale):
    net = small_dense(0.05, seed=seed % 7)
    a, b = scale * draw((5,), 8, seed), scale * draw((5,), 8, seed + 1)
    product = ((net(a) - net(b)) * (a - b)).sum(1)
    assert (product >= 2 * 0.05 * (a - b).square().sum(1) * (1 - 1e-9)).all()


@pytest.mark.parametrize("name", NETS)
def test_output_minimises_its_proximal_problem(name):
    # R(f(v)) = <v, f(v)> - ||f(v)||^2 / 2 - psi(v): no f(v) does better than f(y).
    make, shape = NETS[name]
    net, y, v = make(), draw(shape, 4, 1), draw(shape, 30, 2)
    v = torch.cat([v, (y[:, None] + 0.1 * v[None, :8]).flatten(0, 1)])
    with torch.no_grad():
        flat = lambda t: t.flatten(1)  # noqa: E731

        def prior_at_image(point):
            f = flat(net(point))
            return (flat(point) * f).sum(1) - f.square().sum(1) / 2 - net.potential(point)

        own = prior_at_image(y) + (flat(net(y)) - flat(y)).square().sum(1) / 2
        distance = torch.cdist(flat(y), flat(net(v))).square() / 2
        other = prior_at_image(v)[None] + distance
    assert (own[:, None] <= other + 1e-9).all()


@pytest.mark.parametrize(("c", "slope"), [(0.5, 1.0), (0.1, 0.2)])
def test_zero_weights_give_a_multiple_of_the_identity(c, slope):
    net = small_net(c)
    with torch.no_grad():
        for weight in net.constrained_weights().values():
            weight.zero_()
    x = draw((1, 8, 8), 2)
    torch.testing.assert_close(net(x), slope * x)


def test_projection_touches_constrained_weights_only():
    net = LearnedProximalNetwork(1, 16, width=3, bias=True)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert not net.is_convex()
    assert net.project_() is net
    assert net.is_convex()
    constrained = net.constrained_weights()
    assert set(constrained) == {f"lin.{k}.weight" for k in range(1, 6)}
    for name, value in net.state_dict().items():
        expected = before[name].clamp(min=0) if name in constrained else before[name]
        assert torch.equal(value, expected), name


def test_published_initialisation():
    generator = torch.Generator().manual_seed(0)
    net = LearnedProximalNetwork(1, 28, width=64, generator=generator)
    logs = torch.cat([w.detach().log().flatten() for w in net.constrained_weights().values()])
    assert abs(float(logs.mean()) + 10) < 1e-3
    assert abs(float(logs.std()) - 0.1) < 1e-3
    assert float(net.lin[0].weight.detach().abs().max()) <= 1 / 3  # uniform on +-1 / sqrt(9)
    again = LearnedProximalNetwork(1, 28, width=64, generator=generator.manual_seed(0))
    assert all(map(torch.equal, net.parameters(), again.parameters()))


def test_forward_leaves_the_callers_tensor_alone():
    net = small_net().train()
    x = draw((1, 8, 8), 2)
    before = x.clone()
    out = net(x)
    assert not x.requires_grad
    assert x.grad is None
    assert torch.equal(x, before)
    assert out.requires_grad  # training: a graph for the weights


def test_graph_in_training_or_on_request_only():
    net, x = small_net(), draw((1, 8, 8), 2)
    assert not net.eval()(x).requires_grad
    with torch.no_grad():
        assert not net.train()(x).requires_grad
    with torch.inference_mode():
        inference = net.eval()(x.clone())
    torch.testing.assert_close(inference, net(x).detach())
    point = x.clone().requires_grad_()
    net.eval()(point).sum().backward()
    assert point.grad is not None
    v = torch.ones_like(x)
    expected = torch.autograd.functional.vjp(net, x, v)[1]
    torch.testing.assert_close(point.grad, expected)


def test_training_gradients_reach_every_weight_that_matters():
    net = small_dense().train()
    net(draw((5,), 3)).square().sum().backward()
    dead = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead == {"res.2.bias"}  # an additive constant of the potential


@pytest.mark.parametrize("name", NETS)
def test_is_a_denoiser_that_ignores_sigma(name):
    make, shape = NETS[name]
    net, x = make(), draw(shape, 2)
    assert isinstance(net, Denoiser)
    assert torch.equal(net(x), net(x, 0.1))
    assert torch.equal(net(x), net(x, sigma=torch.tensor([0.1, 0.2])))
    assert net(x).shape == x.shape


def test_any_size_and_channels():
    for size, channels, n in itertools.product([(9, 14), 5, 1], [1, 3], [None, 0, 2]):
        net = LearnedProximalNetwork(channels, size, width=2, n_downsamples=n)
        shape = (2, channels, *(size if isinstance(size, tuple) else (size, size)))
        assert net(torch.rand(shape)).shape == shape


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (7, 13), (28, 28)])
@pytest.mark.parametrize("channels", [1, 3, 9])
@pytest.mark.parametrize("n_downsamples", [0, 1, 2, 3])
def test_chain_rule_of_evaluation_equals_automatic_differentiation(size, channels, n_downsamples):
    generator = torch.Generator().manual_seed(0)
    net = LearnedProximalNetwork(
        channels, size, 5, n_downsamples, beta=10.0, strong_convexity=0.1, generator=generator
    ).double()
    with torch.no_grad():
        for weight in net.constrained_weights().values():
            weight.uniform_(0, 0.2, generator=generator)
    x = 3 * draw((channels, *size), 2)
    automatic = net.train()(x).detach()
    torch.testing.assert_close(net.eval()(x), automatic, rtol=1e-7, atol=1e-8)
    assert torch.equal(x, 3 * draw((channels, *size), 2))
    assert (automatic - 0.2 * x).abs().max() > 0.1


def test_dense_network_takes_images():
    net = FullyConnectedLPN(6).eval()
    x = torch.rand(4, 1, 2, 3)
    torch.testing.assert_close(net(x).flatten(1), net(x.flatten(1)))


@pytest.mark.parametrize("overlap", [0, 4, 6, 7])
def test_patch_average_is_the_gradient_of_the_patch_sum(overlap):
    patches = PatchLPN(small_net(), overlap=overlap, batch_size=11)
    x = draw((1, 10, 17), 2).requires_grad_()
    (gradient,) = torch.autograd.grad(patches.potential(x).sum(), x)
    torch.testing.assert_close(patches(x.detach()), gradient)
    torch.testing.assert_close(patches.train()(x.detach()), gradient)


def test_patches_cover_every_pixel_equally():
    net = small_net()
    with torch.no_grad():
        for weight in net.constrained_weights().values():
            weight.zero_()  # f(x) = 2 c x on each patch
    x = draw((1, 19, 12), 1)
    for overlap in (0, 4, 6, 7):
        torch.testing.assert_close(PatchLPN(net, overlap=overlap)(x), 0.1 * x)


def test_patches_without_overlap_are_the_network_itself():
    net, x = small_net(), draw((1, 8, 8), 3)
    torch.testing.assert_close(PatchLPN(net, overlap=0)(x), net(x))


def test_patches_match_a_plain_loop():
    net, x = small_net(), draw((1, 13, 9), 1)
    padded = np.pad(x[0, 0].numpy(), ((4, 4 + 3), (4, 4 + 3)))
    total, count = np.zeros_like(padded), np.zeros_like(padded)
    for i in range(0, padded.shape[0] - 7, 4):
        for j in range(0, padded.shape[1] - 7, 4):
            patch = torch.tensor(padded[i : i + 8, j : j + 8])[None, None]
            total[i : i + 8, j : j + 8] += net(patch)[0, 0].numpy()
            count[i : i + 8, j : j + 8] += 1
    assert (count[4:17, 4:13] == 4).all()
    expected = total[4:17, 4:13] / 4
    np.testing.assert_allclose(PatchLPN(net)(x)[0, 0].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_own_potential_gives_soft_thresholding():
    # The Huber function's gradient in the form of psi(y) = sum max(|y| - 1, 0)^2 / 2.
    prox = ProximalOperator(lambda y: F.relu(y.abs() - 1).square().sum(1, keepdim=True) / 2).eval()
    y = torch.linspace(-3, 3, 25)[:, None]
    torch.testing.assert_close(prox(y), F.softshrink(y, 1.0))


def test_own_potential_may_be_deepinvs_icnn():
    torch.manual_seed(0)
    icnn = ICNN(1, 4, num_layers=3)
    # deepinv 0.5 adds (batch, 1) to (batch,): the samples' own values are on the diagonal.
    prox = ProximalOperator(lambda x: icnn(x).diagonal(), strong_convexity=0.1).eval()
    a, b = torch.rand(2, 3, 1, 8, 8)
    product = ((prox(a) - prox(b)) * (a - b)).flatten(1).sum(1)
    assert (product >= 0.2 * (a - b).square().flatten(1).sum(1) - 1e-6).all()


def test_own_potential_is_projected_by_its_own_method():
    class Potential(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([-1.0]))

        def project_(self):
            self.weight.data.clamp_(min=0)

        def forward(self, x):
            return self.weight * x.square().sum(1)

    prox = ProximalOperator(Potential(), 0.5).eval().project_()
    assert torch.equal(prox(torch.ones(1, 2)), torch.ones(1, 2))


@pytest.mark.parametrize("wrap", [lambda net: net, PatchLPN], ids=["network", "inside PatchLPN"])
def test_loading_weights_that_break_the_constraint_names_the_remedy(wrap):
    net = wrap(LearnedProximalNetwork(1, 8, width=3))
    state = copy.deepcopy(net.state_dict())
    name = next(iter(net.constrained_weights()))
    state[name][0, 0] = -0.25
    before = net.state_dict()[name].clone()
    with pytest.raises(ValueError, match=r"-0.25.*project_state_dict"):
        net.load_state_dict(state)
    assert torch.equal(net.state_dict()[name], before)
    net.load_state_dict(net.project_state_dict(state))
    assert net.is_convex()
    torch.testing.assert_close(copy.deepcopy(net).state_dict()[name], state[name].clamp(min=0))


IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(1, 1, 9, 9), ValueError, r"\(8, 8\), got \(9, 9\); PatchLPN"),
        (torch.zeros(1, 3, 8, 8), ValueError, r"any, 1, 8, 8.*\(1, 3, 8, 8\)"),
        (torch.zeros(8, 8), ValueError, "any, 1, 8, 8"),
        (IMAGE.long(), TypeError, "floating point dtype, got torch.int64"),
        (IMAGE.double(), TypeError, "dtype torch.float32, got torch.float64"),
        (IMAGE.numpy(), TypeError, "torch.Tensor, got ndarray"),
        (IMAGE * torch.nan, ValueError, "x must be finite"),
        (IMAGE + torch.inf, ValueError, "x must be finite"),
    ],
)
def test_bad_input(x, error, match):
    with pytest.raises(error, match=match):
        LearnedProximalNetwork(1, 8, width=2)(x)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LearnedProximalNetwork(0), ValueError, "in_channels"),
        (lambda: LearnedProximalNetwork(1, 2.5), TypeError, "image_size"),
        (lambda: LearnedProximalNetwork(1, 8, beta=0.0), ValueError, "beta"),
        (lambda: LearnedProximalNetwork(1, 8, strong_convexity=-1.0), ValueError, "strong_conv"),
        (lambda: LearnedProximalNetwork(1, 8, n_downsamples=-1), ValueError, "n_downsamples"),
        (lambda: FullyConnectedLPN(3)(torch.zeros(2, 4)), ValueError, r"\(batch, 3\).*\(2, 4\)"),
        (lambda: FullyConnectedLPN(n_layers=0), ValueError, "n_layers"),
        (lambda: PatchLPN(LearnedProximalNetwork(1, (8, 9))), ValueError, "square patches"),
        (lambda: PatchLPN(LearnedProximalNetwork(1, 8), 3), ValueError, "overlap 3, stride 5"),
        (lambda: PatchLPN(LearnedProximalNetwork(1, 8), 8), ValueError, "overlap"),
        (lambda: PatchLPN(FullyConnectedLPN(64)), TypeError, "LearnedProximalNetwork"),
        (lambda: ProximalOperator(3), TypeError, "callable"),
        (lambda: ProximalOperator(torch.sum)(torch.ones(2, 3)), ValueError, "one value a sample"),
    ],
)
def test_bad_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()
