"""Kernel matrices of every kernel and library against scalar formulas and scikit-learn."""

import math
import multiprocessing
import os
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct
from sklearn.metrics.pairwise import pairwise_kernels as sklearn_kernels
from sklearn.metrics.pairwise import rbf_kernel

from sciml.kernels import (
    NNGP,
    NTK,
    cupy_epilogues,
    kernel_diag,
    kernel_matmul,
    numba_epilogues,
    pairwise_kernel,
    row_threads,
)
from sciml.kernels import pairwise as module

NAMES = (
    "linear",
    "polynomial",
    "rbf",
    "laplacian",
    "exponential",
    "arc_cosine",
    "arc_cosine_0",
)
OBJECTS = (NTK(depth=1), NTK(depth=3, w_std=1.3, b_std=0.2), NNGP(depth=2))
ALL = (*NAMES, *OBJECTS)


def data(n_x, n_y, d, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_x, d)).astype(dtype), rng.standard_normal((n_y, d)).astype(dtype)


def scalar_kernel(name, x, y, gamma, degree=3, coef0=1.0):
    """The definition of each kernel for one pair of vectors, in Python floats."""
    if name == "linear":
        return math.fsum(x * y)
    if name == "polynomial":
        return (gamma * math.fsum(x * y) + coef0) ** degree
    if name == "rbf":
        return math.exp(-gamma * math.fsum((x - y) ** 2))
    if name == "laplacian":
        return math.exp(-gamma * math.fsum(abs(x - y)))
    if name == "exponential":
        return math.exp(-gamma * math.sqrt(math.fsum((x - y) ** 2)))
    norms = math.sqrt(math.fsum(x * x) * math.fsum(y * y))
    angle = math.acos(max(-1.0, min(1.0, math.fsum(x * y) / norms)))
    if name == "arc_cosine_0":
        return 1 - angle / math.pi
    return norms * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi


def matrix(name, X, Y, gamma):
    X, Y = X.astype(np.float64), Y.astype(np.float64)
    return np.array([[scalar_kernel(name, x, y, gamma) for y in Y] for x in X])


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 2e-14), (np.float32, 3e-6)])
@pytest.mark.parametrize("gamma", [None, 0.37])
def test_equals_the_definition(name, dtype, tolerance, gamma):
    X, Y = data(23, 17, 11, dtype)
    expected = matrix(name, X, Y, 1 / 11 if gamma is None else gamma)
    K = pairwise_kernel(X, Y, name, gamma=gamma)
    assert K.dtype == dtype
    np.testing.assert_allclose(K, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["linear", "polynomial", "poly", "rbf", "laplacian"])
def test_defaults_are_those_of_scikit_learn(name):
    X, Y = data(50, 40, 7)
    np.testing.assert_allclose(
        pairwise_kernel(X, Y, name), sklearn_kernels(X, Y, metric=name), rtol=1e-12
    )
    np.testing.assert_allclose(pairwise_kernel(X), rbf_kernel(X), rtol=1e-12)


@pytest.mark.parametrize("degree", [1, 2, 5, 4.0])
def test_polynomial_degree_and_constant(degree):
    X, Y = data(9, 8, 5)
    K = pairwise_kernel(X, Y, "polynomial", gamma=0.5, degree=degree, coef0=-0.3)
    np.testing.assert_allclose(K, (0.5 * X @ Y.T - 0.3) ** degree, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 1, 1), (700, 3, 2), (3, 700, 2), (257, 1300, 900)])
@pytest.mark.parametrize("name", ["rbf", "laplacian", "arc_cosine"])
def test_every_tile_and_thread_is_written(shape, name):
    X, Y = data(*shape, seed=1)
    K = pairwise_kernel(X, Y, name)
    picks = np.random.default_rng(0).integers(0, shape[:2], size=(200, 2))
    for i, j in [*picks, (0, 0), (shape[0] - 1, shape[1] - 1)]:
        expected = scalar_kernel(name, X[i], Y[j], 1 / shape[2])
        assert K[i, j] == pytest.approx(expected, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("name", ALL, ids=str)
def test_symmetric_matrix_is_exactly_symmetric_with_exact_diagonal(name, monkeypatch):
    monkeypatch.setitem(module._TILE_ENTRIES, "numpy", 64 * 300)  # several tiles
    X = data(300, 1, 6)[0]
    K = pairwise_kernel(X, kernel=name)
    np.testing.assert_array_equal(K, K.T)
    np.testing.assert_array_equal(K, pairwise_kernel(X, X, name))
    np.testing.assert_array_equal(K.diagonal(), kernel_diag(X, name))
    off = ~np.eye(300, dtype=bool)
    general = pairwise_kernel(X, X.copy(), name)
    np.testing.assert_allclose(K[off], general[off], rtol=1e-10, atol=1e-12)
    # The diagonal of the general matrix knows angles and distances only to sqrt(eps).
    np.testing.assert_allclose(K.diagonal(), general.diagonal(), rtol=2e-7)
    assert np.linalg.eigvalsh(K).min() >= -1e-8 * len(K)


@pytest.mark.parametrize("name", ["rbf", "laplacian", "exponential"])
def test_far_from_the_origin_float32_keeps_its_digits(name):
    X, Y = data(40, 30, 5)
    X32, Y32 = (X + 1000).astype(np.float32), (Y + 1000).astype(np.float32)
    expected = matrix(name, X32, Y32, 0.2)
    np.testing.assert_allclose(pairwise_kernel(X32, Y32, name, gamma=0.2), expected, rtol=2e-5)
    tensors = torch.tensor(X32, requires_grad=True), torch.tensor(Y32)
    K = pairwise_kernel(*tensors, name, gamma=0.2)
    np.testing.assert_allclose(K.detach().numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential_function_is_accurate_to_rounding(dtype):
    # With inner products 0 and gamma 1 the epilogue returns exp(-x^2).
    limit = 86.9 if dtype == np.float32 else 707.0
    x = np.sqrt(np.linspace(0, limit, 20_001)).astype(dtype)
    S, zero = np.zeros((len(x), 1), dtype), np.zeros(1, dtype)
    numba_epilogues.apply_epilogue("rbf", S, x * x, zero, (1.0,))
    exact = np.exp(-(x * x).astype(np.longdouble))
    assert np.abs(S[:, 0] / exact - 1).max() < 2 * np.finfo(dtype).eps
    for squared, value in ((0.0, 1.0), (1e6, 0.0)):
        S = np.zeros((1, 1), dtype)
        numba_epilogues.apply_epilogue("rbf", S, np.array([squared], dtype), zero, (1.0,))
        assert S[0, 0] == value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angle_is_accurate_to_rounding(dtype):
    u = np.linspace(-1, 1, 20_001).astype(dtype)[:, None]
    ones = np.ones(len(u), dtype)
    S = u.copy()
    numba_epilogues.apply_epilogue("arc_cosine", S, ones, ones[:1], (0,))
    exact = 1 - np.arccos(u.astype(np.longdouble)) / np.pi
    assert np.abs(S - exact).max() < 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("name", ["arc_cosine", "arc_cosine_0"])
def test_zero_vectors_have_no_direction(name):
    X = np.array([[0.0, 0.0], [1.0, 2.0]])
    value = 0.0 if name == "arc_cosine" else 0.5
    K = pairwise_kernel(X, kernel=name)
    assert K[0, 0] == K[0, 1] == value
    np.testing.assert_array_equal(K.diagonal(), kernel_diag(X, name))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.integers(1, 9),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
)
def test_laws_of_kernels(name, n, m, d, scale, seed):
    X, Y = data(n, m, d, seed=seed)
    X, Y = X * scale, Y * scale
    K, gamma = pairwise_kernel(X, Y, name), 1 / d
    bound = np.sqrt(np.outer(kernel_diag(X, name), kernel_diag(Y, name)))
    assert (np.abs(K) <= bound * (1 + 1e-9)).all()  # Cauchy-Schwarz
    np.testing.assert_allclose(pairwise_kernel(Y, X, name).T, K, rtol=1e-6, atol=1e-9 * bound.max())
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_allclose(
        pairwise_kernel(X[order], Y, name), K[order], rtol=1e-6, atol=1e-9 * bound.max()
    )
    if name in ("rbf", "laplacian", "exponential"):
        # Distances to a common origin: scaling the points is scaling gamma.
        power = 2 if name == "rbf" else 1
        scaled = pairwise_kernel(2 * X, 2 * Y, name, gamma=gamma / 2**power)
        np.testing.assert_allclose(scaled, K, rtol=1e-9)


# ---------------------------------------------------------------- types


def test_input_types():
    X, Y = data(5, 4, 3)
    reference = pairwise_kernel(X, Y)
    assert pairwise_kernel(X.tolist(), Y.tolist()).dtype == np.float64
    np.testing.assert_array_equal(pairwise_kernel(X.tolist(), Y), reference)
    np.testing.assert_allclose(pairwise_kernel(np.asfortranarray(X), Y[:, ::1]), reference)
    np.testing.assert_allclose(pairwise_kernel(np.repeat(X, 2, axis=0)[::2], Y), reference)
    assert pairwise_kernel(np.eye(3, dtype=int)).dtype == np.float64
    assert pairwise_kernel(X.astype(np.float32), Y).dtype == np.float64
    assert pairwise_kernel(torch.tensor(X)).dtype == torch.float64
    assert pairwise_kernel(torch.tensor(X, dtype=torch.float32)).dtype == torch.float32
    assert isinstance(kernel_diag(torch.tensor(X)), torch.Tensor)


@pytest.mark.parametrize("kernel", ALL, ids=str)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_out_receives_the_matrix(kernel, library, symmetric):
    X, Y = data(20, 20 if symmetric else 30, 4)
    Y = None if symmetric else Y
    if library == "torch":
        X, Y = torch.tensor(X), None if Y is None else torch.tensor(Y)
        out = torch.full((20, 20 if symmetric else 30), torch.nan, dtype=torch.float64)
    else:
        out = np.full((20, 20 if symmetric else 30), np.nan)
    result = pairwise_kernel(X, Y, kernel, out=out)
    assert result is out
    np.testing.assert_array_equal(np.asarray(out), np.asarray(pairwise_kernel(X, Y, kernel)))


@pytest.mark.parametrize("kernel", ALL, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_equals_numpy(kernel, dtype, tolerance, symmetric):
    X, Y = data(40, 30, 6, dtype)
    Y = None if symmetric else Y
    expected = pairwise_kernel(X, Y, kernel)
    scale = np.abs(expected).max()
    X_t, Y_t = torch.tensor(X), None if Y is None else torch.tensor(Y)
    compiled = pairwise_kernel(X_t, Y_t, kernel)
    np.testing.assert_array_equal(compiled.numpy(), expected)
    # The operations autograd follows, and the tiles as a CUDA tensor would take them.
    K = pairwise_kernel(X_t.clone().requires_grad_(), Y_t, kernel).detach()
    tiled = torch.empty(expected.shape, dtype=X_t.dtype)
    module._fill(X_t, Y_t, *module._epilogue(kernel, 6, None, 3, 1.0), tiled, "torch")
    for result in (K, tiled):
        np.testing.assert_allclose(result.numpy(), expected, rtol=tolerance, atol=tolerance * scale)
        if symmetric:
            np.testing.assert_array_equal(result.numpy(), result.numpy().T)
    if symmetric:
        diagonal = kernel_diag(X_t, kernel)
        np.testing.assert_allclose(K.diagonal(), diagonal, rtol=1e-6 if dtype == "float32" else 0)


@pytest.mark.parametrize("kernel", ALL, ids=str)
def test_torch_gradients(kernel):
    X, Y = data(4, 3, 5, seed=3)
    X, Y = torch.tensor(X, requires_grad=True), torch.tensor(Y, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: pairwise_kernel(x, y, kernel), (X, Y))
    assert torch.autograd.gradcheck(lambda x: pairwise_kernel(x, kernel=kernel), (X,))
    assert torch.autograd.gradcheck(lambda x: kernel_diag(x, kernel), (X,))
    if kernel != "laplacian":  # torch.cdist has no second derivative for p=1
        assert torch.autograd.gradgradcheck(lambda x, y: pairwise_kernel(x, y, kernel), (X, Y))


@pytest.mark.parametrize("kernel", ALL, ids=str)
def test_torch_gradients_are_finite_at_equal_opposite_and_zero_rows(kernel):
    points = [[0.3, -1.0, 2.0], [0.3, -1.0, 2.0], [-0.3, 1.0, -2.0], [0.0, 0.0, 0.0]]
    for dtype in (torch.float32, torch.float64):
        X = torch.tensor(points, dtype=dtype, requires_grad=True)
        for K in (pairwise_kernel(X, kernel=kernel), pairwise_kernel(X, X * 1, kernel)):
            (gradient,) = torch.autograd.grad(K.sum(), X)
            assert gradient.isfinite().all()


# ---------------------------------------------------------------- kernel objects and functions


def test_foreign_kernels_take_numpy_only():
    X, Y = data(6, 5, 3)
    foreign = RBF(1.7) + DotProduct()
    np.testing.assert_array_equal(pairwise_kernel(X, Y, foreign), foreign(X, Y))
    np.testing.assert_array_equal(kernel_diag(X, foreign), foreign.diag(X))
    assert pairwise_kernel(X.astype(np.float32), kernel=foreign).dtype == np.float32
    with pytest.raises(TypeError, match="kernel RBF.*NumPy arrays only.*Tensor"):
        pairwise_kernel(torch.tensor(X), kernel=RBF())


def test_composites_of_own_kernels_take_every_library():
    X, Y = data(6, 5, 3)
    composite = 2.0 * NTK(2) + NNGP() ** 2 + 0.5
    expected = 2 * NTK(2)(X, Y) + NNGP()(X, Y) ** 2 + 0.5
    np.testing.assert_allclose(pairwise_kernel(X, Y, composite), expected, rtol=1e-12)
    X_t, Y_t = torch.tensor(X, requires_grad=True), torch.tensor(Y)
    K = pairwise_kernel(X_t, Y_t, composite)
    np.testing.assert_allclose(K.detach().numpy(), expected, rtol=1e-12)
    assert torch.autograd.grad(K.sum(), X_t)[0].isfinite().all()
    np.testing.assert_allclose(
        kernel_diag(X_t, composite).detach().numpy(), composite.diag(X), rtol=1e-12
    )
    np.testing.assert_array_equal(
        pairwise_kernel(X_t, Y_t, ConstantKernel(3.0)).numpy(), np.full((6, 5), 3.0)
    )


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_functions(library):
    X, Y = data(40, 5, 3)
    if library == "torch":
        X, Y = torch.tensor(X), torch.tensor(Y)
    function = lambda a, b: (a @ b.T) ** 2  # noqa: E731
    expected = (np.asarray(X) @ np.asarray(Y).T) ** 2
    np.testing.assert_allclose(np.asarray(pairwise_kernel(X, Y, function)), expected)
    np.testing.assert_allclose(
        np.asarray(kernel_diag(X, function)), (np.asarray(X) ** 2).sum(1) ** 2
    )
    V = np.ones(5) if library == "numpy" else torch.ones(5, dtype=torch.float64)
    product = kernel_matmul(X, Y, V, function, block=7)
    np.testing.assert_allclose(np.asarray(product), expected.sum(1))
    with pytest.raises(ValueError, match=r"matrix returned by kernel.*\(40, 5\)"):
        pairwise_kernel(X, Y, lambda a, b: (a @ b.T)[:3])


# ---------------------------------------------------------------- products without the matrix


@pytest.mark.parametrize("kernel", ALL, ids=str)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_equals_the_matrix_product(kernel, library, symmetric):
    X, Y = data(50, 50 if symmetric else 33, 4)
    Y = None if symmetric else Y
    V = np.random.default_rng(5).standard_normal((50 if symmetric else 33, 2))
    expected = pairwise_kernel(X, Y, kernel) @ V
    if library == "torch":
        X, V, Y = torch.tensor(X), torch.tensor(V), None if Y is None else torch.tensor(Y)
    for block in (1, 16, 1000):
        result = kernel_matmul(X, Y, V, kernel, block=block)
        np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-9, atol=1e-9)
    vector = kernel_matmul(X, Y, V[:, 0], kernel)
    assert tuple(vector.shape) == (50,)
    np.testing.assert_allclose(np.asarray(vector), expected[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["rbf", "exponential", NTK(2)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_gradients_equal_those_of_the_matrix(kernel, symmetric):
    X, Y = (torch.tensor(a, requires_grad=True) for a in data(12, 12, 3))
    V = torch.tensor(data(12, 12, 2)[1], requires_grad=True)
    inputs = (X, V) if symmetric else (X, Y, V)
    other = None if symmetric else Y
    weights = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2)
    dense = ((pairwise_kernel(X, other, kernel) @ V) * weights).sum()
    tiled = (kernel_matmul(X, other, V, kernel, block=5) * weights).sum()
    for a, b in zip(
        torch.autograd.grad(dense, inputs), torch.autograd.grad(tiled, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_matmul_needs_one_tile_of_memory():
    X, V = data(6000, 6000, 8)[0], np.ones(6000)
    kernel_matmul(X[:300], None, V[:300])
    tracemalloc.start()
    kernel_matmul(X, None, V, block=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 128 * 6000 * 8  # the matrix has 6000 * 6000 * 8 bytes


def test_matrix_needs_little_memory_besides_itself():
    X, Y = data(3000, 2500, 50)
    pairwise_kernel(X[:100], Y)
    tracemalloc.start()
    pairwise_kernel(X, Y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * 3000 * 2500 * 8


# ---------------------------------------------------------------- threads and processes


def test_simultaneous_calls_agree():
    X, Y = data(2000, 600, 20)
    expected = pairwise_kernel(X, Y)
    with ThreadPoolExecutor(6) as pool:
        for K in pool.map(lambda _: pairwise_kernel(X, Y), range(12)):
            np.testing.assert_allclose(K, expected, rtol=1e-12)


def _sum_in_child(queue, X):
    queue.put(float(pairwise_kernel(X).sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_can_compute():
    X = data(800, 1, 3)[0]
    expected = float(pairwise_kernel(X).sum())  # the parent's threads are running now
    assert row_threads._pool is not None or row_threads.N_THREADS == 1
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(queue, X))
    child.start()
    assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-12)
    child.join(timeout=60)
    assert child.exitcode == 0


# ---------------------------------------------------------------- CuPy, without a GPU


def run_cuda_body(body, names, arrays, scalar):
    """Run the C statements of an elementwise kernel in Python, once an entry."""
    source, indent = [], ""
    for line in re.sub(r";|\{|\}", lambda token: f"{token[0]}\n", body).splitlines():
        text = line.strip()
        loop = re.match(r"for \(int (\w+) = (\d+);", text)
        if loop:
            variable, first = loop[1], loop[2]
        elif re.match(r"\w+ < \w+;", text):
            limit = text[:-1].split(" < ")[1]
        elif text.startswith("++"):
            source.append(f"{indent}for {variable} in range({first}, {limit}):")
            indent += "    "
        elif text == "}":
            indent = indent[:-4]
        elif text:
            source.append(indent + re.sub(r"^T ", "", text).rstrip(";"))
    code = compile("\n".join(source), "body", "exec")
    functions = {
        "T": scalar,
        "exp": np.exp,
        "sqrt": np.sqrt,
        "acos": np.arccos,
        "fabs": abs,
        "fmax": max,
        "fmin": min,
    }
    broadcast = np.broadcast_arrays(*[a for a in arrays if isinstance(a, np.ndarray)])
    out = np.empty(broadcast[0].shape, dtype=scalar)
    for index in np.ndindex(out.shape):
        entries = iter(broadcast)
        scope = dict(functions)
        for name, value in zip(names, arrays, strict=True):
            scope[name] = next(entries)[index] if isinstance(value, np.ndarray) else value
        exec(code, scope)
        out[index] = scope["k"]
    return out


class StandIn(np.ndarray):
    """A NumPy array that passes for a CuPy array."""


StandIn.__module__ = "cupy"


class ElementwiseKernel:
    """What CuPy's class does, in Python: parse the parameters, loop over broadcast entries."""

    def __init__(self, inputs, outputs, body, name):
        declared = [part.split() for part in inputs.split(",")]
        assert outputs == "T k"
        assert name.isidentifier()
        self.names, self.body = [words[-1] for words in declared], body
        self.raw = [words[0] == "raw" for words in declared]
        assert not {"i", "n"} & set(self.names), "names reserved by CuPy"
        for word in re.findall(r"[A-Za-z_]\w*", re.sub(r"T\([^()]*\)", "", body)):
            assert word in known_words(self.names, body), word

    def __call__(self, *arguments):
        *arguments, out = arguments
        arguments = [
            list(np.ravel(value)) if raw else np.asarray(value) if np.ndim(value) else value
            for value, raw in zip(arguments, self.raw, strict=True)
        ]
        # Scalars take the dtype T of the arrays.
        arguments = [out.dtype.type(a) if type(a) is float else a for a in arguments]
        out[...] = run_cuda_body(self.body, self.names, arguments, out.dtype.type)


def known_words(names, body):
    declared = re.findall(r"\b(?:T|int) (\w+) =", body)
    return {*names, *declared, "T", "k", "int", "for"} | {
        "exp", "sqrt", "acos", "fabs", "fmax", "fmin",
    }  # fmt: skip


@pytest.fixture
def cupy_stand_in(monkeypatch):
    fake = ModuleType("cupy")
    for name in ("matmul", "einsum", "tril", "isfinite", "float64", "concatenate"):
        setattr(fake, name, getattr(np, name))
    fake.arange = np.arange
    fake.ascontiguousarray = np.ascontiguousarray
    fake.empty = lambda shape, dtype: np.empty(shape, dtype).view(StandIn)
    fake.ElementwiseKernel = ElementwiseKernel
    monkeypatch.setitem(__import__("sys").modules, "cupy", fake)
    for cached in (cupy_epilogues._kernel, cupy_epilogues._laplacian_kernel):
        cached.cache_clear()
    yield
    for cached in (cupy_epilogues._kernel, cupy_epilogues._laplacian_kernel):
        cached.cache_clear()


@pytest.mark.parametrize("kernel", ALL, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cuda_sources_compute_the_kernels(kernel, dtype, cupy_stand_in):
    """The sources are interpreted: their arithmetic is proved, their run on a GPU is not."""
    X, Y = data(9, 7, 4, dtype)
    X[0] = 0
    for other in (None, Y):
        expected = pairwise_kernel(X, other, kernel)
        cupy_other = None if other is None else other.view(StandIn)
        K = pairwise_kernel(X.view(StandIn), cupy_other, kernel)
        assert isinstance(K, StandIn)
        assert K.dtype == dtype
        tolerance = 1e-12 if dtype == np.float64 else 2e-6
        scale = np.abs(expected).max()
        np.testing.assert_allclose(K, expected, rtol=tolerance, atol=tolerance * scale)
    V = np.ones((7, 2), dtype)
    product = kernel_matmul(X.view(StandIn), Y.view(StandIn), V.view(StandIn), kernel, block=4)
    np.testing.assert_allclose(product, expected @ V, rtol=1e-5, atol=1e-5)


def test_cuda_sources_have_no_double_literals():
    for _, body in [*cupy_epilogues.SOURCES.values(), ("", cupy_epilogues.LAPLACIAN)]:
        outside = re.sub(r"T\([^()]*\)", "", body)
        assert not re.search(r"\d\.\d|\de-?\d", outside)
        assert body.count("(") == body.count(")")
        assert body.count("{") == body.count("}")


# ---------------------------------------------------------------- bad input

X_GOOD = np.ones((4, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"X": np.ones(3)}, ValueError, r"X must be a 2-D array, got shape \(3,\)"),
        ({"X": np.ones((2, 3, 4))}, ValueError, "X must be a 2-D"),
        ({"X": np.ones((0, 3))}, ValueError, "X must have at least one row and column"),
        ({"X": np.ones((3, 0))}, ValueError, "X must have at least one row and column"),
        ({"X": np.array([["a"]])}, ValueError, "X must hold float32, float64 or integer"),
        ({"X": np.array([[1.0]], dtype=object)}, ValueError, "X must hold .* got dtype object"),
        ({"X": np.ones((2, 2), complex)}, ValueError, "X must hold .* got dtype complex128"),
        ({"X": np.ones((2, 2), np.float16)}, ValueError, "X must hold .* got dtype float16"),
        ({"X": torch.ones((2, 2), dtype=torch.bfloat16)}, ValueError, "X must hold"),
        ({"X": np.array([[np.nan]])}, ValueError, "X must be finite"),
        ({"X": torch.tensor([[torch.inf]])}, ValueError, "X must be finite"),
        ({"Y": np.array([[1.0, 2.0, np.inf]])}, ValueError, "Y must be finite"),
        ({"Y": np.ones((4, 2))}, ValueError, r"Y must have as many features as X \(3\), got 2"),
        ({"Y": torch.ones((4, 3))}, TypeError, "X and Y must be arrays of one library"),
        ({"kernel": "rbv"}, ValueError, "kernel must be one of .*'rbf'.* got 'rbv'"),
        ({"kernel": 3}, TypeError, "kernel must be a name, a Kernel or a function, got 3"),
        ({"gamma": -1.0}, ValueError, "gamma must be in"),
        ({"gamma": math.nan}, ValueError, "gamma must be in"),
        ({"gamma": "scale"}, TypeError, "gamma must be a real number"),
        ({"kernel": "poly", "degree": 2.5}, ValueError, "degree must be an integer value"),
        ({"kernel": "poly", "degree": 0}, ValueError, "degree must be in"),
        ({"kernel": "poly", "coef0": math.inf}, ValueError, "coef0 must be in"),
        ({"out": np.empty((4, 4), np.float32)}, ValueError, "out must have the dtype"),
        ({"out": np.empty((4, 5))}, ValueError, r"out must have shape \(4, 4\)"),
        ({"out": np.empty((4, 4)).T[:, ::-1]}, ValueError, "out must be C-contiguous"),
        ({"out": torch.empty((4, 4))}, TypeError, "out must be a numpy array"),
        ({"out": [[0.0] * 4] * 4}, TypeError, "out must be a numpy array"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        pairwise_kernel(**{"X": X_GOOD, **arguments})


def test_bad_input_of_matmul_and_gradients():
    with pytest.raises(ValueError, match=r"V must have one row a row of Y \(4\)"):
        kernel_matmul(X_GOOD, None, np.ones(3))
    with pytest.raises(ValueError, match="V must be a 1-D or 2-D array"):
        kernel_matmul(X_GOOD, None, np.ones((4, 1, 1)))
    with pytest.raises(TypeError, match="V must be an array of the library of X"):
        kernel_matmul(X_GOOD, None, torch.ones(4))
    with pytest.raises(ValueError, match="block must be an integer"):
        kernel_matmul(X_GOOD, None, np.ones(4), block=0)
    X = torch.ones((4, 3), requires_grad=True)
    with pytest.raises(ValueError, match="out must be None"):
        pairwise_kernel(X, out=torch.empty((4, 4)))
    with torch.no_grad():
        assert not pairwise_kernel(X, out=torch.empty((4, 4))).requires_grad
