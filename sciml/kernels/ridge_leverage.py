"""How much each point matters to kernel ridge regression: ridge leverage scores, exactly.

    tau_i = [K (K + ridge I)^{-1}]_{ii},     effective dimension = sum_i tau_i

A point with a score near 1 is one that the others cannot stand in for [1]_.

References
----------
.. [1] A. Alaoui, M. W. Mahoney, "Fast randomized kernel ridge regression with statistical
   guarantees", NeurIPS 2015. arXiv:1411.0306
"""

import numpy as np

from sciml._check import check_finite, check_interval, check_square
from sciml.kernels.arrays import Array, array_library
from sciml.kernels.linear_algebra import add_to_diagonal, cholesky, solve_lower
from sciml.kernels.pairwise import KernelLike, pairwise_kernel

__all__ = ["effective_dimension", "ridge_leverage_scores"]

_BLOCK = 512


def ridge_leverage_scores(
    X: Array,
    ridge: float = 1.0,
    *,
    kernel: KernelLike = "precomputed",
    gamma: float | None = None,
    degree: float = 3,
    coef0: float = 1.0,
) -> Array:
    """Compute ``diag(K (K + ridge I)^{-1})``.

    Parameters
    ----------
    X : array of shape (n, n) or (n, n_features)
        Kernel matrix; or points, if `kernel` is not "precomputed". NumPy, torch or CuPy.
    ridge : float, default=1.0
        Ridge of the scores, positive.
    kernel, gamma, degree, coef0
        As in `pairwise_kernel`. With a kernel the matrix is built in place and factored; one
        n x n matrix is held beside it.

    Returns
    -------
    array of shape (n,)
        Scores in [0, 1], in the library of X.

    Raises
    ------
    ValueError
        If `ridge` is not positive, or the matrix is not square, symmetric, finite and positive
        semidefinite.

    Notes
    -----
    O(n^3) time and O(n^2) memory. `RidgeLeverageNystroem` approximates the scores in less.

    References
    ----------
    .. [1] A. Alaoui, M. W. Mahoney, 2015. arXiv:1411.0306

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import ridge_leverage_scores
    >>> ridge_leverage_scores(np.eye(3), ridge=1.0)
    array([0.5, 0.5, 0.5])
    """
    check_interval("ridge", ridge, 0, closed="neither")
    K = _kernel_matrix(X, kernel, gamma, degree, coef0)
    n = len(K)
    # One copy, whose diagonal alone changes between the two factorisations.
    shifted = K.clone() if array_library(K) == "torch" else K.copy()
    eps = float(np.finfo(str(K.dtype).replace("torch.", "")).eps)
    rounding = 4 * n * eps * float(K.diagonal().max())
    try:
        add_to_diagonal(shifted, rounding)
        cholesky(shifted)
        add_to_diagonal(shifted, ridge - rounding)
        factor = cholesky(shifted)
    except np.linalg.LinAlgError:
        raise ValueError(
            "the kernel matrix must be positive semidefinite, but it has a negative eigenvalue "
            "(or ridge is below the rounding errors of its entries)"
        ) from None
    # The inverse of L by columns: [A^{-1}]_ii is the squared norm of its i-th column.
    # Columns from `start` on are zero above it, which leaves a third of the work.
    inverse_diagonal = K.diagonal() * 0
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        unit = shifted[start:, : stop - start] * 0
        add_to_diagonal(unit[: stop - start], 1)
        columns = solve_lower(factor[start:, start:], unit)
        inverse_diagonal[start:stop] = (columns * columns).sum(0)
    scores = 1 - ridge * inverse_diagonal
    return scores.clip(0, 1)


def effective_dimension(
    X: Array,
    ridge: float = 1.0,
    *,
    kernel: KernelLike = "precomputed",
    gamma: float | None = None,
    degree: float = 3,
    coef0: float = 1.0,
) -> float:
    """Compute ``trace(K (K + ridge I)^{-1})``, the degrees of freedom of kernel ridge regression.

    Parameters
    ----------
    X, ridge, kernel, gamma, degree, coef0
        As in `ridge_leverage_scores`.

    Returns
    -------
    float
        Between 0 and n.

    Raises
    ------
    ValueError
        As in `ridge_leverage_scores`.

    References
    ----------
    .. [1] A. Alaoui, M. W. Mahoney, 2015. arXiv:1411.0306

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import effective_dimension
    >>> round(effective_dimension(np.eye(3), ridge=1.0), 6)
    1.5
    """
    scores = ridge_leverage_scores(X, ridge, kernel=kernel, gamma=gamma, degree=degree, coef0=coef0)
    return float(scores.sum())


def check_kernel_matrix(K: Array) -> None:
    """Raise ValueError unless K is square, finite, symmetric and has no negative diagonal."""
    check_square("K", K)
    check_finite("K", K)
    scale = float(abs(K).max())
    if float(abs(K - K.T).max()) > 1e-6 * scale:
        raise ValueError(
            "K must be symmetric, but it differs from its transpose by "
            f"{float(abs(K - K.T).max()):.3g}"
        )
    if float(K.diagonal().min()) < 0:
        raise ValueError(
            "K must be positive semidefinite, but its diagonal holds "
            f"{float(K.diagonal().min()):.3g}"
        )


def _kernel_matrix(
    X: Array, kernel: KernelLike, gamma: float | None, degree: float, coef0: float
) -> Array:
    if not (isinstance(kernel, str) and kernel == "precomputed"):
        return pairwise_kernel(X, None, kernel, gamma=gamma, degree=degree, coef0=coef0)
    if array_library(X) == "numpy":
        X = np.asarray(X)
        if X.dtype not in (np.float32, np.float64):
            X = X.astype(np.float64)
    check_kernel_matrix(X)
    return X
