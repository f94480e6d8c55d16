"""Time of the kernel machines' solvers against scikit-learn's on the same kernel matrix.

    python benchmarks/kernels/bench_kernel_machine.py [--n 1797] [--repeats 3]

Digit 8 against the rest, kernel NTK(depth=2). The peers solve nearly the same problem, and all
take the kernel matrix as given: `SVC` and `SVR` (libsvm; with intercept, at their default tol 1e-3
and at the 1e-6 of the kernel machines), `KernelRidge`, and for logistic and squared hinge loss,
for which scikit-learn has no kernel solver, `LogisticRegression` and `LinearSVC` on the rows of
the matrix's symmetric square root, whose time is not counted. CPU seconds of a single thread,
minima over repeats, taking turns; those of ours include the checks of the matrix. The residual is
the largest violation of the optimality conditions, of ours only.
"""

import argparse
import time
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, SVR, LinearSVC
from threadpoolctl import threadpool_limits

from sciml.kernels import NTK, KernelMachineClassifier, KernelMachineRegressor


def seconds(estimator, X, y):
    start = time.process_time()
    estimator.fit(X, y)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1797)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    X, y = load_digits(return_X_y=True)
    X, y = X[: arguments.n] / 16, np.where(y[: arguments.n] == 8, 1, -1)
    K = NTK(depth=2)(X)
    values, vectors = np.linalg.eigh(K)
    rows = vectors * np.sqrt(np.maximum(values, 0))
    warnings.simplefilter("ignore")  # libsvm and liblinear tell when they stop early

    print(f"n={len(y)}; ratio = peer / ours, above 1 is faster than the peer")
    print("loss                 C        ours s   residual  peer                    peer s   ratio")
    for C in (1.0, 15.625, 1000.0):
        linear = {"C": C, "fit_intercept": False, "max_iter": 10_000}
        svc = {"kernel": "precomputed", "C": C, "cache_size": 1000, "max_iter": 10**7}
        cases = {
            "hinge": [("SVC tol=1e-3", SVC(**svc), K), ("SVC tol=1e-6", SVC(**svc, tol=1e-6), K)],
            "squared_hinge": [("LinearSVC", LinearSVC(**linear, tol=1e-6), rows)],
            "logistic": [("LogisticRegression", LogisticRegression(**linear, tol=1e-6), rows)],
            "squared": [("KernelRidge", KernelRidge(alpha=1 / (2 * C), kernel="precomputed"), K)],
            "epsilon_insensitive": [
                ("SVR tol=1e-3", SVR(**svc), K),
                ("SVR tol=1e-6", SVR(**svc, tol=1e-6), K),
            ],
        }
        for loss, peers in cases.items():
            regressor = loss in ("squared", "epsilon_insensitive")
            kind = KernelMachineRegressor if regressor else KernelMachineClassifier
            ours = kind("precomputed", loss=loss, C=C)
            ours.fit(K[:50, :50], y[:50])  # compile
            times = np.empty((arguments.repeats, 1 + len(peers)))
            for row in times:
                row[0] = seconds(ours, K, y)
                row[1:] = [seconds(peer, data, y) for _, peer, data in peers]
            best = times.min(axis=0)
            for (name, _, _), peer_seconds in zip(peers, best[1:], strict=True):
                print(
                    f"{loss:20} {C:<8g} {best[0]:6.3f}   {ours.kkt_residual_:8.1e}  {name:22} "
                    f"{peer_seconds:7.3f}  {peer_seconds / best[0]:6.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
