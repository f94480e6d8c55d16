"""Draw landmarks from points that are all at hand: exact scores, recursive halving, BLESS.

Each function returns positions and importance weights: with the weights, sums over landmarks
are unbiased for sums over all points.

References
----------
.. [1] A. Alaoui, M. W. Mahoney, "Fast randomized kernel ridge regression with statistical
   guarantees", NeurIPS 2015. arXiv:1411.0306
.. [2] C. Musco, C. Musco, "Recursive sampling for the Nyström method", NeurIPS 2017.
   arXiv:1605.07583
.. [3] A. Rudi, D. Calandriello, L. Carratino, L. Rosasco, "On fast leverage score sampling and
   optimal learning" (BLESS), NeurIPS 2018. arXiv:1810.13258
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sciml._check import check_finite
from sciml.kernels.arrays import Array, cast_like, take, to_double, to_numpy
from sciml.kernels.linear_algebra import add_to_diagonal, kernel_cholesky, solve_lower
from sciml.kernels.ridge_leverage import ridge_leverage_scores
from sciml.kernels.squeak import check_residuals

__all__ = [
    "Sample",
    "bless_sample",
    "exact_leverage_sample",
    "own_landmarks",
    "recursive_leverage_sample",
    "uniform_sample",
]

Kernel = Callable[[Array, Array | None], Array]
Diagonal = Callable[[Array], Array]
_BLOCK = 4096  # rows that are scored at once


class Sample(NamedTuple):
    """Landmarks: positions, importance weights, and the leverage scores they were drawn by."""

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]
    scores: NDArray[np.float64]


def own_landmarks(landmarks: Any, points: Array, precomputed: bool) -> tuple[Array, Sample]:
    """Check landmarks that the user gives: positions among the points, or points.

    Parameters
    ----------
    landmarks : array of shape (m,) or (m, n_features)
        Integers, or points.
    points : array of shape (n, n_features)
        Points of the fit.
    precomputed : bool
        Whether `points` are but the positions of the rows of a kernel matrix.

    Returns
    -------
    points : array of shape (m, n_features)
        Landmarks.
    sample : Sample
        Their positions, -1 for points; weights 1, scores NaN.

    Raises
    ------
    ValueError
        If they are no such array.
    """
    shape = np.shape(landmarks)
    if len(shape) == 1:
        indices = np.asarray(to_numpy(landmarks))
        if indices.dtype.kind not in "iu":
            raise ValueError(
                f"landmarks must be integers when they are positions, got {indices.dtype}"
            )
        n = len(points)
        if not len(indices) or indices.min() < 0 or indices.max() >= n:
            raise ValueError(f"landmarks must be positions in [0, {n}), got {landmarks!r:.100}")
        if len(np.unique(indices)) < len(indices):
            raise ValueError("landmarks must be distinct positions, got duplicates")
        chosen = take(points, indices)
    elif len(shape) == 2 and not precomputed and shape[1] == points.shape[1]:
        chosen = cast_like(landmarks, points)
        check_finite("landmarks", chosen)
        indices = np.full(shape[0], -1)
    else:
        raise ValueError(
            f"landmarks must be positions of shape (m,), or points of shape "
            f"(m, {points.shape[1]}) for a kernel that is not precomputed, got shape {shape}"
        )
    m = len(indices)
    return chosen, Sample(indices, np.ones(m), np.full(m, np.nan))


def uniform_sample(n: int, n_components: int, rng: np.random.RandomState) -> Sample:
    """Draw distinct points uniformly, in the order that scikit-learn's `Nystroem` draws them."""
    indices = rng.permutation(n)[:n_components]
    m = len(indices)
    return Sample(indices, np.full(m, n / m), np.full(m, np.nan))


def exact_leverage_sample(
    X: Array,
    kernel: Kernel,
    ridge: float,
    n_components: int,
    rng: np.random.RandomState,
) -> Sample:
    """Draw points in proportion to their exact scores, O(n^3)."""
    K = to_double(kernel(to_double(X), None))
    scores = to_numpy(ridge_leverage_scores(K, ridge))
    n_components = min(n_components, int((scores > 0).sum()))
    inclusion = _inclusion(scores, n_components)
    # Systematic sampling: a fixed size, and each point with its inclusion probability.
    order = rng.permutation(len(scores))
    ends = np.cumsum(inclusion[order])
    marks = rng.uniform() + np.arange(n_components)
    chosen = order[np.minimum(np.searchsorted(ends, marks), len(order) - 1)]
    indices = np.unique(chosen)
    return Sample(indices, 1 / inclusion[indices], scores[indices])


def recursive_leverage_sample(
    X: Array,
    kernel: Kernel,
    diagonal: Diagonal,
    n_components: int,
    rng: np.random.RandomState,
) -> Sample:
    """Halve the points until few are left, and double back, scoring each level by the last.

    The ridge adapts to the tail of the spectrum that `n_components` landmarks leave out.
    O(n n_components^2).
    """
    n = len(X)
    size = min(n_components, n)
    permutation = rng.permutation(n)
    levels = max(0, int(np.ceil(np.log2(n / size))))
    sizes = [n]
    for _ in range(levels):
        sizes.append(int(np.ceil(sizes[-1] / 2)))
    values = _kernel_diagonal(diagonal, X)
    oversample = max(np.log(size), 1.0)
    rank = int(np.ceil(size / (4 * oversample)))

    chosen = permutation[rng.choice(sizes[-1], min(size, sizes[-1]), replace=False)]
    weights = np.ones(len(chosen))
    scores = np.full(len(chosen), np.nan)
    for level in range(levels - 1, -1, -1):
        top = level == 0
        current = permutation[: sizes[level]]
        landmarks = to_double(take(X, chosen))
        system = to_double(kernel(landmarks, None)) + 0  # a copy: the ridge goes in place
        SKS = to_numpy(system)
        if rank >= len(chosen):
            ridge = max(1e-5, 1e-10 * values.max())
        else:
            eigenvalues = np.linalg.eigvalsh(weights[:, None] * SKS * weights)
            tail = (SKS.diagonal() * weights**2).sum() - np.abs(eigenvalues[-rank:]).sum()
            ridge = max(tail / rank, 1e-10 * values.max())
        add_to_diagonal(system, cast_like(ridge / weights**2, system))
        residual = _residuals(X, current, values, kernel, landmarks, system)
        scale = 1.0 if top else oversample
        leverage = np.clip(scale / ridge * np.maximum(residual, 0), 0, 1)
        if not leverage.sum():
            leverage[:] = size / len(leverage)
        if top:
            positive = int((leverage > 0).sum())
            picked = rng.choice(
                len(current), min(size, positive), replace=False, p=leverage / leverage.sum()
            )
            weights = np.ones(len(picked))
        else:
            picked = np.flatnonzero(rng.uniform(size=len(current)) < leverage)
            if not len(picked):
                leverage[:] = size / len(leverage)
                picked = rng.choice(len(current), min(size, len(current)), replace=False)
            weights = 1 / np.sqrt(leverage[picked])
        chosen, scores = current[picked], leverage[picked]
    return Sample(chosen, weights**2, scores)


def bless_sample(
    X: Array,
    kernel: Kernel,
    diagonal: Diagonal,
    ridge: float,
    budget: float,
    rng: np.random.RandomState,
) -> Sample:
    """Lower the ridge from n to its target, each time scoring by the landmarks of the last.

    Only candidates drawn uniformly enough are scored, so the cost is that of the final
    landmarks, not of n.
    """
    n = len(X)
    values = _kernel_diagonal(diagonal, X)
    # The published order: the first landmarks are drawn for a ridge of n.
    keep = rng.uniform(size=n) < np.minimum(budget * values / n, 1)
    keep[0] = True
    chosen = np.flatnonzero(keep)
    probabilities = np.minimum(budget * values[chosen] / n, 1)
    scores = np.full(len(chosen), np.nan)
    for step in np.geomspace(max(n, ridge), ridge, max(2, int(np.ceil(np.log(n))))):
        ceiling = np.minimum(budget * values / (values + step), 1)
        candidates = np.flatnonzero(rng.uniform(size=n) < ceiling)
        if not len(candidates):
            candidates = np.array([int(rng.randint(n))])
        landmarks = to_double(take(X, chosen))
        system = to_double(kernel(landmarks, None)) + 0
        add_to_diagonal(system, cast_like(step * probabilities, system))
        residual = _residuals(X, candidates, values, kernel, landmarks, system)
        tau = np.clip(residual / step, 0, 1)
        share = np.minimum(budget * tau, ceiling[candidates]) / ceiling[candidates]
        kept = np.flatnonzero(rng.uniform(size=len(candidates)) < share)
        if not len(kept):
            kept = np.array([int(tau.argmax())])
            share[kept] = max(float(share[kept[0]]), 1 / n)
        chosen, scores = candidates[kept], tau[kept]
        probabilities = share[kept] * ceiling[chosen]
    return Sample(chosen, 1 / np.maximum(probabilities, 1 / n), scores)


def _kernel_diagonal(diagonal: Diagonal, X: Array) -> NDArray[np.float64]:
    values = to_numpy(diagonal(X)).astype(np.float64)
    if values.min() < 0:
        raise ValueError(
            f"kernel must be positive semidefinite, but k(x, x) is {values.min():.3g} for a row"
        )
    return values


def _residuals(
    X: Array,
    rows: NDArray[np.int64],
    values: NDArray[np.float64],
    kernel: Kernel,
    landmarks: Array,
    system: Array,
) -> NDArray[np.float64]:
    """``k_ii - k_i' system^{-1} k_i`` for the kernel values k_i of some rows with landmarks."""
    factor = kernel_cholesky(system)
    residual = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        half = solve_lower(factor, to_double(kernel(landmarks, to_double(take(X, block)))))
        residual[start : start + _BLOCK] = values[block] - to_numpy((half * half).sum(0))
    check_residuals(residual, values[rows])
    return residual


def _inclusion(scores: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Inclusion probabilities proportional to the scores, at most 1, that sum to `size`."""
    inclusion = np.zeros(len(scores))
    sure = np.zeros(len(scores), dtype=bool)
    while True:
        left = size - int(sure.sum())
        rest = scores[~sure].sum()
        inclusion[~sure] = left * scores[~sure] / rest if rest > 0 else 0
        inclusion[sure] = 1
        over = inclusion > 1
        if not over.any():
            return inclusion
        sure |= over
