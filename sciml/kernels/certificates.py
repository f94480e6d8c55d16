"""Certify that no perturbation up to a radius changes the decision of an NTK machine.

The machine f(x) = sum_i alpha_i K(x, x_i) of an infinitely wide ReLU network is bounded for all
x with ||x - x0||_inf <= delta: with intervals [L_i, U_i] of K(x, x_i), its margin is at least
sum_i (alpha_i L_i if alpha_i > 0 else alpha_i U_i), and the certified radius is the largest delta
at which this is positive. For one hidden layer, with c = w_std^2 ||x|| ||x_i|| / d and u the
cosine of the angle between x and x_i,

    NTK(x, x_i) = w_std^2 c h(u) / (2 pi),    h(u) = 2 u (pi - arccos u) + sqrt(1 - u^2),

where h falls on [-1, u*] and rises on [u*, 1], u* = -0.7941, so that intervals of ||x|| and
<x, x_i> give one of the kernel. For more layers, intervals of the norm q, the covariance S and
the tangent kernel T are carried through the recursion of the NTK, layer by layer.

Where paper and code differ: the paper bounds ||x - x0|| by sqrt(d) delta and <x - x0, x_i> by
sqrt(d) delta ||x_i|| (``norm_bound="l2"``). ``norm_bound="linf"`` uses delta ||x_i||_1 and the
coordinates one by one, which certifies more and is as sound. The official code stops its
bisection at a fixed number of steps on [0, 0.3]; here the bracket grows until it holds the radius.

References
----------
Y. Chen, W. Huang, L. M. Nguyen, T.-W. Weng, "On the Equivalence between Neural Network and
Support Vector Machine", NeurIPS 2021, arXiv:2111.06063.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from sklearn.utils.validation import check_is_fitted, validate_data

from sciml._check import check_choice, check_same_length, check_shape
from sciml.kernels.interval_bounds import largest_certified_radii
from sciml.kernels.kernel_machine import KernelMachineClassifier
from sciml.kernels.ntk import NNGP, NTK
from sciml.kernels.pairwise import kernel_matmul

__all__ = ["certified_radius"]

# The minimum of h, where pi - arccos(u) = -u / (2 sqrt(1 - u^2)).
U_STAR = -0.7940998648103225
H_STAR = -0.4297378205183164  # rounded down

_CHUNK_ENTRIES = 1 << 23  # 64 MiB of inner products a thread


def certified_radius(
    machine: KernelMachineClassifier,
    X: Any,
    y: Any = None,
    *,
    norm_bound: str = "linf",
    max_radius: float | None = None,
    tol: float = 1e-6,
) -> Any:
    """Compute the largest proved radius in maximum norm within which the decision is constant.

    Parameters
    ----------
    machine : KernelMachineClassifier
        Fitted machine with kernel `NTK` or `NNGP`, of two classes or more, any loss.
    X : array of shape (n_samples, n_features)
        Samples.
    y : array of shape (n_samples,), default=None
        True classes; misclassified samples get radius 0, so that the share of radii above r is
        the certified accuracy at r. None certifies the decision, right or wrong.
    norm_bound : {"linf", "l2"}, default="linf"
        How a change of the sample moves its norm and inner products: exactly for the box
        (``"linf"``) or for the ball of radius ``sqrt(n_features) delta`` around it (``"l2"``, the
        paper's). Both are sound; ``"linf"`` certifies at least as much.
    max_radius : float, default=None
        Largest radius of interest. None sets no limit; samples that stay certified get the last
        radius tried, about 1e6 times the largest absolute value in X.
    tol : float, default=1e-6
        Relative width of the bracket at which bisection ends. The lower end is returned.

    Returns
    -------
    ndarray of shape (n_samples,), dtype float64
        Certified radii, float64 also for float32 samples (rounding up would not be sound). A
        sample on the decision boundary has radius 0. Perturbed samples are not clipped to any
        range.

    Raises
    ------
    TypeError
        If the machine is of another kind or its kernel no plain `NTK` or `NNGP`.
    ValueError
        If an argument does not fit, or ``b_std=0`` and X has zero rows: there the kernel, and
        with it the decision, vanishes.
    sklearn.exceptions.NotFittedError
        If the machine is not fitted.

    See Also
    --------
    ibp_certified_radius : The same for a finite network.

    Notes
    -----
    With one hidden layer the kernel is bounded by its closed form; with more, or with biases, by
    that form in the first layer and by interval arithmetic above it, which is looser layer by
    layer. Several classes: the smallest over the rivals j of the radius of f_c - f_j, where c is
    the predicted class. The samples of a thread are bisected in lockstep; a probe costs O(depth)
    a pair of sample and support vector. Computed in float64 without directed rounding.

    References
    ----------
    Chen et al., arXiv:2111.06063.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.kernels import NTK, KernelMachineClassifier, certified_radius
    >>> X, y = load_digits(n_class=2, return_X_y=True)
    >>> machine = KernelMachineClassifier(NTK(), C=10.0).fit(X[:260] / 16, y[:260])
    >>> radius = certified_radius(machine, X[260:] / 16, y[260:])
    >>> bool(radius.mean() > 0.01)
    True
    """
    if not isinstance(machine, KernelMachineClassifier):
        raise TypeError(f"machine must be a KernelMachineClassifier, got {type(machine).__name__}")
    check_is_fitted(machine)
    kernel: Any = machine.kernel_
    if type(kernel) not in (NTK, NNGP):
        raise TypeError(f"machine must have the kernel NTK or NNGP to be certified, got {kernel!r}")
    check_choice("norm_bound", norm_bound, ("linf", "l2"))
    X = validate_data(machine, X, reset=False, dtype=np.float64)
    zero_rows = ~X.any(axis=1)
    if kernel.b_std == 0 and zero_rows.any():
        raise ValueError(
            "X must have no zero rows if b_std=0, because the kernel vanishes there, got "
            f"{zero_rows.sum()} zero rows, the first at index {zero_rows.argmax()}"
        )
    if y is not None:
        y = np.asarray(y)
        check_shape("y", y, (None,))
        check_same_length(X=X, y=y)

    dual = np.asarray(machine.dual_coef_, dtype=np.float64)
    if dual.ndim == 1:  # the two classes as two outputs -f/2 and f/2
        dual = np.stack([-dual / 2, dual / 2], axis=1)
    support = (dual != dual[:, :1]).any(axis=1)  # points with equal weight in all outputs cancel
    points = np.asarray(machine.X_fit_, dtype=np.float64)[support]
    dual = np.ascontiguousarray(dual[support])
    if not len(points):  # the decision function is zero everywhere
        return np.zeros(len(X))
    decision = kernel_matmul(X, points, dual, kernel).argmax(axis=1)
    correct = np.ones(len(X), dtype=bool) if y is None else machine.classes_[decision] == y
    scale = float(np.abs(X).max()) or 1.0
    # Chunks bound the memory; their lockstep bisections run side by side, never waiting.
    n_threads = numba.get_num_threads()
    chunk = min(max(1, _CHUNK_ENTRIES // len(points)), -(-len(X) // n_threads))
    pieces = [slice(start, start + chunk) for start in range(0, len(X), chunk)]
    with ThreadPoolExecutor(n_threads) as pool:
        radii = pool.map(
            lambda rows: _radii(
                X[rows],
                points,
                dual,
                kernel,
                norm_bound,
                decision[rows],
                correct[rows],
                scale,
                max_radius,
                tol,
            ),
            pieces,
        )
        return np.concatenate(list(radii))


def _radii(
    X: Any,
    points: Any,
    dual: Any,
    kernel: Any,
    norm_bound: str,
    decision: Any,
    wanted: Any,
    scale: float,
    max_radius: float | None,
    tol: float,
) -> Any:
    """Bisect the radii of one chunk of samples."""
    d = X.shape[1]
    w2, b2 = float(kernel.w_std) ** 2, float(kernel.b_std) ** 2
    products = X @ points.T
    point_norms = np.linalg.norm(points, axis=1)
    point_q = w2 / d * point_norms**2 + b2
    reach = np.abs(points).sum(axis=1) if norm_bound == "linf" else math.sqrt(d) * point_norms
    size, norms = np.abs(X), np.linalg.norm(X, axis=1)

    def certified(rows: Any, radii: Any) -> Any:
        if norm_bound == "linf":
            low = np.linalg.norm(np.maximum(size[rows] - radii[:, None], 0), axis=1)
            high = np.linalg.norm(size[rows] + radii[:, None], axis=1)
        else:
            low = np.maximum(norms[rows] - math.sqrt(d) * radii, 0)
            high = norms[rows] + math.sqrt(d) * radii
        q_low, q_high = w2 / d * low**2 + b2, w2 / d * high**2 + b2
        tangent, depth = isinstance(kernel, NTK), int(kernel.depth)
        margins = np.empty(len(rows))
        _margins(
            products, rows, radii, reach, q_low, q_high, point_q, dual, decision,
            w2, b2, d, depth, tangent, margins,
        )  # fmt: skip
        return margins > 0

    return largest_certified_radii(certified, wanted, scale=scale, max_radius=max_radius, tol=tol)


@numba.njit(nogil=True, cache=True)
def _margins(
    products: Any,
    rows: Any,
    radii: Any,
    reach: Any,
    q_low: Any,
    q_high: Any,
    point_q: Any,
    dual: Any,
    decision: Any,
    w2: float,
    b2: float,
    d: int,
    depth: int,
    tangent: bool,
    margins: Any,
) -> None:
    """Write the smallest lower bound of f_c - f_j over the rivals j of the decision c."""
    n_points, n_outputs = dual.shape
    for r in range(len(rows)):
        row = rows[r]
        chosen = decision[row]
        bounds = np.zeros(n_outputs)
        for i in range(n_points):
            move = radii[r] * reach[i]
            low, high = _kernel_interval(
                w2 / d * (products[row, i] - move) + b2,
                w2 / d * (products[row, i] + move) + b2,
                math.sqrt(q_low[r] * point_q[i]),
                math.sqrt(q_high[r] * point_q[i]),
                q_low[r], q_high[r], point_q[i], w2, b2, depth, tangent,
            )  # fmt: skip
            for j in range(n_outputs):
                weight = dual[i, chosen] - dual[i, j]
                bounds[j] += weight * (low if weight > 0 else high)
        bounds[chosen] = np.inf
        margins[r] = bounds.min()


@numba.njit(cache=True)
def _kernel_interval(
    s_low: float,
    s_high: float,
    c_low: float,
    c_high: float,
    q_low: float,
    q_high: float,
    q_point: float,
    w2: float,
    b2: float,
    depth: int,
    tangent: bool,
) -> tuple[float, float]:
    """Return an interval of the NTK (`tangent`) or NNGP kernel.

    It starts from intervals of the first covariance S and of c, the geometric mean of the
    variances of sample and point.
    """
    t_low, t_high = 0.0, 0.0
    for layer in range(depth):
        if layer > 0:
            q_low, q_high = w2 * q_low / 2 + b2, w2 * q_high / 2 + b2
            q_point = w2 * q_point / 2 + b2
            c_low, c_high = math.sqrt(q_low * q_point), math.sqrt(q_high * q_point)
        u_low = _ratio(s_low, c_high if s_low >= 0 else c_low, -1.0)
        u_high = _ratio(s_high, c_low if s_high >= 0 else c_high, 1.0)
        if depth > 1 or not tangent:
            # E[relu relu] rises in S and in c, hence these ends, within |S| <= c.
            s_low, s_high = (
                w2 * _relu_moment(s_low, max(c_low, abs(s_low))) + b2,
                w2 * _relu_moment(min(s_high, c_high), c_high) + b2,
            )
        if not tangent:
            continue
        if layer == 0:  # here T = S, and the two terms join in the closed form
            h_left, h_right = _h(u_low), _h(u_high)
            h_low = H_STAR if u_low <= U_STAR <= u_high else min(h_left, h_right)
            h_high = max(h_left, h_right)
            scale = w2 / (2 * math.pi)
            t_low = scale * (c_low if h_low >= 0 else c_high) * h_low + b2
            t_high = scale * (c_high if h_high >= 0 else c_low) * h_high + b2
        else:
            k_low, k_high = w2 * _step_moment(u_low), w2 * _step_moment(u_high)
            t_low = s_low + t_low * (k_low if t_low >= 0 else k_high)
            t_high = s_high + t_high * (k_high if t_high >= 0 else k_low)
    return (t_low, t_high) if tangent else (s_low, s_high)


@numba.njit(cache=True)
def _ratio(s: float, c: float, otherwise: float) -> float:
    """Return s / c clipped to [-1, 1], or the safe end where c vanishes."""
    return min(max(s / c, -1.0), 1.0) if c > 0 else otherwise


@numba.njit(cache=True)
def _relu_moment(s: float, c: float) -> float:
    """Return E[relu(a) relu(b)] of a Gaussian pair with covariance s and norm product c."""
    if c <= 0:
        return 0.0
    u = min(max(s / c, -1.0), 1.0)
    return c * (math.sqrt(1 - u * u) + u * (math.pi - math.acos(u))) / (2 * math.pi)


@numba.njit(cache=True)
def _step_moment(u: float) -> float:
    """Return P[a > 0 and b > 0] of a Gaussian pair with correlation u."""
    return (math.pi - math.acos(u)) / (2 * math.pi)


@numba.njit(cache=True)
def _h(u: float) -> float:
    """Return 2 u (pi - arccos u) + sqrt(1 - u^2), the NTK of one hidden layer by its cosine."""
    return 2 * u * (math.pi - math.acos(u)) + math.sqrt(1 - u * u)
