"""NystroemRidge against scikit-learn's Nystroem + Ridge and KernelRidge.

    python benchmarks/kernels/bench_nystroem_ridge.py            # all parts, about 5 minutes
    python benchmarks/kernels/bench_nystroem_ridge.py large      # one part

Parts: large (n=100k, d=50, m=1000, both dtypes: time and accuracy), risk (clustered data, equal
numbers of landmarks), stream (a stream against a batch), real (digits, diabetes), memory (a
million rows from a memory-mapped file).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes, load_digits
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sciml.kernels import NystroemRidge, NystroemRidgeClassifier


def clustered(seed=0):
    rng = np.random.default_rng(seed)
    X = np.concatenate([rng.normal(0, 0.15, (540, 2)), rng.normal(4, 3, (60, 2))])
    X = rng.permutation(X)
    clean = np.sin(X[:, 0]) + np.cos(X[:, 1])
    return X, clean, clean + 0.3 * rng.standard_normal(600)


def large(n=100_000, d=50, m=1000):
    for dtype in (np.float32, np.float64):
        rng = np.random.default_rng(0)
        X = rng.standard_normal((n + 5000, d)).astype(dtype)
        W = rng.standard_normal((d, 10)) / np.sqrt(d)
        y = (np.sin(X @ W).sum(1) + 0.1 * rng.standard_normal(len(X))).astype(dtype)
        options = {"gamma": 0.25 / d, "n_components": m, "random_state": 0}
        ours = {"method": "uniform", **options}
        models = {
            "sklearn": make_pipeline(Nystroem(**options), Ridge(1.0, fit_intercept=False)),
            "cg tol=1e-3": NystroemRidge(1.0, solver="cg", tol=1e-3, **ours),
            "cg tol=1e-3, no cache": NystroemRidge(
                1.0, solver="cg", tol=1e-3, cache_size=0, **ours
            ),
            "cg tol=1e-6": NystroemRidge(1.0, solver="cg", **ours),
            "direct": NystroemRidge(1.0, **ours),
        }
        NystroemRidge(1.0, solver="cg", **ours).fit(X[:2000], y[:2000])  # compile
        seconds, cpu, scores = {}, {}, {}
        for _ in range(2):
            for name, model in models.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                model.fit(X[:n], y[:n])
                took = time.perf_counter() - start
                cpu_took = time.process_time() - cpu_start
                seconds[name] = min(took, seconds.get(name, np.inf))
                cpu[name] = min(cpu_took, cpu.get(name, np.inf))
                scores[name] = model.score(X[n:], y[n:])
        print(f"n={n} d={d} m={m} {np.dtype(dtype).name}: fit, and R2 of 5000 test rows")
        for name, took in seconds.items():
            ratio, cpu_ratio = seconds["sklearn"] / took, cpu["sklearn"] / cpu[name]
            count = getattr(models[name], "n_iter_", 0)
            print(
                f"  {name:22s} {took:6.2f} s ({ratio:.2f}x), CPU {cpu[name]:6.2f} s "
                f"({cpu_ratio:.2f}x)  R2 {scores[name]:.4f}  iterations {count}",
                flush=True,
            )


def risk():
    X, clean, y = clustered()
    exact = KernelRidge(alpha=1.0, kernel="rbf", gamma=1.0).fit(X, y).predict(X)
    print("clustered data, n=600, median of 5 seeds of the mean squared distance to the truth")
    print(f"  KernelRidge          {np.square(exact - clean).mean():.4f}")
    for budget in (10, 20, 40):
        names = ("squeak", "exact", "uniform", "squeak regularized", "uniform regularized")
        risks, sizes = {name: [] for name in names}, []
        for seed in range(5):
            m = None
            for name, into in risks.items():
                method, _, form = name.partition(" ")
                options = {"method": method, "approximation": form or "projected"}
                options |= {"budget": budget, "n_components": m, "random_state": seed}
                model = NystroemRidge(gamma=1.0, **options).fit(X, y)
                m = len(model.components_)
                into.append(np.square(model.predict(X) - clean).mean())
            sizes.append(m)
        medians = ", ".join(f"{name} {np.median(into):.4f}" for name, into in risks.items())
        print(f"  q={budget} m={np.median(sizes):.0f}: {medians}")


def waves(X):
    return np.sin(X[:, 0]) * np.cos(X[:, 1])


def stream():
    """Risk at the end of a stream, in random order and with one cluster after another."""
    for order in ("random", "one cluster after another"):
        rng = np.random.default_rng(0)
        centres = rng.uniform(-6, 6, (20, 2))
        label = np.arange(20_000) * 20 // 20_000
        if order == "random":
            label = rng.permutation(label)
        X = centres[label] + 0.4 * rng.standard_normal((20_000, 2))
        y = waves(X) + 0.3 * rng.standard_normal(len(X))
        test = centres[rng.integers(20, size=4000)] + 0.4 * rng.standard_normal((4000, 2))
        for options in ({"budget": 2}, {"budget": 10}, {"method": "uniform", "n_components": 200}):
            options = {"gamma": 0.5, "ridge": 1.0, "random_state": 0, **options}
            model = NystroemRidge(1.0, **options)
            start = time.perf_counter()
            for i in range(0, len(X), 500):
                model.partial_fit(X[i : i + 500], y[i : i + 500])
            took = time.perf_counter() - start
            batch = NystroemRidge(1.0, **options).fit(X, y)
            own = {**options, "method": "squeak", "landmarks": model.components_}
            same = NystroemRidge(1.0, **own).fit(X, y)
            values = [np.square(m.predict(test) - waves(test)).mean() for m in (model, batch, same)]
            print(
                f"  {order}, {model.method}, m={len(model.components_)}: stream {values[0]:.5f} "
                f"({took:.1f} s), batch {values[1]:.5f}, batch on the stream's landmarks "
                f"{values[2]:.5f}",
                flush=True,
            )


def real():
    print("5-fold cross-validation: mean (standard deviation)")
    for name, load, gamma, alpha in (
        ("diabetes, R2", load_diabetes, 0.02, 10.0),
        ("digits, accuracy", load_digits, 0.5, 0.1),
    ):
        X, y = load(return_X_y=True)
        classify = load is load_digits
        X = X / 16 if classify else StandardScaler().fit_transform(X)
        target = y if classify else y - y.mean()
        own = NystroemRidgeClassifier if classify else NystroemRidge
        linear = RidgeClassifier if classify else Ridge
        for m in (50, 200):
            options = {"gamma": gamma, "n_components": m, "random_state": 0}
            models = {
                "Nystroem + Ridge": make_pipeline(
                    Nystroem(**options), linear(alpha, fit_intercept=False)
                ),
                "uniform": own(alpha, method="uniform", **options),
                "recursive": own(alpha, method="recursive", **options),
                "exact": own(alpha, method="exact", **options),
                "squeak, at most m": own(alpha, **options),
            }
            if m == 50:
                models["squeak"] = own(alpha, gamma=gamma, random_state=0)
                models["squeak, regularized"] = own(
                    alpha, gamma=gamma, approximation="regularized", random_state=0
                )
                if not classify:
                    models["KernelRidge"] = KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma)
                else:
                    models["all rows (exact)"] = own(
                        alpha, gamma=gamma, method="uniform", n_components=len(X) * 4 // 5
                    )
            for label, model in models.items():
                scores = cross_val_score(model, X, target, cv=5)
                print(f"  {name:17s} m={m:3d} {label:19s} {scores.mean():.4f} ({scores.std():.4f})")


FIT_FROM_FILE = """
import threading, time, numpy as np
from sciml.kernels import NystroemRidge
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
X, y = np.load({X!r}, mmap_mode="r")[:{n}], np.load({y!r}, mmap_mode="r")[:{n}]
model = NystroemRidge(
    1.0, gamma=0.2, ridge=300.0, random_state=0, cache_size=0, tol=1e-3, **{options}
)
model.fit(X[:5000], y[:5000])
peak, stop = [before := anonymous()], threading.Event()
def watch():
    while not stop.wait(0.01):
        peak.append(anonymous())
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
if {stream}:
    for i in range(0, {n}, 50_000):
        model.partial_fit(X[i : i + 50_000], y[i : i + 50_000])
else:
    model.fit(X, y)
took = time.perf_counter() - start
stop.set(); thread.join()
truth = np.sin(2 * X[-5000:, 0]) * X[-5000:, 1]
error = np.square(model.predict(X[-5000:]) - truth).mean()
print(f"{{took:.1f}} s, peak {{(max(peak) - before) / 1024:.0f}} MB of private memory above start, "
      f"m={{len(model.components_)}}, mean squared error {{error:.4f}}")
"""


def memory():
    n, d = 1_000_000, 5
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / f"{name}.npy") for name in "Xy"}
        X = np.lib.format.open_memmap(paths["X"], mode="w+", dtype=np.float32, shape=(n, d))
        y = np.lib.format.open_memmap(paths["y"], mode="w+", dtype=np.float32, shape=(n,))
        rng = np.random.default_rng(0)
        for start in range(0, n, 50_000):
            rows = slice(start, start + 50_000)
            X[rows] = rng.standard_normal((50_000, d))
            y[rows] = np.sin(2 * X[rows, 0]) * X[rows, 1] + 0.1 * rng.standard_normal(50_000)
        del X, y
        size = (n * d + n) * 4 / 2**20
        print(f"rows from files, float32, d={d}; a million rows are {size:.0f} MB")
        for label, options, streamed in (
            ("direct, fit", {"budget": 5}, False),
            ("direct, partial_fit", {"budget": 5}, True),
            ("cg, fit, uniform", {"solver": "cg", "method": "uniform", "n_components": 500}, False),
        ):
            for count in (100_000, n):
                code = FIT_FROM_FILE.format(n=count, options=options, stream=streamed, **paths)
                out = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                )
                print(f"  {label:20s} {count:8d} rows: {out.stdout.strip()}", flush=True)


PARTS = {"large": large, "risk": risk, "stream": stream, "real": real, "memory": memory}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
