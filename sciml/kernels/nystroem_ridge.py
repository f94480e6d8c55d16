"""Kernel ridge regression and classification on Nyström features: batch, streamed, or large.

With features z(x) such that ``z(x)'z(y)`` is the Nyström kernel, kernel ridge regression is
ridge regression on z:

    theta = (Z'Z + alpha I)^{-1} Z'y,     f(x) = z(x)'theta = k_S(x)'beta,
    beta = (C'C + alpha W)^{-1} C'y,      C = K S,

with S the roots of the landmarks' weights and W either ``S'KS``, which projects on the span of
the landmarks [2]_, or ``S'KS + ridge I`` [1]_. By the Woodbury identity this is the solution of
the n x n problem, ``f = K~ (K~ + alpha I)^{-1} y`` with ``K~ = C W^{-1} C'``. With an
eps-accurate dictionary its risk is at most ``(1 + (ridge/alpha)/(1 - eps))^2`` times that of
exact kernel ridge regression [1]_. Neither K~ nor C is stored: rows pass through in tiles. With
many landmarks the same problem is solved by preconditioned conjugate gradients [2]_.

References
----------
.. [1] D. Calandriello, A. Lazaric, M. Valko, "Analysis of Nyström method with sequential ridge
   leverage scores", UAI 2016. arXiv:2604.20077
.. [2] A. Rudi, L. Carratino, L. Rosasco, "FALKON: An optimal large scale kernel method", NeurIPS
   2017. arXiv:1705.10958
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data

from sciml._check import check_finite, check_same_length
from sciml.kernels.arrays import Array, array_library, to_numpy
from sciml.kernels.nystroem_solver import NystroemSolver, check_weights, row_dtypes, streams
from sciml.kernels.pairwise import KernelLike
from sciml.kernels.rows import validate_rows

__all__ = ["NystroemRidge", "NystroemRidgeClassifier"]

Matrix = NDArray[np.float64]


class NystroemRidge(MultiOutputMixin, RegressorMixin, NystroemSolver):
    """Fit kernel ridge regression on Nyström features.

    Parameters
    ----------
    alpha : float, default=1.0
        Ridge of the regression, positive; the same as scikit-learn's ``KernelRidge.alpha``.
    kernel : str, Kernel or callable, default="rbf"
        As in `pairwise_kernel`.
    gamma : float, default=None
        Scale of the kernels that have one; None means ``1 / n_features``.
    degree : float, default=3
        Power of the polynomial kernel.
    coef0 : float, default=1.0
        Constant of the polynomial kernel.
    ridge : float, default=None
        Ridge of the leverage scores; None means `alpha`, for which the risk bound is
        ``(1 + 1/(1 - eps))^2``. A smaller one brings the bound to 1 with more landmarks.
    method, landmarks, n_components, budget, eps
        How landmarks are chosen, as in `RidgeLeverageNystroem`. Landmarks of your own given as
        positions count the rows of `fit`, or of the first `partial_fit`.
    approximation : {"projected", "regularized"}, default="projected"
        ``K~ = C W^{-1} C'`` with W the kernel among the (weighted) landmarks, or that plus
        ``ridge I``, the form of [1]_. See Notes.
    solver : {"direct", "cg"}, default="direct"
        "direct" accumulates the m x m problem in O(n m^2), and streams; "cg" runs
        preconditioned conjugate gradients in O(n m) an iteration, which pays from several
        hundred landmarks on [2]_.
    tol : float, default=1e-6
        Relative residual at which "cg" stops. 1e-3 is often enough for predictions.
    max_iter : int, default=100
        Iterations of "cg" at most.
    cache_size : float, default=1000
        Megabytes of kernel values that "cg" may keep between iterations. Those that do not fit
        are computed anew in each; with 0 memory is O(m^2) whatever n.
    random_state : int, RandomState instance or None, default=None
        Seed of the landmarks.
    verbose : int, default=0
        With 1, show progress bars over the choice of landmarks and over conjugate gradients.

    Attributes
    ----------
    dual_coef_ : ndarray of shape (m,) or (m, n_targets)
        Predictions are ``K(X, components_) @ dual_coef_``; 0 for landmarks that the others
        make redundant.
    components_ : array of shape (m, n_features)
        Landmarks.
    component_indices_ : ndarray of shape (m,)
        Their positions among the rows seen; -1 for landmarks given as points.
    weights_ : ndarray of shape (m,)
        Their importance weights; for "squeak", "ink", "bless" and "exact" times their sample
        weights. They matter to the regularized form and to the preconditioner of "cg".
    effective_dimension_ : float
        Estimate of ``trace(K (K + ridge I)^{-1})``, as in `RidgeLeverageNystroem`.
    n_iter_ : int
        Iterations of "cg"; 1 for "direct".
    residual_ : float
        Relative residual that "cg" ended with; 0 for "direct".
    n_samples_seen_ : int
        Number of rows seen.
    n_features_in_ : int
        Number of features seen in fit.

    See Also
    --------
    sklearn.kernel_ridge.KernelRidge : the exact method, O(n^3).
    RidgeLeverageNystroem : the features alone, for any linear model.

    Notes
    -----
    There is no intercept, as in ``KernelRidge``: centre the targets, or add a constant to the
    kernel. A NumPy memory map is read in tiles and never copied as a whole, except that
    "bless", "recursive" and "exact" hold the rows when weights are given.

    *Projected or regularized.* ``K~_regularized <= K~_projected <= K`` in the order of positive
    semidefinite matrices, so every guarantee of the first holds for the second, which is the
    nearer one: with ``ridge = alpha`` the first shrinks predictions visibly more than exact
    regression does. With all rows as landmarks the projected form is ``KernelRidge``; the
    regularized one only as ridge tends to 0. The regularized form spares "direct" a triangular
    solve a row.

    *Sample weights* are exact in the regression: for given landmarks a weight of 2 is a row given
    twice. They also enter the choice: rows of weight zero are never landmarks, and "squeak",
    "ink", "bless" and "exact" take the leverage scores of the weighted problem, so that weights
    and repetitions draw landmarks of equal quality. They draw the *same* only if every distinct
    row becomes one: otherwise equal rows would have to be found, and all rows put in an order
    of their own, before the first is read, which neither streams nor files allow.

    *Streams.* `partial_fit` keeps the statistics Z'WZ and Z'WY of past rows. When landmarks
    change, the kernel values of past rows with landmarks that stay are kept exactly, and those
    with a new landmark u are replaced by those with the projection of u onto the span of the
    old ones. For one change and an eps-accurate dictionary this shifts the column of u, over all
    past rows, by at most ``sqrt(ridge/(1 - eps))`` times the distance of u from that span;
    without change of landmarks a stream equals a batch. A call is all or nothing: after an
    error or an interrupt the model is what it was before.

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
        X, y = self._validate_pairs(X, y, reset=True)
        self._fit_targets(X, _as_columns(y), check_weights(X, sample_weight))
        self._flatten(y)
        return self

    @available_if(streams)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> "NystroemRidge":
        """Take in more rows of a stream, after earlier calls or after `fit`.

        Needs ``solver="direct"`` and a streaming `method` ("squeak", "ink", "uniform") or
        landmarks of your own. Pickled between calls, the model goes on bit-identically.

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
            As in `fit`; also if the number of features or targets, or a parameter that past
            rows depend on, changes. With `ridge` given, `alpha` may change.
        """
        first = self._is_new()
        X, y = self._validate_pairs(X, y, reset=first)
        Y = _as_columns(y)
        if not first and Y.shape[1] != self._moment.shape[1]:
            raise ValueError(f"y must have {self._moment.shape[1]} targets, got {Y.shape[1]}")
        self._stream_targets(X, Y, check_weights(X, sample_weight))
        self._flatten(y)
        return self

    def predict(self, X: Any) -> Any:
        """Predict targets.

        Parameters
        ----------
        X : array of shape (n, n_features)
            Rows.

        Returns
        -------
        array of shape (n,) or (n, n_targets)
            In the library and dtype of X.
        """
        return self._decision(X)

    def _validate_pairs(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        if array_library(X) == "numpy":
            if issparse(y):
                raise TypeError(f"y must be a dense array, got {type(y).__name__}")
            options: dict[str, Any] = {"y_numeric": True, "multi_output": True}
            return validate_data(self, X, y, dtype=row_dtypes(X), reset=reset, **options)
        X = validate_rows(self, X, reset=reset)
        if y.ndim not in (1, 2):
            raise ValueError(f"y must have 1 or 2 dimensions, got shape {tuple(y.shape)}")
        check_same_length(X=X, y=y)
        check_finite("y", y)
        return X, y

    def _flatten(self, y: Array) -> None:
        if y.ndim == 1:
            self.dual_coef_ = self.dual_coef_[:, 0]


class NystroemRidgeClassifier(ClassifierMixin, NystroemSolver):
    """Classify by kernel ridge regression of -1/+1 targets, one class against the rest.

    Parameters
    ----------
    alpha : float, default=1.0
        Ridge of the regression, positive.
    kernel : str, Kernel or callable, default="rbf"
        As in `pairwise_kernel`.
    gamma, degree, coef0
        As in `NystroemRidge`.
    ridge : float, default=None
        Ridge of the leverage scores; None means `alpha`.
    method, landmarks, n_components, budget, eps
        How landmarks are chosen, as in `RidgeLeverageNystroem`.
    approximation, solver, tol, max_iter, cache_size
        As in `NystroemRidge`.
    class_weight : dict or "balanced", default=None
        Weight of each class, which multiplies `sample_weight`, as in scikit-learn's
        ``RidgeClassifier``. "balanced" needs all labels at once, hence `fit`.
    random_state : int, RandomState instance or None, default=None
        Seed of the landmarks.
    verbose : int, default=0
        With 1, show progress bars.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels.
    dual_coef_ : ndarray of shape (m,) or (m, n_classes)
        Decision values are ``K(X, components_) @ dual_coef_``; one column for two classes.
    components_, component_indices_, weights_, effective_dimension_, n_iter_, residual_
        As in `NystroemRidge`.
    n_samples_seen_, n_features_in_
        As in `NystroemRidge`.

    See Also
    --------
    sklearn.linear_model.RidgeClassifier : the same on given features.
    NystroemRidge : regression; its Notes on weights and streams hold here too.

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
        class_weight: Mapping[Any, float] | str | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            alpha,
            kernel=kernel,
            gamma=gamma,
            degree=degree,
            coef0=coef0,
            ridge=ridge,
            method=method,
            landmarks=landmarks,
            n_components=n_components,
            budget=budget,
            eps=eps,
            approximation=approximation,
            solver=solver,
            tol=tol,
            max_iter=max_iter,
            cache_size=cache_size,
            random_state=random_state,
            verbose=verbose,
        )
        self.class_weight = class_weight

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
        self._fit_targets(X, self._targets(y), self._class_weights(X, y, sample_weight))
        self._flatten()
        return self

    @available_if(streams)
    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "NystroemRidgeClassifier":
        """Take in more rows of a stream, as `NystroemRidge.partial_fit` does.

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
            As in `fit`; also if `classes` is missing or changes, a label is not among them,
            or ``class_weight="balanced"``.
        """
        first = self._is_new()
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight must not be 'balanced' in partial_fit, which sees some labels "
                "only; pass the weights as a dict"
            )
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
        self._stream_targets(X, self._targets(y), self._class_weights(X, y, sample_weight))
        self._flatten()
        return self

    def decision_function(self, X: Any) -> Any:
        """Compute regression values: positive for the second of two classes, or one a class.

        Parameters
        ----------
        X : array of shape (n, n_features)
            Rows.

        Returns
        -------
        array of shape (n,) or (n, n_classes)
            In the library and dtype of X.
        """
        return self._decision(X)

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict labels.

        Parameters
        ----------
        X : array of shape (n, n_features)
            Rows.

        Returns
        -------
        ndarray of shape (n,)
            NumPy array whatever the library of X, as labels may be strings.
        """
        scores = to_numpy(self._decision(X))
        if scores.ndim == 1:
            return self.classes_[(scores > 0).astype(int)]
        return self.classes_[scores.argmax(axis=1)]

    def _validate_pairs(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, NDArray[Any]]:
        if array_library(X) == "numpy":
            X, y = validate_data(self, X, y, dtype=row_dtypes(X), reset=reset)
        else:
            X = validate_rows(self, X, reset=reset)
            y = to_numpy(y)
            check_same_length(X=X, y=y)
        check_classification_targets(y)
        return X, column_or_1d(y)

    def _targets(self, y: NDArray[Any]) -> Matrix:
        """Return +1 for the class and -1 for the rest, in one column a class (one for two)."""
        hits = y[:, None] == (self.classes_ if len(self.classes_) > 2 else self.classes_[1:])
        return np.where(hits, 1.0, -1.0)

    def _class_weights(self, X: Array, y: NDArray[Any], sample_weight: Any) -> Matrix | None:
        weight = check_weights(X, sample_weight)
        if self.class_weight is None:
            return weight
        own = compute_sample_weight(self.class_weight, y)
        return own if weight is None else own * weight

    def _flatten(self) -> None:
        if len(self.classes_) == 2:
            self.dual_coef_ = self.dual_coef_[:, 0]


def _as_columns(y: Array) -> Array:
    return y if y.ndim == 2 else y[:, None]
