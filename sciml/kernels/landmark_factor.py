"""Turn kernel values with landmarks into Nyström features by one triangular matrix.

For landmarks with weights ``S^2`` the regularised Nyström kernel is

    k~(x, y) = k(x)' S (S'KS + ridge I)^{-1} S k(y) = z(x)'z(y),      z(x) = L^{-1} S k(x),

with ``L L' = S'KS + ridge I`` the Cholesky factorisation. Without weights and ridge it is
``k(x)' K^+ k(y)``, and a Cholesky factorisation with pivots leaves out the landmarks that the
others explain to rounding, such as duplicates.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg.lapack import dpstrf

from sciml.kernels.linear_algebra import kernel_cholesky, solve_lower

__all__ = ["LandmarkFactor", "carry_matrix", "factor_landmarks"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class LandmarkFactor:
    """The map ``z = L^{-1} S k`` from m kernel values to r <= m features.

    Attributes
    ----------
    used : ndarray of shape (r,)
        Positions of the landmarks that the features use.
    root : ndarray of shape (r,)
        The diagonal of S.
    lower : ndarray of shape (r, r)
        The triangular L.
    n_landmarks : int
        The number m.
    """

    used: NDArray[np.int64]
    root: Matrix
    lower: Matrix
    n_landmarks: int

    def features(self, values: Matrix) -> Matrix:
        """Compute ``L^{-1} S values`` for kernel values of shape (m, k)."""
        return solve_lower(self.lower, self.root[:, None] * values[self.used])

    def coefficients(self, theta: Matrix) -> Matrix:
        """Compute ``S L^{-T} theta`` of shape (m, k): what multiplies kernel values."""
        result = np.zeros((self.n_landmarks, theta.shape[1]))
        inner = solve_lower(self.lower, theta, transposed=True)
        result[self.used] = self.root[:, None] * inner
        return result


def factor_landmarks(
    K: Matrix, weights: Matrix | None, ridge: float, *, precision: float | None = None
) -> LandmarkFactor:
    """Factor the kernel matrix of the landmarks.

    Parameters
    ----------
    K : ndarray of shape (m, m)
        Kernel among the landmarks, in float64.
    weights : ndarray of shape (m,) or None
        ``S^2``; None for no weights and no ridge.
    ridge : float
        Ridge, used with weights.
    precision : float, default=None
        Relative rounding error of kernel values that the features will be made of; None means
        that of float64. Without weights, landmarks go whose squared distance from the span of
        the others is below ``precision^(2/3)`` of the largest ``k(x, x)``: such a landmark adds
        less to the approximation than it adds noise to coefficients.

    Returns
    -------
    LandmarkFactor

    Raises
    ------
    ValueError
        If the matrix is not positive semidefinite, which no kernel matrix is.
    """
    m = len(K)
    if weights is not None:
        root = np.sqrt(weights)
        system = root[:, None] * K * root
        system[np.diag_indices(m)] += ridge
        return LandmarkFactor(np.arange(m), root, kernel_cholesky(system), m)
    eps = np.finfo(float).eps if precision is None else precision
    lower, pivots, rank, _ = dpstrf(K, tol=eps ** (2 / 3) * float(K.diagonal().max()), lower=1)
    if rank == 0:
        # All landmarks are zero in the kernel's space, and so are their values with any point.
        rank, lower[0, 0] = 1, 1.0
    return LandmarkFactor(pivots[:rank] - 1, np.ones(rank), np.tril(lower[:rank, :rank]), m)


def carry_matrix(
    old: LandmarkFactor,
    old_indices: NDArray[np.int64],
    new: LandmarkFactor,
    new_indices: NDArray[np.int64],
    old_kernel: Matrix,
    across: Matrix,
) -> Matrix:
    """Compute the matrix that takes features of past rows to the new landmarks.

    The kernel value of a past row with a landmark that stays is kept exactly. That with a new
    landmark u is gone; in its place comes that with the projection of u onto the span of the
    old landmarks, ``k(x)' K^+ k(u)``.

    Parameters
    ----------
    old, new : LandmarkFactor
        Features before and after.
    old_indices, new_indices : ndarray of shape (m_old,) and (m_new,)
        Identities of the landmarks.
    old_kernel : ndarray of shape (m_old, m_old)
        Kernel among the old landmarks.
    across : ndarray of shape (m_old, m_new)
        Kernel between old and new landmarks.

    Returns
    -------
    ndarray of shape (r_new, r_old)
        M with ``z_new = M z_old``.

    Notes
    -----
    Since the past rows have no more than ``ridge/(1 - eps)`` of their energy outside the span of
    an eps-accurate dictionary, the column of values with u that is carried differs from the true
    one by at most ``sqrt(ridge/(1 - eps)) ||u - P u||``, in the norm over all past rows, P the
    projection onto the span. That is one change of landmarks; errors of many may add up.
    """
    place = {int(index): i for i, index in enumerate(old_indices[old.used])}
    stays = np.array([place.get(int(index), -1) for index in new_indices[new.used]])
    kept, fresh = np.flatnonzero(stays >= 0), np.flatnonzero(stays < 0)
    transfer = np.zeros((len(old.used), len(new.used)))
    transfer[stays[kept], kept] = 1
    if len(fresh):
        span = factor_landmarks(old_kernel[np.ix_(old.used, old.used)], None, 0.0)
        fresh_values = across[np.ix_(old.used, new.used[fresh])]
        transfer[:, fresh] = span.coefficients(span.features(fresh_values))
    values = old.lower / old.root[:, None]  # kernel values with old landmarks, from features
    moved = new.root[:, None] * (transfer.T @ values)
    return scipy.linalg.solve_triangular(new.lower, moved, lower=True, check_finite=False)
