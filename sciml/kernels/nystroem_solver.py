"""What Nyström regression and classification share: landmarks, statistics, streams and solvers.

The equations are those of `sciml.kernels.nystroem_ridge`. Rows pass through in tiles; what is
kept of them is the m x m matrix Z'WZ and the m x k matrix Z'WY.
"""

import copy
import warnings
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from sciml._check import check_choice, check_integer, check_interval
from sciml.kernels.arrays import Array, array_library, cast_like, take, to_double, to_numpy
from sciml.kernels.landmark_factor import LandmarkFactor, carry_matrix, factor_landmarks
from sciml.kernels.linear_algebra import cholesky, solve_lower
from sciml.kernels.nystroem import RidgeLeverageNystroem
from sciml.kernels.pairwise import KernelLike, kernel_matmul, pairwise_kernel
from sciml.kernels.preconditioned_cg import KernelTiles, preconditioned_cg
from sciml.kernels.rows import validate_rows

__all__ = ["NystroemSolver", "WeightedKernel", "check_weights", "row_dtypes", "streams"]

Matrix = NDArray[np.float64]
_SELECT = 1 << 16  # rows that are shown to the choice of landmarks at a time
# Parameters that the statistics of past rows depend on.
_FROZEN = (
    "kernel",
    "gamma",
    "degree",
    "coef0",
    "method",
    "landmarks",
    "n_components",
    "budget",
    "eps",
    "approximation",
)


class WeightedKernel:
    """The kernel ``c k(x, y) c'`` of points (x, c): what a square root weight c makes of k."""

    def __init__(self, kernel: KernelLike, options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = options

    def __call__(self, X: Array, Y: Array) -> Array:
        """Compute the kernel matrix between points whose last column is c."""
        other = None if Y is X else Y[:, :-1]
        K = pairwise_kernel(X[:, :-1], other, self.kernel, **self.options)
        K *= X[:, -1:]
        K *= Y[:, -1]
        return K


class Landmarks(NamedTuple):
    """What the choice of landmarks leaves: where they are, what they weigh, and the map."""

    points: Array
    indices: NDArray[np.int64]  # positions among the rows seen; -1 for points of your own
    # Rows that may be chosen again: their positions among the rows of positive weight, which the
    # selector counts, ascending, and among all, which users count.
    counted: NDArray[np.int64]
    positions: NDArray[np.int64]
    weights: Matrix  # importance weight times sample weight
    effective_dimension: float
    kernel: Matrix
    factor: LandmarkFactor


def streams(model: "NystroemSolver") -> bool:
    """Whether `partial_fit` exists; AttributeError says why not."""
    if model.solver != "direct":
        raise AttributeError(f"partial_fit needs solver='direct', got {model.solver!r}")
    if model.landmarks is None and model.method not in ("squeak", "ink", "uniform"):
        raise AttributeError(
            "partial_fit needs method='squeak', 'ink' or 'uniform', or landmarks of your own, "
            f"got method={model.method!r}"
        )
    return True


class NystroemSolver(BaseEstimator):
    """Base of the two estimators; its parameters are described there."""

    # State of a stream. All of it is replaced at once, after everything else has succeeded.
    _gram: Any  # Z'WZ of the rows so far; None after conjugate gradients
    _moment: Any  # Z'WY
    _landmarks: Landmarks
    _selector: RidgeLeverageNystroem
    _started_with: dict[str, Any]  # parameters that may not change within a stream

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        kernel: KernelLike = "rbf",
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1.0,
        ridge: float | None = None,
        method: str = "squeak",
        landmarks: Any = None,
        n_components: int | None = None,
        budget: int | None = None,
        eps: float = 0.5,
        approximation: str = "projected",
        solver: str = "direct",
        tol: float = 1e-6,
        max_iter: int = 100,
        cache_size: float = 1000,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.alpha = alpha
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.ridge = ridge
        self.method = method
        self.landmarks = landmarks
        self.n_components = n_components
        self.budget = budget
        self.eps = eps
        self.approximation = approximation
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.cache_size = cache_size
        self.random_state = random_state
        self.verbose = verbose

    def _fit_targets(self, X: Array, Y: Array, weight: Matrix | None) -> None:
        """Choose landmarks among the rows that count, and solve for targets of shape (n, k)."""
        self._check_arguments()
        selector = self._new_selector()
        landmarks = self._choose(selector, X, weight, None, 0, stream=False)
        statistics: Any = (None, None)
        if self.solver == "direct":
            statistics = self._statistics(landmarks, X, Y, weight)
            self._solve(landmarks, *statistics)
        else:
            self._solve_cg(landmarks, X, Y, weight)
        self._gram, self._moment = statistics
        self._selector = selector
        self._started_with = self._frozen()
        self.n_samples_seen_ = len(X)

    def _stream_targets(self, X: Array, Y: Array, weight: Matrix | None) -> None:
        """Take in rows: renew the landmarks, carry the statistics over, add the new rows."""
        self._check_arguments()
        if self._is_new():
            selector, before, seen = self._new_selector(), None, 0
        else:
            self._check_unchanged()
            # A copy: if anything goes wrong below, or is interrupted, nothing has happened.
            selector = copy.deepcopy(self._selector)
            before, seen = self._landmarks, self.n_samples_seen_
        landmarks = self._choose(selector, X, weight, before, seen, stream=True)
        gram, moment = self._statistics(landmarks, X, Y, weight)
        if before is not None:
            past, past_moment = self._gram, self._moment
            if landmarks is not before:
                across = self._kernel(to_double(before.points), to_double(landmarks.points))
                move = carry_matrix(
                    before.factor,
                    before.indices,
                    landmarks.factor,
                    landmarks.indices,
                    before.kernel,
                    to_numpy(across),
                )
                past, past_moment = move @ past @ move.T, move @ past_moment
            gram, moment = gram + past, moment + past_moment
        self._solve(landmarks, gram, moment)
        self._gram, self._moment, self._selector = gram, moment, selector
        self._started_with = self._frozen()
        self.n_samples_seen_ = seen + len(X)

    def _is_new(self) -> bool:
        """Whether there are no statistics yet to go on from."""
        if hasattr(self, "dual_coef_") and self._gram is None:
            raise ValueError(
                "solver must be 'direct' in the fit that partial_fit goes on from; "
                "conjugate gradients keep no statistics"
            )
        return not hasattr(self, "dual_coef_")

    # -------------------------------------------------------------- landmarks

    def _choose(
        self,
        selector: RidgeLeverageNystroem,
        X: Array,
        weight: Matrix | None,
        before: Landmarks | None,
        seen: int,
        *,
        stream: bool,
    ) -> Landmarks:
        """Show rows of positive weight to the selector, and factor what it chooses."""
        if self.landmarks is not None and before is not None:
            return before
        rows = np.arange(len(X)) if weight is None else np.flatnonzero(weight > 0)
        if len(rows) == 0 and before is not None:
            return before
        if len(rows) == 0:
            raise ValueError("sample_weight must be positive for at least one row, got zeros")
        known = 0 if before is None else selector.n_samples_seen_
        weighted = isinstance(selector.kernel, WeightedKernel)
        if self.landmarks is not None:
            rows = np.arange(len(X))  # positions of your own are those of all rows
            selector.fit(X)
        elif weighted or stream:
            for start in range(0, len(rows), _SELECT):
                at = rows[start : start + _SELECT]
                selector.partial_fit(self._shown(X, at, weight, weighted))
        elif weight is not None and self.method in ("bless", "recursive", "exact"):
            weighted = True
            selector.set_params(kernel=WeightedKernel(self.kernel, self._options()))
            selector.fit(self._shown(X, rows, weight, weighted))
        else:
            selector.fit(X if len(rows) == len(X) else take(X, rows))
        indices = selector.component_indices_
        counted = positions = np.empty(0, dtype=np.int64)
        if self.landmarks is None:
            counted, positions = known + np.arange(len(rows)), seen + rows
            if before is not None:
                counted = np.concatenate([before.counted, counted])
                positions = np.concatenate([before.positions, positions])
            chosen = np.searchsorted(counted, indices)
            indices = positions[chosen]
            if self.method != "ink":  # which alone can come back to a row that it left out
                chosen.sort()
                counted, positions = counted[chosen], positions[chosen]
        points, weights = selector.components_, selector.weights_
        if weighted:
            weights = weights * to_numpy(points[:, -1]).astype(float) ** 2
            points = points[:, :-1]
        K = to_numpy(self._kernel(to_double(points), None)).astype(float)
        precision = float(np.finfo(str(_floating(X[:1]).dtype).replace("torch.", "")).eps)
        share = weights if self.approximation == "regularized" else None
        factor = factor_landmarks(K, share, self._score_ridge(), precision=precision)
        dimension = selector.effective_dimension_
        return Landmarks(points, indices, counted, positions, weights, dimension, K, factor)

    def _shown(self, X: Array, at: NDArray[np.int64], weight: Matrix | None, root: bool) -> Array:
        """Rows as the selector sees them: with the root of their weight as last column."""
        together = len(at) == at[-1] - at[0] + 1
        rows = _floating(X[int(at[0]) : int(at[-1]) + 1] if together else take(X, at))
        if not root:
            return rows
        column = cast_like(np.ones(len(at)) if weight is None else np.sqrt(weight[at]), rows)
        library = import_module(array_library(rows))
        return library.concatenate([rows, column[:, None]], 1)

    def _score_ridge(self) -> float:
        return self.alpha if self.ridge is None else self.ridge

    def _new_selector(self) -> RidgeLeverageNystroem:
        # A streaming method sees the root of the weight in each row, for weights to come.
        weighted = self.method in ("squeak", "ink") and self.landmarks is None
        options = self._options()
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = int(check_random_state(seed).randint(2**31 - 1))
        return RidgeLeverageNystroem(
            WeightedKernel(self.kernel, options) if weighted else self.kernel,
            **options,
            ridge=self._score_ridge(),
            method=self.method,
            landmarks=self.landmarks,
            n_components=self.n_components,
            budget=self.budget,
            eps=self.eps,
            random_state=seed,
            verbose=self.verbose,
        )

    # -------------------------------------------------------------- statistics and solvers

    def _statistics(
        self, landmarks: Landmarks, X: Array, Y: Array, weight: Matrix | None
    ) -> tuple[Matrix, Matrix]:
        """Return ``Z'WZ`` and ``Z'WY`` for the features of the rows, tile by tile."""
        factor = landmarks.factor
        # Without a ridge the map is ill conditioned: it must act before the square is taken.
        # With one it may act afterwards, once, on an m x m matrix.
        projected = self.approximation == "projected"
        inverse: Array = None
        gram: Array = 0.0
        moment: Array = 0.0
        # In the order of the factor, so that tiles need no reordering.
        points = take(landmarks.points, factor.used)
        for start, C in self._tiles(points, X, weight, cache_bytes=0):
            Zt = C.T
            if projected:
                if inverse is None:
                    # One product a tile is as exact as a triangular solve, since the factor is
                    # cut off well above rounding, and keeps to one linear algebra library: two
                    # thread pools in turn halve the speed of each other.
                    inverse = cast_like(solve_lower(factor.lower, np.eye(len(factor.lower))), C)
                Zt = (C @ inverse.T).T
            gram = gram + to_double(Zt @ Zt.T)
            moment = moment + to_double(Zt @ self._scaled(Y, weight, start, C))
        gram, moment = to_numpy(gram), to_numpy(moment)
        if projected:
            return gram, moment
        return factor.features(factor.features(gram).T), factor.features(moment)

    def _solve(self, landmarks: Landmarks, gram: Matrix, moment: Matrix) -> None:
        """Solve the m x m problem."""
        system = gram.copy()
        system[np.diag_indices_from(system)] += self.alpha
        factor = cholesky(system)
        theta = solve_lower(factor, solve_lower(factor, moment), transposed=True)
        self.n_iter_, self.residual_ = 1, 0.0
        self._set_coefficients(landmarks, landmarks.factor.coefficients(theta))

    def _solve_cg(self, landmarks: Landmarks, X: Array, Y: Array, weight: Matrix | None) -> None:
        """Solve the same problem by preconditioned conjugate gradients, all targets at once."""
        factor = landmarks.factor
        tiles = self._tiles(landmarks.points, X, weight, cache_bytes=self.cache_size * 2**20)
        target = factor.features(tiles.moment(lambda start, C: self._scaled(Y, weight, start, C)))
        # The system as the landmarks alone see it: weighted sums over them are unbiased for
        # sums over all rows.
        total = float(len(X) if weight is None else weight.sum())
        share = np.sqrt(landmarks.weights / landmarks.weights.sum() * total)
        seen = factor.features(landmarks.kernel * share)
        system = seen @ seen.T
        system[np.diag_indices_from(system)] += self.alpha
        lower = cholesky(system)
        solution = preconditioned_cg(
            lambda v: factor.features(tiles.gram(factor.coefficients(v))) + self.alpha * v,
            target,
            lambda v: solve_lower(lower, solve_lower(lower, v), transposed=True),
            tol=self.tol,
            max_iter=self.max_iter,
            verbose=self.verbose,
        )
        self.n_iter_, self.residual_ = solution.n_iter, solution.residual
        if self.residual_ > self.tol:
            warnings.warn(
                f"conjugate gradients stopped after max_iter={self.max_iter} iterations with a "
                f"relative residual of {self.residual_:.2g} above tol={self.tol}",
                ConvergenceWarning,
                stacklevel=4,
            )
        self._set_coefficients(landmarks, factor.coefficients(solution.x))

    def _tiles(
        self, points: Array, X: Array, weight: Matrix | None, *, cache_bytes: float
    ) -> KernelTiles:
        points = cast_like(points, _floating(X[:1]))
        options = self._options()

        def kernel(start: int, stop: int, out: Array | None) -> Array:
            rows = _floating(X[start:stop])
            return pairwise_kernel(rows, points, self.kernel, out=out, **options)

        scale = None if weight is None else np.sqrt(weight)
        return KernelTiles(kernel, len(X), len(points), cache_bytes=cache_bytes, scale=scale)

    def _scaled(self, Y: Array, weight: Matrix | None, start: int, C: Array) -> Array:
        """Rows of the targets that belong to a tile, times the roots of their weights."""
        rows = cast_like(Y[start : start + len(C)], C)
        if weight is None:
            return rows
        return rows * cast_like(np.sqrt(weight[start : start + len(C)]), C)[:, None]

    def _set_coefficients(self, landmarks: Landmarks, coefficients: Matrix) -> None:
        self._landmarks = landmarks
        self.components_ = landmarks.points
        self.component_indices_ = landmarks.indices
        self.weights_ = landmarks.weights
        self.effective_dimension_ = landmarks.effective_dimension
        self.dual_coef_: Matrix = coefficients

    def _decision(self, X: Any) -> Array:
        check_is_fitted(self, "dual_coef_")
        X = validate_rows(self, X, reset=False, dtype=row_dtypes(X))
        like = _floating(X[:1])
        points, coefficients = cast_like(self.components_, like), cast_like(self.dual_coef_, like)
        return kernel_matmul(X, points, coefficients, self.kernel, **self._options())

    # -------------------------------------------------------------- arguments

    def _kernel(self, X: Array, Y: Array | None) -> Array:
        return pairwise_kernel(X, Y, self.kernel, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}

    def _frozen(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _FROZEN}
        return {**values, "ridge": self._score_ridge()}

    def _check_unchanged(self) -> None:
        for name, now in self._frozen().items():
            before = self._started_with[name]
            if before is not now and not np.array_equal(before, now):
                told = " (None is alpha)" if name == "ridge" else ""
                raise ValueError(
                    f"{name}{told} must stay {before!r} in the middle of a stream, got {now!r}; "
                    "fit starts a new one"
                )

    def _check_arguments(self) -> None:
        check_interval("alpha", self.alpha, 0, closed="neither")
        if self.ridge is not None:
            check_interval("ridge", self.ridge, 0, closed="neither")
        check_choice("approximation", self.approximation, ("projected", "regularized"))
        check_choice("solver", self.solver, ("direct", "cg"))
        check_interval("tol", self.tol, 0, closed="neither")
        check_integer("max_iter", self.max_iter, 1)
        check_interval("cache_size", self.cache_size, 0)
        if isinstance(self.kernel, str) and self.kernel == "precomputed":
            raise ValueError(
                "kernel must be a function of points, got 'precomputed'; put "
                "RidgeLeverageNystroem and Ridge in a pipeline for a precomputed kernel"
            )


def row_dtypes(X: Any) -> Any:
    """Dtypes to validate X for: a memory map of integers is converted tile by tile only."""
    mapped = isinstance(X, np.memmap) and X.dtype.kind in "iub"
    return None if mapped else [np.float64, np.float32]


def _floating(rows: Array) -> Array:
    """Rows in float32 or float64: integers of a memory map become float64."""
    if array_library(rows) == "numpy" and rows.dtype.kind != "f":
        return rows.astype(np.float64)
    return np.asarray(rows) if isinstance(rows, np.memmap) else rows


def check_weights(X: Array, sample_weight: Any) -> Matrix | None:
    """Return weights of shape (n,) in float64, or None; ValueError for negative ones."""
    if sample_weight is None:
        return None
    return _check_sample_weight(
        to_numpy(sample_weight),
        np.empty((len(X), 1)),
        dtype=np.float64,
        ensure_non_negative=True,
        allow_all_zero_weights=True,  # partial_fit may meet a block that does not count
    )
