"""Kernel ridge regression and classification on Nyström features, batch, streamed, or large.

With features z(x) such that ``z(x)'z(y)`` is the Nyström kernel, kernel ridge regression is
ridge regression on z:

    theta = (Z'Z + alpha I)^{-1} Z'y,     f(x) = z(x)'theta.

By the Woodbury identity this is the solution ``(K~ + alpha I)^{-1} y`` of the n x n problem;
with an eps-accurate dictionary its risk is at most ``(1 + (ridge/alpha)/(1 - eps))^2`` times
that of exact kernel ridge regression [1]_. Z is never stored: rows pass through in tiles.

References
----------
.. [1] D. Calandriello, A. Lazaric, M. Valko, "Analysis of Nyström method with sequential ridge
   leverage scores", UAI 2016. arXiv:2604.20077
.. [2] A. Rudi, L. Carratino, L. Rosasco, "FALKON: An optimal large scale kernel method", NeurIPS
   2017. arXiv:1705.10958
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from sciml._check import check_choice, check_finite, check_integer, check_interval
from sciml.kernels.leverage_sampling import nystroem_map
from sciml.kernels.linear_algebra import array_library, cholesky, matmul, solve_lower, to_numpy
from sciml.kernels.nystroem import RidgeLeverageNystroem, _cast, _empty
from sciml.kernels.pairwise import KernelLike, kernel_matmul, pairwise_kernel

__all__ = ["NystroemRidge", "NystroemRidgeClassifier"]

Array = Any
_TILE = 2048  # rows of a kernel tile
_CACHE_BYTES = 2**31  # kernel tiles that conjugate gradients may keep between iterations


def _streams(model: "_NystroemModel") -> bool:
    if model.solver != "direct":
        raise AttributeError(f"partial_fit needs solver='direct', got {model.solver!r}")
    return hasattr(model._selector(), "partial_fit")


class _NystroemModel(BaseEstimator):
    """Solver shared by regression and classification."""

    _gram: Any  # Z'WZ of the rows so far, None before the first
    _moment: Any
    _map: NDArray[np.float64]

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
        solver: str = "direct",
        tol: float = 1e-6,
        max_iter: int = 100,
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
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.verbose = verbose

    def _fit_targets(self, X: Array, Y: Array, weight: NDArray[np.float64] | None) -> None:
        """Choose landmarks among the rows that count, and solve for targets (n, k)."""
        self._check_arguments()
        rows = X if weight is None or (weight > 0).all() else X[np.flatnonzero(weight > 0)]
        if len(rows) == 0:
            raise ValueError("sample_weight must be positive for at least one row, got zeros")
        self.nystroem_ = self._selector().fit(rows)
        self._gram = self._moment = None
        if self.solver == "direct":
            self._gram, self._moment = self._statistics(X, Y, weight)
            self._solve()
        else:
            self._solve_cg(X, Y, weight)

    def _stream_targets(self, X: Array, Y: Array, weight: NDArray[np.float64] | None) -> None:
        """Take in rows: renew the landmarks, carry the statistics over, add the new rows."""
        self._check_arguments()
        new = self._is_new()
        if new:
            self.nystroem_ = self._selector()
            self._gram = self._moment = None
        else:
            before = self.nystroem_.component_indices_, self.nystroem_.components_, self._map
        rows = X if weight is None else X[np.flatnonzero(weight > 0)]
        if len(rows):
            self.nystroem_.partial_fit(rows)
        elif new:
            raise ValueError("sample_weight must be positive for at least one row, got zeros")
        gram, moment = self._statistics(X, Y, weight)
        if not new:
            carry = self._carry_over(*before)
            gram += carry.T @ self._gram @ carry
            moment += carry.T @ self._moment
        self._gram, self._moment = gram, moment
        self._solve()

    def _is_new(self) -> bool:
        """Whether there are no statistics yet to go on from."""
        return getattr(self, "_gram", None) is None

    def _carry_over(
        self, old_indices: NDArray[np.int64], old_components: Array, old_map: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Matrix from old features of past rows to their new ones.

        Landmarks that stay keep their kernel values with past rows exactly. Those of new
        landmarks are gone; they are replaced by the projection onto the old landmarks.
        """
        new = self.nystroem_
        place = {int(index): i for i, index in enumerate(old_indices)}
        stays = np.array([place.get(int(index), -1) for index in new.component_indices_])
        transfer = np.zeros((len(old_indices), len(stays)))
        kept = np.flatnonzero(stays >= 0)
        transfer[stays[kept], kept] = 1
        fresh = np.flatnonzero(stays < 0)
        if len(fresh):
            options = self._options()
            K = to_numpy(pairwise_kernel(old_components, None, self.kernel, **options))
            across = pairwise_kernel(old_components, new.components_[fresh], self.kernel, **options)
            transfer[:, fresh] = np.linalg.pinv(K.astype(float), rcond=1e-10, hermitian=True) @ (
                to_numpy(across).astype(float)
            )
        return np.linalg.pinv(old_map.T, rcond=1e-12) @ transfer @ self._map.T

    def _statistics(
        self, X: Array, Y: Array, weight: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return ``Z'WZ`` and ``Z'WY`` for the features of the rows, tile by tile."""
        self._set_map(X)
        components = _cast(self.nystroem_.components_, X)
        to_features = _cast(self._map, X)
        m = len(components)
        gram, moment = np.zeros((m, m)), np.zeros((m, Y.shape[1]))
        tile = _empty((min(_TILE, len(X)), m), X)
        mapped = _empty(tile.shape, X) if self.nystroem_._plain else None
        for start in range(0, len(X), _TILE):
            rows = X[start : start + _TILE]
            C = tile[: len(rows)]
            pairwise_kernel(rows, components, self.kernel, out=C, **self._options())
            if mapped is not None:
                # Without the ridge the map is ill conditioned: it must act before the square.
                Z = mapped[: len(rows)]
                matmul(C, to_features.T, Z)
                C = Z
            scaled = C
            if weight is not None:
                scaled = C * _cast(weight[start : start + _TILE, None], X)
            gram += to_numpy(scaled.T @ C)
            moment += to_numpy(scaled.T @ Y[start : start + _TILE])
        if mapped is None:
            gram, moment = self._map @ gram @ self._map.T, self._map @ moment
        return gram, moment

    def _set_map(self, X: Array) -> None:
        """Set the map from kernel values to features, in float64, without its noisiest part."""
        nystroem = self.nystroem_
        K = to_numpy(pairwise_kernel(nystroem.components_, None, self.kernel, **self._options()))
        precision = np.finfo(str(X.dtype).replace("torch.", "")).eps
        self._map, _ = nystroem_map(
            K.astype(float),
            None if nystroem._plain else nystroem.weights_,
            nystroem.ridge,
            cutoff=float(precision) ** (2 / 3),
        )

    def _solve(self) -> None:
        """Solve the m x m problem."""
        system = self._gram.copy()
        system[np.diag_indices_from(system)] += self.alpha
        factor = cholesky(system)
        half = solve_lower(factor, self._moment)
        theta = solve_lower(factor, half, transposed=True)
        self.n_iter_ = 1
        self._set_coefficients(self._map.T @ theta)

    def _solve_cg(self, X: Array, Y: Array, weight: NDArray[np.float64] | None) -> None:
        """Preconditioned conjugate gradients on the feature problem, all targets at once.

        The preconditioner is the problem seen by the landmarks alone: with importance weights
        their sums are unbiased for those over all rows.
        """
        nystroem = self.nystroem_
        self._set_map(X)
        normalization = self._map
        components = _cast(nystroem.components_, X)
        own = to_numpy(pairwise_kernel(components, None, self.kernel, **self._options()))
        landmark_features = own.astype(float) @ normalization.T
        total = float(len(X) if weight is None else weight.sum())
        share = nystroem.weights_ / nystroem.weights_.sum() * total
        system = (landmark_features * share[:, None]).T @ landmark_features
        system[np.diag_indices_from(system)] += self.alpha
        factor = cholesky(system)

        tiles = _KernelTiles(X, components, self.kernel, self._options(), weight)
        target = normalization @ tiles.transposed(Y)

        def apply(theta: NDArray[np.float64]) -> NDArray[np.float64]:
            product = tiles.gram(normalization.T @ theta)
            return normalization @ product + self.alpha * theta

        def precondition(r: NDArray[np.float64]) -> NDArray[np.float64]:
            return solve_lower(factor, solve_lower(factor, r), transposed=True)

        theta = np.zeros_like(target)
        residual = target.copy()
        z = precondition(residual)
        direction = z.copy()
        energy = (residual * z).sum(0)
        scale = np.maximum(np.linalg.norm(target, axis=0), np.finfo(float).tiny)
        self.n_iter_ = 0
        for _ in range(self.max_iter):
            if (np.linalg.norm(residual, axis=0) / scale).max() <= self.tol:
                break
            image = apply(direction)
            curvature = (direction * image).sum(0)
            step = np.divide(energy, curvature, out=np.zeros_like(energy), where=curvature > 0)
            theta += step * direction
            residual -= step * image
            z = precondition(residual)
            before, energy = energy, (residual * z).sum(0)
            ratio = np.divide(energy, before, out=np.zeros_like(energy), where=before > 0)
            direction = z + ratio * direction
            self.n_iter_ += 1
        self.residual_ = float((np.linalg.norm(residual, axis=0) / scale).max())
        if self.residual_ > self.tol:
            warnings.warn(
                f"conjugate gradients stopped after max_iter={self.max_iter} iterations with a "
                f"relative residual of {self.residual_:.2g} above tol={self.tol}",
                ConvergenceWarning,
                stacklevel=4,
            )
        self._set_coefficients(normalization.T @ theta)

    def _set_coefficients(self, coefficients: NDArray[np.float64]) -> None:
        self.components_ = self.nystroem_.components_
        self.component_indices_ = self.nystroem_.component_indices_
        self.dual_coef_ = coefficients

    def _decision(self, X: Array) -> Array:
        check_is_fitted(self, "dual_coef_")
        X = self._validate_rows(X, reset=False)
        components = _cast(self.components_, X)
        coefficients = _cast(self.dual_coef_, X)
        return kernel_matmul(X, components, coefficients, self.kernel, **self._options())

    def _selector(self) -> RidgeLeverageNystroem:
        return RidgeLeverageNystroem(
            self.kernel,
            gamma=self.gamma,
            degree=self.degree,
            coef0=self.coef0,
            ridge=self.alpha if self.ridge is None else self.ridge,
            method=self.method,
            landmarks=self.landmarks,
            n_components=self.n_components,
            budget=self.budget,
            eps=self.eps,
            random_state=self.random_state,
            verbose=self.verbose,
        )

    def _options(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}

    def _check_arguments(self) -> None:
        check_interval("alpha", self.alpha, 0, closed="neither")
        check_choice("solver", self.solver, ("direct", "cg"))
        check_interval("tol", self.tol, 0, closed="neither")
        check_integer("max_iter", self.max_iter, 1)
        if isinstance(self.kernel, str) and self.kernel == "precomputed":
            raise ValueError(
                "kernel must be a function of points, got 'precomputed'; put "
                "RidgeLeverageNystroem and Ridge in a pipeline for a precomputed kernel"
            )

    def _validate_rows(self, X: Any, *, reset: bool) -> Array:
        if array_library(X) == "numpy":
            return validate_data(self, X, dtype=[np.float64, np.float32], reset=reset)
        if X.ndim != 2:
            raise ValueError(f"X must be a matrix, got shape {tuple(X.shape)}")
        check_finite("X", X)
        if reset:
            self.n_features_in_ = int(X.shape[1])
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return X


class NystroemRidge(MultiOutputMixin, RegressorMixin, _NystroemModel):
    """Kernel ridge regression on Nyström features.

    Parameters
    ----------
    alpha : float, default=1.0
        Ridge of the regression, positive; the same as scikit-learn's ``KernelRidge.alpha``.
    kernel : str, Kernel or callable, default="rbf"
        As in `pairwise_kernel`.
    gamma, degree, coef0
        As in `pairwise_kernel`.
    ridge : float, default=None
        Ridge of the leverage scores; None means `alpha`.
    method, landmarks, n_components, budget, eps
        How landmarks are chosen, as in `RidgeLeverageNystroem`.
    solver : {"direct", "cg"}, default="direct"
        "direct" accumulates the m x m problem in O(n m^2); "cg" runs preconditioned conjugate
        gradients in O(n m) an iteration, which pays for many landmarks [2]_.
    tol : float, default=1e-6
        Relative residual at which "cg" stops.
    max_iter : int, default=100
        Iterations of "cg" at most.
    random_state : int, RandomState instance or None, default=None
        Seed of the landmarks.
    verbose : int, default=0
        With 1, show a progress bar over the choice of landmarks.

    Attributes
    ----------
    dual_coef_ : ndarray of shape (m,) or (m, n_targets)
        Predictions are ``K(X, components_) @ dual_coef_``.
    components_ : array of shape (m, n_features)
        Landmarks.
    component_indices_ : ndarray of shape (m,)
        Their positions among the rows with positive weight.
    nystroem_ : RidgeLeverageNystroem
        The fitted choice of landmarks.
    n_iter_ : int
        Iterations of "cg"; 1 for "direct".
    residual_ : float
        Relative residual that "cg" ended with.

    See Also
    --------
    sklearn.kernel_ridge.KernelRidge : the exact method, O(n^3).

    Notes
    -----
    There is no intercept, as in ``KernelRidge``: centre the targets, or add a constant to the
    kernel. Rows of weight zero are never landmarks; the other weights act on the regression,
    not on the choice of landmarks. Since landmarks are drawn at random, a weight of 2 and a row
    given twice agree exactly for the same landmarks only.

    `partial_fit` keeps the m x m statistics of past rows. When the landmarks change, the kernel
    values of past rows with new landmarks are replaced by those of their projection onto the
    old landmarks, which is what the Nyström approximation itself does; the result is close to,
    but not the same as, a fit on all rows with the final landmarks.

    References
    ----------
    .. [1] D. Calandriello, A. Lazaric, M. Valko, UAI 2016. arXiv:2604.20077
    .. [2] A. Rudi, L. Carratino, L. Rosasco, "FALKON", NeurIPS 2017. arXiv:1705.10958

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sciml.kernels import NystroemRidge
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = NystroemRidge(alpha=0.1, gamma=5.0, random_state=0).fit(X, y - y.mean())
    >>> model.score(X, y - y.mean()) > 0.4
    True
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "NystroemRidge":
        """Choose landmarks and fit.

        Parameters
        ----------
        X : array of shape (n, n_features)
            NumPy array, memory map, torch tensor or CuPy array.
        y : array of shape (n,) or (n, n_targets)
            Targets, in the library of X.
        sample_weight : array of shape (n,), default=None
            Nonnegative weights of the squared errors.

        Returns
        -------
        NystroemRidge
            Itself.

        Raises
        ------
        ValueError
            If an argument is out of range, lengths differ, or a value is not finite.
        """
        X, Y, weight, flat = self._validate_pairs(X, y, sample_weight, reset=True)
        self._fit_targets(X, Y, weight)
        if flat:
            self.dual_coef_ = self.dual_coef_[:, 0]
        return self

    @available_if(_streams)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> "NystroemRidge":
        """Take in more rows of a stream, with ``solver="direct"`` and a streaming `method`.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`, for the new rows.

        Returns
        -------
        NystroemRidge
            Itself.

        Raises
        ------
        ValueError
            As in `fit`; also if the number of features or targets changes.
        """
        first = self._is_new()
        X, Y, weight, flat = self._validate_pairs(X, y, sample_weight, reset=first)
        if not first and Y.shape[1] != self._moment.shape[1]:
            raise ValueError(f"y must have {self._moment.shape[1]} targets, got {Y.shape[1]}")
        self._stream_targets(X, Y, weight)
        if flat:
            self.dual_coef_ = self.dual_coef_[:, 0]
        return self

    def predict(self, X: Any) -> Any:
        """Predict targets.

        Parameters
        ----------
        X : array of shape (n, n_features)

        Returns
        -------
        array of shape (n,) or (n, n_targets)
            In the library and dtype of X.
        """
        return self._decision(X)

    def _validate_pairs(
        self, X: Any, y: Any, sample_weight: Any, *, reset: bool
    ) -> tuple[Array, Array, NDArray[np.float64] | None, bool]:
        if array_library(X) == "numpy":
            X, y = validate_data(
                self,
                X,
                y,
                dtype=[np.float64, np.float32],
                y_numeric=True,
                multi_output=True,
                reset=reset,
            )
        else:
            X = self._validate_rows(X, reset=reset)
            check_finite("y", y)
            if len(y) != len(X):
                raise ValueError(f"y must have {len(X)} rows, got {len(y)}")
        Y = y if y.ndim == 2 else y[:, None]
        return X, _cast(Y, X), _weights(X, sample_weight), y.ndim == 1


class NystroemRidgeClassifier(ClassifierMixin, _NystroemModel):
    """Classification by kernel ridge regression of -1/+1 targets, one against the rest.

    Parameters
    ----------
    alpha : float, default=1.0
        Ridge of the regression, positive.
    kernel : str, Kernel or callable, default="rbf"
        As in `pairwise_kernel`.
    gamma, degree, coef0
        As in `pairwise_kernel`.
    ridge : float, default=None
        Ridge of the leverage scores; None means `alpha`.
    method, landmarks, n_components, budget, eps
        How landmarks are chosen, as in `RidgeLeverageNystroem`.
    solver, tol, max_iter
        As in `NystroemRidge`.
    random_state : int, RandomState instance or None, default=None
        Seed of the landmarks.
    verbose : int, default=0
        With 1, show a progress bar over the choice of landmarks.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels.
    dual_coef_ : ndarray of shape (m,) or (m, n_classes)
        Decision values are ``K(X, components_) @ dual_coef_``.
    components_, component_indices_, nystroem_, n_iter_, residual_
        As in `NystroemRidge`.

    See Also
    --------
    sklearn.linear_model.RidgeClassifier : the same on given features.

    References
    ----------
    .. [1] D. Calandriello, A. Lazaric, M. Valko, UAI 2016. arXiv:2604.20077
    .. [2] A. Rudi, L. Carratino, L. Rosasco, "FALKON", NeurIPS 2017. arXiv:1705.10958

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.kernels import NystroemRidgeClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> model = NystroemRidgeClassifier(0.1, gamma=0.001, random_state=0).fit(X[:1400], y[:1400])
    >>> model.score(X[1400:], y[1400:]) > 0.9
    True
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "NystroemRidgeClassifier":
        """Choose landmarks and fit.

        Parameters
        ----------
        X : array of shape (n, n_features)
            NumPy array, memory map, torch tensor or CuPy array.
        y : array of shape (n,)
            Labels of at least two classes.
        sample_weight : array of shape (n,), default=None
            Nonnegative weights of the squared errors.

        Returns
        -------
        NystroemRidgeClassifier
            Itself.

        Raises
        ------
        ValueError
            If there is one class only, an argument is out of range, or a value is not finite.
        """
        X, y = self._validate_pairs(X, y, reset=True)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y must hold at least two classes, got one class: {self.classes_.tolist()}"
            )
        self._fit_targets(X, self._targets(X, y), _weights(X, sample_weight))
        self._flatten()
        return self

    @available_if(_streams)
    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "NystroemRidgeClassifier":
        """Take in more rows of a stream.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`, for the new rows.
        classes : array of shape (n_classes,), default=None
            All labels that will come; needed in the first call.

        Returns
        -------
        NystroemRidgeClassifier
            Itself.

        Raises
        ------
        ValueError
            As in `fit`; also if `classes` is missing or a label is not among them.
        """
        first = self._is_new()
        X, y = self._validate_pairs(X, y, reset=first)
        if first:
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit")
            self.classes_ = np.unique(classes)
            if len(self.classes_) < 2:
                raise ValueError(f"classes must hold at least two labels, got {classes!r}")
        elif classes is not None and not np.array_equal(self.classes_, np.unique(classes)):
            raise ValueError(
                f"classes must be the same as in the first call, {self.classes_.tolist()}, "
                f"got {np.unique(classes).tolist()}"
            )
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y must hold labels among classes, got {unknown.tolist()}")
        self._stream_targets(X, self._targets(X, y), _weights(X, sample_weight))
        self._flatten()
        return self

    def decision_function(self, X: Any) -> Any:
        """Signed distance-like scores: positive for the second class, or one a class.

        Parameters
        ----------
        X : array of shape (n, n_features)

        Returns
        -------
        array of shape (n,) or (n, n_classes)
        """
        return self._decision(X)

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict labels.

        Parameters
        ----------
        X : array of shape (n, n_features)

        Returns
        -------
        ndarray of shape (n,)
        """
        scores = to_numpy(self._decision(X))
        if scores.ndim == 1:
            return self.classes_[(scores > 0).astype(int)]
        return self.classes_[scores.argmax(axis=1)]

    def _validate_pairs(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, NDArray[Any]]:
        if array_library(X) == "numpy":
            X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], reset=reset)
        else:
            X = self._validate_rows(X, reset=reset)
            y = to_numpy(y)
            check_consistent_length(to_numpy(X[:, 0]), y)
        check_classification_targets(y)
        return X, column_or_1d(y)

    def _targets(self, X: Array, y: NDArray[Any]) -> Array:
        binarizer = LabelBinarizer(neg_label=-1).fit(self.classes_)
        return _cast(binarizer.transform(y).astype(float), X)

    def _flatten(self) -> None:
        if len(self.classes_) == 2:
            self.dual_coef_ = self.dual_coef_[:, 0]


class _KernelTiles:
    """Products with the n x m kernel matrix, computed in tiles and kept while memory allows."""

    def __init__(
        self,
        X: Array,
        components: Array,
        kernel: KernelLike,
        options: dict[str, Any],
        weight: NDArray[np.float64] | None,
    ) -> None:
        self.X, self.components = X, components
        self.kernel, self.options, self.weight = kernel, options, weight
        itemsize = 4 if str(X.dtype).endswith("float32") else 8
        fits = len(X) * len(components) * itemsize <= _CACHE_BYTES
        self.kept: Array | None = _empty((len(X), len(components)), X) if fits else None
        self.filled = 0

    def transposed(self, Y: Array) -> NDArray[np.float64]:
        """``K' W Y``, in float64."""
        result = np.zeros((len(self.components), Y.shape[1]))
        for start, C in self._tiles():
            result += to_numpy(C.T @ self._weighted(Y[start : start + len(C)], start))
        return result

    def gram(self, V: NDArray[np.float64]) -> NDArray[np.float64]:
        """``K' W K V``, in float64."""
        result = np.zeros(V.shape)
        v = _cast(V, self.X)
        product = _empty((min(_TILE, len(self.X)), V.shape[1]), self.X)
        for start, C in self._tiles():
            part = product[: len(C)]
            matmul(C, v, part)
            result += to_numpy(C.T @ self._weighted(part, start))
        return result

    def _weighted(self, values: Array, start: int) -> Array:
        if self.weight is None:
            return values
        return values * _cast(self.weight[start : start + len(values), None], self.X)

    def _tiles(self) -> Any:
        n, m = len(self.X), len(self.components)
        scratch = _empty((min(_TILE, n), m), self.X) if self.kept is None else None
        for start in range(0, n, _TILE):
            rows = self.X[start : start + _TILE]
            if self.kept is not None:
                C = self.kept[start : start + len(rows)]
                if start < self.filled:
                    yield start, C
                    continue
                self.filled = start + len(rows)
            elif scratch is not None:
                C = scratch[: len(rows)]
            pairwise_kernel(rows, self.components, self.kernel, out=C, **self.options)
            yield start, C


def _weights(X: Array, sample_weight: Any) -> NDArray[np.float64] | None:
    if sample_weight is None:
        return None
    first = to_numpy(X[:, :1])
    return _check_sample_weight(
        to_numpy(sample_weight),
        first,
        dtype=np.float64,
        ensure_non_negative=True,
        allow_all_zero_weights=True,  # partial_fit may meet a block that does not count
    )
