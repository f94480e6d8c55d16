"""Dense factorisations in the library of their input: NumPy (SciPy), torch or CuPy.

The methods of this package are matrix algebra around a kernel matrix. These few functions let
them be written once: the result lives where the input lives.
"""

from typing import Any

import numpy as np
import scipy.linalg

from sciml.kernels.arrays import Array, array_library

__all__ = [
    "add_to_diagonal",
    "cholesky",
    "eigh",
    "inverse_diagonal",
    "kernel_cholesky",
    "solve_lower",
]


def add_to_diagonal(matrix: Array, values: Any) -> None:
    """Add a number, or an array of shape (n,), to the diagonal of a matrix in place."""
    if array_library(matrix) == "numpy":
        diagonal = np.einsum("ii->i", matrix)  # unlike numpy's diagonal(), a writable view
    else:
        diagonal = matrix.diagonal()
    diagonal += values


def cholesky(matrix: Array) -> Array:
    """Return the lower Cholesky factor of a symmetric positive definite matrix.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the matrix is not positive definite.
    """
    library = array_library(matrix)
    if library == "torch":
        import torch

        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            raise np.linalg.LinAlgError("matrix is not positive definite")
        return factor
    if library == "cupy":
        import cupy
        import cupyx

        with cupyx.errstate(linalg="raise"):  # by default a failure leaves finite nonsense
            return cupy.linalg.cholesky(matrix)
    return scipy.linalg.cholesky(matrix, lower=True, check_finite=False)


def kernel_cholesky(matrix: Array) -> Array:
    """Return the lower Cholesky factor of a kernel matrix plus a ridge.

    Raises
    ------
    ValueError
        If the matrix is not positive definite, which no kernel matrix can cause.
    """
    try:
        return cholesky(matrix)
    except np.linalg.LinAlgError:
        raise ValueError(
            "kernel must be positive semidefinite, but its matrix on some of the points has a "
            "negative eigenvalue (or ridge is below the rounding errors of the kernel values)"
        ) from None


def solve_lower(factor: Array, right: Array, *, transposed: bool = False) -> Array:
    """Solve ``L x = b``, or ``L' x = b``, for a lower triangular L and right sides (n, k)."""
    library = array_library(factor)
    if library == "torch":
        import torch

        if transposed:
            return torch.linalg.solve_triangular(factor.T, right, upper=True)
        return torch.linalg.solve_triangular(factor, right, upper=False)
    if library == "cupy":
        from cupyx.scipy.linalg import solve_triangular
    else:
        from scipy.linalg import solve_triangular
    return solve_triangular(factor, right, lower=True, trans=int(transposed), check_finite=False)


def inverse_diagonal(factor: Array) -> Array:
    """Return the diagonal of ``(L L')^{-1}`` for a lower Cholesky factor L."""
    library = array_library(factor)
    if library == "torch":
        import torch

        return torch.cholesky_inverse(factor).diagonal()
    if library == "cupy":
        import cupy

        inverse = solve_lower(factor, cupy.eye(len(factor), dtype=factor.dtype))
        return (inverse * inverse).sum(0)
    # A triangular inverse is a third of the work of solving for all columns of I.
    (trtri,) = scipy.linalg.get_lapack_funcs(("trtri",), (factor,))
    inverse, _ = trtri(factor, lower=1)
    return np.einsum("ij,ij->j", inverse, inverse)


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix."""
    library = array_library(matrix)
    if library == "torch":
        import torch

        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    if library == "cupy":
        import cupy

        return cupy.linalg.eigh(matrix)
    return scipy.linalg.eigh(matrix, check_finite=False)
