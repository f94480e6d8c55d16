"""Fit the kernel machine that an infinitely wide network becomes under a regularised loss.

Training an infinitely wide network by gradient descent on a loss with l2-regularised last layer
gives a machine without intercept, ``f(x) = sum_i beta_i K(x, x_i)``, that minimises

    lambda / 2 ||f||^2 + sum_i l(f(x_i), y_i),        lambda = 1 / C,

where K is the network's tangent kernel. Hinge loss gives the soft-margin support vector machine
(without the intercept that `sklearn.svm.SVC` always fits), squared loss kernel ridge regression,
the epsilon-insensitive loss support vector regression, and so on. Outputs are those of the
network less its output at initialisation.

References
----------
Y. Chen, W. Huang, L. M. Nguyen, T.-W. Weng, "On the Equivalence between Neural Network and
Support Vector Machine", NeurIPS 2021, arXiv:2111.06063.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logsumexp
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process.kernels import Kernel
from sklearn.utils import Tags
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm import tqdm

from sciml._check import check_choice, check_finite, check_integer, check_interval, check_shape
from sciml.kernels.dual_solvers import minimize_box_quadratic, minimize_logistic, solve_ridge
from sciml.kernels.ntk import NTK
from sciml.kernels.pairwise import kernel_matmul, pairwise_kernel

__all__ = ["KernelMachineClassifier", "KernelMachineRegressor"]

Array = NDArray[Any]
KernelLike: TypeAlias = str | Kernel | Callable[..., Array] | None


class _KernelMachine(BaseEstimator):
    """Kernel matrix, weights, solver and decision values, which both machines share."""

    kernel: KernelLike
    loss: str
    C: float
    gamma: float | None
    degree: float
    coef0: float
    tol: float
    max_iter: int
    verbose: bool

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self._precomputed()
        return tags

    def _precomputed(self) -> bool:
        return isinstance(self.kernel, str) and self.kernel == "precomputed"

    def _check_parameters(self, losses: tuple[str, ...]) -> None:
        check_choice("loss", self.loss, losses)
        check_interval("C", self.C, 0, math.inf, closed="right")
        if math.isinf(self.C) and self.loss == "logistic":
            raise ValueError(
                "C must be finite for loss='logistic', which has no minimiser without "
                "regularisation if the classes can be separated, got inf"
            )
        check_interval("tol", self.tol, 0, math.inf, closed="neither")
        check_integer("max_iter", self.max_iter, 1)

    def _fit(self, X: Array, Y: Array, weight: Array, epsilon: float = 0.0) -> Array:
        """Return the coefficients of one problem for each column of Y, on one kernel matrix."""
        K = self._fit_kernel(X)
        if self.loss == "squared":
            scale = np.abs(Y).max(axis=0)  # the residual is relative to the targets
            scale[scale == 0] = 1.0
            B, self.kkt_residual_ = solve_ridge(K, Y / scale, 0.5 / self.C, weight)
            B *= scale
            self.n_iter_ = 1
        else:
            B, self.n_iter_, self.kkt_residual_ = np.empty(Y.shape), 0, 0.0
            bar = tqdm(range(Y.shape[1]), desc="problems", disable=not self.verbose)

            def show(residual: float) -> None:
                bar.set_postfix(residual=f"{residual:.1e}")

            for k in bar:
                progress = show if self.verbose else None
                B[:, k], n_iter, residual = self._solve(K, Y[:, k], weight, epsilon, progress)
                self.n_iter_ = max(self.n_iter_, n_iter)
                self.kkt_residual_ = max(self.kkt_residual_, residual)
        if not self.kkt_residual_ <= self.tol:
            advice = "scale the data, lower C, or increase max_iter or tol"
            if math.isinf(self.C) and self.loss != "squared":
                advice = "with C=inf, perhaps no function meets all constraints"
            warnings.warn(
                f"the optimality conditions hold to {self.kkt_residual_:.2g} after "
                f"{self.n_iter_} iterations, not to tol={self.tol:g}: {advice}",
                ConvergenceWarning,
                stacklevel=3,
            )
        return B.astype(X.dtype)

    def _fit_kernel(self, X: Array) -> Array:
        """Set the resolved kernel and the training samples; return the kernel matrix."""
        if self._precomputed():
            if X.shape[0] != X.shape[1]:
                raise ValueError(
                    "X must be a square kernel matrix for kernel='precomputed', got shape "
                    f"{X.shape}"
                )
            self.kernel_: KernelLike = "precomputed"
            self.X_fit_: Array | None = None
            K = X
        else:
            if self.kernel is None:
                self.kernel_ = NTK()
            else:
                self.kernel_ = clone(self.kernel, safe=False)
            self.X_fit_ = X.copy()
            # Samples that coincide share one row: between rows computed one by one rounding can
            # leave differences of sqrt(eps), which a large C would take for information.
            unique, inverse = np.unique(X, axis=0, return_inverse=True)
            repeated = len(unique) < len(X)
            K = pairwise_kernel(
                unique if repeated else X, None, self.kernel_, **self._kernel_parameters()
            )
            check_finite("the kernel matrix", K)
            if repeated:
                K = K[np.ix_(inverse.ravel(), inverse.ravel())]
        largest = max(K.max(), -K.min())
        blocks = [slice(i, i + 256) for i in range(0, len(K), 256)]
        asymmetry = max(
            np.abs(K[rows, columns] - K[columns, rows].T).max()
            for i, rows in enumerate(blocks)
            for columns in blocks[: i + 1]
        )
        if asymmetry > 10 * math.sqrt(np.finfo(K.dtype).eps) * largest:
            raise ValueError(
                "the kernel matrix must be symmetric, got entries that differ from their mirror "
                f"image by {asymmetry:.3g}"
            )
        if K.diagonal().min() < 0:
            raise ValueError(
                "the kernel matrix must be positive semi-definite, got the diagonal entry "
                f"{K.diagonal().min():.3g}"
            )
        return K

    def _kernel_parameters(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}

    def _solve(
        self,
        K: Array,
        y: Array,
        weight: Array,
        epsilon: float,
        progress: Callable[[float], None] | None,
    ) -> tuple[Array, int, float]:
        """Solve the problem of one column."""
        options: dict[str, Any] = {
            "tol": self.tol,
            "max_iter": self.max_iter,
            "progress": progress,
        }
        used = weight > 0
        c = np.zeros(len(y))
        c[used] = self.C * weight[used]
        if self.loss == "logistic":
            return minimize_logistic(K, y, c, **options)
        if self.loss == "epsilon_insensitive":
            scale = float(np.abs(y).max()) or 1.0  # so that tol is relative to the targets
            b, n_iter, residual = minimize_box_quadratic(
                K, y / scale, -c / scale, c / scale, epsilon=epsilon / scale, **options
            )
            return scale * b, n_iter, residual
        diagonal = np.zeros(len(y))
        if self.loss == "squared_hinge":
            diagonal[used] = 0.5 / c[used]
            c[used] = math.inf
        lower, upper = np.where(y > 0, 0.0, -c), np.where(y > 0, c, 0.0)
        return minimize_box_quadratic(K, y, lower, upper, diagonal=diagonal, **options)

    def _outputs(self, X: Any) -> Array:
        """Compute the outputs f(x) in the shape that the coefficients give."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        # Most machines need few of their training samples.
        support = np.flatnonzero(self.dual_coef_.reshape(len(self.dual_coef_), -1).any(axis=1))
        dual = self.dual_coef_[support]
        if self.X_fit_ is None:
            return X[:, support] @ dual
        dtype = np.result_type(X, dual)
        X, Y, dual = (a.astype(dtype, copy=False) for a in (X, self.X_fit_[support], dual))
        if len(support) == 0:
            return np.zeros((len(X), *dual.shape[1:]), dtype=dtype)
        return kernel_matmul(X, Y, dual, self.kernel_, **self._kernel_parameters())


def _has_probabilities(machine: "KernelMachineClassifier") -> bool:
    if machine.loss != "logistic":
        raise AttributeError(f"predict_proba needs loss='logistic', got loss={machine.loss!r}")
    return True


class KernelMachineClassifier(ClassifierMixin, _KernelMachine):
    """Classify by an l2-regularised kernel machine without intercept.

    For two classes, written y = -1 and 1, it minimises over functions f of the kernel's space

        1/2 ||f||^2 + C sum_i w_i l(f(x_i), y_i)

    which for ``C = 1 / lambda`` is what an infinitely wide network with that tangent kernel
    becomes when it is trained on ``lambda/2 ||W_last||^2 + sum_i l``. For more classes, one such
    problem a class against all others is solved on one kernel matrix.

    Parameters
    ----------
    kernel : str, Kernel, callable or None, default=None
        Name of a kernel of `pairwise_kernel`, a `sklearn.gaussian_process.kernels.Kernel`, a
        function ``kernel(X, Y)`` that returns the matrix, or "precomputed", where X holds kernel
        values: (n, n) in `fit` and (n_samples, n) later. None is ``NTK()``, the kernel of one
        hidden layer. Must be symmetric and positive semi-definite.
    loss : {"hinge", "squared_hinge", "logistic", "squared"}, default="hinge"
        Loss l(z, y), and the coefficient it gives to a sample of weight w:

        - "hinge": ``max(0, 1 - y z)``; ``0 <= y beta <= C w``, the 1-norm support vector machine;
        - "squared_hinge": ``max(0, 1 - y z)^2``; ``beta = 2 C w y max(0, 1 - y f)``;
        - "logistic": ``log(1 + exp(-y z))``; ``beta = C w y / (1 + exp(y f))``;
        - "squared": ``(y - z)^2``; ``beta = (K + I / (2 C))^-1 y`` for w = 1, which is
          `sklearn.kernel_ridge.KernelRidge` with ``alpha = lambda / 2 = 1 / (2 C)``.
    C : float, default=1.0
        Weight of the losses, ``1 / lambda`` of their *sum*; for a regulariser ``lambda_mean`` of
        their mean it is ``1 / (n lambda_mean)``. Infinite gives the hard-margin machine, and for
        "squared" the interpolation of least norm; not allowed for "logistic".
    gamma : float, default=None
        Scale of a named kernel; None is ``1 / n_features``.
    degree : float, default=3
        Degree of the polynomial kernel.
    coef0 : float, default=1.0
        Constant of the polynomial kernel.
    tol : float, default=1e-6
        Largest residual of the optimality conditions, in units of f.
    max_iter : int, default=1000
        Largest number of iterations of the solver a problem: rounds of n coordinate updates and
        some Newton steps, or Newton steps for "logistic". "squared" needs none.
    class_weight : dict or "balanced", default=None
        Weight of each class, which multiplies `sample_weight`; "balanced" is
        ``n / (n_classes * number in the class)``, as in scikit-learn.
    verbose : bool, default=False
        Whether to show a progress bar over the problems.

    Attributes
    ----------
    dual_coef_ : ndarray of shape (n_train,) or (n_train, n_classes)
        Coefficients beta, signed: ``decision_function(X) = K(X, X_fit_) @ dual_coef_``. One
        column for more than two classes.
    X_fit_ : ndarray of shape (n_train, n_features) or None
        Training samples; None if ``kernel="precomputed"``.
    kernel_ : str, Kernel or callable
        The kernel in use.
    classes_ : ndarray of shape (n_classes,)
        Class labels; positive outputs speak for ``classes_[1]`` if there are two.
    n_iter_ : int
        Iterations of the solver, the most over the problems.
    kkt_residual_ : float
        Residual reached, the largest over the problems, before `dual_coef_` is rounded to the
        dtype of X. A `ConvergenceWarning` tells if it is above `tol`.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : ndarray of shape (n_features,)
        Names of the features, if X has string column names.

    See Also
    --------
    KernelMachineRegressor : The same for real targets.
    kernel_gradient_flow : How training gets there.
    certified_radius : Radii within which the decision is proved constant.
    sklearn.svm.SVC : Support vector machine with intercept.

    Notes
    -----
    The kernel matrix is stored: memory O(n^2), time O(n^2) per n coordinate updates, O(s^3) for
    a Newton step on s free coefficients, O(n^3) for "logistic" and "squared". Coefficients are
    computed in float64 also from a float32 kernel matrix. Where training samples coincide the
    coefficients are not unique, but their sum and f are.

    References
    ----------
    Chen et al., "On the Equivalence between Neural Network and Support Vector Machine",
    arXiv:2111.06063.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.kernels import NTK, KernelMachineClassifier
    >>> X, y = load_digits(n_class=2, return_X_y=True)
    >>> machine = KernelMachineClassifier(NTK(depth=2), C=10.0).fit(X[:260] / 16, y[:260])
    >>> machine.score(X[260:] / 16, y[260:])
    1.0
    """

    def __init__(
        self,
        kernel: KernelLike = None,
        *,
        loss: str = "hinge",
        C: float = 1.0,
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1.0,
        tol: float = 1e-6,
        max_iter: int = 1000,
        class_weight: Mapping[Any, float] | str | None = None,
        verbose: bool = False,
    ) -> None:
        self.kernel = kernel
        self.loss = loss
        self.C = C
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.tol = tol
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the machine.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training samples, or their kernel matrix if ``kernel="precomputed"``.
        y : array-like of shape (n_samples,)
            Class labels, of two classes or more.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights w >= 0 of the losses; None is 1. An integer weight equals so many copies.

        Returns
        -------
        KernelMachineClassifier
            The machine itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or an array does not fit, holds NaN or infinity, or there is one class
            only; if the kernel matrix is not square, not symmetric or has a negative diagonal.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the optimality conditions do not hold to `tol` in the end.
        """
        self._check_parameters(("hinge", "squared_hinge", "logistic", "squared"))
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        weight = _check_weights(sample_weight, len(X))
        if self.class_weight is not None:
            weight = weight * compute_sample_weight(self.class_weight, y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(np.unique(y[weight > 0])) < 2:
            raise ValueError(
                "y must hold two classes or more (of positive sample_weight), got 1 class: "
                f"{y[weight > 0][0]!r}"
            )
        if len(self.classes_) == 2:
            Y = np.where(index == 1, 1.0, -1.0)[:, None]
        else:
            Y = np.where(index[:, None] == np.arange(len(self.classes_)), 1.0, -1.0)
        B = self._fit(X, Y, weight)
        self.dual_coef_ = B[:, 0] if len(self.classes_) == 2 else B
        return self

    def decision_function(self, X: Any) -> Array:
        """Compute the outputs f(x).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples, or if ``kernel="precomputed"`` their kernel values with the training samples.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_classes)
            Outputs; one column a class for more than two.
        """
        return self._outputs(X)

    def predict(self, X: Any) -> Array:
        """Predict the class of each sample.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples, or if ``kernel="precomputed"`` their kernel values with the training samples.

        Returns
        -------
        ndarray of shape (n_samples,)
            The class of the largest output; for two classes ``classes_[1]`` where f(x) > 0.
        """
        f = self.decision_function(X)
        index = (f > 0).astype(int) if f.ndim == 1 else f.argmax(axis=1)
        return self.classes_[index]

    @available_if(_has_probabilities)
    def predict_proba(self, X: Any) -> Array:
        """Compute the probability of each class; only for ``loss="logistic"``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples, or if ``kernel="precomputed"`` their kernel values with the training samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            For two classes ``1 / (1 + exp(-f))`` for the second, which is the model's; for more,
            these values of all outputs divided by their sum, which is a convention.
        """
        f = self.decision_function(X)
        if f.ndim == 1:
            return np.stack([expit(-f), expit(f)], axis=1)
        score = log_expit(f)  # logarithms, because all values may underflow
        return np.exp(score - logsumexp(score, axis=1, keepdims=True))


class KernelMachineRegressor(RegressorMixin, _KernelMachine):
    """Regress by an l2-regularised kernel machine without intercept.

    Minimises ``1/2 ||f||^2 + C sum_i w_i l(f(x_i), y_i)`` over functions f of the kernel's space,
    for each output by itself. Targets are neither centred nor scaled.

    Parameters
    ----------
    kernel : str, Kernel, callable or None, default=None
        As in `KernelMachineClassifier`; None is ``NTK()``.
    loss : {"squared", "epsilon_insensitive"}, default="squared"
        Loss l(z, y), and the coefficient it gives to a sample of weight w:

        - "squared": ``(y - z)^2``; ``beta = (K + I / (2 C))^-1 y`` for w = 1, which is
          `sklearn.kernel_ridge.KernelRidge` with ``alpha = 1 / (2 C)``;
        - "epsilon_insensitive": ``max(0, |y - z| - epsilon)``; ``|beta| <= C w``, support vector
          regression without intercept.
    C : float, default=1.0
        Weight of the losses, ``1 / lambda`` of their sum. Infinite gives for "squared" the
        interpolation of least norm, for "epsilon_insensitive" the function of least norm within
        epsilon of all targets.
    epsilon : float, default=0.1
        Half the width of the tube without loss, for "epsilon_insensitive" (the default is that
        of `sklearn.svm.SVR`).
    gamma : float, default=None
        Scale of a named kernel; None is ``1 / n_features``.
    degree : float, default=3
        Degree of the polynomial kernel.
    coef0 : float, default=1.0
        Constant of the polynomial kernel.
    tol : float, default=1e-6
        Largest residual of the optimality conditions, relative to the largest absolute target.
    max_iter : int, default=1000
        Largest number of iterations of the solver an output; "squared" needs none.
    verbose : bool, default=False
        Whether to show a progress bar over the outputs.

    Attributes
    ----------
    dual_coef_ : ndarray of shape (n_train,) or (n_train, n_outputs)
        Coefficients beta: ``predict(X) = K(X, X_fit_) @ dual_coef_``.
    X_fit_ : ndarray of shape (n_train, n_features) or None
        Training samples; None if ``kernel="precomputed"``.
    kernel_ : str, Kernel or callable
        The kernel in use.
    n_iter_ : int
        Iterations of the solver, the most over the outputs.
    kkt_residual_ : float
        Residual reached, relative to the largest absolute target of its output, before
        `dual_coef_` is rounded to the dtype of X.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : ndarray of shape (n_features,)
        Names of the features, if X has string column names.

    See Also
    --------
    KernelMachineClassifier : The same for classes.
    sklearn.kernel_ridge.KernelRidge, sklearn.svm.SVR : The peers in scikit-learn; SVR fits an
        intercept.

    References
    ----------
    Chen et al., "On the Equivalence between Neural Network and Support Vector Machine",
    arXiv:2111.06063.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import KernelMachineRegressor
    >>> X = np.linspace(0, 6, 50)[:, None]
    >>> machine = KernelMachineRegressor("rbf", loss="epsilon_insensitive", C=100.0)
    >>> float(np.abs(machine.fit(X, np.sin(X[:, 0])).predict(X) - np.sin(X[:, 0])).max().round(3))
    0.1
    """

    def __init__(
        self,
        kernel: KernelLike = None,
        *,
        loss: str = "squared",
        C: float = 1.0,
        epsilon: float = 0.1,
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1.0,
        tol: float = 1e-6,
        max_iter: int = 1000,
        verbose: bool = False,
    ) -> None:
        self.kernel = kernel
        self.loss = loss
        self.C = C
        self.epsilon = epsilon
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.tol = tol
        self.max_iter = max_iter
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the machine.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training samples, or their kernel matrix if ``kernel="precomputed"``.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights w >= 0 of the losses; None is 1. An integer weight equals so many copies.

        Returns
        -------
        KernelMachineRegressor
            The machine itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or an array does not fit or holds NaN or infinity; if the kernel matrix
            is not square, not symmetric or has a negative diagonal.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the optimality conditions do not hold to `tol` in the end.
        """
        self._check_parameters(("squared", "epsilon_insensitive"))
        check_interval("epsilon", self.epsilon, 0, math.inf, closed="left")
        X, y = validate_data(
            self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True
        )
        weight = _check_weights(sample_weight, len(X))
        y = y.astype(np.float64)
        B = self._fit(X, y.reshape(len(y), -1), weight, float(self.epsilon))
        self.dual_coef_ = B.reshape(y.shape)
        return self

    def predict(self, X: Any) -> Array:
        """Compute the outputs f(x).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples, or if ``kernel="precomputed"`` their kernel values with the training samples.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Outputs, in the shape of the targets.
        """
        return self._outputs(X)


def _check_weights(sample_weight: Any, n: int) -> Array:
    """Return the weights in float64."""
    if sample_weight is None:
        return np.ones(n)
    weight = np.asarray(sample_weight, dtype=np.float64)
    check_shape("sample_weight", weight, (n,))
    check_finite("sample_weight", weight)
    if weight.min() < 0 or weight.max() == 0:
        got = "all zeros" if weight.max() == 0 else f"the entry {weight.min()}"
        raise ValueError(f"sample_weight must be >= 0 and not zero for all samples, got {got}")
    return weight
