"""Scalar epilogues of `sciml.kernels.pairwise` for NumPy arrays, compiled by Numba.

Each function overwrites inner products ``S[i, j] = <x_i, y_j>`` by kernel values in one pass.
What makes that pass fast is that LLVM turns the inner loop into SIMD code, and for this

- the loop body has no branch and calls no libm function: ``exp`` and ``arccos`` are polynomials
  (fitted by Chebyshev interpolation) accurate to the rounding of their dtype;
- every constant has the dtype of the array: one float64 literal would make float32 data be
  computed in float64.

The compiled functions release the GIL and share their rows among the threads of
`sciml.kernels.row_threads`, instead of using ``numba.prange``, whose threading layers can neither
be entered by two threads at once (workqueue) nor be forked (OpenMP).
"""

# Numba reads no annotations: the compiled functions below carry none.
# mypy: allow-untyped-defs

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from sciml.kernels.row_threads import over_rows

__all__ = ["apply_epilogue", "laplacian_into", "mirror"]

# Contraction (fused multiply-add) is the only liberty given to LLVM: reassociation would undo
# the two-part reduction in `_exp`, and assuming no NaN would hide an overflow.
_FASTMATH = {"contract"}
_compiled = njit(nogil=True, cache=True, fastmath=_FASTMATH, error_model="numpy")


# ---------------------------------------------------------------- elementary functions


def _exp(x):
    """Return exp(x) for x <= 0; results below the smallest normal number become 0."""
    raise TypeError("compiled code only")  # pragma: no cover


@overload(_exp, jit_options={"fastmath": _FASTMATH})
def _exp_by_dtype(x):
    # exp(x) = 2^k exp(r), |r| <= ln(2)/2. Adding 1.5 * 2^(mantissa bits) rounds x / ln 2 to the
    # integer k and leaves k in the low bits of the sum, ready to be shifted into the exponent.
    if x == types.float32:

        def exp32(x):
            shifted = x * np.float32(1.442695040888963) + np.float32(12582912.0)
            k = shifted - np.float32(12582912.0)
            r = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
            p = np.float32(0.00139261835877134945)
            p = p * r + np.float32(0.00836317905272257737)
            p = p * r + np.float32(0.0416665546172045742)
            p = p * r + np.float32(0.166665769896987757)
            p = p * r + np.float32(0.5)
            p = p * r * r + r + np.float32(1.0)
            bits = np.float32(shifted).view(np.int32) << np.int32(23)
            scaled = np.int32(np.float32(p).view(np.int32) + bits).view(np.float32)
            return scaled if x > np.float32(-87.0) else np.float32(0.0)

        return exp32

    def exp64(x):
        shifted = x * 1.4426950408889634 + 6755399441055744.0
        k = shifted - 6755399441055744.0
        r = x - k * 0.693147180369123816490 - k * 1.90821492927058770002e-10
        p = 2.51003854955103191e-8
        p = p * r + 2.76200884454097482e-7
        p = p * r + 2.75572684599970648e-6
        p = p * r + 0.0000248015212959543751
        p = p * r + 0.000198412698630536169
        p = p * r + 0.00138888889172137169
        p = p * r + 0.00833333333333006183
        p = p * r + 0.0416666666666241279
        p = p * r + 0.166666666666666675
        p = p * r + 0.500000000000000102
        p = p * r * r + r + 1.0
        bits = np.float64(shifted).view(np.int64) << np.int64(52)
        scaled = np.int64(np.float64(p).view(np.int64) + bits).view(np.float64)
        return scaled if x > -708.0 else 0.0

    return exp64


def _arcsin(s, z):
    """Return arcsin(s) for 0 <= s <= 1/2, where z = s^2."""
    raise TypeError("compiled code only")  # pragma: no cover


@overload(_arcsin, jit_options={"fastmath": _FASTMATH})
def _arcsin_by_dtype(s, z):
    if s == types.float32:

        def arcsin32(s, z):
            p = np.float32(0.0380850235610926538)
            p = p * z + np.float32(0.0265545422061613284)
            p = p * z + np.float32(0.0450013800699101676)
            p = p * z + np.float32(0.0749885507260082111)
            p = p * z + np.float32(0.166666724147953052)
            return s + s * (z * p)

        return arcsin32

    def arcsin64(s, z):
        p = 0.0281692180608814129
        p = p * z - 0.0107490503396978076
        p = p * z + 0.0160355143491488231
        p = p * z + 0.00780294947735331714
        p = p * z + 0.0118754943826369232
        p = p * z + 0.0139296529023266332
        p = p * z + 0.0173552599557863217
        p = p * z + 0.0223720476317445104
        p = p * z + 0.0303819473670984811
        p = p * z + 0.0446428571034236434
        p = p * z + 0.0750000000002076436
        p = p * z + 0.166666666666666486
        return s + s * (z * p)

    return arcsin64


@njit(inline="always")
def _angle_and_sine(u, one, half, pi):
    """Return (pi - arccos u, sin arccos u) for u in [-1, 1], in the dtype of the constants."""
    x = abs(u)
    low = x < half
    z = x * x if low else half * (one - x)
    s = _arcsin(x if low else math.sqrt(z), z)
    arccos = half * pi - s if low else s + s
    return (pi - arccos if u > one - one else arccos), math.sqrt((one - x) * (one + x))


# ---------------------------------------------------------------- one pass over rows


@_compiled
def _polynomial_rows(S, qx, qy, first, last, gamma, coef0, degree):
    base = np.empty(len(qy), S.dtype)
    for i in range(first, last):
        for j in range(len(qy)):
            base[j] = gamma * S[i, j] + coef0
            S[i, j] = base[j]
        for _ in range(degree - 1):
            for j in range(len(qy)):
                S[i, j] *= base[j]


@_compiled
def _rbf_rows(S, qx, qy, first, last, gamma):
    zero = S.dtype.type(0)
    for i in range(first, last):
        q = qx[i]
        for j in range(len(qy)):
            s = S[i, j]
            squared = q + qy[j] - (s + s)
            squared = squared if squared > zero else zero
            S[i, j] = _exp(-gamma * squared)


@_compiled
def _exponential_rows(S, qx, qy, first, last, gamma):
    zero = S.dtype.type(0)
    for i in range(first, last):
        q = qx[i]
        for j in range(len(qy)):
            s = S[i, j]
            squared = q + qy[j] - (s + s)
            squared = squared if squared > zero else zero
            S[i, j] = _exp(-gamma * math.sqrt(squared))


@_compiled
def _arc_cosine_rows(S, nx, ny, ix, iy, first, last, order):
    one, half, pi = S.dtype.type(1), S.dtype.type(0.5), S.dtype.type(math.pi)
    scale = S.dtype.type(1 / math.pi)
    for i in range(first, last):
        n, inverse = nx[i] * scale, ix[i]
        if order == 0:
            for j in range(len(ny)):
                u = max(-one, min(one, S[i, j] * (inverse * iy[j])))
                angle, _ = _angle_and_sine(u, one, half, pi)
                S[i, j] = angle * scale
        else:
            for j in range(len(ny)):
                u = max(-one, min(one, S[i, j] * (inverse * iy[j])))
                angle, sine = _angle_and_sine(u, one, half, pi)
                S[i, j] = n * ny[j] * (sine + u * angle)


@_compiled
def _network_rows(S, nx, ny, ix, iy, first, last, scale, w2, b2, tangent):
    # Layers outside, columns inside: only the innermost loop becomes SIMD code.
    one, half, pi = S.dtype.type(1), S.dtype.type(0.5), S.dtype.type(math.pi)
    w2_over_2pi = w2 * S.dtype.type(0.5 / math.pi)
    m = ny.shape[1]
    T = np.empty(m, S.dtype)
    for i in range(first, last):
        for j in range(m):
            S[i, j] = scale * S[i, j] + b2
            T[j] = S[i, j]
        for layer in range(len(nx)):
            n, inverse = nx[layer, i] * w2_over_2pi, ix[layer, i]
            norms, inverses = ny[layer], iy[layer]
            for j in range(m):
                u = max(-one, min(one, S[i, j] * (inverse * inverses[j])))
                angle, sine = _angle_and_sine(u, one, half, pi)
                s = n * norms[j] * (sine + u * angle) + b2
                S[i, j] = s
                T[j] = s + w2_over_2pi * angle * T[j]
        if tangent:
            for j in range(m):
                S[i, j] = T[j]


# A sum over features becomes SIMD code only if LLVM may reorder it.
@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _laplacian_rows(out, X, Y, first, last, gamma):
    zero = X.dtype.type(0)
    for i in range(first, last):
        x = X[i]
        for j in range(len(Y)):
            y = Y[j]
            total = zero
            for k in range(len(x)):
                total += abs(x[k] - y[k])
            out[i, j] = total
        for j in range(len(Y)):
            out[i, j] = _exp(-gamma * out[i, j])


@_compiled
def _mirror_rows(K, first, last):
    # In squares of 64: reading or writing whole columns would miss the cache at every entry.
    for start in range(0, last, 64):
        for i in range(max(first, start + 1), last):
            for j in range(start, min(start + 64, i)):
                K[j, i] = K[i, j]


# ---------------------------------------------------------------- called by pairwise


def polynomial(S: Any, qx: Any, qy: Any, gamma: float, coef0: float, degree: int) -> None:
    """Overwrite S by (gamma S + coef0)^degree."""
    t = S.dtype.type
    _over_rows(_polynomial_rows, S, qx, qy, params=(t(gamma), t(coef0), degree))


def rbf(S: Any, qx: Any, qy: Any, gamma: float) -> None:
    """Overwrite S by exp(-gamma ||x - y||^2)."""
    _over_rows(_rbf_rows, S, qx, qy, params=(S.dtype.type(gamma),))


def exponential(S: Any, qx: Any, qy: Any, gamma: float) -> None:
    """Overwrite S by exp(-gamma ||x - y||)."""
    _over_rows(_exponential_rows, S, qx, qy, params=(S.dtype.type(gamma),))


def arc_cosine(S: Any, qx: Any, qy: Any, order: int) -> None:
    """Overwrite S by the arc-cosine kernel of order 0 or 1."""
    (nx, ix), (ny, iy) = _norms(qx), _norms(qy)
    _over_rows(_arc_cosine_rows, S, nx, ny, ix, iy, params=(order,))


def network(
    S: Any, qx: Any, qy: Any, scale: float, w2: float, b2: float, depth: int, tangent: bool
) -> None:
    """Overwrite S by the NTK (`tangent`) or NNGP of a ReLU network with `depth` hidden layers."""
    t = S.dtype.type
    (nx, ix), (ny, iy) = (_norms(layer_variances(q, scale, w2, b2, depth)) for q in (qx, qy))
    _over_rows(_network_rows, S, nx, ny, ix, iy, params=(t(scale), t(w2), t(b2), tangent))


def layer_variances(q: Any, scale: float, w2: float, b2: float, depth: int) -> Any:
    """Return the variance of each layer's preactivations, shape (depth, n), from squared norms."""
    layers = [scale * q + b2]
    for _ in range(depth - 1):
        layers.append(0.5 * w2 * layers[-1] + b2)
    return np.stack(layers).astype(q.dtype, copy=False)


def laplacian_into(out: Any, X: Any, Y: Any, gamma: float) -> None:
    """Write exp(-gamma ||x - y||_1) to `out`; the L1 distance has no inner product in it."""
    X, Y = np.ascontiguousarray(X), np.ascontiguousarray(Y)
    _over_rows(_laplacian_rows, out, X, Y, params=(X.dtype.type(gamma),), cost=X.shape[1])


def mirror(K: Any, rows: slice) -> None:
    """Copy the lower triangle of these rows of K to the columns above the diagonal."""
    _mirror_rows(K, rows.start, rows.stop)


_EPILOGUES: dict[str, Callable[..., None]] = {
    "polynomial": polynomial,
    "rbf": rbf,
    "exponential": exponential,
    "arc_cosine": arc_cosine,
    "network": network,
}


def apply_epilogue(name: str, S: Any, qx: Any, qy: Any, params: tuple[Any, ...]) -> None:
    """Overwrite the first ``len(qy)`` columns of S by kernel values.

    Parameters
    ----------
    name : str
        Name of the epilogue.
    S : ndarray of shape (n_X, >= n_Y)
        C-contiguous; inner products in the first n_Y columns.
    qx, qy : ndarray of shape (n_X,) and (n_Y,)
        Squared norms.
    params : tuple
        Parameters of the epilogue.
    """
    _EPILOGUES[name](S, qx, qy, *params)


def _norms(q: Any) -> tuple[Any, Any]:
    """Return norms and their inverses, 0 for zero vectors: then cos = 0 and kernels vanish."""
    norms = np.sqrt(q)
    inverse = np.zeros_like(norms)
    return norms, np.divide(1, norms, out=inverse, where=norms > 0)


def _over_rows(
    function: Callable[..., None], S: Any, *arrays: Any, params: tuple[Any, ...], cost: int = 1
) -> None:
    """Call ``function(S, *arrays, first, last, *params)`` on the rows of S, in all threads."""

    def part(first: int, last: int) -> None:
        function(S, *arrays, first, last, *params)

    over_rows(part, len(S), S.size * cost)
