"""Solve the dual problems of kernel machines without intercept on a given kernel matrix.

The machines minimise, over functions ``f = sum_i beta_i K(., x_i)``,

    1/2 ||f||^2 + sum_i c_i l(f(x_i), y_i),

with weights ``c_i = C w_i``. Three solvers cover all their losses:

- `minimize_box_quadratic` for piecewise linear losses and the squared hinge, whose dual is a
  quadratic under bounds. Without an intercept no constraint couples the coefficients, so single
  coordinates can be optimised: the one that gains most is taken each time (Steinwart, Hush and
  Scovel, 2011). That finds the right set of free coefficients soon but, where the kernel matrix
  is ill-conditioned, their values late; a Newton step on the free ones gives those.
- `minimize_logistic` by Newton's method in the outputs, in the form that stays well-conditioned
  when weights vanish (Rasmussen and Williams, 2006, algorithm 3.1).
- `solve_ridge` by one Cholesky factorisation for all outputs.

Each returns the coefficients and a residual of the optimality conditions, computed afresh from
the coefficients and in units of the output ``f(x_i)``.

References
----------
I. Steinwart, D. Hush, C. Scovel, "Training SVMs Without Offset", JMLR 12, 2011.

C. E. Rasmussen, C. K. I. Williams, "Gaussian Processes for Machine Learning", MIT Press, 2006.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.special import expit, logit

__all__ = ["minimize_box_quadratic", "minimize_logistic", "solve_ridge"]

Array = NDArray[Any]
Progress = Callable[[float], None]

_NEWTON_STEPS = 20  # a round, before coordinates are looked at again
_PATIENCE = 8  # rounds without progress before rounding is held to be the limit


def minimize_box_quadratic(
    K: Array,
    linear: Array,
    lower: Array,
    upper: Array,
    *,
    diagonal: Array | float = 0.0,
    epsilon: float = 0.0,
    tol: float = 1e-6,
    max_iter: int = 1000,
    progress: Progress | None = None,
) -> tuple[Array, int, float]:
    """Minimise a convex quadratic with an absolute-value term under bounds.

    Minimises ``1/2 b'(K + diag(diagonal)) b - linear'b + epsilon sum |b_i|`` over
    ``lower <= b <= upper``.

    Parameters
    ----------
    K : ndarray of shape (n, n), float32 or float64
        Symmetric positive semi-definite matrix. Computations are in float64 either way.
    linear : ndarray of shape (n,)
        Linear term.
    lower, upper : ndarrays of shape (n,)
        Bounds with ``lower <= 0 <= upper``, possibly infinite.
    diagonal : ndarray of shape (n,) or float, default=0.0
        What is added to the diagonal of K, >= 0.
    epsilon : float, default=0.0
        Weight of the absolute values, >= 0.
    tol : float, default=1e-6
        Largest violation of the optimality conditions at which to stop.
    max_iter : int, default=1000
        Largest number of rounds: up to n coordinate updates and some Newton steps each.
    progress : callable, default=None
        Called with the violation before each round.

    Returns
    -------
    b : ndarray of shape (n,), float64
        Minimiser; its bounds hold exactly.
    n_iter : int
        Rounds used, at least 1.
    violation : float
        Largest violation: the slope of the objective along a coordinate into its interval.
    """
    n = len(linear)
    K = np.ascontiguousarray(K)
    diagonal = np.broadcast_to(np.asarray(diagonal, dtype=np.float64), n).copy()
    linear, lower, upper = (np.asarray(a, dtype=np.float64) for a in (linear, lower, upper))
    problem = (K, diagonal, lower, upper, float(epsilon))
    b = np.zeros(n)
    best, best_violation, lowest, stalled = b, np.inf, np.inf, 0
    # Each round aims at much less than tol, and one such round more costs little: then the
    # result no longer depends on the order of samples or on how weights are written.
    aim, polished = 1e-4 * tol, False
    for n_iter in range(1, max_iter + 2):
        gradient = _rows_times(K, b) + diagonal * b - linear
        violation = _violation(gradient, b, lower, upper, epsilon)
        if violation < best_violation:
            best, best_violation = b.copy(), violation
        objective = (b @ gradient - b @ linear) / 2 + epsilon * np.abs(b).sum()
        stalled = 0 if objective < lowest - 1e-14 * abs(lowest) else stalled + 1
        lowest = min(lowest, objective)
        if progress is not None:
            progress(best_violation)
        if violation <= (tol if polished else aim) or stalled > _PATIENCE or n_iter > max_iter:
            break
        polished = violation <= tol
        _descend(*problem, aim, b, gradient, max(n, 100))
        for _ in range(_NEWTON_STEPS):
            if _newton(*problem, b, gradient):
                break
    return best, max(1, n_iter - 1), float(best_violation)


def minimize_logistic(
    K: Array,
    y: Array,
    weight: Array,
    *,
    tol: float = 1e-6,
    max_iter: int = 1000,
    progress: Progress | None = None,
) -> tuple[Array, int, float]:
    """Minimise ``1/2 b'K b + sum_i weight_i log(1 + exp(-y_i (K b)_i))``.

    Parameters
    ----------
    K : ndarray of shape (n, n)
        Symmetric positive semi-definite matrix.
    y : ndarray of shape (n,)
        Classes -1 and 1.
    weight : ndarray of shape (n,)
        Weights of the losses, >= 0 and finite.
    tol : float, default=1e-6
        Largest residual at which to stop.
    max_iter : int, default=1000
        Largest number of Newton steps.
    progress : callable, default=None
        Called with the residual before each step.

    Returns
    -------
    b : ndarray of shape (n,), float64
        Minimiser, with ``0 <= y_i b_i <= weight_i``.
    n_iter : int
        Newton steps used, at least 1.
    residual : float
        At the minimum ``b_i = weight_i y_i / (1 + exp(y_i f_i))``. The residual is the change of
        ``f_i`` that makes this true or, if smaller, of ``b_i``, measured by its effect on the
        outputs (and relative to its weight, where it has none); the largest over i.
    """
    K = np.asarray(K, dtype=np.float64)
    weight = np.asarray(weight, dtype=np.float64)
    divisor = np.where(weight > 0, weight, 1.0)
    effect = np.maximum(np.sqrt(K.diagonal() * K.diagonal().max()), 1 / divisor)
    b, f = np.zeros(len(y)), np.zeros(len(y))
    best, best_residual, lowest, stalled = b, np.inf, np.inf, 0
    for n_iter in range(1, max_iter + 2):
        share = expit(-y * f)
        stationary = weight * y * share
        share_of_b = np.clip(y * b / divisor, 0.0, 1.0)
        distance = np.abs(y * f - logit(1.0 - share_of_b))
        distance = np.minimum(distance, effect * np.abs(b - stationary))
        residual = float(distance[weight > 0].max(initial=0.0))
        if residual < best_residual:
            best, best_residual = b, residual
        objective = _logistic_objective(b, f, y, weight)
        stalled = 0 if objective < lowest - 1e-15 * abs(lowest) else stalled + 1
        lowest = min(lowest, objective)
        if progress is not None:
            progress(best_residual)
        if residual <= tol or stalled > 2 or n_iter > max_iter:
            break
        root = np.sqrt(weight * share * (1 - share))
        target = root**2 * f + stationary
        B = root[:, None] * K * root
        B.flat[:: len(y) + 1] += 1.0
        try:
            factor = linalg.cho_factor(B, lower=True, overwrite_a=True)
        except linalg.LinAlgError:
            raise ValueError(
                "the kernel matrix must be positive semi-definite (up to rounding relative to 1 / "
                "C), got one with a negative eigenvalue"
            ) from None
        step = target - root * linalg.cho_solve(factor, root * (K @ target)) - b
        change = K @ step
        slope = change @ (b - stationary)
        length = 1.0
        while length > 1e-10:
            trial = _logistic_objective(b + length * step, f + length * change, y, weight)
            # Near the end rounding hides the decrease, which is no reason for shorter steps.
            if trial <= objective + 1e-4 * length * slope + 1e-14 * abs(objective):
                break
            length /= 2
        b = b + length * step
        f = K @ b
    # The optimum lies inside these bounds, but rounding may cross them.
    best = y * np.clip(y * best, 0.0, weight)
    return best, max(1, n_iter - 1), best_residual


def solve_ridge(
    K: Array, Y: Array, ridge: float, sample_weight: Array | None = None
) -> tuple[Array, float]:
    """Minimise ``ridge tr(B'K B) + sum_i w_i ||Y_i - (K B)_i||^2``, so ``(K + ridge/w) B = Y``.

    Parameters
    ----------
    K : ndarray of shape (n, n)
        Symmetric positive semi-definite matrix.
    Y : ndarray of shape (n,) or (n, k)
        Targets.
    ridge : float
        Regularisation, >= 0. With 0 the limit is taken: the minimiser of least norm.
    sample_weight : ndarray of shape (n,), default=None
        Weights w >= 0; None means 1.

    Returns
    -------
    B : ndarray of the shape of Y, float64
        Coefficients, 0 where the weight is.
    residual : float
        Largest entry of ``K B + ridge/w B - Y``; for a singular K and ``ridge=0``, of its part
        in the range of K.
    """
    weight = np.ones(len(K)) if sample_weight is None else np.asarray(sample_weight, float)
    kept = np.flatnonzero(weight > 0)
    root = np.sqrt(weight[kept])
    A = root[:, None] * K[np.ix_(kept, kept)].astype(np.float64) * root
    target = root[:, None] * Y[kept].reshape(len(kept), -1)
    solution = projection = None
    try:
        shifted = A.copy()
        shifted.flat[:: len(A) + 1] += ridge
        factor = linalg.cho_factor(shifted, lower=True, overwrite_a=True)
        solution = linalg.cho_solve(factor, target)
        solution += linalg.cho_solve(factor, target - A @ solution - ridge * solution)
    except linalg.LinAlgError:
        pass
    if solution is None or not np.abs(target - A @ solution - ridge * solution).max() <= 1e-10 * (
        np.abs(target).max()
    ):
        values, vectors = linalg.eigh(A)
        if ridge == 0:
            large = values > len(A) * np.finfo(K.dtype).eps * values[-1]
            values, vectors = values[large], vectors[:, large]
            projection = vectors @ vectors.T
        solution = vectors @ ((vectors.T @ target) / (np.maximum(values, 0.0) + ridge)[:, None])
    error = A @ solution + ridge * solution - target
    if projection is not None:
        error = projection @ error
    residual = float((np.abs(error) / root[:, None]).max(initial=0.0))
    B = np.zeros((len(K), target.shape[1]))
    B[kept] = root[:, None] * solution
    return B.reshape(Y.shape), residual


def _logistic_objective(b: Array, f: Array, y: Array, weight: Array) -> float:
    return float(b @ f / 2 + weight @ np.logaddexp(0.0, -y * f))


def _newton(
    K: Array,
    diagonal: Array,
    lower: Array,
    upper: Array,
    epsilon: float,
    b: Array,
    gradient: Array,
) -> bool:
    """Move the free coefficients to their joint optimum, in place; tell if no bound was met."""
    free = np.flatnonzero((b > lower) & (b < upper) & ((b != 0) | (epsilon == 0)))
    if len(free) == 0:
        return True
    value, sign = b[free], np.sign(b[free])
    low, high = lower[free], upper[free]
    if epsilon > 0:  # the absolute value is linear only up to zero
        low, high = np.where(sign > 0, 0.0, low), np.where(sign < 0, 0.0, high)
    H = K[np.ix_(free, free)].astype(np.float64)
    H.flat[:: len(free) + 1] += diagonal[free]
    slope = gradient[free] + epsilon * sign
    direction = _solve_nearly_singular(H, -slope)
    if direction is None:
        return True
    curvature = direction @ H @ direction
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.where(direction > 0, (high - value) / direction, (low - value) / direction)
        length = -(slope @ direction) / curvature if curvature > 0 else np.inf
    room[direction == 0] = np.inf
    if not np.isfinite(min(length, room.min())):
        return True  # the objective falls forever: no bound, no curvature
    if length <= room.min():
        new = value + length * direction
    else:
        # Stop at the first bound, or let coefficients past their bounds stay there if better.
        stopped = value + room.min() * direction
        stopped[room.argmin()] = (high if direction[room.argmin()] > 0 else low)[room.argmin()]
        new = np.clip(stopped, low, high)
        if np.isfinite(length):
            projected = np.clip(value + length * direction, low, high)
            if _change(H, slope, projected - value) < _change(H, slope, new - value):
                new = projected
    step = np.zeros_like(b)
    step[free] = new - value
    b[free] = new
    gradient += _rows_times(K, step) + diagonal * step
    return bool(length <= room.min())


def _change(H: Array, slope: Array, step: Array) -> float:
    """Return by how much the quadratic changes along a step."""
    return float(slope @ step + step @ H @ step / 2)


def _solve_nearly_singular(H: Array, right: Array) -> Array | None:
    """Solve H x = right for positive semi-definite H, with the least jitter that allows it."""
    scale = H.diagonal().max()
    if scale <= 0:
        return None
    for jitter in (0.0, 1e-13, 1e-11, 1e-9):
        A = H.copy()
        A.flat[:: len(H) + 1] += jitter * scale
        try:
            x = linalg.cho_solve(linalg.cho_factor(A, lower=True, overwrite_a=True), right)
        except linalg.LinAlgError:
            continue
        if np.isfinite(x).all() and right @ x > 0:
            return x
    return None


# ---------------------------------------------------------------- coordinate descent


@numba.njit(nogil=True, cache=True)
def _rows_times(K: Array, b: Array) -> Array:
    """Compute K b in float64 for symmetric K, row by row, skipping zeros of b."""
    n = len(b)
    f = np.zeros(n)
    for i in range(n):
        if b[i] != 0.0:
            for j in range(n):
                f[j] += b[i] * K[i, j]
    return f


@numba.njit(nogil=True, cache=True)
def _violation(gradient: Array, b: Array, lower: Array, upper: Array, epsilon: float) -> float:
    """Return the largest slope of the objective along a coordinate that may still move."""
    largest = 0.0
    for j in range(len(b)):
        right = gradient[j] + (epsilon if b[j] >= 0.0 else -epsilon)
        left = gradient[j] + (epsilon if b[j] > 0.0 else -epsilon)
        if b[j] < upper[j]:
            largest = max(largest, -right)
        if b[j] > lower[j]:
            largest = max(largest, left)
    return largest


@numba.njit(nogil=True, cache=True)
def _optimum(
    value: float, gradient: float, curvature: float, low: float, high: float, epsilon: float
) -> float:
    """Minimise the objective along one coordinate."""
    if curvature > 0.0:
        centre = value - gradient / curvature
        threshold = epsilon / curvature
        if centre > threshold:
            new = centre - threshold
        elif centre < -threshold:
            new = centre + threshold
        else:
            new = 0.0
    elif gradient < -epsilon:  # linear: to the end of the interval
        new = high
    elif gradient > epsilon:
        new = low
    else:
        new = value if epsilon == 0.0 else 0.0
    new = min(max(new, low), high)
    return new if np.isfinite(new) else value


@numba.njit(nogil=True, cache=True)
def _descend(
    K: Array,
    diagonal: Array,
    lower: Array,
    upper: Array,
    epsilon: float,
    tol: float,
    b: Array,
    gradient: Array,
    n_updates: int,
) -> None:
    """Optimise the coordinate that lowers the objective most, again and again, in place."""
    n = len(b)
    curvature = np.empty(n)
    for j in range(n):
        curvature[j] = K[j, j] + diagonal[j]
    chosen, step = 0, 0.0
    for _ in range(n_updates + 1):
        row = K[chosen]
        gradient[chosen] += diagonal[chosen] * step
        largest, best, target = 0.0, -1.0, 0.0
        next_chosen = 0
        for j in range(n):
            g = gradient[j] + step * row[j]
            gradient[j] = g
            right = g + (epsilon if b[j] >= 0.0 else -epsilon)
            left = g + (epsilon if b[j] > 0.0 else -epsilon)
            slope = 0.0
            if right < 0.0 and b[j] < upper[j]:
                slope = -right
            elif left > 0.0 and b[j] > lower[j]:
                slope = left
            if slope > 0.0:
                largest = max(largest, slope)
                new = _optimum(b[j], g, curvature[j], lower[j], upper[j], epsilon)
                # Half the slope times the step bounds the gain from below, and is it when the
                # optimum is inside the interval.
                gain = slope * abs(new - b[j])
                if gain > best:
                    best, target, next_chosen = gain, new, j
        if largest <= tol or best <= 0.0:
            return
        chosen = next_chosen
        step = target - b[chosen]
        b[chosen] = target
