"""INK-Estimate: incremental ridge leverage scores from all columns of the kernel matrix.

At each arrival the kernel values between the new point and **all** points seen are known. With
the regularised Nyström approximation K~ from the dictionary, and ``alpha = (2 - eps)/(1 - eps)``,

    tau~_i = (k_ii - k_i' (Kbar + alpha ridge I)^{-1} k_i) / (alpha ridge),

where Kbar is K~ bordered by the new column. Dividing by an estimate d~ of the effective
dimension gives sampling probabilities that sum to about one [1]_. It touches columns as long as
the stream, so its cost a step grows with the stream: O(t m + m^3) here, by the Woodbury
identity. SQUEAK, which needs only the dictionary, is the one to use on long streams.

References
----------
.. [1] D. Calandriello, A. Lazaric, M. Valko, "Analysis of Nyström method with sequential ridge
   leverage scores", UAI 2016. arXiv:2604.20077
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array, check_random_state

from sciml._check import check_choice, check_integer, check_interval
from sciml.kernels.linear_algebra import kernel_cholesky, solve_lower
from sciml.kernels.pairwise import KernelLike, kernel_diag, pairwise_kernel

__all__ = ["INKEstimate", "ink_estimate"]


class INKEstimate(NamedTuple):
    """Dictionary of INK-Estimate: positions, weights, probabilities and estimates.

    ``leverage_scores`` are the last estimates for the points kept, ``effective_dimension`` the
    estimate d~ after the last point.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    leverage_scores: NDArray[np.float64]
    effective_dimension: float


def ink_estimate(
    X: NDArray[Any],
    ridge: float = 1.0,
    *,
    budget: int = 600,
    eps: float = 0.5,
    shrink_expand: str = "copies",
    deff: str = "safe",
    kernel: KernelLike = "rbf",
    gamma: float | None = None,
    degree: float = 3,
    coef0: float = 1.0,
    random_state: int | np.random.RandomState | None = None,
) -> INKEstimate:
    """Choose landmarks sequentially by estimated ridge leverage scores.

    Parameters
    ----------
    X : array of shape (n, n_features)
        Points in the order of arrival.
    ridge : float, default=1.0
        Ridge of the scores, positive.
    budget : int, default=600
        Copies q. The expected dictionary holds at most about q points; 20 times the effective
        dimension works in practice, and 50 to 100 times where the ridge is small. The theory
        asks for ``28 alpha beta d_eff log(4 n/delta) / eps^2``, far more.
    eps : float in (0, 1), default=0.5
        Accuracy that the scores assume.
    shrink_expand : {"copies", "weights"}, default="copies"
        How points are dropped: binomial thinning of q copies, or one integer weight b a point
        that grows to b + 1 with probability b / (b + 1) while ``b p~ <= 1/q``, or else drops
        the point. Both keep weights unbiased.
    deff : {"safe", "paper"}, default="safe"
        Increment of the effective dimension. "safe" never falls below the exact one while the
        dictionary is accurate; "paper" subtracts a further term.
    kernel, gamma, degree, coef0
        As in `pairwise_kernel`; or "precomputed" for a kernel matrix `X`.
    random_state : int, RandomState instance or None, default=None
        Seed of the sampling.

    Returns
    -------
    INKEstimate
        ``indices``, ``weights``, ``probabilities``, ``leverage_scores`` and
        ``effective_dimension``.

    Raises
    ------
    ValueError
        If an argument is out of range, or X holds NaN.

    Warns
    -----
    UserWarning
        If the dictionary cannot be accurate any more, which means that the budget is too small:
        the Nyström matrix explains more of a new point than there is, or d~ runs away.

    Notes
    -----
    The printed constants of the paper's estimator of the effective dimension could not be
    checked; the increments here are derived from its idea: the exact increment

        Delta = (c - k'A^{-1}k - ridge k'A^{-2}k) / (c + ridge - k'A^{-1}k),  A = K + ridge I,

    with A replaced by sketched matrices so that d~ is not too small.

    References
    ----------
    .. [1] D. Calandriello, A. Lazaric, M. Valko, UAI 2016. arXiv:2604.20077

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import ink_estimate
    >>> X = np.random.default_rng(0).standard_normal((200, 2))
    >>> result = ink_estimate(X, ridge=1.0, budget=400, random_state=0)
    >>> 5 < len(result.indices) < 200
    True
    """
    check_interval("ridge", ridge, 0, closed="neither")
    check_integer("budget", budget, 1)
    check_interval("eps", eps, 0, 1, closed="neither")
    check_choice("shrink_expand", shrink_expand, ("copies", "weights"))
    check_choice("deff", deff, ("safe", "paper"))
    X = check_array(X, dtype=[np.float64, np.float32])
    rng = check_random_state(random_state)
    stream = INKStream(ridge, budget, eps, shrink_expand, deff)
    if isinstance(kernel, str) and kernel == "precomputed":
        for t in range(len(X)):
            stream.update(X[:t, t], float(X[t, t]), rng)
    else:
        options: dict[str, Any] = {"gamma": gamma, "degree": degree, "coef0": coef0}
        diagonal = kernel_diag(X, kernel, **options)
        for t in range(len(X)):
            column = (
                pairwise_kernel(X[:t], X[t : t + 1], kernel, **options)[:, 0]
                if t
                else np.empty(0, X.dtype)
            )
            stream.update(column, float(diagonal[t]), rng)
    return stream.result()


class INKStream:
    """State of INK-Estimate between arrivals; see `ink_estimate` for the arguments.

    The columns kept are rows of one array with spare rows and spare room, so that a step writes
    a column and an entry instead of copying all of them. What is written lies outside what the
    state before the step reads: a shallow copy taken before `update` stays valid.
    """

    def __init__(
        self, ridge: float, budget: int, eps: float, shrink_expand: str, deff: str
    ) -> None:
        self.ridge, self.budget, self.eps = ridge, budget, eps
        self.shrink_expand, self.deff = shrink_expand, deff
        self.alpha = (2 - eps) / (1 - eps)
        self.n_seen = 0
        self.effective_dimension = 0.0
        self.indices = np.empty(0, np.int64)
        self.copies = np.empty(0, np.int64)
        self.probabilities = np.empty(0)
        self.scores = np.empty(0)
        self._columns = np.zeros((16, 64))  # row `_slots[i]` holds the column of point i
        self._slots = np.empty(0, np.int64)
        self._gram = np.empty((0, 0))  # inner products of the columns kept
        self._warned = False

    @property
    def weights(self) -> NDArray[np.float64]:
        """Importance weights of the points kept."""
        if self.shrink_expand == "weights":
            return self.copies.astype(np.float64)
        return self.copies / (self.budget * self.probabilities)

    def result(self) -> INKEstimate:
        """Return the dictionary."""
        return INKEstimate(
            self.indices,
            self.weights,
            self.probabilities,
            self.scores,
            self.effective_dimension,
        )

    def update(self, column: NDArray[Any], value: float, rng: np.random.RandomState) -> None:
        """Take in a point: its kernel values with all points before it, and with itself."""
        column = column.astype(np.float64)
        self._check(column, value)
        cross = self._with_columns(column)
        scores, increment, possible = self.estimate(column, value, cross)
        self.effective_dimension += increment
        self._join(column, value, cross)
        self._shrink(scores, rng)
        self._guard(possible)

    def estimate(
        self, column: NDArray[np.float64], value: float, cross: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.float64], float, bool]:
        """Scores of the points kept and of a new one, increment of d~, and a sign of trouble.

        The last is False if the dictionary explains more of the point than there is, which an
        accurate one cannot.
        """
        ridge, eta = self.ridge, self.alpha * self.ridge
        if not len(self.indices):
            return np.array([value / (value + eta)]), value / (value + ridge), True
        cross = self._with_columns(column) if cross is None else cross
        m, row, energy = len(cross), column[self.indices], float(column @ column)
        root = np.sqrt(self.weights)
        weight = root[:, None] * root
        own = self._columns[self._slots[:, None], self.indices]  # kernel among the points kept
        CC, W = weight * self._gram, weight * own
        W.reshape(-1)[:: m + 1] += ridge
        # (K~ + eta I)^{-1} between columns, by the Woodbury identity.
        right = np.empty((m, m + 1))
        np.multiply(root[:, None], self._gram, out=right[:, :m])
        right[:, m] = root * cross
        half = solve_lower(kernel_cholesky(CC + eta * W), right)
        inner = (self._gram.diagonal() - np.einsum("ij,ij->j", half[:, :m], half[:, :m])) / eta
        between = (cross - half[:, :m].T @ half[:, m]) / eta
        explained = (energy - half[:, m] @ half[:, m]) / eta
        possible = bool(explained <= value * (1 + 1e-9))
        explained = min(explained, value)  # or else an inverse has negative entries
        schur = value + eta - explained
        quadratic = np.append(
            inner + (row - between) ** 2 / schur, explained + (value - explained) ** 2 / schur
        )
        scores = (np.append(own.diagonal(), value) - quadratic) / eta

        numerator = value - explained
        if self.deff == "paper":
            solved = np.linalg.solve(CC + ridge * W, root * cross)
            kept = self._columns[self._slots, : self.n_seen]
            residual = (column - (root * solved) @ kept) / ridge
            numerator -= (1 - self.eps) ** 2 / 4 * ridge * float(residual @ residual)
        increment = max(0.0, numerator / (value + ridge - explained))
        return np.clip(scores, 0, 1), increment, possible

    def _with_columns(self, column: NDArray[np.float64]) -> NDArray[np.float64]:
        return (self._columns[:, : self.n_seen] @ column)[self._slots]

    def _join(self, column: NDArray[np.float64], value: float, cross: NDArray[np.float64]) -> None:
        """Add the new point: its column, and one more entry for every other column."""
        t, row = self.n_seen, column[self.indices]
        taken = np.zeros(len(self._columns) + 1, dtype=bool)
        taken[self._slots] = True
        slot = int(taken.argmin())
        if t == self._columns.shape[1] or slot == len(self._columns):
            room = np.zeros((max(len(self._columns), 2 * slot), max(64, 2 * t)))
            room[: len(self._columns), :t] = self._columns[:, :t]
            self._columns = room
        self._columns[self._slots, t] = row
        self._columns[slot, :t], self._columns[slot, t] = column, value
        gram = np.empty((len(row) + 1, len(row) + 1))
        gram[:-1, :-1] = self._gram + row[:, None] * row
        gram[:-1, -1] = gram[-1, :-1] = cross + row * value
        gram[-1, -1] = column @ column + value**2
        self._gram = gram
        self._slots = np.append(self._slots, slot)
        self.indices = np.append(self.indices, t)
        self.copies = np.append(self.copies, 1 if self.shrink_expand == "weights" else self.budget)
        self.probabilities = np.append(self.probabilities, 1.0)
        self.n_seen = t + 1

    def _shrink(self, scores: NDArray[np.float64], rng: np.random.RandomState) -> None:
        tiny = np.finfo(float).tiny
        share = np.maximum(scores, tiny) / max(self.effective_dimension, tiny)
        probabilities = np.minimum(share, self.probabilities)
        copies = self.copies.copy()
        if self.shrink_expand == "copies":
            copies = rng.binomial(copies, probabilities / self.probabilities)
        else:
            for i in np.flatnonzero(copies * probabilities <= 1 / self.budget):
                while copies[i] and copies[i] * probabilities[i] <= 1 / self.budget:
                    stays = rng.uniform() < copies[i] / (copies[i] + 1)
                    copies[i] = copies[i] + 1 if stays else 0
        if not copies.any():
            copies[-1], probabilities[-1] = self.copies[-1], 1.0
        keep = np.flatnonzero(copies)
        self.scores = scores[keep]
        self.copies, self.probabilities = copies[keep], probabilities[keep]
        if len(keep) < len(copies):
            self.indices, self._slots = self.indices[keep], self._slots[keep]
            self._gram = self._gram[keep[:, None], keep]

    def _check(self, column: NDArray[np.float64], value: float) -> None:
        """Raise ValueError at values that no positive semidefinite kernel has."""
        t = self.n_seen
        if len(column) != t:
            raise ValueError(f"column must have {t} kernel values, got {len(column)}")
        own = self._columns[self._slots, self.indices]
        bound = np.maximum(own * value, 0)
        if value < 0 or (column[self.indices] ** 2 > bound * (1 + 1e-4) + 1e-12).any():
            raise ValueError(
                "kernel must be positive semidefinite, but for a row "
                f"k(x, x)={value:.3g} is negative or less than k(x, y)^2 / k(y, y)"
            )

    def _guard(self, possible: bool) -> None:
        """Warn once when the dictionary has lost its accuracy."""
        estimate = float(self.weights @ self.scores)
        runaway = self.effective_dimension > max(10.0, 4 * self.alpha * estimate)
        if self._warned or (possible and not (runaway and self.n_seen >= 20)):
            return
        self._warned = True
        warnings.warn(
            f"the dictionary of {len(self.indices)} points cannot be accurate after "
            f"{self.n_seen} rows (effective dimension about {self.effective_dimension:.1f}): "
            f"budget={self.budget} is too small for ridge={self.ridge}",
            stacklevel=4,
        )
