"""Scaling laws: how the loss of a language model falls with its parameters and its data.

Three laws, each an estimator that fits losses of finished training runs and predicts those of
runs nobody has made:

- `Chinchilla` adds a term for parameters and a term for tokens, every token seen once;
- `DataConstrained` discounts tokens seen again and parameters beyond what the data can feed;
- `SoftQ` joins both terms by a soft minimum: the scarcer of the two decides.

All are fitted to the logarithm of the loss by a Huber loss, from many starts.
"""

import warnings
from abc import abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from sciml._check import check_choice, check_integer, check_interval

__all__ = ["Chinchilla", "DataConstrained", "SoftQ"]

Array = NDArray[np.float64]

# Exponents are searched within [e^-6, e^2], the sharpness q within [e^-1, e^4], where the data
# of a few dozen runs still tells values apart.
_LOG_EXPONENT = (-6.0, 2.0)
_LOG_SHARPNESS = (-1.0, 4.0)
_LOG_REPEATS = (-4.0, 12.0)


class _ScalingLaw(RegressorMixin, BaseEstimator):
    """Fit of ln L(N, D, ...) by a Huber loss from many starts; subclasses give the law."""

    _parameter_names: ClassVar[tuple[str, ...]]
    _most_columns: ClassVar[int] = 3

    delta: float
    n_init: int

    @abstractmethod
    def _log_law(self, theta: Tensor, columns: Tensor) -> Tensor:
        """Logarithm of the loss for internal parameters `theta` (p,) and log columns (n, 3)."""

    @abstractmethod
    def _starts(self, columns: Array, loss: Array) -> Array:
        """Starting points (s, p) for the optimiser, best first."""

    @abstractmethod
    def _bounds(self, loss: Array) -> list[tuple[float, float]]:
        """Bounds of the internal parameters."""

    @abstractmethod
    def _published_form(self, theta: Array, means: Array) -> dict[str, float]:
        """Parameters as papers write them, from internal ones and the centres of the columns."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the law to the losses of training runs.

        Parameters
        ----------
        X : array-like of shape (n_runs, 2) or (n_runs, 3)
            Parameters, unique tokens and, in laws that know repetition, epochs (1 where the
            column is missing).
        y : array-like of shape (n_runs,)
            Final losses, positive (nats a token, say).

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If an entry is not positive, or there are fewer distinct runs than parameters.

        Warns
        -----
        ConvergenceWarning
            If no start led the optimiser to a minimum.
        """
        check_interval("delta", self.delta, 0, closed="neither")
        check_integer("n_init", self.n_init, 1)
        columns, loss = self._runs(X, y, reset=True)
        n_distinct = len(np.unique(columns, axis=0))
        if n_distinct < len(self._parameter_names):
            raise ValueError(
                f"X must hold at least {len(self._parameter_names)} distinct runs, one a "
                f"parameter of {type(self).__name__}, got {n_distinct}"
            )
        self.center_ = columns.mean(axis=0)
        self.center_[2] = 0.0  # epochs are counted, not scaled
        centered = columns - self.center_
        self._theta, self.objective_, converged = self._minimise(centered, np.log(loss), loss)
        if not converged:
            warnings.warn(
                f"{type(self).__name__} did not converge from any of its starts",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._set_parameters()
        return self

    def predict(self, X: ArrayLike) -> Array:
        """Predict losses.

        Parameters
        ----------
        X : array-like of shape (n_runs, 2) or (n_runs, 3)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_runs,)
        """
        check_is_fitted(self)
        columns = self._log_columns(validate_data(self, X, reset=False, dtype=np.float64))
        return np.exp(self._log_predict(self._theta, columns - self.center_))

    def confidence_intervals(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        n_resamples: int = 200,
        level: float = 0.95,
        random_state: int | np.random.RandomState | None = None,
    ) -> dict[str, tuple[float, float]]:
        """Percentile intervals of the parameters, by refitting to resampled runs.

        Parameters
        ----------
        X, y : array-like
            The runs of `fit`.
        n_resamples : int, default=200
            Number of bootstrap samples. Each refit starts at the fitted parameters.
        level : float in (0, 1), default=0.95
            Share of the refits inside an interval.
        random_state : int, RandomState or None
            Draws the samples.

        Returns
        -------
        dict of str to (float, float)
            Lower and upper end for each parameter.

        Warns
        -----
        ConvergenceWarning
            If some refits did not reach a minimum; their parameters count all the same.
        """
        check_is_fitted(self)
        check_integer("n_resamples", n_resamples, 2)
        check_interval("level", level, 0, 1, closed="neither")
        columns, loss = self._runs(X, y)
        centered = columns - self.center_
        rng = check_random_state(random_state)
        refits: list[list[float]] = []
        n_failed = 0
        while len(refits) < n_resamples:
            rows = rng.randint(len(loss), size=len(loss))
            if len(np.unique(centered[rows], axis=0)) < len(self._parameter_names):
                continue  # a law cannot be fitted to fewer runs than parameters
            theta, _, converged = self._minimise(
                centered[rows], np.log(loss[rows]), loss[rows], self._theta
            )
            n_failed += not converged
            refits.append(list(self._published_form(theta, self.center_).values()))
        if n_failed:
            warnings.warn(
                f"{n_failed} of {n_resamples} refits of {type(self).__name__} did not converge",
                ConvergenceWarning,
                stacklevel=2,
            )
        ends = np.quantile(refits, [(1 - level) / 2, (1 + level) / 2], axis=0)
        names = self._published_form(self._theta, self.center_)
        return {name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(names)}

    def plot(self, X: ArrayLike, y: ArrayLike | None = None, *, ax: Any = None) -> Any:
        """Draw loss against unique tokens, a curve for each number of parameters.

        Parameters
        ----------
        X : array-like of shape (n_runs, 2) or (n_runs, 3)
            Runs whose parameters (and largest number of epochs) give the curves.
        y : array-like of shape (n_runs,), optional
            Measured losses, drawn as points.
        ax : matplotlib.axes.Axes, optional
            Where to draw; a new figure when missing.

        Returns
        -------
        matplotlib.axes.Axes
        """
        import matplotlib.pyplot as plt

        check_is_fitted(self)
        runs: Array = validate_data(self, X, reset=False, dtype=np.float64)
        if ax is None:
            _, ax = plt.subplots()
        tokens = np.geomspace(runs[:, 1].min() / 2, runs[:, 1].max() * 2, 100)
        sizes = np.unique(runs[:, 0])
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(sizes)))
        for color, size in zip(colors, sizes, strict=True):
            rows = runs[:, 0] == size
            curve = np.column_stack([np.full_like(tokens, size), tokens])
            if runs.shape[1] == 3:
                curve = np.column_stack([curve, np.full_like(tokens, runs[rows, 2].max())])
            ax.plot(tokens, self.predict(curve), color=color, label=f"{size:.3g} parameters")
            if y is not None:
                ax.plot(runs[rows, 1], np.asarray(y)[rows], "o", color=color)
        ax.set(xscale="log", xlabel="unique tokens", ylabel="loss", title=type(self).__name__)
        ax.legend(fontsize="small")
        return ax

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.target_tags.positive_only = True
        return tags

    def _runs(self, X: ArrayLike, y: ArrayLike, *, reset: bool = False) -> tuple[Array, Array]:
        """Log columns and losses, checked."""
        runs, losses = validate_data(self, X, y, reset=reset, dtype=np.float64, y_numeric=True)
        loss = np.asarray(losses, dtype=np.float64)
        if not (loss > 0).all():
            raise ValueError(f"y must be positive losses, got a smallest value of {loss.min()}")
        return self._log_columns(np.asarray(runs)), loss

    def _log_columns(self, X: Array) -> Array:
        n_columns = X.shape[1]
        if not 2 <= n_columns <= self._most_columns:
            names = ("parameters", "unique tokens", "epochs")[: self._most_columns]
            wanted = "2" if self._most_columns == 2 else f"2 or {self._most_columns}"
            raise ValueError(
                f"X must have {wanted} columns ({', '.join(names)}) for {type(self).__name__}, "
                f"got {n_columns}"
            )
        if not (X > 0).all():
            raise ValueError(
                f"X must be positive (parameters, tokens, epochs), got a smallest value of "
                f"{X.min()}"
            )
        epochs = X[:, 2:] if n_columns == 3 else np.ones((len(X), 1))
        return np.log(np.hstack([X[:, :2], epochs]))

    def _log_predict(self, theta: Array, columns: Array) -> Array:
        with torch.no_grad():
            log_loss = self._log_law(torch.from_numpy(theta), torch.from_numpy(columns))
        return np.asarray(log_loss.numpy(), dtype=np.float64)

    def _minimise(
        self, columns: Array, log_loss: Array, loss: Array, warm_start: Array | None = None
    ) -> tuple[Array, float, bool]:
        """Best point reached from the starts or from `warm_start`, its value, if any converged."""
        starts = self._starts(columns, loss) if warm_start is None else warm_start[None]
        bounds = self._bounds(loss)
        low, high = np.array(bounds, dtype=np.float64).T
        data, target = torch.from_numpy(columns), torch.from_numpy(log_loss)

        def objective(theta: Array) -> tuple[float, Array]:
            point = torch.tensor(theta, requires_grad=True)
            # In units of delta: as the law states it, gradients would be below any tolerance.
            residual = (self._log_law(point, data) - target) / self.delta
            value = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual))
            (gradient,) = torch.autograd.grad(value, point)
            return value.item(), gradient.numpy()

        def descend(start: Array) -> Any:
            for _ in range(3):  # rounding can stop a line search: go on from there
                result = minimize(
                    objective,
                    np.clip(start, low, high),
                    jac=True,
                    method="L-BFGS-B",
                    bounds=bounds,
                    options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30},
                )
                if result.success:
                    break
                start = result.x
            return result

        results = [descend(start) for start in starts]
        finite = [result for result in results if np.isfinite(result.fun)]
        arrived = [r.success or np.abs(r.jac).max() < 1e-3 * (1 + r.fun) for r in finite]
        if not finite:
            return np.asarray(starts[0], dtype=np.float64), np.inf, False
        best = min(finite, key=lambda result: float(result.fun))
        return np.asarray(best.x, dtype=np.float64), float(best.fun), any(arrived)

    def _set_parameters(self) -> None:
        for name, value in self._published_form(self._theta, self.center_).items():
            setattr(self, f"{name}_", value)


class _SoftMinimumLaw(_ScalingLaw):
    """L = E + [(A N^-alpha)^q + (B D^-beta)^q]^(1/q), with beta and q free or given."""

    # Internal parameters: e = ln E, a = ln A, b = ln B (columns centred), then ln alpha and
    # what of ln beta and ln q is free.

    def _coupling(self) -> str:
        return "additive"

    def _exponents(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha, beta and q."""
        alpha = theta[3].exp()
        coupling = self._coupling()
        if coupling == "tied":
            return alpha, alpha / (1 + alpha), theta[4].exp()
        beta = theta[4].exp()
        if coupling == "free":
            return alpha, beta, theta[5].exp()
        q = {"additive": torch.ones_like(beta), "kaplan": 1 / beta, "harmonic": 1 / alpha}[coupling]
        return alpha, beta, q

    def _log_law(self, theta: Tensor, columns: Tensor) -> Tensor:
        alpha, beta, q = self._exponents(theta)
        log_n, log_d = columns[:, 0], self._log_tokens(columns)
        parameter_term = theta[1] - alpha * log_n
        token_term = theta[2] - beta * log_d
        reducible = torch.logaddexp(q * parameter_term, q * token_term) / q
        return torch.logaddexp(theta[0], reducible)

    def _log_tokens(self, columns: Tensor) -> Tensor:
        return columns[:, 1] + columns[:, 2]

    def _free(self) -> tuple[str, ...]:
        return {"tied": ("q",), "free": ("beta", "q")}.get(self._coupling(), ("beta",))

    def _starts(self, columns: Array, loss: Array) -> Array:
        free = self._free()
        exponents = np.log(np.geomspace(0.05, 2.0, 10))
        sharpness = np.log([0.5, 1.0, 2.0, 4.0, 8.0])
        axes = [exponents, *(exponents if name == "beta" else sharpness for name in free)]
        ratios = np.linspace(-6.0, 6.0, 9)
        grid = np.stack(np.meshgrid(ratios, *axes, indexing="ij"), axis=-1).reshape(
            -1, len(axes) + 1
        )
        # With b - a and the exponents given, the law is linear in E and A: least squares.
        theta = np.zeros((len(grid), 3 + len(axes)))
        theta[:, 2:] = grid
        theta[:, 0] = -np.inf
        data = torch.from_numpy(columns)
        with torch.no_grad():
            shapes = torch.stack([self._log_law(t, data) for t in torch.from_numpy(theta)])
        g = np.exp(shapes.numpy()) / loss
        w = 1 / loss
        gg, gw, ww = (g * g).sum(1), (g * w).sum(1), (w * w).sum()
        g1, w1 = g.sum(1), w.sum()
        determinant = np.maximum(gg * ww - gw**2, 1e-12 * gg * ww)
        floor = 1e-3 * loss.min()
        E = np.clip((gg * w1 - gw * g1) / determinant, floor, 0.999 * loss.min())
        scale = np.maximum((g1 - gw * E) / gg, 1e-8 * loss.min())
        residual = np.abs(scale[:, None] * g + E[:, None] * w - 1)
        badness = np.minimum(residual**2, self.delta * residual).sum(1)
        order = np.argsort(badness, kind="stable")[: self.n_init]
        theta[:, 0] = np.log(E)
        theta[:, 1] = np.log(scale)
        theta[:, 2] += np.log(scale)
        return theta[order]

    def _bounds(self, loss: Array) -> list[tuple[float, float]]:
        lowest = float(np.log(loss.min()))
        bounds = [(lowest - 12.0, lowest), (-40.0, 40.0), (-40.0, 40.0), _LOG_EXPONENT]
        free = self._free()
        return bounds + [_LOG_EXPONENT if name == "beta" else _LOG_SHARPNESS for name in free]

    def _published_form(self, theta: Array, means: Array) -> dict[str, float]:
        alpha, beta, q = (float(x) for x in self._exponents(torch.from_numpy(theta)))
        named = {
            "E": float(np.exp(theta[0])),
            "A": float(np.exp(theta[1] + alpha * means[0])),
            "B": float(np.exp(theta[2] + beta * means[1])),
            "alpha": alpha,
            "beta": beta,
        }
        return named if self._coupling() == "additive" else {**named, "q": q}

    def data_multiplier(self, X: ArrayLike, y: ArrayLike) -> Array:
        """How many times the tokens of X this law needs for the losses y.

        Fit the law to a baseline, and give the losses of a better method: a multiplier of 1.3
        says that the method is worth 30 % more data.

        Parameters
        ----------
        X : array-like of shape (n_runs, 2) or (n_runs, 3)
            The runs of the other method.
        y : array-like of shape (n_runs,)
            Their losses.

        Returns
        -------
        ndarray of shape (n_runs,)
            Infinity where no amount of data reaches the loss at that number of parameters.
        """
        check_is_fitted(self)
        runs, loss = self._runs(X, y)
        columns = torch.from_numpy(runs - self.center_)
        theta = torch.from_numpy(self._theta)
        alpha, beta, q = (float(x) for x in self._exponents(theta))
        excess = np.maximum(loss - np.exp(self._theta[0]), 0.0)
        parameter_term = np.exp(self._theta[1] - alpha * columns[:, 0].numpy())
        token_term = np.exp(self._theta[2] - beta * self._log_tokens(columns).numpy())
        with np.errstate(divide="ignore"):
            # s^q - u^q in a form that neither over- nor underflows for large q
            share = -np.expm1(q * (np.log(parameter_term) - np.log(excess)))
            needed = excess * np.maximum(share, 0.0) ** (1 / q)
            return np.asarray(np.where(share > 0, (token_term / needed) ** (1 / beta), np.inf))


class Chinchilla(_SoftMinimumLaw):
    """Loss as a constant plus a power of parameters plus a power of tokens seen.

    L(N, D) = E + A N^-alpha + B D^-beta, where D counts every token each time it is seen.
    Fitted as the paper does: the sum over runs of Huber_delta(ln L_predicted - ln L) is
    minimised by L-BFGS from many starts. Starts are not the paper's 4,500 grid points: for given
    exponents and A/B the law is linear, so that the best of a grid of exponents are found by
    least squares and only these are refined. The minimum is the same (see the tests).

    Parameters
    ----------
    delta : float, default=1e-3
        Where the Huber loss turns from squared to absolute, in units of ln L (the paper's).
    n_init : int, default=12
        Number of starts that are refined.

    Attributes
    ----------
    E_, A_, B_, alpha_, beta_ : float
        The law, for parameters and tokens as numbers (not millions).
    objective_ : float
        Mean Huber loss at the minimum, in units of delta squared.
    center_ : ndarray of shape (3,)
        Mean logarithms of the columns, by which they are centred while fitting.
    n_features_in_ : int

    References
    ----------
    Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, arXiv:2203.15556;
    refitted by Besiroglu et al., 2024, arXiv:2404.10102.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.lm import Chinchilla
    >>> N, D = np.meshgrid([1e8, 4e8, 1.6e9], [2e9, 1e10, 5e10])
    >>> X = np.column_stack([N.ravel(), D.ravel()])
    >>> loss = 1.8172 + 482.01 * X[:, 0] ** -0.3478 + 2085.43 * X[:, 1] ** -0.3658
    >>> law = Chinchilla().fit(X, loss)
    >>> round(law.alpha_, 3), round(law.E_, 3)
    (0.348, 1.817)
    """

    _parameter_names = ("E", "A", "B", "alpha", "beta")

    def __init__(self, delta: float = 1e-3, n_init: int = 12):
        self.delta = delta
        self.n_init = n_init

    @classmethod
    def from_parameters(cls, E: float, A: float, B: float, alpha: float, beta: float) -> Self:
        """The law with published constants, ready to predict.

        Parameters
        ----------
        E, A, B, alpha, beta : float
            Positive constants; the paper's are 1.69, 406.4, 410.7, 0.34, 0.28.

        Returns
        -------
        Chinchilla
        """
        for name, value in (("E", E), ("A", A), ("B", B), ("alpha", alpha), ("beta", beta)):
            check_interval(name, value, 0, closed="neither")
        law = cls()
        law.n_features_in_ = 2
        law.center_ = np.zeros(3)
        law._theta = np.log(np.array([E, A, B, alpha, beta], dtype=np.float64))
        law.objective_ = np.nan
        law._set_parameters()
        return law

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss that a budget buys, at 6 N D operations.

        Parameters
        ----------
        flops : float
            Floating-point operations of the whole training.

        Returns
        -------
        n_parameters, n_tokens : float
        """
        check_is_fitted(self)
        check_interval("flops", flops, 0, closed="neither")
        total = self.alpha_ + self.beta_
        G = (self.alpha_ * self.A_ / (self.beta_ * self.B_)) ** (1 / total)
        return float(G * (flops / 6) ** (self.beta_ / total)), float(
            (flops / 6) ** (self.alpha_ / total) / G
        )


class SoftQ(_SoftMinimumLaw):
    """Loss of tuned many-epoch runs: the scarcer of parameters and unique tokens decides.

    L(N, D) = E + [(A N^-alpha)^q + (B D^-beta)^q]^(1/q), D the *unique* tokens of a run whose
    number of epochs was tuned. With q = 1 both terms add up (Chinchilla); with growing q the
    larger one alone counts.

    The paper's printed formula was not available. This is a reconstruction from what is known of
    it: five parameters, a coupling of N and D, a derivation from the quanta hypothesis. If quanta
    of knowledge are used with frequency k^-(1+alpha), a model holds n_N ~ N of them, a corpus
    teaches n_D ~ D^(1/(1+alpha)), and the loss falls as n^-alpha in a soft minimum n of both:
    hence beta = alpha / (1 + alpha), the default coupling. On losses simulated from such quanta it
    predicts held-out runs far better than the additive law; what it does on trained models is in
    the documentation.

    Parameters
    ----------
    coupling : {"tied", "kaplan", "harmonic", "free"}, default="tied"
        ``"tied"``: beta = alpha/(1 + alpha), q free (five parameters). ``"kaplan"``: q = 1/beta,
        Kaplan's joint law plus a constant. ``"harmonic"``: q = 1/alpha. ``"free"``: beta and q
        both free (six parameters).
    delta : float, default=1e-3
        Where the Huber loss on ln L turns from squared to absolute.
    n_init : int, default=12
        Number of starts that are refined.

    Attributes
    ----------
    E_, A_, B_, alpha_, beta_, q_ : float
        The law.
    objective_ : float
        Mean Huber loss at the minimum, in units of delta squared.
    center_ : ndarray of shape (3,)
        Mean logarithms of the columns.
    n_features_in_ : int

    References
    ----------
    Xu et al., "Data-Constrained Language Model Pretraining: Improved Regularization and Scaling
    Laws", 2026, arXiv:2606.06888. Status: partial (reconstructed formula).

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.lm import SoftQ
    >>> N, D = np.meshgrid([1e6, 4e6, 1.6e7], [2e6, 1e7, 5e7])
    >>> X = np.column_stack([N.ravel(), D.ravel()])
    >>> terms = (500 * X[:, 0] ** -0.5) ** 3 + (90 * X[:, 1] ** (-1 / 3)) ** 3
    >>> law = SoftQ().fit(X, 1.7 + terms ** (1 / 3))
    >>> round(law.alpha_, 3), round(law.beta_, 3), round(law.q_, 2)
    (0.5, 0.333, 3.0)
    """

    _most_columns = 2

    def __init__(self, coupling: str = "tied", delta: float = 1e-3, n_init: int = 12):
        self.coupling = coupling
        self.delta = delta
        self.n_init = n_init

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the law to the losses of tuned runs; see `Chinchilla.fit` for errors and warnings.

        Parameters
        ----------
        X : array-like of shape (n_runs, 2)
            Parameters and unique tokens. There is no column of epochs: give each pair the loss
            of its best number of epochs.
        y : array-like of shape (n_runs,)
            Losses.

        Returns
        -------
        self
        """
        check_choice("coupling", self.coupling, ("tied", "kaplan", "harmonic", "free"))
        return super().fit(X, y)

    def _coupling(self) -> str:
        return self.coupling

    @property
    def _parameter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        names = ("E", "A", "B", "alpha", "q")
        return (*names, "beta") if self.coupling == "free" else names


class DataConstrained(_ScalingLaw):
    """Loss when data repeats: tokens seen again, and parameters in excess, count less and less.

    L = E + A N'^-alpha + B D'^-beta with effective counts

        D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*)),   R_D = D / U_D - 1  repetitions,
        N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)),   R_N = N / U_N - 1,

    U_D the unique tokens, U_N the parameters that are compute-optimal for them (N itself when
    smaller). Where every token is seen once and N <= U_N it is Chinchilla's law.

    The fit starts as the paper's does: E, A, B and the exponents on runs that saw each token
    once (on all runs when those are too few), then a grid of R_D* and R_N*. It ends with all
    constants refined together on all runs, where the paper keeps the first stage: single-epoch
    runs with more parameters than their data can feed would bias it.

    Parameters
    ----------
    tie_exponents : bool, default=True
        Keep alpha = beta, as the paper does.
    delta : float, default=1e-3
        Where the Huber loss on ln L turns from squared to absolute.
    n_init : int, default=8
        Number of starts that are refined, the best of the paper's grid of six values of R_D*
        times six of R_N*.

    Attributes
    ----------
    E_, A_, B_, alpha_, beta_, R_N_, R_D_ : float
        The law; the paper's are 1.87, 521, 1488, 0.353, 0.353, 5.31, 15.39.
    objective_ : float
        Mean Huber loss at the minimum, in units of delta squared.
    center_ : ndarray of shape (3,)
        Mean logarithms of the columns.
    n_features_in_ : int

    References
    ----------
    Muennighoff et al., "Scaling Data-Constrained Language Models", 2023, arXiv:2305.16264.

    Examples
    --------
    >>> from sciml.lm import DataConstrained
    >>> law = DataConstrained.from_parameters(1.87, 521, 1488, 0.353, 0.353, 5.31, 15.39)
    >>> once, four, forty = law.predict([[1e9, 1e10, 1], [1e9, 1e10, 4], [1e9, 1e10, 40]])
    >>> bool(once - four > four - forty > 0)
    True
    """

    def __init__(self, tie_exponents: bool = True, delta: float = 1e-3, n_init: int = 8):
        self.tie_exponents = tie_exponents
        self.delta = delta
        self.n_init = n_init

    @property
    def _parameter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        names = ("E", "A", "B", "alpha", "R_N", "R_D")
        return names if self.tie_exponents else (*names, "beta")

    @classmethod
    def from_parameters(
        cls, E: float, A: float, B: float, alpha: float, beta: float, R_N: float, R_D: float
    ) -> Self:
        """The law with published constants, ready to predict.

        Parameters
        ----------
        E, A, B, alpha, beta, R_N, R_D : float
            Positive constants.

        Returns
        -------
        DataConstrained
        """
        named = {"E": E, "A": A, "B": B, "alpha": alpha, "beta": beta, "R_N": R_N, "R_D": R_D}
        for name, value in named.items():
            check_interval(name, value, 0, closed="neither")
        law = cls(tie_exponents=alpha == beta)
        law.n_features_in_ = 3
        law.center_ = np.zeros(3)
        ordered = [E, A, B, alpha, R_N, R_D] + ([] if alpha == beta else [beta])
        law._theta = np.log(np.array(ordered, dtype=np.float64))
        law.objective_ = np.nan
        law._set_parameters()
        return law

    def _log_law(self, theta: Tensor, columns: Tensor) -> Tensor:
        e, a, b, log_alpha, log_r_n, log_r_d = theta[:6]
        log_beta = log_alpha if self.tie_exponents else theta[6]
        alpha, beta = log_alpha.exp(), log_beta.exp()
        log_n, log_u, log_epochs = columns.T
        log_unique = log_u + log_epochs.clamp(max=0)  # less than an epoch: fewer unique tokens
        log_g = (log_alpha + a - log_beta - b) / (alpha + beta)
        log_fed = torch.minimum(log_n, log_g + beta / alpha * (log_g + log_unique))
        log_d = log_unique + _log_saturating(log_epochs.clamp(min=0), log_r_d)
        log_n = log_fed + _log_saturating(log_n - log_fed, log_r_n)
        return torch.logaddexp(e, torch.logaddexp(a - alpha * log_n, b - beta * log_d))

    def _starts(self, columns: Array, loss: Array) -> Array:
        once = columns[:, 2] <= 0
        exponents = 1 if self.tie_exponents else 2
        enough = len(np.unique(columns[once], axis=0)) >= 3 + exponents
        rows = once if enough else np.ones(len(loss), dtype=bool)
        base = (_TiedChinchilla if self.tie_exponents else Chinchilla)(self.delta)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a start need not be a minimum
            base.fit(np.exp(columns[rows]), loss[rows])
        # back to the frame of these columns: `base` centred its own rows once more
        theta = base._theta.copy()
        theta[1] += base.alpha_ * base.center_[0]
        theta[2] += base.beta_ * base.center_[1]
        values = np.log([0.5, 4.0, 8.0, 12.0, 16.0, 20.0])
        pairs = np.stack(np.meshgrid(values, values), axis=-1).reshape(-1, 2)
        parts = [np.tile(theta[:4], (len(pairs), 1)), pairs]
        if not self.tie_exponents:
            parts.append(np.full((len(pairs), 1), theta[4]))
        starts = np.hstack(parts)
        residual = [np.abs(self._log_predict(start, columns) - np.log(loss)) for start in starts]
        badness = np.minimum(np.square(residual), self.delta * np.array(residual)).sum(1)
        return starts[np.argsort(badness, kind="stable")[: self.n_init]]

    def _bounds(self, loss: Array) -> list[tuple[float, float]]:
        lowest = float(np.log(loss.min()))
        bounds = [(lowest - 12.0, lowest), (-40.0, 40.0), (-40.0, 40.0), _LOG_EXPONENT]
        bounds += [_LOG_REPEATS, _LOG_REPEATS]
        return bounds if self.tie_exponents else [*bounds, _LOG_EXPONENT]

    def _published_form(self, theta: Array, means: Array) -> dict[str, float]:
        alpha = float(np.exp(theta[3]))
        beta = alpha if self.tie_exponents else float(np.exp(theta[6]))
        return {
            "E": float(np.exp(theta[0])),
            "A": float(np.exp(theta[1] + alpha * means[0])),
            "B": float(np.exp(theta[2] + beta * means[1])),
            "alpha": alpha,
            "beta": beta,
            "R_N": float(np.exp(theta[4])),
            "R_D": float(np.exp(theta[5])),
        }


class _TiedChinchilla(_SoftMinimumLaw):
    """Chinchilla's law with alpha = beta: the first stage of the data-constrained fit."""

    _parameter_names = ("E", "A", "B", "alpha")

    def __init__(self, delta: float = 1e-3, n_init: int = 12):
        self.delta = delta
        self.n_init = n_init

    def _exponents(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha = theta[3].exp()
        return alpha, alpha, torch.ones_like(alpha)

    def _starts(self, columns: Array, loss: Array) -> Array:
        return super()._starts(columns, loss)[:, :4]

    def _bounds(self, loss: Array) -> list[tuple[float, float]]:
        return super()._bounds(loss)[:4]


def _log_saturating(log_ratio: Tensor, log_scale: Tensor) -> Tensor:
    """ln(1 + R* (1 - exp(-(ratio - 1) / R*))): what `ratio` times a thing is worth."""
    scale = log_scale.exp()
    return torch.log1p(-scale * torch.expm1(-torch.expm1(log_ratio) / scale))
