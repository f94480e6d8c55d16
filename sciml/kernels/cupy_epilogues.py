"""Scalar epilogues of `sciml.kernels.pairwise` for CuPy arrays, as CUDA elementwise kernels.

Each body below is CUDA C++ for one matrix entry; ``T`` is the dtype of the arrays, and constants
are written ``T(0.5)`` so that float32 data are not computed in float64. CuPy compiles a body at
its first call. Nothing here imports CuPy before that.
"""

from functools import cache
from typing import Any

__all__ = ["apply_epilogue", "laplacian_into", "mirror"]

_DISTANCE = "T squared = fmax(qx + qy - T(2) * s, T(0));"

_ANGLE = """
    T c = sqrt(qa * qb);
    T u = fmax(T(-1), fmin(T(1), a / fmax(c, T(1.2e-38))));
    T angle = T(3.141592653589793) - acos(u);
    T moment = c * (sqrt((T(1) - u) * (T(1) + u)) + u * angle);
"""

# name: (parameters, body); every body maps s, qx, qy to k.
SOURCES = {
    "polynomial": (
        "T gamma, T coef0, int32 degree",
        """
        T base = gamma * s + coef0;
        T power = base;
        for (int step = 1; step < degree; ++step) {
            power = power * base;
        }
        k = power;
        """,
    ),
    "rbf": ("T gamma", f"{_DISTANCE} k = exp(-gamma * squared);"),
    "exponential": ("T gamma", f"{_DISTANCE} k = exp(-gamma * sqrt(squared));"),
    "arc_cosine_0": (
        "",
        f"""
        T a = s;
        T qa = qx;
        T qb = qy;
        {_ANGLE}
        k = angle * T(0.3183098861837907);
        """,
    ),
    "arc_cosine_1": (
        "",
        f"""
        T a = s;
        T qa = qx;
        T qb = qy;
        {_ANGLE}
        k = moment * T(0.3183098861837907);
        """,
    ),
    "network": (
        "T scale, T w2, T b2, int32 depth, T tangent",
        f"""
        T a = scale * s + b2;
        T qa = scale * qx + b2;
        T qb = scale * qy + b2;
        T t = a;
        T w = w2 * T(0.15915494309189535);
        for (int layer = 0; layer < depth; ++layer) {{
            {_ANGLE}
            a = w * moment + b2;
            t = a + tangent * (w * angle * t);
            qa = T(0.5) * w2 * qa + b2;
            qb = T(0.5) * w2 * qb + b2;
        }}
        k = t;
        """,
    ),
}

LAPLACIAN = """
    T total = T(0);
    for (int f = 0; f < d; ++f) {
        total = total + fabs(x[row * d + f] - y[column * d + f]);
    }
    k = exp(-gamma * total);
"""


def apply_epilogue(name: str, S: Any, qx: Any, qy: Any, params: tuple[Any, ...]) -> None:
    """Overwrite the first ``len(qy)`` columns of S by kernel values."""
    if name == "arc_cosine":
        name, params = f"arc_cosine_{params[0]}", ()
    if name == "network":
        *others, tangent = params
        params = (*others, float(tangent))
    tile = S[:, : len(qy)]
    _kernel(name)(tile, qx[:, None], qy, *params, tile)


def laplacian_into(out: Any, X: Any, Y: Any, gamma: float) -> None:
    """Write exp(-gamma ||x - y||_1) to the first ``len(Y)`` columns of `out`."""
    import cupy

    X, Y = cupy.ascontiguousarray(X), cupy.ascontiguousarray(Y)
    rows, columns = cupy.arange(len(X))[:, None], cupy.arange(len(Y))
    _laplacian_kernel()(X, Y, rows, columns, X.shape[1], gamma, out[:, : len(Y)])


def mirror(K: Any, rows: slice) -> None:
    """Copy these rows, left of and on the diagonal, to the columns above the diagonal."""
    import cupy

    start, stop = rows.start, rows.stop
    K[:start, start:stop] = K[start:stop, :start].T
    square = K[start:stop, start:stop]
    square[...] = cupy.tril(square) + cupy.tril(square, -1).T


@cache
def _kernel(name: str) -> Any:
    import cupy

    parameters, body = SOURCES[name]
    inputs = ", ".join(part for part in ("T s, T qx, T qy", parameters) if part)
    return cupy.ElementwiseKernel(inputs, "T k", body, f"sciml_{name}")


@cache
def _laplacian_kernel() -> Any:
    import cupy

    inputs = "raw T x, raw T y, int64 row, int64 column, int32 d, T gamma"
    return cupy.ElementwiseKernel(inputs, "T k", LAPLACIAN, "sciml_laplacian")
