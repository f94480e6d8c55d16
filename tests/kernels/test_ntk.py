"""NTK and NNGP against a plain recursion, closed forms, finite networks and scikit-learn."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from sciml.kernels import NNGP, NTK, kernel_diag, ntk

SETTINGS = [(1.0, 0.0), (math.sqrt(2), 0.0), (1.3, 0.4)]


def recursion(X, Y, depth, w_std=1.0, b_std=0.0, kind="ntk"):
    """The definition, in float64 NumPy."""
    X, Y = np.asarray(X, float), np.asarray(Y, float)
    w2, b2 = w_std**2, b_std**2
    S = w2 * X @ Y.T / X.shape[1] + b2
    qx, qy = (w2 * (Z**2).mean(1) + b2 for Z in (X, Y))
    T = S
    for _ in range(depth):
        c = np.sqrt(np.outer(qx, qy))
        with np.errstate(invalid="ignore"):
            u = np.where(c > 0, np.clip(S / c, -1, 1), 0)
        angle = np.pi - np.arccos(u)
        S = w2 * c * (np.sqrt(1 - u**2) + u * angle) / (2 * np.pi) + b2
        T = S + w2 * angle / (2 * np.pi) * T
        qx, qy = w2 * qx / 2 + b2, w2 * qy / 2 + b2
    return T if kind == "ntk" else S


def data(n_x=40, n_y=30, d=9, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_x, d)).astype(dtype), rng.standard_normal((n_y, d)).astype(dtype)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize(("w_std", "b_std"), SETTINGS)
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 3e-6)])
def test_equals_the_recursion(depth, w_std, b_std, kind, dtype, tolerance):
    X, Y = data(dtype=dtype)
    options = {"depth": depth, "w_std": w_std, "b_std": b_std, "kind": kind}
    expected = recursion(X, Y, **options)
    K = ntk(X, Y, **options)
    assert K.dtype == dtype
    np.testing.assert_allclose(K, expected, rtol=tolerance, atol=tolerance * expected.max())
    symmetric, expected = ntk(X, **options), recursion(X, X, **options)
    off = ~np.eye(len(X), dtype=bool)
    np.testing.assert_allclose(
        symmetric[off], expected[off], rtol=tolerance, atol=tolerance * expected.max()
    )
    np.testing.assert_allclose(symmetric.diagonal(), expected.diagonal(), rtol=5e-7)


def test_closed_form_of_one_hidden_layer():
    X, Y = data()
    norms = np.linalg.norm(X, axis=1)[:, None] * np.linalg.norm(Y, axis=1)
    u = X @ Y.T / norms
    h = 2 * u * (np.pi - np.arccos(u)) + np.sqrt(1 - u**2)
    expected = norms * h / (2 * np.pi * X.shape[1])
    np.testing.assert_allclose(ntk(X, Y, depth=1), expected, rtol=1e-11, atol=1e-15)


def test_minimum_of_the_one_layer_profile():
    """The profile h(u) has its minimum -0.429737820518 at u = -0.794099864810."""
    u = np.array([-0.794099864810 - 1e-4, -0.794099864810, -0.794099864810 + 1e-4])
    Y = np.stack([u, np.sqrt(1 - u**2)], axis=1)
    h = 4 * np.pi * ntk(np.array([[1.0, 0.0]]), Y)[0]
    assert h[1] == pytest.approx(-0.429737820518, abs=1e-11)
    assert h[1] < min(h[0], h[2])


def test_closed_form_of_two_hidden_layers():
    X, Y = data()
    norms = np.linalg.norm(X, axis=1)[:, None] * np.linalg.norm(Y, axis=1)
    u = X @ Y.T / norms
    angle = np.pi - np.arccos(u)
    h = 2 * u * angle + np.sqrt(1 - u**2)
    u1 = (np.sqrt(1 - u**2) + u * angle) / np.pi
    angle1 = np.pi - np.arccos(u1)
    bracket = np.sqrt(1 - u1**2) + u1 * angle1 + angle1 * h / np.pi
    expected = norms * bracket / (4 * np.pi * X.shape[1])
    np.testing.assert_allclose(ntk(X, Y, depth=2), expected, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3, 10, 50])
def test_diagonal_of_any_depth(depth):
    X, _ = data()
    q = (X**2).sum(1)
    plain = q * (depth + 1) / (X.shape[1] * 2**depth)
    he = 2 * (depth + 1) * q / X.shape[1]
    np.testing.assert_allclose(ntk(X, depth=depth).diagonal(), plain, rtol=1e-13)
    np.testing.assert_allclose(kernel_diag(X, NTK(depth, math.sqrt(2))), he, rtol=1e-12)
    np.testing.assert_allclose(NNGP(depth, math.sqrt(2)).diag(X), 2 * q / X.shape[1], rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 4),
    a=st.floats(1e-3, 1e3),
    b=st.floats(1e-3, 1e3),
    kind=st.sampled_from(["ntk", "nngp"]),
    seed=st.integers(0, 10**6),
)
def test_positively_homogeneous_without_biases(depth, a, b, kind, seed):
    X, Y = data(6, 5, 3, seed=seed)
    K = ntk(X, Y, depth=depth, kind=kind)
    scaled = ntk(a * X, b * Y, depth=depth, kind=kind)
    np.testing.assert_allclose(scaled, a * b * K, rtol=1e-6, atol=1e-9 * a * b)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 5),
    w_std=st.floats(0.1, 3),
    b_std=st.floats(0, 2),
    kind=st.sampled_from(["ntk", "nngp"]),
    n=st.integers(2, 30),
    seed=st.integers(0, 10**6),
)
def test_symmetric_and_positive_semidefinite(depth, w_std, b_std, kind, n, seed):
    X, _ = data(n, 1, 3, seed=seed)
    X[-1] = X[0] * 2  # parallel
    K = ntk(X, depth=depth, w_std=w_std, b_std=b_std, kind=kind)
    np.testing.assert_array_equal(K, K.T)
    # Parallel rows limit the accuracy of entries to sqrt(eps).
    assert np.linalg.eigvalsh(K).min() >= -2e-8 * n * K.max()


@pytest.mark.parametrize("library", ["numpy", "torch", "torch autograd"])
@pytest.mark.parametrize("depth", [1, 3])
def test_zero_rows(library, depth):
    X, _ = data(5, 1, 4)
    X[2] = 0
    for b_std in (0.0, 0.7):
        expected = recursion(X, X, depth, 1.2, b_std)
        Z = X if library == "numpy" else torch.tensor(X, requires_grad=library != "torch")
        K = ntk(Z, depth=depth, w_std=1.2, b_std=b_std)
        K = K if library == "numpy" else K.detach().numpy()
        np.testing.assert_allclose(K, expected, rtol=5e-8)
        if b_std == 0:
            assert (K[2] == 0).all()
            assert (K[:, 2] == 0).all()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-7), (np.float32, 2e-3)])
def test_near_duplicates(depth, dtype, tolerance):
    """Where an inner product resolves the angle worst, errors stay near sqrt(eps)."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 20)).astype(dtype)
    for size in (0, 1e-9, 1e-6, 1e-3):
        Y = (X + size * rng.standard_normal(X.shape)).astype(dtype)
        A, B = X.astype(np.longdouble), Y.astype(np.longdouble)
        a, b = np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=1)
        theta = 2 * np.arcsin(np.linalg.norm(A / a[:, None] - B / b[:, None], axis=1) / 2)
        S = T = a * b * np.cos(theta) / 20
        c = a * b / 20
        for _ in range(depth):
            S_next = c * (np.sin(theta) + (np.pi - theta) * np.cos(theta)) / (2 * np.pi)
            S, T = S_next, S_next + (np.pi - theta) / (2 * np.pi) * T
            c = c / 2
            theta = np.arccos(np.minimum(S / c, 1))
        K = ntk(X, Y, depth=depth).diagonal()
        np.testing.assert_allclose(K, T.astype(float), rtol=tolerance)


def empirical_tangent_kernel(X, depth, width, w_std, b_std, generator):
    """Inner products of the parameter gradients of one random network, layer by layer.

    The gradient in a weight matrix is an outer product (delta, activation), so that the inner
    product of two of them is the product of two inner products.
    """
    sizes = [X.shape[1], *[width] * depth, 1]
    weights = [
        torch.randn(n_out, n_in, generator=generator) * (w_std / math.sqrt(n_in))
        for n_in, n_out in pairwise(sizes)
    ]
    activations, masks = [X], []
    for W in weights[:-1]:
        z = activations[-1] @ W.T + b_std * torch.randn(len(W), generator=generator)
        masks.append((z > 0).float())
        activations.append(z.relu())
    delta = torch.ones(len(X), 1)
    kernel = torch.zeros(len(X), len(X))
    for layer in range(depth, -1, -1):
        h = activations[layer]
        gram = w_std**2 * h @ h.T / h.shape[1] + b_std**2
        kernel += gram * (delta @ delta.T)
        if layer:
            delta = delta @ weights[layer] * masks[layer - 1]
    return kernel.numpy()


@pytest.mark.parametrize(("depth", "width", "networks"), [(1, 10_000, 8), (2, 1000, 100)])
@pytest.mark.parametrize(("w_std", "b_std"), [(1.0, 0.0), (1.4, 0.3)])
def test_finite_networks_approach_the_kernel(depth, width, networks, w_std, b_std):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4, 6, generator=generator)
    empirical = [
        empirical_tangent_kernel(X, depth, width, w_std, b_std, generator) for _ in range(networks)
    ]
    K = ntk(X.numpy(), depth=depth, w_std=w_std, b_std=b_std)
    scale = np.sqrt(np.outer(K.diagonal(), K.diagonal()))
    assert (np.abs(np.mean(empirical, axis=0) - K) / scale).max() < 0.05


def test_outputs_of_random_networks_have_the_nngp_covariance():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(3, 5, generator=generator)
    outputs = []
    for _ in range(4000):
        hidden = X @ torch.randn(5, 200, generator=generator) * 1.2 / math.sqrt(5)
        hidden = (hidden + 0.5 * torch.randn(200, generator=generator)).relu()
        last = hidden @ torch.randn(200, generator=generator) * 1.2 / math.sqrt(200)
        outputs.append(last + 0.5 * torch.randn(1, generator=generator))
    Z = torch.stack(outputs)
    covariance = (Z.T @ Z / len(Z)).numpy()
    K = NNGP(1, 1.2, 0.5)(X.numpy())
    # Five standard errors of a sample covariance of nearly Gaussian outputs.
    error = 5 * np.sqrt((np.outer(K.diagonal(), K.diagonal()) + K**2) / len(Z))
    assert (np.abs(covariance - K) < error).all()


# ---------------------------------------------------------------- torch


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_torch_equals_numpy(kind, dtype, tolerance):
    X, Y = data(dtype=dtype)
    for depth in (1, 3):
        options = {"depth": depth, "w_std": 1.3, "b_std": 0.4, "kind": kind}
        expected = ntk(X, Y, **options)
        K = ntk(torch.tensor(X, requires_grad=True), torch.tensor(Y), **options)
        assert K.requires_grad
        np.testing.assert_allclose(
            K.detach().numpy(), expected, rtol=tolerance, atol=tolerance * expected.max()
        )


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("w_std", "b_std"), SETTINGS)
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_gradients(depth, w_std, b_std, kind):
    X, Y = (torch.tensor(Z, requires_grad=True) for Z in data(4, 3, 3))
    options = {"depth": depth, "w_std": w_std, "b_std": b_std, "kind": kind}
    assert torch.autograd.gradcheck(lambda x, y: ntk(x, y, **options), (X, Y))
    assert torch.autograd.gradgradcheck(lambda x, y: ntk(x, y, **options), (X, Y))
    assert torch.autograd.gradcheck(lambda x: ntk(x, **options), (X,))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gradients_at_parallel_rows_equal_central_differences(depth):
    """At u = 1 the NTK has a symmetric kink, whose central difference is its smooth part."""
    x = np.array([[0.5, -1.0, 2.0]])
    for y in (x, 3 * x, -x):
        Z = torch.tensor(x, requires_grad=True)
        (gradient,) = torch.autograd.grad(ntk(Z, torch.tensor(y), depth=depth).sum(), Z)
        step = 1e-4 * np.eye(3)
        up, down = (recursion(x + sign * step, y, depth)[:, 0] for sign in (1, -1))
        np.testing.assert_allclose(gradient[0], (up - down) / 2e-4, atol=1e-6)


# ---------------------------------------------------------------- scikit-learn


CALLS = []


class CountedNTK(NTK):
    def __call__(self, X, Y=None, eval_gradient=False):
        CALLS.append(np.shape(X))
        return super().__call__(X, Y, eval_gradient)


@pytest.mark.parametrize(
    ("estimator", "predict"),
    [
        (SVC(kernel=CountedNTK(2)), "predict"),
        (KernelRidge(kernel=CountedNTK(2)), "predict"),
        (Nystroem(kernel=CountedNTK(2), n_components=20, random_state=0), "transform"),
        (GaussianProcessRegressor(CountedNTK(2), alpha=1e-3), "predict"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_one_call_a_matrix(estimator, predict, dtype):
    X, Y = data(60, 25, 4, dtype)
    y = (X[:, 0] > 0).astype(int)
    estimator = clone(estimator)
    CALLS.clear()
    estimator.fit(X, y)
    # A Gaussian process forms two matrices: for the marginal likelihood and for the weights.
    assert len(CALLS) == (2 if isinstance(estimator, GaussianProcessRegressor) else 1)
    CALLS.clear()
    result = getattr(estimator, predict)(Y)
    assert len(CALLS) == 1
    assert np.isfinite(result).all()


def test_kernel_ridge_uses_these_values():
    X, Y = data(50, 20, 4)
    y = np.sin(X[:, 0])
    prediction = KernelRidge(alpha=0.1, kernel=NTK(2)).fit(X, y).predict(Y)
    expected = recursion(Y, X, 2) @ np.linalg.solve(recursion(X, X, 2) + 0.1 * np.eye(50), y)
    np.testing.assert_allclose(prediction, expected, rtol=1e-6, atol=1e-8)


def test_gaussian_process():
    X, Y = data(40, 10, 3)
    y = np.sin(X[:, 0])
    process = GaussianProcessRegressor(NTK(2, 1.4, 0.3), alpha=1e-4).fit(X, y)
    assert process.kernel_.theta.shape == (0,)
    mean, std = process.predict(Y, return_std=True)
    K, k = NTK(2, 1.4, 0.3)(X) + 1e-4 * np.eye(40), NTK(2, 1.4, 0.3)(Y, X)
    variance = NTK(2, 1.4, 0.3).diag(Y) - np.einsum("ij,ij->i", k @ np.linalg.inv(K), k)
    np.testing.assert_allclose(mean, k @ np.linalg.solve(K, y), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=1e-4)
    value, gradient = process.log_marginal_likelihood(process.kernel_.theta, eval_gradient=True)
    assert np.isfinite(value)
    assert gradient.shape == (0,)


def test_amplitude_is_tuned_through_composition():
    X, _ = data(40, 1, 3)
    y = np.sin(X[:, 0])
    kernel = 1.0 * NTK(2) + WhiteKernel(0.1)
    process = GaussianProcessRegressor(kernel, random_state=0).fit(X, y)
    start = GaussianProcessRegressor(kernel, optimizer=None).fit(X, y)
    assert len(process.kernel_.theta) == 2
    assert process.log_marginal_likelihood_value_ > start.log_marginal_likelihood_value_


def test_composition_clone_pickle_and_parameters():
    X, Y = data(8, 6, 3)
    kernel = NTK(depth=3, w_std=1.2, b_std=0.1)
    for composed, expected in (
        (2.0 * kernel + RBF(), 2 * kernel(X, Y) + RBF()(X, Y)),
        (kernel * NNGP(), kernel(X, Y) * NNGP()(X, Y)),
        (kernel**2, kernel(X, Y) ** 2),
    ):
        np.testing.assert_allclose(composed(X, Y), expected, rtol=1e-14)
        np.testing.assert_allclose(composed.diag(X), composed(X).diagonal(), rtol=1e-13)
    for copy in (clone(kernel), pickle.loads(pickle.dumps(kernel))):
        assert copy == kernel
        assert copy is not kernel
        np.testing.assert_array_equal(copy(X), kernel(X))
    assert kernel.get_params() == {"depth": 3, "w_std": 1.2, "b_std": 0.1}
    assert eval(repr(kernel)) == kernel
    assert kernel != NNGP(3, 1.2, 0.1)
    assert kernel.hyperparameters == []
    assert not kernel.is_stationary()


def test_grid_search_over_depth():
    X, y = load_digits(n_class=4, return_X_y=True)
    X, y = X[:200] / 16, y[:200]
    search = GridSearchCV(SVC(kernel=NTK()), {"kernel__depth": [1, 3], "C": [1, 10]}, cv=3)
    assert search.fit(X, y).best_score_ > 0.95
    assert search.best_estimator_.kernel.depth == search.best_params_["kernel__depth"]


def test_eval_gradient():
    X, Y = data(7, 6, 3)
    K, gradient = NTK(2)(X, eval_gradient=True)
    np.testing.assert_array_equal(K, NTK(2)(X))
    assert gradient.shape == (7, 7, 0)
    with pytest.raises(ValueError, match="eval_gradient must be False if Y is given"):
        NTK(2)(X, Y, eval_gradient=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth must be an integer in"),
        ({"depth": 1.5}, TypeError, "depth must be an integer"),
        ({"depth": True}, TypeError, "depth must be an integer"),
        ({"w_std": 0}, ValueError, "w_std must be in"),
        ({"w_std": -1.0}, ValueError, "w_std must be in"),
        ({"w_std": math.nan}, ValueError, "w_std must be in"),
        ({"b_std": -0.1}, ValueError, "b_std must be in"),
        ({"b_std": math.inf}, ValueError, "b_std must be in"),
        ({"kind": "tangent"}, ValueError, "kind must be one of 'ntk', 'nngp'"),
        ({"X": np.ones(3)}, ValueError, "X must be a 2-D array"),
        ({"X": np.array([[np.nan, 1.0]])}, ValueError, "X must be finite"),
        ({"X": np.array([[None, 1.0]])}, ValueError, "X must hold"),
        ({"Y": np.ones((2, 3))}, ValueError, "Y must have as many features as X"),
        ({"Y": np.array([[np.inf, 1.0]])}, ValueError, "Y must be finite"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ntk(**{"X": np.ones((4, 2)), **arguments})
    if set(arguments) <= {"depth", "w_std", "b_std"}:
        kernel = NTK(**arguments)  # the constructor only stores
        with pytest.raises(error, match=message):
            kernel(np.ones((4, 2)))
        with pytest.raises(error, match=message):
            kernel.diag(np.ones((4, 2)))
