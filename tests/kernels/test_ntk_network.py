"""Finite networks: tangent kernel, path kernel, and the two machines they converge to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from sciml.kernels import NTKNetwork, ntk, train_ntk_network


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained_away(network, seed=1, size=0.3):
    """Move all parameters, so that the two copies differ."""
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed), dtype=parameter.dtype)
            parameter += size * noise
    return network


def digits(n_train=260, n_test=100):
    """Digits 0 against 1 in float64: training inputs, labels, test inputs."""
    data = load_digits(n_class=2)
    order = np.random.RandomState(0).permutation(len(data.target))[: n_train + n_test]
    X, y = torch.from_numpy(data.data[order] / 16), torch.from_numpy(2.0 * data.target[order] - 1)
    return X[:n_train], y[:n_train], X[n_train:]


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("depth", "b_std"), [(1, 0.0), (1, 0.4), (2, 0.0), (3, 0.4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_forward_equals_a_plain_implementation(depth, b_std, symmetric):
    network = NTKNetwork(5, 11, depth, 1.3, b_std, symmetric, generator=generator()).double()
    trained_away(network)
    X = torch.randn(7, 5, generator=generator(2), dtype=torch.float64)
    outputs = []
    for copy in range(2 if symmetric else 1):
        h = X
        for layer, weight in enumerate(network.weights):
            h = 1.3 / math.sqrt(h.shape[1]) * h @ weight[copy].T
            if b_std:
                h = h + b_std * network.biases[layer][copy]
            if layer < depth:
                h = h.relu()
        outputs.append(h[:, 0])
    expected = (outputs[0] - outputs[1]) / math.sqrt(2) if symmetric else outputs[0]
    torch.testing.assert_close(network(X), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 3])
def test_symmetric_network_starts_at_zero_exactly(depth, dtype):
    network = NTKNetwork(6, 50, depth, b_std=0.2, generator=generator(), dtype=dtype)
    f = network(torch.randn(20, 6, generator=generator(1), dtype=dtype))
    assert f.dtype == dtype
    assert bool((f == 0).all())


def test_same_generator_same_network():
    a, b = (NTKNetwork(4, 8, generator=generator(3)) for _ in range(2))
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_state_dict_round_trip():
    network = trained_away(NTKNetwork(4, 8, 2, b_std=0.1, generator=generator(3)))
    other = NTKNetwork(4, 8, 2, b_std=0.1, generator=generator(4))
    other.load_state_dict(network.state_dict())
    X = torch.randn(5, 4, generator=generator())
    torch.testing.assert_close(other(X), network(X), rtol=0, atol=0)


# ---------------------------------------------------------------- empirical tangent kernel


@settings(max_examples=15, deadline=None)
@given(
    depth=st.integers(1, 3),
    b_std=st.sampled_from([0.0, 0.5]),
    symmetric=st.booleans(),
    block=st.integers(1, 8),
)
def test_empirical_ntk_equals_inner_products_of_gradients(depth, b_std, symmetric, block):
    network = NTKNetwork(5, 9, depth, 1.2, b_std, symmetric, generator=generator()).double()
    trained_away(network)
    X = torch.randn(7, 5, generator=generator(2), dtype=torch.float64)
    last = {id(parameter) for parameter in network.last_layer()}
    gradients = {"all": [], "last": [], "hidden": []}
    for x in X:
        parameters = list(network.parameters())
        g = torch.autograd.grad(network(x[None])[0], parameters)
        pairs = list(zip(parameters, g, strict=True))
        gradients["all"].append(torch.cat([v.flatten() for _, v in pairs]))
        gradients["last"].append(torch.cat([v.flatten() for p, v in pairs if id(p) in last]))
        gradients["hidden"].append(torch.cat([v.flatten() for p, v in pairs if id(p) not in last]))
    for part, rows in gradients.items():
        J = torch.stack(rows)
        K = network.empirical_ntk(X, part=part, block=block)
        torch.testing.assert_close(K, J @ J.T)
        K = network.empirical_ntk(X[:3], X[2:], part=part, block=block)
        torch.testing.assert_close(K, J[:3] @ J[2:].T)


@pytest.mark.parametrize(("depth", "width", "bound"), [(1, 10_000, 0.05), (2, 2048, 0.15)])
def test_empirical_ntk_tends_to_the_ntk(depth, width, bound):
    X, _, _ = digits(30, 1)
    network = NTKNetwork(64, width, depth, 1.4, 0.1, generator=generator(), dtype=torch.float64)
    arguments = {"depth": depth, "w_std": 1.4, "b_std": 0.1}
    full, last = (ntk(X, kind=kind, **arguments) for kind in ("ntk", "nngp"))
    for part, limit in (("all", full), ("last", last), ("hidden", full - last)):
        gap = (network.empirical_ntk(X, part=part) - limit).norm() / limit.norm()
        assert gap < bound


def test_empirical_ntk_error_falls_as_one_over_root_width():
    X, _, _ = digits(30, 1)
    limit = ntk(X)
    gaps = []
    for width in (64, 4096):
        draws = [NTKNetwork(64, width, generator=generator(s)).double() for s in range(6)]
        gaps.append(np.mean([float((n.empirical_ntk(X) - limit).norm()) for n in draws]))
    slope = math.log(gaps[1] / gaps[0]) / math.log(64)
    assert -0.65 < slope < -0.35


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "logistic", "squared"])
def test_one_step_is_one_step_of_autograd_on_the_objective(loss):
    X, y, _ = digits(20, 1)
    network = trained_away(NTKNetwork(64, 10, 2, b_std=0.1, generator=generator()).double())
    values = {
        "hinge": lambda f: (1 - y * f).clamp(min=0),
        "squared_hinge": lambda f: (1 - y * f).clamp(min=0) ** 2,
        "logistic": lambda f: torch.log1p(torch.exp(-y * f)),
        "squared": lambda f: (y - f) ** 2,
    }
    last = network.weights[-1].square().sum() + network.biases[-1].square().sum()
    objective = 0.35 * last + values[loss](network(X)).sum()
    gradients = torch.autograd.grad(objective, list(network.parameters()))
    expected = [p - 0.01 * g for p, g in zip(network.parameters(), gradients, strict=True)]
    training = train_ntk_network(network, X, y, loss=loss, lam=0.7, learning_rate=0.01, n_steps=1)
    torch.testing.assert_close(training.objective[0], objective.detach())
    for parameter, target in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), target)


@pytest.mark.parametrize("b_std", [0.0, 0.5])
def test_regulariser_moves_the_output_by_minus_lam_f(b_std):
    X, _, _ = digits(20, 1)
    network = trained_away(NTKNetwork(64, 16, 2, b_std=b_std, generator=generator()).double())
    for x in X[:5]:
        f = network(x[None])[0]
        gradients = torch.autograd.grad(f, network.last_layer())
        inner = sum((g * p).sum() for g, p in zip(gradients, network.last_layer(), strict=True))
        torch.testing.assert_close(inner, f)


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "logistic"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_network_is_its_path_kernel_machine_to_first_order(loss, symmetric):
    X, y, Z = digits(40, 30)
    gaps = []
    for n_steps in (20, 40, 80, 160):
        network = NTKNetwork(64, 48, 1, 1.0, 0.0, symmetric, generator=generator(1)).double()
        training = train_ntk_network(
            network, X, y, loss=loss, lam=1.0, learning_rate=1 / n_steps, n_steps=n_steps, X_path=Z
        )
        f = network(Z).detach()
        gaps.append((f - training.machine_output).abs().max().item())
    assert gaps[0] < 0.05 * f.abs().max().item()
    order = -np.polyfit(np.log([20, 40, 80, 160]), np.log(gaps), 1)[0]
    # Slopes with a kink switch samples on and off at whole steps, which roughens the gap.
    assert abs(order - 1) < (0.1 if loss == "logistic" else 0.25)


def test_machine_output_is_path_kernel_times_labels():
    X, y, Z = digits(40, 10)
    network = NTKNetwork(64, 32, generator=generator(), dtype=torch.float64)
    training = train_ntk_network(network, X, y, lam=0.5, learning_rate=0.01, n_steps=20, X_path=Z)
    torch.testing.assert_close(training.machine_output, training.path_kernel @ y)


def test_path_kernel_is_symmetric_before_a_margin_is_met():
    X, y, _ = digits(40, 1)
    network = NTKNetwork(64, 256, generator=generator(), dtype=torch.float64)
    training = train_ntk_network(network, X, y, lam=1.0, learning_rate=1e-4, n_steps=50, X_path=X)
    assert bool((y * network(X) < 1).all())  # every sample was active all the time
    K = training.path_kernel
    torch.testing.assert_close(K, K.T)
    assert torch.linalg.eigvalsh(K).min() > -1e-12


def test_path_kernel_holds_for_mini_batches():
    X, y, Z = digits(60, 20)
    network = NTKNetwork(64, 64, generator=generator(), dtype=torch.float64)
    training = train_ntk_network(
        network, X, y, lam=0.5, learning_rate=1e-3, n_steps=150, batch_size=16, X_path=Z,
        generator=generator(5),
    )  # fmt: skip
    f = network(Z).detach()
    assert f.abs().max() > 0.4
    assert (f - training.machine_output).abs().max() < 0.02


def test_callback_and_reproducible_batches():
    X, y, Z = digits(30, 5)
    outputs, steps = [], []
    for _ in range(2):
        network = NTKNetwork(64, 32, generator=generator())
        train_ntk_network(
            network, X.float(), y.float(), learning_rate=1e-3, n_steps=7, batch_size=8,
            generator=generator(9), callback=lambda step, _: steps.append(step),
        )  # fmt: skip
        outputs.append(network(Z.float()))
    assert steps == [1, 2, 3, 4, 5, 6, 7] * 2
    assert outputs[0].dtype == torch.float32
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_divergence_is_an_error():
    X, y, _ = digits(30, 1)
    network = NTKNetwork(64, 32, generator=generator())
    with pytest.raises(FloatingPointError, match="learning_rate=100.0 is too large"):
        train_ntk_network(
            network, X.float(), y.float(), loss="squared", learning_rate=100.0, n_steps=50
        )


# ---------------------------------------------------------------- bad input

NETWORK = NTKNetwork(3, 4)
ONES = torch.ones(5)
INPUT = torch.ones(5, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features"),
        ({"width": 2.5}, TypeError, "width"),
        ({"depth": 0}, ValueError, "depth"),
        ({"w_std": 0.0}, ValueError, "w_std"),
        ({"b_std": -1.0}, ValueError, "b_std"),
        ({"symmetric": 2}, ValueError, "symmetric"),
    ],
)
def test_network_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        NTKNetwork(**{"in_features": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"network": torch.nn.Linear(3, 1)}, TypeError, "network must be an NTKNetwork"),
        ({"X": np.ones((5, 3))}, TypeError, "X must be a torch tensor"),
        ({"X": INPUT.double()}, ValueError, "X must have the dtype"),
        ({"X": torch.ones(5, 2)}, ValueError, "X must have shape"),
        ({"X": INPUT * math.nan}, ValueError, "X must be finite"),
        ({"y": [1] * 5}, TypeError, "y must be a torch tensor"),
        ({"y": torch.ones(4)}, ValueError, "same length"),
        ({"y": ONES.long()}, ValueError, "y must have the dtype"),
        ({"y": 0 * ONES}, ValueError, "y must hold -1 and"),
        ({"y": ONES * math.inf, "loss": "squared"}, ValueError, "y must be finite"),
        ({"loss": "huber"}, ValueError, "loss"),
        ({"lam": -1.0}, ValueError, "lam"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate"),
        ({"n_steps": 1.5}, TypeError, "n_steps"),
        ({"batch_size": 6}, ValueError, "batch_size"),
        ({"X_path": torch.ones(5, 2)}, ValueError, "X_path must have shape"),
        ({"X_path": INPUT, "loss": "squared"}, ValueError, "X_path must be None"),
    ],
)
def test_training_rejects(arguments, error, message):
    good = {"network": NETWORK, "X": INPUT, "y": ONES, "learning_rate": 0.1, "n_steps": 1}
    with pytest.raises(error, match=message):
        train_ntk_network(**{**good, **arguments})


def test_empirical_ntk_rejects():
    with pytest.raises(ValueError, match="part"):
        NETWORK.empirical_ntk(INPUT, part="first")
    with pytest.raises(ValueError, match="Y must have shape"):
        NETWORK.empirical_ntk(INPUT, torch.ones(5, 2))
