"""INK-Estimate by the Woodbury identity against the same steps with all matrices formed."""

import argparse
import time

import numpy as np

from sciml.kernels import ink_estimate, pairwise_kernel


def dense_ink(K, ridge, budget, eps, seed):
    """Every matrix formed and solved: O(t^3) a step."""
    rng = np.random.RandomState(seed)
    alpha = (2 - eps) / (1 - eps)
    indices, copies, probabilities = np.empty(0, int), np.empty(0, int), np.empty(0)
    dimension = 0.0
    for t in range(len(K)):
        k, c = K[:t, t], K[t, t]
        S = np.zeros((t, len(indices)))
        S[indices, np.arange(len(indices))] = np.sqrt(copies / (budget * probabilities))
        inner = S.T @ K[:t, :t] @ S + ridge * np.eye(len(indices))
        sketch = K[:t, :t] @ S @ np.linalg.solve(inner, S.T @ K[:t, :t])
        solved = k @ np.linalg.solve(sketch + alpha * ridge * np.eye(t), k)
        dimension += max(0.0, (c - solved) / (c + ridge - solved))
        border = np.block([[sketch, k[:, None]], [k[None], np.array([[c]])]])
        inverse = np.linalg.inv(border + alpha * ridge * np.eye(t + 1))
        columns = np.append(indices, t)
        part = K[: t + 1][:, columns]
        scores = (K[columns, columns] - np.einsum("ij,ik,kj->j", part, inverse, part)) / (
            alpha * ridge
        )
        indices = columns
        copies = np.append(copies, budget)
        old = np.append(probabilities, 1.0)
        probabilities = np.minimum(np.clip(scores, 1e-300, 1) / dimension, old)
        copies = rng.binomial(copies, probabilities / old)
        keep = copies > 0
        indices, copies, probabilities = indices[keep], copies[keep], probabilities[keep]
    return indices


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=600)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    n = arguments.n
    X = np.concatenate([rng.normal(0, 0.15, (n - n // 10, 2)), rng.normal(4, 3, (n // 10, 2))])
    X = rng.permutation(X)
    K = pairwise_kernel(X, gamma=1.0)
    start = time.perf_counter()
    ours = ink_estimate(K, 1.0, budget=600, kernel="precomputed", random_state=0).indices
    fast = time.perf_counter() - start
    start = time.perf_counter()
    dense = dense_ink(K, 1.0, 600, 0.5, 0)
    slow = time.perf_counter() - start
    print(
        f"n={n}: Woodbury {fast:.3f} s, dense {slow:.2f} s -> {slow / fast:.0f}x; "
        f"same landmarks: {ours.tolist() == dense.tolist()}"
    )
