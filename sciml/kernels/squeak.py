"""SQUEAK: choose landmarks in one pass, by ridge leverage scores estimated from the landmarks.

The state is a *dictionary* of points, each with a probability p~ and a number of copies out of
q. New points enter with p~ = 1 and all q copies; then every score is estimated with the points
in the dictionary alone, probabilities fall to ``min(p~, tau~)``, and copies are thinned
binomially [1]_. A point's weight ``copies / (q p~)`` keeps every sum over the dictionary
unbiased for the sum over all points seen.

    tau~_i = (1 - eps)/ridge (k_ii - k_i' S (S' K S + ridge I)^{-1} S' k_i)

Points that enter with weight 1 add no error, so any number may enter at once: blocks give the
guarantee of single arrivals at a fraction of the cost. When two dictionaries are merged both
bring an error, which the ridge inside, ``(1 + eps) ridge``, accounts for.

References
----------
.. [1] D. Calandriello, A. Lazaric, M. Valko, "Distributed adaptive sampling for kernel matrix
   approximation", AISTATS 2017. arXiv:1803.10172
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sciml.kernels.arrays import Array, cast_like, concatenate, take, to_double, to_numpy
from sciml.kernels.linear_algebra import add_to_diagonal, inverse_diagonal, kernel_cholesky

__all__ = [
    "Dictionary",
    "check_residuals",
    "expand",
    "keep_to_limit",
    "merge_dictionaries",
    "shrink",
    "squeak_scores",
]

Kernel = Callable[[Array, Array | None], Array]


@dataclass(frozen=True)
class Dictionary:
    """Points that stand for all points seen.

    Attributes
    ----------
    points : array of shape (m, n_features)
        The points themselves.
    indices : ndarray of shape (m,)
        Their positions in the stream.
    probabilities : ndarray of shape (m,)
        Their inclusion probabilities p~, relative to `budget`.
    copies : ndarray of shape (m,)
        Copies left, out of `budget`.
    budget : float
        Copies q that a point enters with.
    n_seen : int
        Points seen so far.
    ridge_factor : float
        How many times the ridge is raised, to keep to a limit.
    """

    points: Array
    indices: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    copies: NDArray[np.int64]
    budget: float
    n_seen: int
    ridge_factor: float = 1.0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Importance weights ``copies / (budget p~)``, of shape (m,)."""
        return self.copies / (self.budget * self.probabilities)


def expand(dictionary: Dictionary | None, points: Array, budget: int) -> Dictionary:
    """Add points with all their copies and weight 1.

    Under a limit the budget of a dictionary may be no integer: new points then get the next one,
    and a probability just above 1 makes their weight 1 again.

    Parameters
    ----------
    dictionary : Dictionary or None
        What there is; None at the start.
    points : array of shape (n, n_features)
        New points of the stream.
    budget : int
        Copies q a point, for a new dictionary; otherwise its own budget counts.

    Returns
    -------
    Dictionary
    """
    n = len(points)
    start = 0 if dictionary is None else dictionary.n_seen
    share = float(budget) if dictionary is None else dictionary.budget
    copies = int(np.ceil(share))
    new = Dictionary(
        points,
        np.arange(start, start + n),
        np.full(n, copies / share),
        np.full(n, copies),
        share,
        start + n,
    )
    return new if dictionary is None else _union(dictionary, new, n_seen=start + n)


def squeak_scores(
    dictionary: Dictionary, kernel: Kernel, ridge: float, eps: float, *, merged: bool = False
) -> NDArray[np.float64]:
    """Estimate ridge leverage scores from the points of a dictionary.

    Parameters
    ----------
    dictionary : Dictionary
        Dictionary with its weights.
    kernel : callable
        ``kernel(X, Y)`` returns the kernel matrix.
    ridge : float
        Ridge of the scores, to be multiplied by the dictionary's `ridge_factor`.
    eps : float
        Accuracy in (0, 1).
    merged : bool, default=False
        Whether the dictionary is the union of two that were sampled.

    Returns
    -------
    ndarray of shape (m,)
        Estimates between tau / alpha and tau if the dictionary is eps-accurate, with alpha
        = (1 + eps)/(1 - eps), or (1 + 3 eps)/(1 - eps) when merged; clipped to [0, 1].

    Raises
    ------
    ValueError
        If the kernel is not positive semidefinite.

    Notes
    -----
    For points of the dictionary, S'k_i is a column of ``A - inside I`` over sqrt(w_i), with
    ``A = S'KS + inside I``. The residual is therefore ``inside (1 - inside [A^{-1}]_ii) / w_i``,
    which needs no more than the diagonal of an inverse.

    Computed in float64 whatever the dtype of the points: the residuals are differences, and a
    small ridge would drown in the rounding of float32.
    """
    system = to_double(kernel(to_double(dictionary.points), None)) + 0
    root = cast_like(np.sqrt(dictionary.weights), system)
    system *= root[:, None]
    system *= root
    ridge = ridge * dictionary.ridge_factor
    inside = (1 + eps) * ridge if merged else ridge
    add_to_diagonal(system, inside)
    share = 1 - inside * to_numpy(inverse_diagonal(kernel_cholesky(system)))
    if share.min() < -1e-3:
        raise ValueError(
            "kernel must be positive semidefinite, but on some of the points it has a negative "
            f"leverage ({share.min():.3g})"
        )
    return np.clip((1 - eps) / ridge * inside * share / dictionary.weights, 0, 1)


def check_residuals(residual: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    """Raise ValueError if ``k_ii - k_i' (...)^{-1} k_i`` is negative, as for no kernel."""
    if residual.min() < -1e-3 * np.abs(values).max():
        raise ValueError(
            "kernel must be positive semidefinite, but the part of a point that the landmarks "
            f"do not explain has the squared length {residual.min():.3g}"
        )


def shrink(
    dictionary: Dictionary, scores: NDArray[np.float64], rng: np.random.RandomState
) -> Dictionary:
    """Lower probabilities to the scores and thin the copies accordingly.

    Parameters
    ----------
    dictionary : Dictionary
        Dictionary to thin.
    scores : ndarray of shape (m,)
        Estimated scores.
    rng : numpy.random.RandomState
        Draws the binomials.

    Returns
    -------
    Dictionary
        Without the points that lost all copies, except that the newest always stays.
    """
    probabilities = np.minimum(np.maximum(scores, np.finfo(float).tiny), dictionary.probabilities)
    copies = rng.binomial(dictionary.copies, probabilities / dictionary.probabilities)
    if not copies.any():
        # An empty dictionary could never estimate a score again.
        newest = int(dictionary.indices.argmax())
        copies[newest] = dictionary.copies[newest]
        probabilities[newest] = dictionary.probabilities[newest]
    keep = np.flatnonzero(copies)
    return replace(
        dictionary,
        points=take(dictionary.points, keep),
        indices=dictionary.indices[keep],
        probabilities=probabilities[keep],
        copies=copies[keep],
    )


def merge_dictionaries(
    a: Dictionary,
    b: Dictionary,
    kernel: Kernel,
    ridge: float,
    eps: float,
    rng: np.random.RandomState,
) -> Dictionary:
    """Merge the dictionaries of two streams into one for both, as if b had followed a.

    Parameters
    ----------
    a, b : Dictionary
        Dictionaries of disjoint sets of points; the smaller budget becomes that of the result.
    kernel, ridge, eps, rng
        As in `squeak_scores` and `shrink`.

    Returns
    -------
    Dictionary
        eps-accurate with high probability if both were; indices of b follow those of a.
    """
    budget = min(a.budget, b.budget)
    a, b = (_keep_copies(part, budget / part.budget, rng) for part in (a, b))
    both = _union(a, replace(b, indices=b.indices + a.n_seen), n_seen=a.n_seen + b.n_seen)
    return shrink(both, squeak_scores(both, kernel, ridge, eps, merged=True), rng)


def keep_to_limit(
    dictionary: Dictionary,
    n_components: int,
    kernel: Kernel,
    ridge: float,
    eps: float,
    rng: np.random.RandomState,
) -> Dictionary:
    """Lower the budget, and then raise the ridge, until at most `n_components` points are left.

    Copies are thinned binomially, so a lower budget is as if it had been set from the start. It
    does not fall below ``2/(1 - eps)``: as a point with one copy has a weight of 1/(budget p~),
    which bounds its next estimate by ``(1 - eps) budget p~``, a budget below ``1/(1 - eps)`` would
    make probabilities fall at each update, whatever the data. A higher ridge asks for less: the
    dictionary becomes one for the directions that the limit has room for. Weights stay unbiased
    either way.

    Parameters
    ----------
    dictionary : Dictionary
        Dictionary.
    n_components : int
        Largest number of points.
    kernel, ridge, eps, rng
        As in `squeak_scores` and `shrink`.

    Returns
    -------
    Dictionary
    """
    floor = 2 / (1 - eps)
    while len(dictionary) > n_components:
        if dictionary.budget > floor:
            share = max(0.5, min(0.95, n_components / len(dictionary)))
            budget = max(floor, share * dictionary.budget)  # against rounding
            dictionary = replace(
                _keep_copies(dictionary, budget / dictionary.budget, rng), budget=budget
            )
        else:
            dictionary = replace(dictionary, ridge_factor=1.25 * dictionary.ridge_factor)
            dictionary = shrink(dictionary, squeak_scores(dictionary, kernel, ridge, eps), rng)
    return dictionary


def _keep_copies(dictionary: Dictionary, share: float, rng: np.random.RandomState) -> Dictionary:
    """Keep each copy with probability `share`, and lower the budget by it."""
    if share == 1:
        return dictionary
    copies = rng.binomial(dictionary.copies, share)
    if not copies.any():
        copies[int(rng.randint(len(copies)))] = 1
    keep = np.flatnonzero(copies)
    return replace(
        dictionary,
        points=take(dictionary.points, keep),
        indices=dictionary.indices[keep],
        probabilities=dictionary.probabilities[keep],
        copies=copies[keep],
        budget=dictionary.budget * share,
    )


def _union(a: Dictionary, b: Dictionary, *, n_seen: int) -> Dictionary:
    return Dictionary(
        concatenate([a.points, b.points]),
        np.concatenate([a.indices, b.indices]),
        np.concatenate([a.probabilities, b.probabilities]),
        np.concatenate([a.copies, b.copies]),
        a.budget,
        n_seen,
        max(a.ridge_factor, b.ridge_factor),
    )
