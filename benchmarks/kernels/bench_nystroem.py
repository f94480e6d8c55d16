"""RidgeLeverageNystroem against scikit-learn's Nystroem: time, memory, and error.

    python benchmarks/kernels/bench_nystroem.py             # all parts, about 5 minutes
    python benchmarks/kernels/bench_nystroem.py uniform     # one part

Parts: uniform (n=100k, d=784, m=500, fit and transform, both dtypes), clustered (error, risk,
fit and transform of every method), homogeneous (no gain is to be had), equal_error (time at the
error that SQUEAK reaches), rows (cost a row along a stream), memory (a million rows from a
memory-mapped file). Memory is the peak of a fresh process less that before the call.
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from sklearn.kernel_approximation import Nystroem

from sciml.kernels import RidgeLeverageNystroem, pairwise_kernel


def clustered(n, seed=0, d=2):
    rng = np.random.default_rng(seed)
    blob = rng.normal(0, 0.15, (n - n // 10, d))
    return rng.permutation(np.concatenate([blob, rng.normal(4, 3, (n // 10, d))]))


def sphere(n):
    X = np.random.default_rng(0).standard_normal((n, 3))
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def best_of(times, function):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_above_data(estimator, dtype):
    """Peak memory in MB of fit and transform in a fresh process, less data and result."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks/kernels')\n"
        f"from bench_nystroem import measure; measure({estimator!r}, {dtype!r})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(out.stdout)


def measure(estimator, dtype, n=100_000, d=784, m=500):
    X = np.random.default_rng(0).standard_normal((n, d), np.dtype(dtype))  # no copy in the peak
    model = make(estimator, m)
    model.fit(X[:2000])
    model.transform(X[:2000])
    before = resident("VmHWM")
    Z = model.fit(X).transform(X)
    print(resident("VmHWM") - before - Z.nbytes / 2**20)


def resident(kind):
    """Memory of this process in MB: "VmHWM" is the peak, "RssAnon" leaves out mapped files.

    Linux only; not getrusage, whose maximum a child process inherits from its parent.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(kind))


def make(name, m):
    options = {"gamma": 1 / 784, "n_components": m, "random_state": 0}
    if name == "scikit-learn":
        return Nystroem("rbf", **options)
    return RidgeLeverageNystroem("rbf", method="uniform", **options)


def uniform():
    print("uniform landmarks, n=100000 d=784 m=500, fit + transform")
    for dtype in ("float32", "float64"):
        X = np.random.default_rng(0).standard_normal((100_000, 784), np.float32).astype(dtype)
        seconds = {}
        for name in ("ours", "scikit-learn") * 5:
            model = make(name, 500)
            took = best_of(1, lambda model=model, X=X: model.fit(X).transform(X))
            seconds[name] = min(took, seconds.get(name, np.inf))
        gemm = best_of(5, lambda X=X: (X @ X[:500].T) @ np.ones((500, 500), X.dtype))
        memory = {name: peak_above_data(name, dtype) for name in ("ours", "scikit-learn")}
        print(
            f"  {dtype}: ours {seconds['ours']:.2f} s, scikit-learn {seconds['scikit-learn']:.2f} s"
            f" -> {seconds['scikit-learn'] / seconds['ours']:.1f}x"
            f" (the two products alone {gemm:.2f} s); temporary memory "
            f"{memory['ours']:.0f} MB against {memory['scikit-learn']:.0f} MB"
        )


def errors(X, title, sizes=(50, 100, 150)):
    """Every method at its own number of landmarks, beside Nystroem at the same number.

    The error is the spectral norm of K - Z Z'; the risk that of kernel ridge regression on the
    features, with ridge 1 and noise 0.3, expected over the noise (exact: that with K).
    Transforms are of 20000 rows.
    """
    K = pairwise_kernel(X, gamma=1.0)
    signal = np.sin(X).sum(1)

    def risk(G):
        hat = np.linalg.solve(G + np.eye(len(G)), G)
        return (((signal - hat @ signal) ** 2).sum() + 0.09 * (hat**2).sum()) / len(G)

    print(f"{title}: n={len(X)}, median over 5 seeds, exact risk {risk(K):.4f}")
    print(
        "  method      landmarks   error (Nystroem)        risk (Nystroem)     fit s  transform s"
    )
    pool = np.concatenate([X] * (20_000 // len(X) + 1))[:20_000]

    def error(model):
        Z = model.transform(X)
        return np.linalg.norm(K - Z @ Z.T, 2), risk(Z @ Z.T)

    for method, argument, values in (
        ("squeak", "budget", (10, 20, 40)),
        ("ink", "budget", (300, 600)),
        ("bless", "budget", (2, 4)),
        ("recursive", "n_components", sizes),
        ("exact", "n_components", sizes),
        ("uniform", "n_components", sizes),
    ):
        for value in values:
            rows = []
            for seed in range(5):
                model = RidgeLeverageNystroem(
                    gamma=1.0, method=method, random_state=seed, **{argument: value}
                )
                fit = best_of(1, lambda model=model: model.fit(X))
                m = len(model.component_indices_)
                peer = Nystroem(gamma=1.0, n_components=m, random_state=seed).fit(X)
                transform = best_of(1, lambda model=model: model.transform(pool))
                rows.append((m, *error(model), *error(peer), fit, transform))
            m, ours, ours_risk, theirs, theirs_risk, fit, transform = np.median(rows, axis=0)
            print(
                f"  {method:10s}  {m:6.0f}    {ours:6.3f} ({theirs:6.3f}, {theirs / ours:4.1f}x)"
                f"   {ours_risk:.4f} ({theirs_risk:.4f})   {fit:7.3f}  {transform:7.3f}"
            )


def equal_error():
    """Fit on clustered data and transform 100000 rows, at the error that SQUEAK reaches."""
    X = clustered(2000)
    K = pairwise_kernel(X, gamma=1.0)
    rows = np.concatenate([X] * 50)

    def error(model):
        Z = model.transform(X)
        return np.linalg.norm(K - Z @ Z.T, 2)

    target = np.median(
        [error(RidgeLeverageNystroem(gamma=1.0, random_state=s).fit(X)) for s in range(5)]
    )
    m = 100
    while True:
        theirs = [
            error(Nystroem(gamma=1.0, n_components=m, random_state=s).fit(X)) for s in range(5)
        ]
        if np.median(theirs) <= target or m >= 2000:
            break
        m = min(2000, int(m * 1.25))
    ours = RidgeLeverageNystroem(gamma=1.0, random_state=0)
    peer = Nystroem(gamma=1.0, n_components=m, random_state=0)
    seconds = [best_of(3, lambda e=e: e.fit(X).transform(rows)) for e in (ours, peer)]
    print(
        f"equal error {target:.3f} on clustered data, n=2000, 100000 rows transformed: SQUEAK "
        f"{len(ours.component_indices_)} landmarks {seconds[0]:.2f} s, Nystroem {m} landmarks "
        f"{seconds[1]:.2f} s -> {seconds[1] / seconds[0]:.1f}x"
    )


def rows():
    """The cost a row follows the dictionary: the effective dimension, or the limit, not n."""
    n, step = 80_000, 10_000
    flat = np.random.default_rng(0).standard_normal((n, 5))
    streams = {
        "polynomial kernel of degree 2, at most 21 dimensions": (
            RidgeLeverageNystroem("polynomial", degree=2, gamma=0.2, random_state=0),
            flat,
        ),
        "clustered rows, n_components=300": (
            RidgeLeverageNystroem(gamma=1.0, n_components=300, random_state=0),
            clustered(n),
        ),
        "clustered rows, no limit: the effective dimension grows": (
            RidgeLeverageNystroem(gamma=1.0, budget=5, random_state=0),
            clustered(n),
        ),
    }
    print("SQUEAK along a stream: microseconds a row (landmarks)")
    for name, (model, X) in streams.items():
        cells = []
        for start in range(0, n, step):
            block = X[start : start + step]
            took = best_of(1, lambda model=model, block=block: model.partial_fit(block))
            cells.append(f"{took / step * 1e6:.0f} ({len(model.component_indices_)})")
        print(f"  {name}, every {step} rows:\n    {'  '.join(cells)}")


def memory():
    n, d = 1_000_000, 20
    print("SQUEAK on a memory-mapped file, n_components=200")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "X.npy"
        X = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
        rng = np.random.default_rng(0)
        for start in range(0, n, 50_000):
            X[start : start + 50_000] = rng.standard_normal((50_000, d))
        del X
        for count in (100_000, 1_000_000):
            code = (
                "import sys; sys.path.insert(0, 'benchmarks/kernels')\n"
                f"from bench_nystroem import stream_file; stream_file({str(path)!r}, {count})"
            )
            out = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            print(f"  {count:8d} rows of {d} float32 from disk: {out.stdout.strip()}")


def stream_file(path, count):
    X = np.load(path, mmap_mode="r")[:count]
    model = RidgeLeverageNystroem(gamma=0.02, ridge=100.0, n_components=200, random_state=0)
    model.fit(X[:2000])
    peak = before = resident("RssAnon")
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model.fit(X)
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    print(
        f"{took:.1f} s ({took / count * 1e6:.0f} us a row), peak {peak - before:.0f} MB beside "
        f"the mapped file of {X.nbytes / 2**20:.0f} MB, {len(model.component_indices_)} landmarks"
    )


PARTS = {
    "uniform": uniform,
    "clustered": lambda: errors(clustered(600), "clustered data"),
    "homogeneous": lambda: errors(sphere(600), "homogeneous data, a sphere", (30, 60)),
    "equal_error": equal_error,
    "rows": rows,
    "memory": memory,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
