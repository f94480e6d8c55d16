"""
Kernel ridge regression on a stream
===================================

Kernel ridge regression keeps all rows: its kernel matrix grows with their square, and landmarks
drawn uniformly follow the crowd. :class:`~sciml.kernels.NystroemRidge` with SQUEAK keeps a
dictionary that grows with what there is to learn, and takes the stream block by block with
``partial_fit``.

Here nine rows in ten come from one dense blob, and one in ten from regions that open up as the
stream goes on. We measure the risk (mean squared distance to the noiseless target) on all regions
seen so far, and the memory of each model.
"""

# %%
import pickle

import matplotlib.pyplot as plt
import numpy as np
from sklearn.kernel_ridge import KernelRidge

from sciml.kernels import NystroemRidge

BLOCK, N_BLOCKS = 250, 24
rng = np.random.default_rng(0)
centres = rng.uniform(-8, 8, (8, 2))


def rows(n, n_regions, share_of_blob):
    X = centres[rng.integers(n_regions, size=n)] + 0.6 * rng.standard_normal((n, 2))
    blob = rng.random(n) < share_of_blob
    X[blob] = 0.15 * rng.standard_normal((blob.sum(), 2))
    return X


def target(X):
    return np.sin(X[:, 0]) + np.cos(X[:, 1])


# %%
# The stream
# ----------
# A new region opens every third block. The uniform model holds a reservoir of exactly as many
# landmarks as SQUEAK ends with. `ridge` is given, so that `alpha` might still change.
regions = [1 + block // 3 for block in range(N_BLOCKS)]
blocks = [rows(BLOCK, count, 0.9) for count in regions]
noisy = [target(X) + 0.2 * rng.standard_normal(BLOCK) for X in blocks]
tests = [rows(1000, count, 0.1) for count in regions]


def run(model):
    risk, megabytes = [], []
    for X, y, test in zip(blocks, noisy, tests, strict=True):
        model.partial_fit(X, y)
        risk.append(np.square(model.predict(test) - target(test)).mean())
        megabytes.append(len(pickle.dumps(model)) / 2**20)
    return risk, megabytes


options = {"gamma": 1.0, "ridge": 0.1, "random_state": 0}
squeak = NystroemRidge(0.1, budget=4, **options)
results = {"SQUEAK": run(squeak)}
m = len(squeak.components_)
results["uniform reservoir"] = run(NystroemRidge(0.1, method="uniform", n_components=m, **options))

# %%
# The exact method sees all rows again at each point of the curve.
exact_at = range(2, N_BLOCKS, 3)
exact = []
for last in exact_at:
    X, y = np.concatenate(blocks[: last + 1]), np.concatenate(noisy[: last + 1])
    model = KernelRidge(alpha=0.1, kernel="rbf", gamma=1.0).fit(X, y)
    exact.append(np.square(model.predict(tests[last]) - target(tests[last])).mean())

# %%
# A stream is one pass; is it worse than a fit on all rows at once?
X, y = np.concatenate(blocks), np.concatenate(noisy)
batch = NystroemRidge(0.1, budget=4, **options).fit(X, y)
batch_risk = np.square(batch.predict(tests[-1]) - target(tests[-1])).mean()

n = np.arange(1, N_BLOCKS + 1) * BLOCK
kernel_matrix = 8 * n**2 / 2**20
print(f"after {n[-1]} rows, {m} landmarks:")
for name, (risk, megabytes) in results.items():
    print(f"  {name:18s} risk {risk[-1]:.4f}  {megabytes[-1]:6.1f} MB")
print(f"  {'SQUEAK, batch':18s} risk {batch_risk:.4f}")
print(f"  {'exact':18s} risk {exact[-1]:.4f}  {kernel_matrix[-1]:6.1f} MB (kernel matrix)")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, (risk, megabytes) in results.items():
    left.semilogy(n, risk, label=name)
    right.semilogy(n, megabytes, label=name)
left.semilogy(n[list(exact_at)], exact, "k.", label="exact, all rows")
right.semilogy(n, kernel_matrix, "k:", label="exact, kernel matrix")
left.set(xlabel="rows seen", ylabel="risk on the regions seen so far")
right.set(xlabel="rows seen", ylabel="memory (MB)")
left.legend()
right.legend()

if __name__ == "__main__":
    fig.savefig("streaming_ridge.png")
plt.show()
