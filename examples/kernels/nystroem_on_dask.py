"""Choose landmarks on a Dask cluster: a dictionary for each chunk, joined by a tree of merges.

    python examples/kernels/nystroem_on_dask.py [--rows 200000] [--chunks 8] [--workers 2]
        [--scheduler tcp://HOST:8786]

Without --scheduler a cluster of processes on this machine is started. No process ever holds more
than one chunk and two dictionaries; what comes back is an ordinary fitted transformer.
"""

import argparse
import time

import dask.array as da
import numpy as np
from dask import delayed
from distributed import Client, LocalCluster

from sciml.kernels import RidgeLeverageNystroem, pairwise_kernel


def clustered(chunk_rows, seed):
    """Nine tenths of the rows in a tight blob, the others in a wide cloud."""
    rng = np.random.default_rng(seed)
    few = chunk_rows // 10
    blob, cloud = rng.normal(0, 0.15, (chunk_rows - few, 2)), rng.normal(4, 3, (few, 2))
    return rng.permutation(np.concatenate([blob, cloud]))


def spectral_error(model, X):
    Z = model.transform(X)
    return np.abs(np.linalg.eigvalsh(pairwise_kernel(X, gamma=1.0) - Z @ Z.T)).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scheduler", default=None, help="address of a running cluster")
    arguments = parser.parse_args()
    rows = arguments.rows // arguments.chunks

    cluster = arguments.scheduler or LocalCluster(
        n_workers=arguments.workers, threads_per_worker=1, dashboard_address=None
    )
    with Client(cluster) as client:
        parts = [
            da.from_delayed(delayed(clustered)(rows, seed), shape=(rows, 2), dtype=float)
            for seed in range(arguments.chunks)
        ]
        X = da.concatenate(parts)
        model = RidgeLeverageNystroem(gamma=1.0, ridge=10.0, n_components=200, random_state=0)
        start = time.perf_counter()
        model.fit(X)
        seconds = time.perf_counter() - start
        workers = len(client.scheduler_info()["workers"])

        start = time.perf_counter()
        alone = RidgeLeverageNystroem(gamma=1.0, ridge=10.0, n_components=200, random_state=0)
        alone.fit(clustered(rows, seed) for seed in range(arguments.chunks))
        seconds_alone = time.perf_counter() - start

    sample = clustered(2000, seed=10_000)
    print(f"{model.n_samples_seen_} rows in {arguments.chunks} chunks, {workers} workers")
    for name, fitted, took in (("cluster", model, seconds), ("one process", alone, seconds_alone)):
        print(
            f"{name:>12}: {took:5.1f} s, {len(fitted.component_indices_)} landmarks, "
            f"spectral error on 2000 new rows {spectral_error(fitted, sample):.3f}"
        )


if __name__ == "__main__":
    main()
