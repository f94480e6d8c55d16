"""Follow gradient flow and gradient descent of a kernel machine, in its coefficients.

An infinitely wide network trained by gradient flow on ``lam/2 ||W_last||^2 + sum_i l(f(x_i), y_i)``
moves its outputs, less their initial values, as the kernel machine with its tangent kernel does:

    d/dt f_t(x) = -lam f_t(x) - sum_i l'(f_t(x_i), y_i) K(x, x_i).

With ``f_t = sum_i alpha_i(t) K(., x_i)`` this is an equation for the coefficients alone,

    d/dt alpha_i = -lam alpha_i - l'(f_t(x_i), y_i),

and gradient descent of step eta is ``alpha_i <- (1 - eta lam) alpha_i - eta l'_i``. For lam > 0
the flow tends to the machine, where ``alpha_i = -l'_i / lam``, its distance to it shrinking at
least like ``exp(-lam t)``, the gap of the objective like ``exp(-2 lam t)``.

References
----------
Y. Chen, W. Huang, L. M. Nguyen, T.-W. Weng, "On the Equivalence between Neural Network and
Support Vector Machine", NeurIPS 2021, arXiv:2111.06063.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.special import expit
from tqdm import trange

from sciml._check import (
    check_choice,
    check_finite,
    check_integer,
    check_interval,
    check_shape,
    check_square,
)
from sciml.kernels.dual_solvers import minimize_box_quadratic

__all__ = ["kernel_gradient_descent", "kernel_gradient_flow"]

Array = NDArray[Any]

LOSSES = ("hinge", "squared_hinge", "logistic", "squared", "epsilon_insensitive")
_CLASSIFICATION = ("hinge", "squared_hinge", "logistic")


def kernel_gradient_flow(
    K: Any,
    y: Any,
    loss: str,
    lam: float,
    t: Any,
    *,
    epsilon: float = 0.1,
    initial: Any = None,
) -> Array:
    """Compute the coefficients of a kernel machine that is trained by gradient flow.

    Parameters
    ----------
    K : array-like of shape (n, n)
        Kernel matrix of the training samples, symmetric positive semi-definite.
    y : array-like of shape (n,)
        Classes -1 and 1, or real targets for "squared" and "epsilon_insensitive".
    loss : {"hinge", "squared_hinge", "logistic", "squared", "epsilon_insensitive"}
        Loss l(z, y), as in `KernelMachineClassifier` and `KernelMachineRegressor`.
    lam : float
        Regularisation of the sum of losses, >= 0.
    t : float or array-like of shape (n_times,)
        Times >= 0, in any order.
    epsilon : float, default=0.1
        Half the width of the tube, for "epsilon_insensitive".
    initial : array-like of shape (n,), default=None
        Coefficients at time 0; None is 0, where the network's outputs less their initial values
        start.

    Returns
    -------
    ndarray of shape (n,) or (n_times, n), float64
        Coefficients alpha(t): the outputs are ``K(x, X) @ alpha``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or holds NaN or infinity.

    See Also
    --------
    kernel_gradient_descent : Steps of finite size.
    KernelMachineClassifier : Where the flow ends, with ``C = 1 / lam``.

    Notes
    -----
    "squared": closed form by an eigendecomposition,
    ``K alpha(t) = 2 K (2 K + lam)^-1 (1 - exp(-(2 K + lam) t)) y`` from 0.

    "hinge" and "epsilon_insensitive": exact up to rounding, from event to event. While no output
    meets a kink of its loss, ``alpha_i(t) = exp(-lam t) alpha_i(0) + (1 - exp(-lam t)) / lam c_i``
    with c_i = -l'_i constant. An output that would be driven back to the kink from both sides
    stays there (sliding mode): c_i then is the element of the subdifferential that makes it stay.
    All such c_i together are those of the subgradient of least norm, which is what the unique
    gradient flow of a convex function follows; they solve a small quadratic problem under bounds.

    "logistic" and "squared_hinge": `scipy.integrate.solve_ivp` (LSODA) with relative tolerance
    1e-10.

    References
    ----------
    Chen et al., arXiv:2111.06063.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import kernel_gradient_flow
    >>> K, y = np.eye(2), np.array([1.0, -1.0])
    >>> kernel_gradient_flow(K, y, "hinge", 0.5, [0.0, 1.0, 2.0]).round(4)
    array([[ 0.    ,  0.    ],
           [ 0.7869, -0.7869],
           [ 1.    , -1.    ]])
    """
    K, y, alpha = _check(K, y, loss, lam, epsilon, initial)
    times = np.asarray(t, dtype=np.float64)
    if times.ndim > 1:
        raise ValueError(f"t must be a number or have shape (n_times,), got shape {times.shape}")
    check_finite("t", times)
    if times.size and times.min() < 0:
        raise ValueError(f"t must be >= 0, got {times.min()}")
    order = np.argsort(times, axis=None, kind="stable")
    ordered = times.ravel()[order]
    if loss == "squared":
        path = _squared_flow(K, y, lam, ordered, alpha)
    elif loss in ("logistic", "squared_hinge"):
        path = _smooth_flow(K, y, loss, lam, ordered, alpha)
    else:
        path = _piecewise_linear_flow(K, *_kinks(y, loss, epsilon), lam, ordered, alpha)
    result = np.empty_like(path)
    result[order] = path
    return result[0] if times.ndim == 0 else result


def kernel_gradient_descent(
    K: Any,
    y: Any,
    loss: str,
    lam: float,
    step: float,
    n_steps: Any,
    *,
    epsilon: float = 0.1,
    initial: Any = None,
    verbose: bool = False,
) -> Array:
    """Compute the coefficients of a kernel machine that is trained by (sub)gradient descent.

    Parameters
    ----------
    K : array-like of shape (n, n)
        Kernel matrix of the training samples, symmetric positive semi-definite.
    y : array-like of shape (n,)
        Classes -1 and 1, or real targets for "squared" and "epsilon_insensitive".
    loss : {"hinge", "squared_hinge", "logistic", "squared", "epsilon_insensitive"}
        Loss l(z, y). At a kink of "hinge" and "epsilon_insensitive" the subgradient is 0.
    lam : float
        Regularisation of the sum of losses, >= 0.
    step : float
        Step eta > 0. Smooth losses of curvature at most L (2 for "squared" and "squared_hinge",
        1/4 for "logistic") need ``eta < 2 / (lam + L kappa)``, kappa the largest eigenvalue of K.
    n_steps : int or array-like of int of shape (n_times,)
        Number of steps, or the numbers of steps after which to return the coefficients.
    epsilon : float, default=0.1
        Half the width of the tube, for "epsilon_insensitive".
    initial : array-like of shape (n,), default=None
        Coefficients at the start; None is 0.
    verbose : bool, default=False
        Whether to show a progress bar.

    Returns
    -------
    ndarray of shape (n,) or (n_times, n), float64
        Coefficients alpha after so many steps: the outputs are ``K(x, X) @ alpha``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or holds NaN or infinity, or the steps are so large that the
        coefficients overflow.

    See Also
    --------
    kernel_gradient_flow : The limit of small steps, at time ``n_steps * step``.

    References
    ----------
    Chen et al., arXiv:2111.06063.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import kernel_gradient_descent
    >>> K, y = np.eye(2), np.array([1.0, -1.0])
    >>> kernel_gradient_descent(K, y, "hinge", 0.5, 0.01, 100).round(4)
    array([ 0.7885, -0.7885])
    """
    K, y, alpha = _check(K, y, loss, lam, epsilon, initial)
    check_interval("step", step, 0, math.inf, closed="neither")
    counts = np.asarray(n_steps)
    if counts.ndim > 1:
        raise ValueError(
            f"n_steps must be an integer or have shape (n_times,), got shape {counts.shape}"
        )
    for count in counts.ravel():
        check_integer("n_steps", count, 0)
    result = np.empty((counts.size, len(y)))
    result[counts.ravel() == 0] = alpha
    with np.errstate(over="ignore", invalid="ignore"):
        for done in trange(1, int(counts.max(initial=0)) + 1, disable=not verbose):
            # Outputs first, with the old coefficients, then all coefficients at once.
            force = _force(K @ alpha, y, loss, epsilon)
            alpha = (1 - step * lam) * alpha + step * force
            result[counts.ravel() == done] = alpha
    if not np.isfinite(alpha).all():
        raise ValueError(f"step must be small enough for descent, got {step}: overflow")
    return result[0] if counts.ndim == 0 else result


def _check(
    K: Any, y: Any, loss: str, lam: float, epsilon: float, initial: Any
) -> tuple[Array, Array, Array]:
    """Check the problem; return K, y and the initial coefficients in float64."""
    K, y = np.asarray(K, dtype=np.float64), np.asarray(y, dtype=np.float64)
    check_square("K", K)
    check_finite("K", K)
    if np.abs(K - K.T).max(initial=0.0) > 1e-6 * np.abs(K).max(initial=0.0):
        raise ValueError("K must be symmetric, got entries that differ from their mirror image")
    check_shape("y", y, (len(K),))
    check_finite("y", y)
    check_choice("loss", loss, LOSSES)
    check_interval("lam", lam, 0, math.inf, closed="left")
    check_interval("epsilon", epsilon, 0, math.inf, closed="left")
    if loss in _CLASSIFICATION and not (np.abs(y) == 1).all():
        raise ValueError(
            f"y must hold the classes -1 and 1 for loss={loss!r}, got {np.unique(y)[:5]}"
        )
    alpha = np.zeros(len(K)) if initial is None else np.array(initial, dtype=np.float64)
    check_shape("initial", alpha, (len(K),))
    check_finite("initial", alpha)
    return K, y, alpha


def _force(f: Array, y: Array, loss: str, epsilon: float) -> Array:
    """Return minus the derivative of the loss with respect to the output."""
    if loss == "hinge":
        return np.where(y * f < 1, y, 0.0)
    if loss == "squared_hinge":
        return 2 * y * np.maximum(0.0, 1 - y * f)
    if loss == "logistic":
        return y * expit(-y * f)
    if loss == "squared":
        return 2 * (y - f)
    return np.where(np.abs(y - f) > epsilon, np.sign(y - f), 0.0)


def _saturation(t: Any, rate: Any) -> Any:
    """Return ``(1 - exp(-rate t)) / rate``, which is t for rate 0."""
    safe = np.where(rate == 0, 1.0, rate)
    return np.where(rate == 0, t, -np.expm1(-safe * t) / safe)


def _squared_flow(K: Array, y: Array, lam: float, times: Array, alpha: Array) -> Array:
    """Solve the linear flow in the eigenvectors of K."""
    values, vectors = np.linalg.eigh(K)
    rate = 2 * np.maximum(values, 0.0) + lam
    t = times[:, None]
    start, target = vectors.T @ alpha, vectors.T @ y
    return (np.exp(-rate * t) * start + _saturation(t, rate) * 2 * target) @ vectors.T


def _smooth_flow(K: Array, y: Array, loss: str, lam: float, times: Array, alpha: Array) -> Array:
    """Integrate the flow of a loss with continuous derivative."""

    def velocity(_: float, alpha: Array) -> Array:
        return _force(K @ alpha, y, loss, 0.0) - lam * alpha

    def jacobian(_: float, alpha: Array) -> Array:
        z = y * (K @ alpha)
        curvature = expit(z) * expit(-z) if loss == "logistic" else np.where(z < 1, 2.0, 0.0)
        return -curvature[:, None] * K - lam * np.eye(len(y))

    # So early one Euler step is exact to rounding, and the integrator has no sense of scale.
    rate = lam + 2 * float(np.abs(K).sum(axis=1).max(initial=0.0))
    early = times * rate <= 1e-9
    path = alpha + times[:, None] * velocity(0.0, alpha)
    if not early.all():
        end = float(times.max())
        late, position = np.unique(times[~early], return_inverse=True)
        unit = max(float(np.abs(alpha).max()), float(_saturation(end, lam)))
        solution = solve_ivp(
            velocity,
            (0.0, end),
            alpha,
            method="LSODA",
            t_eval=late,
            jac=jacobian,
            rtol=1e-10,
            atol=1e-13 * unit,
        )
        if not solution.success:
            raise ValueError(f"the flow up to t={end} could not be followed: {solution.message}")
        path[~early] = solution.y.T[position]
    return path


# ---------------------------------------------------------------- piecewise linear losses


def _kinks(y: Array, loss: str, epsilon: float) -> tuple[Array, Array]:
    """Describe a piecewise linear loss by its kinks in the output and its forces between them.

    Returns the kinks, shape (n, k), ascending, and the forces -l' left of, between and right of
    them, shape (n, k + 1), descending because the loss is convex.
    """
    one, zero = np.ones_like(y), np.zeros_like(y)
    if loss == "hinge":
        return y[:, None], np.stack([np.maximum(y, 0), np.minimum(y, 0)], axis=1)
    if epsilon == 0:
        return y[:, None], np.stack([one, -one], axis=1)
    return np.stack([y - epsilon, y + epsilon], axis=1), np.stack([one, zero, -one], axis=1)


def _piecewise_linear_flow(
    K: Array, kinks: Array, forces: Array, lam: float, times: Array, alpha: Array
) -> Array:
    """Follow the flow of least subgradients from event to event.

    Between events the forces c are constant, and outputs and coefficients are linear in
    ``s = (1 - exp(-lam t)) / lam``: ``f + s (K c - lam f)``, ``alpha + s (c - lam alpha)``.
    """
    n, n_kinks = kinks.shape
    rows = np.arange(n)
    largest = float(np.abs(K).max(initial=0.0))
    f = K @ alpha
    closest = np.abs(f[:, None] - kinks).argmin(axis=1)
    on_kink = np.abs(f - kinks[rows, closest]) <= 1e-11 * (1 + np.abs(kinks).max(axis=1))
    # The number of the interval an output is in, or of the kink it is on.
    place = np.where(on_kink, closest, (f[:, None] > kinks).sum(axis=1))
    path = np.empty((len(times), n))
    time, written = 0.0, 0
    for _ in range(1000 * (n + 10)):
        f = K @ alpha  # afresh, so that rounding does not add up
        f[on_kink] = kinks[rows, np.minimum(place, n_kinks - 1)][on_kink]
        c = np.where(on_kink, 0.0, forces[rows, place])
        if on_kink.any():
            c[on_kink] = _sliding_forces(K, forces, lam, f, c, place, on_kink)
        velocity = K @ c - lam * f
        noise = 1e-14 * largest * float(np.abs(c).sum())
        # At the end of its subdifferential and still pushed: the output leaves the kink.
        up = on_kink & (c == forces[rows, np.minimum(place + 1, n_kinks)]) & (velocity > noise)
        down = on_kink & (c == forces[rows, place]) & (velocity < -noise)
        place[up] += 1
        on_kink &= ~(up | down)
        velocity[on_kink] = 0.0

        ahead = np.where(velocity > 0, place, place - 1)
        meets = (velocity != 0) & (ahead >= 0) & (ahead < n_kinks)
        distance = np.full(n, np.inf)
        distance[meets] = np.maximum(
            0.0, (kinks[rows[meets], ahead[meets]] - f[meets]) / velocity[meets]
        )
        s = float(distance.min())
        duration = math.inf
        if lam * s < 1:
            duration = -math.log1p(-lam * s) / lam if lam > 0 else s
        drift = c - lam * alpha
        while written < len(times) and times[written] <= time + duration:
            path[written] = alpha + _saturation(times[written] - time, lam) * drift
            written += 1
        if written == len(times):
            return path
        time += duration
        alpha = alpha + s * drift
        hit = distance <= s
        on_kink |= hit
        place[hit] = ahead[hit]
    raise RuntimeError(f"the flow met too many events, the last at time {time}")


def _sliding_forces(
    K: Array, forces: Array, lam: float, f: Array, c: Array, place: Array, on_kink: Array
) -> Array:
    """Return the forces on outputs at a kink: those that make the subgradient's norm least.

    Minimises ``||lam f - sum_j c_j K(., x_j)||^2`` over the forces each kink allows. At the
    minimum an output whose force is not at an end of its range has velocity 0.
    """
    at = np.flatnonzero(on_kink)
    linear = lam * f[at] - K[at] @ c
    scale = max(1e-300, float(np.abs(linear).max()), float(np.abs(K[np.ix_(at, at)]).max()))
    solution, _, _ = minimize_box_quadratic(
        K[np.ix_(at, at)] / scale,
        linear / scale,
        forces[at, place[at] + 1],
        forces[at, place[at]],
        tol=1e-10,
    )
    return solution
