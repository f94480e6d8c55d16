"""Interval bound propagation: soundness, special cases, and its decline with the width."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from sciml.kernels import NTKNetwork, ibp_bounds, ibp_certified_radius, train_ntk_network
from sciml.kernels.interval_bounds import largest_certified_radii


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(network, seed=1):
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed), dtype=parameter.dtype)
            parameter += 0.5 * noise
    return network


def sequential(n_outputs=1, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 9, bias=bias), nn.ReLU(), nn.Linear(9, 7), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(7, n_outputs)).double()


NETWORKS = {
    "symmetric": moved(NTKNetwork(6, 12, 2, 1.3, 0.2, generator=generator()).double()),
    "single copy": moved(NTKNetwork(6, 12, 1, symmetric=False, generator=generator()).double()),
    "sequential": sequential(),
    "three classes": sequential(3, bias=False),
}


def box(x, radius, seed=0, n=1000):
    """Random points and corners of the box around x."""
    u = torch.rand(n, len(x), generator=generator(seed), dtype=x.dtype) * 2 - 1
    return x + radius * torch.cat([u, u.sign(), torch.zeros(1, len(x), dtype=x.dtype)])


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.3, 5.0])
def test_bounds_hold_on_the_box(network, eps):
    X = torch.randn(5, 6, generator=generator(3), dtype=torch.float64)
    lower, upper = ibp_bounds(network, X, eps)
    with torch.no_grad():
        assert lower.shape == upper.shape == network(X).shape
        for x, low, high in zip(X, lower, upper, strict=True):
            outputs = network(box(x, eps))
            assert bool((outputs >= low - 1e-12).all())
            assert bool((outputs <= high + 1e-12).all())
        if eps == 0:
            torch.testing.assert_close(lower, network(X))
            torch.testing.assert_close(upper, network(X))


def test_bounds_of_a_linear_layer_are_attained():
    layer = nn.Sequential(nn.Linear(4, 3).double())
    x = torch.randn(1, 4, generator=generator(), dtype=torch.float64)
    lower, upper = ibp_bounds(layer, x, 0.2)
    corners = torch.cartesian_prod(*[torch.tensor([-0.2, 0.2], dtype=torch.float64)] * 4)
    outputs = layer(x + corners).detach()
    torch.testing.assert_close(lower[0], outputs.amin(0))
    torch.testing.assert_close(upper[0], outputs.amax(0))


def test_ntk_network_equals_the_sequential_of_the_same_weights():
    network = NTKNetwork(6, 12, 2, 1.3, 0.2, symmetric=False, generator=generator()).double()
    layers = []
    for weight, bias in zip(network.weights, network.biases, strict=True):
        linear = nn.Linear(weight.shape[2], weight.shape[1]).double()
        with torch.no_grad():
            linear.weight.copy_(1.3 / math.sqrt(weight.shape[2]) * weight[0])
            linear.bias.copy_(0.2 * bias[0, 0])
        layers += [linear, nn.ReLU()]
    same = nn.Sequential(*layers[:-1])
    X = torch.randn(5, 6, generator=generator(3), dtype=torch.float64)
    for ours, theirs in zip(ibp_bounds(network, X, 0.1), ibp_bounds(same, X, 0.1), strict=True):
        torch.testing.assert_close(ours, theirs[:, 0])


def test_eps_a_sample():
    X = torch.randn(3, 6, generator=generator(3), dtype=torch.float64)
    eps = torch.tensor([0.0, 0.1, 0.4])
    lower, upper = ibp_bounds(NETWORKS["symmetric"], X, eps)
    for i, radius in enumerate(eps.tolist()):
        low, high = ibp_bounds(NETWORKS["symmetric"], X[i : i + 1], radius)
        torch.testing.assert_close(lower[i : i + 1], low)
        torch.testing.assert_close(upper[i : i + 1], high)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_certified_radius_is_certified_and_largest(network):
    X = torch.randn(20, 6, generator=generator(3), dtype=torch.float64)
    with torch.no_grad():
        f = network(X).reshape(20, -1)
        chosen = (f[:, 0] > 0).long() if f.shape[1] == 1 else f.argmax(1)

        def proved(radius):
            lower, upper = (b.reshape(20, -1) for b in ibp_bounds(network, X, radius))
            if f.shape[1] == 1:
                return torch.where(chosen == 1, lower[:, 0] > 0, upper[:, 0] < 0)
            others = upper.scatter(1, chosen[:, None], -math.inf).amax(1)
            return lower.gather(1, chosen[:, None])[:, 0] > others

        radius = ibp_certified_radius(network, X)
        assert bool((radius > 0).all())
        assert bool(proved(radius).all())
        assert not bool(proved(1.00001 * radius).any())
        truth = chosen if f.shape[1] > 1 else 2 * chosen - 1
        wrong = truth.clone()
        wrong[:4] = (truth[:4] + 1) % f.shape[1] if f.shape[1] > 1 else -truth[:4]
        assert bool((ibp_certified_radius(network, X, wrong)[:4] == 0).all())
        torch.testing.assert_close(ibp_certified_radius(network, X, wrong)[4:], radius[4:])
        for x, r, c in zip(X[:5], radius, chosen, strict=False):
            outputs = network(box(x, r)).reshape(2001, -1)
            decision = (outputs[:, 0] > 0).long() if f.shape[1] == 1 else outputs.argmax(1)
            assert bool((decision == c).all())


def digits():
    data = load_digits(n_class=2)
    order = np.random.RandomState(0).permutation(len(data.target))[:360]
    X, y = torch.from_numpy(data.data[order] / 16), torch.from_numpy(2 * data.target[order] - 1)
    return X[:260].float(), y[:260].float(), X[260:].float(), y[260:]


def mean_certificates(width, symmetric, seeds):
    X, y, X_test, y_test = digits()
    means = []
    for seed in range(seeds):
        network = NTKNetwork(64, width, symmetric=symmetric, generator=generator(seed))
        train_ntk_network(network, X, y, learning_rate=0.005, n_steps=100)
        radius = ibp_certified_radius(network, X_test, y_test)
        assert bool((radius > 0).all())  # every sample is classified correctly
        means.append(radius.mean().item())
    return np.mean(means)


def test_certificates_on_digits_fall_with_the_width():
    means = [mean_certificates(w, symmetric=False, seeds=s) for w, s in ((100, 3), (1000, 1))]
    np.testing.assert_allclose(means, [0.0452, 0.0173], rtol=0.15)
    # The two copies of a symmetric network are bounded apart, at a loss of about sqrt(2).
    assert 1.2 < means[1] / mean_certificates(1000, symmetric=True, seeds=1) < 1.6


@pytest.mark.slow
def test_certificates_fall_as_one_over_root_width():
    widths = (1000, 3162, 10_000)
    means = [mean_certificates(width, symmetric=False, seeds=2) for width in widths]
    slope = np.polyfit(np.log(widths), np.log(means), 1)[0]
    assert -0.55 < slope < -0.42
    np.testing.assert_allclose(means[2], 0.0057, rtol=0.1)


X = torch.ones(4, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"network": nn.Linear(6, 1)}, TypeError, "network must be an NTKNetwork or a Sequential"),
        ({"network": nn.Sequential(nn.Linear(6, 2), nn.Tanh())}, TypeError, "the layer Tanh"),
        ({"network": nn.Sequential(nn.ReLU())}, ValueError, "at least one Linear"),
        ({"X": X[:, :2]}, ValueError, "X must have shape"),
        ({"X": X * math.nan}, ValueError, "X must be finite"),
        ({"eps": -0.1}, ValueError, "eps"),
        ({"eps": math.nan}, ValueError, "eps"),
        ({"eps": torch.ones(3)}, ValueError, "eps must have shape"),
        ({"eps": torch.tensor([0.1, -0.1, 0.0, 0.0])}, ValueError, "eps must be >= 0"),
    ],
)
def test_bounds_reject(arguments, error, message):
    with pytest.raises(error, match=message):
        ibp_bounds(**{"network": NETWORKS["sequential"], "X": X, "eps": 0.1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": [1, 1, 1]}, "same length"),
        ({"y": [0, 1, 1, 1]}, "y must hold the classes"),
        ({"max_radius": -1.0}, "max_radius"),
        ({"tol": 1.0}, "tol"),
    ],
)
def test_certified_radius_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        ibp_certified_radius(**{"network": NETWORKS["sequential"], "X": X, **arguments})


# ---------------------------------------------------------------- search for the radius


def radii_below(thresholds, wanted=None, scale=1.0, max_radius=None, tol=1e-6):
    thresholds = np.asarray(thresholds, dtype=float)
    wanted = np.ones(len(thresholds), dtype=bool) if wanted is None else np.asarray(wanted)
    return largest_certified_radii(
        lambda rows, radius: (radius < thresholds[rows]) & (thresholds[rows] > 0),
        wanted,
        scale=scale,
        max_radius=max_radius,
        tol=tol,
    )


@settings(max_examples=100, deadline=None)
@given(
    thresholds=st.lists(st.floats(1e-9, 1e5), max_size=20),
    tol=st.sampled_from([1e-2, 1e-6, 1e-12]),
)
def test_result_is_just_below_the_threshold(thresholds, tol):
    found = radii_below(thresholds, tol=tol)
    assert found.shape == (len(thresholds),)
    assert (found < thresholds).all()
    assert (found >= (1 - tol) * np.array(thresholds) * (1 - 1e-15)).all()


def test_limits_of_the_search():
    found = radii_below(
        [0.3, 0.0, 0.3, np.inf, 5.0], [True, True, False, True, True], max_radius=2.0
    )
    np.testing.assert_allclose(found, [0.3, 0, 0, 2.0, 2.0], rtol=1e-6)
    assert radii_below([np.inf], scale=3.0)[0] == 3.0 * 2**20
    assert radii_below([0.3], max_radius=0.001)[0] == 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0.0}, "tol"),
        ({"tol": 1.0}, "tol"),
        ({"max_radius": 0.0}, "max_radius"),
        ({"max_radius": np.inf}, "max_radius"),
    ],
)
def test_the_search_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        radii_below([1.0], **arguments)
