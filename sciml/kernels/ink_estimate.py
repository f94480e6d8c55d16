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
from sciml.kernels.linear_algebra import cholesky, solve_lower
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
        Copies q. The expected dictionary holds at most about q points; 20 to 50 times the
        effective dimension works in practice. The theory asks for
        ``28 alpha beta d_eff log(4 n/delta) / eps^2``, far more.
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
        If d~ runs away, which means that the budget is too small.

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
    """State of INK-Estimate between arrivals; see `ink_estimate` for the arguments."""

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
        # Rows grow by doubling, so that a step does not copy all columns.
        self._columns = np.empty((64, 0))
        self._gram = np.empty((0, 0))
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
        t = self.n_seen
        column = column.astype(np.float64)
        if t == len(self._columns):
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)])
        kept = self._columns[:t]
        row = column[self.indices]
        scores, increment = self._estimate(kept, column, row, value)
        self.effective_dimension += increment

        # The new point joins: its column, and one more row for every column.
        cross = kept.T @ column
        self._gram += np.outer(row, row)
        corner = column @ column + value**2
        border = cross + row * value
        self._gram = np.block([[self._gram, border[:, None]], [border[None], corner]])
        columns = np.empty((len(self._columns), len(row) + 1))
        columns[:t, :-1], columns[:t, -1] = kept, column
        columns[t, :-1], columns[t, -1] = row, value
        self._columns = columns
        self.indices = np.append(self.indices, t)
        self.copies = np.append(self.copies, 1 if self.shrink_expand == "weights" else self.budget)
        self.probabilities = np.append(self.probabilities, 1.0)
        self.n_seen = t + 1
        self._shrink(scores, rng)
        self._guard()

    def _estimate(
        self,
        kept: NDArray[np.float64],
        column: NDArray[np.float64],
        row: NDArray[np.float64],
        value: float,
    ) -> tuple[NDArray[np.float64], float]:
        """Scores of the dictionary's points and of the new one; increment of d~."""
        ridge, eta = self.ridge, self.alpha * self.ridge
        root = np.sqrt(self.weights)
        # Kernel among the points kept, from their columns.
        own = kept[self.indices] if len(self.indices) else np.empty((0, 0))
        W = root[:, None] * own * root
        W[np.diag_indices_from(W)] += ridge
        CC = root[:, None] * self._gram * root
        g = root * (kept.T @ column)  # C' k
        energy = float(column @ column)
        if len(root):
            factor = cholesky(CC + eta * W)
            G = root[:, None] * self._gram  # C' times the raw columns
            half = solve_lower(factor, np.column_stack([G, g]))
            # (K~ + eta I)^{-1} between columns, by the Woodbury identity.
            inner = (np.diag(self._gram) - (half[:, :-1] ** 2).sum(0)) / eta
            cross = (kept.T @ column - half[:, :-1].T @ half[:, -1]) / eta
            with_itself = (energy - half[:, -1] @ half[:, -1]) / eta
        else:
            inner = cross = np.empty(0)
            with_itself = energy / eta
        schur = value + eta - with_itself
        quadratic = inner + (row - cross) ** 2 / schur
        new = with_itself + (value - with_itself) ** 2 / schur
        diagonal = own.diagonal() if len(root) else np.empty(0)
        scores = (np.append(diagonal, value) - np.append(quadratic, new)) / eta

        numerator = value - with_itself
        if self.deff == "paper":
            if len(root):
                solved = np.linalg.solve(CC + ridge * W, g)
                residual = (column - kept @ (root * solved)) / ridge
            else:
                residual = column / ridge
            numerator -= (1 - self.eps) ** 2 / 4 * ridge * float(residual @ residual)
        increment = max(0.0, numerator / (value + ridge - with_itself))
        return np.clip(scores, 0, 1), increment

    def _shrink(self, scores: NDArray[np.float64], rng: np.random.RandomState) -> None:
        tiny = np.finfo(float).tiny
        share = np.maximum(scores, tiny) / max(self.effective_dimension, tiny)
        probabilities = np.minimum(share, self.probabilities)
        copies = self.copies.copy()
        if self.shrink_expand == "copies":
            copies = rng.binomial(copies, probabilities / self.probabilities)
        else:
            for i in range(len(copies)):
                while copies[i] and copies[i] * probabilities[i] <= 1 / self.budget:
                    stays = rng.uniform() < copies[i] / (copies[i] + 1)
                    copies[i] = copies[i] + 1 if stays else 0
        if not copies.any():
            copies[-1], probabilities[-1] = self.copies[-1], 1.0
        keep = np.flatnonzero(copies)
        self.indices, self.copies = self.indices[keep], copies[keep]
        self.probabilities, self.scores = probabilities[keep], scores[keep]
        self._columns = self._columns[:, keep]
        self._gram = self._gram[np.ix_(keep, keep)]

    def _guard(self) -> None:
        estimate = float(self.weights @ self.scores)
        runaway = self.effective_dimension > max(10.0, 4 * self.alpha * estimate)
        if runaway and self.n_seen >= 20 and not self._warned:
            self._warned = True
            warnings.warn(
                f"the effective dimension is estimated at {self.effective_dimension:.1f}, but "
                f"the dictionary of {len(self.indices)} points explains {estimate:.1f}: "
                f"budget={self.budget} is too small",
                stacklevel=4,
            )
