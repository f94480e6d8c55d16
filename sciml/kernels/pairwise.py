"""Compute kernel matrices on NumPy, torch and CuPy arrays by one mechanism.

Nearly every kernel in use is a *core product* followed by a *scalar epilogue*: with
``S = X Y'`` and the squared norms ``q_i = ||x_i||^2``, ``r_j = ||y_j||^2``,

    K[i, j] = f(S[i, j], q_i, r_j).

The product is left to the matrix multiplication of the array's own library. The epilogue ``f``
is written once a backend (`sciml.kernels.numba_epilogues`, `torch_epilogues`,
`cupy_epilogues`), and the backend is chosen by the type of the input alone: the result lives in
the same library and on the same device as the input. The epilogue overwrites the product in
tiles of rows, so that apart from the result itself at most a tile of memory is needed; for
``K(X, X)`` it runs over the tiles on and below the diagonal, the rest is their mirror image and
the diagonal is exact.

Kernels of distances see data that lie far from the origin after subtracting the mean of Y, which
changes no distance and keeps ``q + r - 2 S`` from cancelling.

To add a kernel, write its epilogue in each backend, its diagonal in `_diagonal`, and its name in
`_epilogue`.

References
----------
Y. Cho, L. K. Saul, "Kernel Methods for Deep Learning", NeurIPS 2009 (arc-cosine kernels).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from scipy.linalg import get_blas_funcs
from sklearn.gaussian_process import kernels as gp

from sciml._check import check_choice, check_finite, check_integer, check_interval, check_shape
from sciml.kernels.arrays import Array, array_library, array_namespace, concatenate, empty
from sciml.kernels.row_threads import N_THREADS, over_tiles

__all__ = ["KERNELS", "kernel_diag", "kernel_matmul", "pairwise_kernel"]

KERNELS = (
    "linear",
    "polynomial",
    "poly",
    "rbf",
    "laplacian",
    "exponential",
    "arc_cosine",
    "arc_cosine_0",
)

KernelLike: TypeAlias = str | gp.Kernel | Callable[..., Array]
Epilogue: TypeAlias = tuple[str, tuple[Any, ...]]  # a name of EPILOGUES and its parameters

_CENTRED = ("rbf", "exponential")
# Entries of a tile: on a CPU a few MB, which stay in the cache; on a GPU enough to outlast the
# launch of a kernel.
_TILE_ENTRIES = {"numpy": 1 << 20, "torch": 1 << 23, "cupy": 1 << 23}


def pairwise_kernel(
    X: Array,
    Y: Array | None = None,
    kernel: KernelLike = "rbf",
    *,
    gamma: float | None = None,
    degree: float = 3,
    coef0: float = 1.0,
    out: Array | None = None,
) -> Array:
    """Compute the matrix of kernel values between the rows of X and the rows of Y.

    Parameters
    ----------
    X : array of shape (n_X, n_features)
        NumPy array (or what `numpy.asarray` accepts), torch tensor or CuPy array. float32 and
        float64 are kept, integers become float64.
    Y : array of shape (n_Y, n_features), default=None
        Same library and device as X. None, or X itself, computes the symmetric matrix with an
        exact diagonal at about half the cost.
    kernel : str, Kernel or callable, default="rbf"
        One of

        - "linear": ``x'y``;
        - "polynomial" or "poly": ``(gamma x'y + coef0)^degree``;
        - "rbf": ``exp(-gamma ||x - y||_2^2)``;
        - "laplacian": ``exp(-gamma ||x - y||_1)``;
        - "exponential": ``exp(-gamma ||x - y||_2)``;
        - "arc_cosine": the order-1 kernel ``||x|| ||y|| (sin t + (pi - t) cos t) / pi`` with t the
          angle between x and y;
        - "arc_cosine_0": the order-0 kernel ``1 - t / pi``;

        or a `sklearn.gaussian_process.kernels.Kernel` (those of this library take any array
        type, and so do their sums, products, powers and multiples; others take NumPy arrays
        only), or a function ``kernel(X, Y)`` returning the matrix.
    gamma : float, default=None
        Scale of the kernels that have one; None means ``1 / n_features`` as in
        `sklearn.metrics.pairwise.pairwise_kernels`.
    degree : float, default=3
        Power of the polynomial kernel, an integer value >= 1.
    coef0 : float, default=1.0
        Constant of the polynomial kernel.
    out : array of shape (n_X, n_Y), default=None
        Where to write the result: a C-contiguous array of the library, dtype and device of the
        result. Not for inputs that require gradients.

    Returns
    -------
    array of shape (n_X, n_Y)
        In the library, dtype and device of X (float64 if only one of X and Y is float32).
        Differentiable for torch tensors that require gradients; at the kinks of "exponential",
        "laplacian" and "arc_cosine_0" the subgradient 0 is used.

    Raises
    ------
    TypeError
        If X and Y are of different libraries, or `kernel` cannot take their type.
    ValueError
        If a shape, dtype or parameter does not fit, or an array holds NaN or infinity.

    Notes
    -----
    Distances come from inner products, so their squares carry an absolute error of about
    ``eps * (||x - m||^2 + ||y - m||^2)`` with m the mean of Y or 0. For "exponential" and
    "arc_cosine_0", whose graphs have a kink at ``x = y``, near-duplicates that are not the same
    row of one array therefore carry relative errors of order ``sqrt(eps)``.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import pairwise_kernel
    >>> X = np.array([[0.0, 0.0], [3.0, 4.0]])
    >>> pairwise_kernel(X, kernel="exponential", gamma=0.2).round(4)
    array([[1.    , 0.3679],
           [0.3679, 1.    ]])
    """
    X, Y, library = _as_arrays(X, Y)
    shape = (len(X), len(X) if Y is None else len(Y))
    epilogue = _epilogue(kernel, X.shape[1], gamma, degree, coef0)
    if epilogue is not None:
        return product_kernel(X, Y, *epilogue, out=out)
    K = _evaluate(kernel, X, Y, library)
    check_shape("the matrix returned by kernel", K, shape)
    K = _cast(K, X)
    if out is None:
        return K
    _check_out(out, shape, X, library)
    out[...] = K
    return out


def kernel_diag(
    X: Array,
    kernel: KernelLike = "rbf",
    *,
    gamma: float | None = None,
    degree: float = 3,
    coef0: float = 1.0,
) -> Array:
    """Compute the kernel of each row of X with itself, without the matrix.

    Parameters
    ----------
    X : array of shape (n, n_features)
        NumPy array, torch tensor or CuPy array.
    kernel, gamma, degree, coef0
        As in `pairwise_kernel`.

    Returns
    -------
    array of shape (n,)
        Equal to the diagonal of ``pairwise_kernel(X, kernel=kernel)``.

    Raises
    ------
    TypeError, ValueError
        As in `pairwise_kernel`.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import kernel_diag
    >>> kernel_diag(np.array([[3.0, 4.0], [0.0, 2.0]]), "arc_cosine")
    array([25.,  4.])
    """
    X, _, library = _as_arrays(X, None)
    epilogue = _epilogue(kernel, X.shape[1], gamma, degree, coef0)
    if epilogue is not None:
        return _diagonal(*epilogue, _squared_norms(X))
    if isinstance(kernel, gp.Kernel) and library == "numpy":
        return _cast(kernel.diag(X), X)
    # A function gives matrices only: small blocks on the diagonal waste least.
    blocks = [X[start : start + 16] for start in range(0, len(X), 16)]
    parts = [_cast(_evaluate(kernel, b, None, library), X).diagonal() for b in blocks]
    return concatenate(parts)


def kernel_matmul(
    X: Array,
    Y: Array | None,
    V: Array,
    kernel: KernelLike = "rbf",
    *,
    gamma: float | None = None,
    degree: float = 3,
    coef0: float = 1.0,
    block: int = 1024,
) -> Array:
    """Multiply a kernel matrix by a vector or matrix without storing the kernel matrix.

    Computes ``K(X, Y) @ V`` from tiles of `block` rows of K.

    Parameters
    ----------
    X : array of shape (n_X, n_features)
        NumPy array, torch tensor or CuPy array.
    Y : array of shape (n_Y, n_features) or None
        Same library and device as X; None means X.
    V : array of shape (n_Y,) or (n_Y, k)
        What to multiply, same library and device as X.
    kernel, gamma, degree, coef0
        As in `pairwise_kernel`.
    block : int, default=1024
        Rows of K in memory at a time, at least 64 for each thread.

    Returns
    -------
    array of shape (n_X,) or (n_X, k)
        The product, in the library, dtype and device of X. For torch tensors that require
        gradients it is differentiable, and the backward pass recomputes the tiles, so that it
        needs no more memory than the forward pass.

    Raises
    ------
    TypeError, ValueError
        As in `pairwise_kernel`; also if V has another length than Y.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import kernel_matmul
    >>> X = np.array([[0.0, 0.0], [3.0, 4.0]])
    >>> kernel_matmul(X, None, np.array([1.0, 1.0]), "exponential", gamma=0.2).round(4)
    array([1.3679, 1.3679])
    """
    check_integer("block", block, 1)
    X, Y, library = _as_arrays(X, Y)
    other = X if Y is None else Y
    V = _as_array("V", V, ndims=(1, 2), like=X)
    if len(V) != len(other):
        raise ValueError(f"V must have one row a row of Y ({len(other)}), got shape {_shape(V)}")
    epilogue = _epilogue(kernel, X.shape[1], gamma, degree, coef0)
    options: dict[str, Any] = {"gamma": gamma, "degree": degree, "coef0": coef0}
    diagonal = kernel_diag(X, kernel, **options) if Y is None else None
    if library == "torch":
        import torch

        # A function may hold parameters of its own that require gradients.
        needs_gradient = epilogue is None or any(a.requires_grad for a in (X, other, V))
        if torch.is_grad_enabled() and needs_gradient:
            from torch.utils.checkpoint import checkpoint

            def tile(X: Array, other: Array, V: Array, diagonal: Array, start: int) -> Array:
                K = pairwise_kernel(X, other, kernel, **options)
                if diagonal is not None:
                    K = torch.diagonal_scatter(K, diagonal, offset=start)
                return K @ V

            parts = []
            for rows in _tiles(len(X), block):
                part = None if diagonal is None else diagonal[rows]
                # Without the checkpoint autograd would keep every tile for the backward pass.
                arguments = (X[rows], other, V, part, rows.start)
                parts.append(checkpoint(tile, *arguments, use_reentrant=False))
            return torch.cat(parts)
    result = empty((len(X), *V.shape[1:]), X)
    xp = array_namespace(X)

    def multiply(rows: slice, K: Array) -> None:
        if diagonal is not None:
            K.reshape(-1)[rows.start :: len(other) + 1] = diagonal[rows]
        xp.matmul(K, V, out=result[rows])

    height = max(min(64, block), block // N_THREADS) if library == "numpy" else block
    for_each_tile(multiply, X, other, kernel, height=height, **options)
    return result


def for_each_tile(
    use: Callable[[slice, Array], None],
    X: Array,
    Y: Array,
    kernel: KernelLike,
    *,
    gamma: float | None,
    degree: float,
    coef0: float,
    height: int,
    out: Array | None = None,
    n_threads: int | None = None,
) -> None:
    """Call ``use(rows, K(X[rows], Y))`` on tiles of rows, several side by side for NumPy arrays.

    Parameters
    ----------
    use : callable
        Takes a slice of rows and their kernel values, which it may overwrite.
    X, Y : arrays of shape (n_X, n_features) and (n_Y, n_features)
        Checked, of one library and dtype.
    kernel, gamma, degree, coef0
        As in `pairwise_kernel`.
    height : int
        Rows of a tile.
    out : array of shape (n_X, n_Y), default=None
        Where the kernel values are written; None means buffers, one for each thread.
    n_threads : int, default=None
        As in `over_tiles`.
    """
    epilogue = _epilogue(kernel, X.shape[1], gamma, degree, coef0)
    buffers: deque[Array] = deque()

    def tile(rows: slice) -> None:
        if out is not None:
            memory = out[rows]
        else:
            memory = buffers.pop() if buffers else empty((min(height, len(X)), len(Y)), X)
        K = memory[: rows.stop - rows.start]
        if epilogue is not None:
            product_kernel(X[rows], Y, *epilogue, out=K)
        else:
            pairwise_kernel(X[rows], Y, kernel, out=K)
        use(rows, K)
        if out is None:
            buffers.append(memory)

    if epilogue is not None and array_library(X) == "numpy":
        over_tiles(tile, len(X), height, n_threads)
    else:  # a foreign kernel may not be ready for several threads
        for rows in _tiles(len(X), height):
            tile(rows)


# ---------------------------------------------------------------- the mechanism


def product_kernel(
    X: Array, Y: Array | None, name: str, params: tuple[Any, ...], out: Array | None = None
) -> Array:
    """Compute core product and scalar epilogue, tile by tile, for checked arrays.

    Parameters
    ----------
    X, Y : arrays as in `pairwise_kernel`, already checked
        Y = None asks for the symmetric matrix.
    name : str
        "linear", "laplacian" or a name in EPILOGUES of the backends.
    params : tuple
        Parameters of the epilogue.
    out : array of shape (n_X, n_Y), default=None
        Where to write the result.

    Returns
    -------
    array of shape (n_X, n_Y)
        The kernel matrix.
    """
    library = array_library(X)
    shape = (len(X), len(X if Y is None else Y))
    if out is not None:
        _check_out(out, shape, X, library)
    if library == "torch":
        import torch

        needs_gradient = X.requires_grad or (Y is not None and Y.requires_grad)
        if torch.is_grad_enabled() and needs_gradient:
            if out is not None:
                raise ValueError("out must be None for tensors that require gradients")
            return _differentiable(X, Y, name, params)
        out = empty(shape, X) if out is None else out
        if X.device.type == "cpu":
            # The same memory seen as NumPy arrays takes the compiled path.
            other = None if Y is None else Y.detach().numpy()
            _fill(X.detach().numpy(), other, name, params, out.detach().numpy(), "numpy")
        else:
            with torch.no_grad():
                _fill(X, Y, name, params, out, library)
        return out
    out = empty(shape, X) if out is None else out
    _fill(X, Y, name, params, out, library)
    return out


def _fill(
    X: Array, Y: Array | None, name: str, params: tuple[Any, ...], out: Array, library: str
) -> None:
    """Write the kernel matrix to `out`, after moving far data to the origin."""
    shift = _shift(X if Y is None else Y) if name in _CENTRED else None
    if shift is None:
        _fill_as_is(X, Y, name, params, out, library)
    elif Y is None:
        _fill_as_is(X - shift, None, name, params, out, library)
    else:
        Y = Y - shift
        for rows in _tiles(len(X), max(64, _TILE_ENTRIES[library] // X.shape[1])):
            _fill_as_is(X[rows] - shift, Y, name, params, out[rows], library)


def _fill_as_is(
    X: Array, Y: Array | None, name: str, params: tuple[Any, ...], out: Array, library: str
) -> None:
    """Write the kernel matrix to `out`: one product, then epilogues on tiles of rows."""
    backend = _backend(library)
    symmetric = Y is None
    other = X if Y is None else Y
    norms = _squared_norms(X)
    other_norms = norms if symmetric else _squared_norms(other)
    if name != "laplacian":
        if symmetric and library == "numpy":
            _lower_product(X, out)
        else:
            array_namespace(X).matmul(X, other.T, out=out)
    for rows in _tiles(len(X), max(64, _TILE_ENTRIES[library] // len(other))):
        columns = slice(0, rows.stop if symmetric else len(other))
        if name == "laplacian":
            backend.laplacian_into(out[rows], X[rows], other[columns], *params)
        elif name != "linear":
            backend.apply_epilogue(name, out[rows], norms[rows], other_norms[columns], params)
        if symmetric:
            backend.mirror(out, rows)
    if symmetric:
        out.reshape(-1)[:: len(X) + 1] = _diagonal(name, params, norms)


def _lower_product(X: Array, out: Array) -> None:
    """Write the lower triangle of ``X X'`` to `out`, and leave the rest to be mirrored."""
    syrk = get_blas_funcs("syrk", (X, out))
    # BLAS counts by columns: its upper triangle of the transpose is ours below the diagonal.
    syrk(1.0, X.T, trans=1, beta=0.0, c=out.T, overwrite_c=1)


def _differentiable(X: Array, Y: Array | None, name: str, params: tuple[Any, ...]) -> Array:
    """Compute the kernel matrix of torch tensors by operations autograd can follow."""
    import torch

    backend = _backend("torch")
    other = X if Y is None else Y
    if name == "laplacian":
        K = backend.laplacian(X, other, *params)
    else:
        shift = _shift(other.detach()) if name in _CENTRED else None
        X_centred, other = (X, other) if shift is None else (X - shift, other - shift)
        K = X_centred @ other.T
        if name != "linear":
            norms, other_norms = _squared_norms(X_centred), _squared_norms(other)
            K = backend.EPILOGUES[name](K, norms, other_norms, *params)
    if Y is None:
        K = K.tril(-1) + K.tril(-1).T
        K = torch.diagonal_scatter(K, _diagonal(name, params, _squared_norms(X)))
    return K


def _shift(Y: Array) -> Array | None:
    """Return the mean of the rows if subtracting it shortens them to half or less, else None."""
    mean = Y.mean(0)
    return mean if bool(mean @ mean > 0.75 * _squared_norms(Y).mean()) else None


def _diagonal(name: str, params: tuple[Any, ...], q: Array) -> Array:
    """Return k(x, x) from the squared norms q of the points."""
    if name == "linear":
        return q
    if name == "polynomial":
        gamma, coef0, degree = params
        return (gamma * q + coef0) ** degree
    if name == "arc_cosine":
        (order,) = params
        # A zero vector has no direction: its angle to anything, itself included, is pi / 2.
        return q * 1 if order == 1 else 0.5 + 0.5 * (q * 0 + (q > 0))
    if name == "network":
        scale, w2, b2, depth, tangent = params
        s = scale * q + b2
        t = s
        for _ in range(depth):
            s = 0.5 * w2 * s + b2
            t = s + 0.5 * w2 * t
        return t if tangent else s
    return q * 0 + 1  # kernels of distances


def _epilogue(
    kernel: KernelLike, n_features: int, gamma: float | None, degree: float, coef0: float
) -> Epilogue | None:
    """Return the name and parameters of the epilogue, or None for foreign kernels."""
    if isinstance(kernel, str):
        check_choice("kernel", kernel, KERNELS)
        if gamma is not None:
            check_interval("gamma", gamma, 0, math.inf, closed="left")
        gamma = 1.0 / n_features if gamma is None else float(gamma)
        if kernel in ("polynomial", "poly"):
            check_interval("degree", degree, 1, 1000)
            check_interval("coef0", coef0, -math.inf, math.inf, closed="neither")
            if int(degree) != degree:
                raise ValueError(f"degree must be an integer value, got {degree!r}")
            return "polynomial", (gamma, float(coef0), int(degree))
        if kernel in ("arc_cosine", "arc_cosine_0"):
            return "arc_cosine", (1 if kernel == "arc_cosine" else 0,)
        return kernel, () if kernel == "linear" else (gamma,)
    if hasattr(kernel, "epilogue"):
        return kernel.epilogue(n_features)
    if not callable(kernel):
        raise TypeError(f"kernel must be a name, a Kernel or a function, got {kernel!r}")
    return None


def _evaluate(kernel: Any, X: Array, Y: Array | None, library: str) -> Array:
    """Evaluate a foreign kernel; composites of our own kernels also on torch and CuPy arrays."""
    if not isinstance(kernel, gp.Kernel):
        return kernel(X, X if Y is None else Y)
    if library == "numpy":
        return kernel(X, Y)
    if isinstance(kernel, gp.Sum):
        return _evaluate(kernel.k1, X, Y, library) + _evaluate(kernel.k2, X, Y, library)
    if isinstance(kernel, gp.Product):
        return _evaluate(kernel.k1, X, Y, library) * _evaluate(kernel.k2, X, Y, library)
    if isinstance(kernel, gp.Exponentiation):
        return _evaluate(kernel.kernel, X, Y, library) ** kernel.exponent
    if isinstance(kernel, gp.ConstantKernel):
        K = empty((len(X), len(X if Y is None else Y)), X)
        K[...] = kernel.constant_value
        return K
    if hasattr(kernel, "epilogue"):
        return product_kernel(X, Y, *kernel.epilogue(X.shape[1]))
    raise TypeError(f"kernel {kernel!r} takes NumPy arrays only, got X of type {type(X).__name__}")


# ---------------------------------------------------------------- arrays of three libraries


def _backend(library: str) -> ModuleType:
    module = {"numpy": "numba_epilogues", "torch": "torch_epilogues", "cupy": "cupy_epilogues"}
    return import_module(f"sciml.kernels.{module[library]}")


def _as_arrays(X: Array, Y: Array | None) -> tuple[Array, Array | None, str]:
    """Check X and Y and bring them to one floating dtype; Y is None if it is X."""
    same = Y is None or Y is X
    X = _as_array("X", X)
    if same:
        return X, None, array_library(X)
    Y = _as_array("Y", Y)
    if array_library(X) != array_library(Y):
        raise TypeError(
            f"X and Y must be arrays of one library, got {type(X).__name__} and {type(Y).__name__}"
        )
    if X.shape[1] != Y.shape[1]:
        raise ValueError(
            f"Y must have as many features as X ({X.shape[1]}), got {Y.shape[1]}: "
            f"shapes {_shape(X)} and {_shape(Y)}"
        )
    if getattr(X, "device", None) != getattr(Y, "device", None):
        raise ValueError(f"Y must be on the device of X ({X.device}), got {Y.device}")
    if X.dtype != Y.dtype:
        wide = X.dtype if "64" in str(X.dtype) else Y.dtype
        X, Y = _to_dtype(X, wide), _to_dtype(Y, wide)
    return X, Y, array_library(X)


def _as_array(
    name: str, array: Array, ndims: tuple[int, ...] = (2,), like: Array | None = None
) -> Array:
    """Return a finite float32 or float64 array, or raise naming the argument."""
    library = array_library(array)
    if library == "numpy":
        array = np.asarray(array)
    if array.ndim not in ndims:
        wanted = " or ".join(f"{n}-D" for n in ndims)
        raise ValueError(f"{name} must be a {wanted} array, got shape {_shape(array)}")
    if 0 in array.shape:
        raise ValueError(f"{name} must have at least one row and column, got {_shape(array)}")
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float64"):
        if not (dtype == "bool" or dtype.startswith(("int", "uint"))):
            raise ValueError(
                f"{name} must hold float32, float64 or integer values, got dtype {dtype}"
            )
        array = _to_dtype(array, array_namespace(array).float64)
    check_finite(name, array)
    if like is not None:
        if library != array_library(like):
            raise TypeError(
                f"{name} must be an array of the library of X ({array_library(like)}), "
                f"got {type(array).__name__}"
            )
        array = _to_dtype(array, like.dtype)
    return array


def _to_dtype(array: Array, dtype: Any) -> Array:
    if array_library(array) == "torch":
        return array.to(dtype)
    return array.astype(dtype, copy=False)


def _cast(K: Array, X: Array) -> Array:
    """Return K in the dtype of X (a foreign kernel may compute in float64)."""
    return K if K.dtype == X.dtype else _to_dtype(K, X.dtype)


def _squared_norms(X: Array) -> Array:
    return array_namespace(X).einsum("ij,ij->i", X, X)


def _tiles(n: int, height: int) -> Iterator[slice]:
    return (slice(start, min(start + height, n)) for start in range(0, n, height))


def _shape(array: Array) -> tuple[int, ...]:
    return tuple(array.shape)


def _check_out(out: Array, shape: tuple[int, int], X: Array, library: str) -> None:
    if array_library(out) != library or (library == "numpy" and not isinstance(out, np.ndarray)):
        raise TypeError(f"out must be a {library} array, got {type(out).__name__}")
    check_shape("out", out, shape)
    if out.dtype != X.dtype or getattr(out, "device", None) != getattr(X, "device", None):
        raise ValueError(f"out must have the dtype and device of X ({X.dtype}), got {out.dtype}")
    contiguous = out.is_contiguous() if library == "torch" else out.flags.c_contiguous
    if not contiguous:
        raise ValueError("out must be C-contiguous, got a strided array")
