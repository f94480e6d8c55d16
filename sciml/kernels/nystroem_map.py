"""The matrix that turns kernel values with landmarks into Nyström features, and its product.

Features z(x) = R k(x) have ``z(x)'z(y) = k(x)' R'R k(y)``, so that R may be any root of the inverse
(or regularised inverse) of the kernel matrix of the landmarks. The upper triangular one needs half
the work for a row of features, and is applied in place.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_blas_funcs

from sciml.kernels.arrays import Array, array_library, array_namespace, cast_like, empty, to_numpy
from sciml.kernels.linear_algebra import eigh
from sciml.kernels.pairwise import KernelLike, for_each_tile

__all__ = ["nystroem_features", "nystroem_map"]

_TILE_ENTRIES = 1 << 20  # of kernel values; a thread's share stays in its cache


def nystroem_map(
    K: Array,
    weights: NDArray[np.float64] | None,
    ridge: float,
    *,
    cutoff: float = 0.0,
    share: float = 1.0,
) -> tuple[Array, float]:
    """Matrix that turns kernel values with landmarks into features, and the effective dimension.

    Parameters
    ----------
    K : array of shape (m, m)
        Kernel among the landmarks.
    weights : ndarray of shape (m,) or None
        Importance weights, for features of ``K S (S'KS + ridge I)^{-1} S'K``; None for the
        unregularised ``C K^{-1} C'``.
    ridge : float
        Ridge.
    cutoff : float, default=0.0
        Without weights, directions with eigenvalues below this share of the largest are left
        out; at least those at rounding level are.
    share : float, default=1.0
        Without weights, how many rows a landmark stands for in the effective dimension.

    Returns
    -------
    normalization : array of shape (m, m)
        Upper triangular; features of x are ``k(x, landmarks) @ normalization.T``.
    effective_dimension : float
        ``trace(S'KS (S'KS + ridge I)^{-1})``, with weights `share` if there are none.

    Raises
    ------
    ValueError
        If K has a negative eigenvalue beyond rounding.
    """
    if weights is None:
        values, vectors = eigh(K)
        spectrum = _nonnegative(to_numpy(values).astype(float))
        # Directions at rounding level are noise: scaling them up would only amplify it.
        eps = np.finfo(str(K.dtype).replace("torch.", "")).eps
        noise = spectrum <= max(cutoff, eps * len(spectrum)) * spectrum.max()
        inverse = np.where(noise, 0, 1 / np.sqrt(np.where(noise, 1, spectrum)))
        dimension = float((spectrum / (spectrum + ridge / share)).sum())
        return _triangular(vectors * cast_like(inverse, K)), dimension
    root = cast_like(np.sqrt(weights), K)
    values, vectors = eigh(root[:, None] * K * root)
    spectrum = _nonnegative(to_numpy(values).astype(float))
    scale = cast_like(1 / np.sqrt(spectrum + ridge), K)
    dimension = float((spectrum / (spectrum + ridge)).sum())
    return _triangular(root[:, None] * (vectors * scale)), dimension


def _nonnegative(spectrum: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eigenvalues of a kernel matrix without the negative ones that rounding makes."""
    if spectrum.min() < -1e-4 * abs(spectrum).max():
        raise ValueError(
            "kernel must be positive semidefinite, but its matrix on the landmarks has the "
            f"eigenvalue {spectrum.min():.3g}"
        )
    return np.maximum(spectrum, 0)


def _triangular(root: Array) -> Array:
    """Return the upper triangular R with ``R'R = A A'`` and no negative diagonal."""
    _, R = array_namespace(root).linalg.qr(root.T)
    return cast_like(np.where(to_numpy(R.diagonal()) < 0, -1.0, 1.0), R)[:, None] * R


def nystroem_features(
    X: Array,
    landmarks: Array,
    normalization: Array,
    kernel: KernelLike,
    *,
    gamma: float | None,
    degree: float,
    coef0: float,
    n_threads: int | None = None,
) -> Array:
    """Compute ``K(X, landmarks) @ normalization.T`` in tiles of rows.

    Parameters
    ----------
    X : array of shape (n, n_features)
        Checked rows.
    landmarks, normalization : arrays of shape (m, n_features) and (m, m)
        In the library and dtype of X.
    kernel, gamma, degree, coef0
        As in `pairwise_kernel`.
    n_threads : int, default=None
        Threads, for NumPy arrays; None means `N_THREADS`.

    Returns
    -------
    array of shape (n, m)
        Features. For NumPy arrays nothing of their size is needed beside them.
    """
    m = len(landmarks)
    parameters: dict[str, Any] = {"gamma": gamma, "degree": degree, "coef0": coef0}
    result = empty((len(X), m), X)
    height = max(64, _TILE_ENTRIES // m)
    if array_library(X) != "numpy":

        def multiply(rows: slice, K: Array) -> None:
            result[rows] = K @ normalization.T

        for_each_tile(multiply, X, landmarks, kernel, height=8 * height, **parameters)
        return result
    trmm = get_blas_funcs("trmm", (normalization, result))
    columns = np.asfortranarray(normalization)

    def multiply_in_place(rows: slice, K: Array) -> None:
        # BLAS counts by columns: R K' in place of K'.
        trmm(1.0, columns, K.T, overwrite_b=1)

    for_each_tile(
        multiply_in_place,
        X,
        landmarks,
        kernel,
        height=height,
        out=result,
        n_threads=n_threads,
        **parameters,
    )
    return result
