"""
Landmarks by ridge leverage, and why uniform ones miss what is rare
===================================================================

A Nyström approximation expresses all points by a few *landmarks*. Drawn uniformly, nearly all of
them land where nearly all points are, although a tight blob needs only a handful; what is rare
stays unseen. Ridge leverage scores say how badly a point is expressed by the others, and landmarks
drawn by them go where they are needed.
"""

# %%
# A tight blob with nine tenths of the points, and a wide cloud with the rest.
import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.kernel_approximation import Nystroem

from sciml.kernels import (
    RidgeLeverageNystroem,
    effective_dimension,
    pairwise_kernel,
    ridge_leverage_scores,
)

rng = np.random.default_rng(0)
X = np.concatenate([rng.normal(0, 0.15, (540, 2)), rng.normal(4, 3, (60, 2))])
X = rng.permutation(X)
gamma, ridge = 1.0, 1.0
K = pairwise_kernel(X, gamma=gamma)
scores = ridge_leverage_scores(K, ridge)
needed, coherence = effective_dimension(K, ridge), len(X) * scores.max()
print(f"effective dimension {needed:.1f}; uniform sampling pays for n max score = {coherence:.0f}")

# %%
# Where the landmarks land
# ------------------------
# SQUEAK reads the points once and estimates the scores from the landmarks it holds.
squeak = RidgeLeverageNystroem(gamma=gamma, ridge=ridge, n_components=80, random_state=0).fit(X)
uniform = Nystroem(gamma=gamma, n_components=len(squeak.components_), random_state=0).fit(X)
fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for ax, model, name in ((axes[0], squeak, "SQUEAK"), (axes[1], uniform, "uniform")):
    ax.scatter(*X.T, s=4, c=scores, cmap="viridis")
    ax.scatter(*model.components_.T, s=30, facecolors="none", edgecolors="red")
    outside = int((np.linalg.norm(model.components_, axis=1) > 1).sum())
    ax.set(title=f"{name}: {outside} of {len(model.components_)} landmarks outside the blob")
    print(f"{name}: {outside} of {len(model.components_)} landmarks lie outside the blob")

# %%
# Error against the number of landmarks
# -------------------------------------
# The spectral norm of ``K - Z Z'``, median over five seeds, and the time of a fit. "exact" needs
# all n x n kernel values; SQUEAK reads the points once.


def error(model, X, K):
    Z = model.transform(X)
    return np.abs(np.linalg.eigvalsh(K - Z @ Z.T)).max()


sizes = [40, 60, 80, 110]
print("landmarks    " + "  ".join(f"{m:7d}" for m in sizes))
for name in ("uniform", "squeak", "recursive", "exact"):
    errors, seconds = [], []
    for m in sizes:
        some = []
        for seed in range(5):
            model = RidgeLeverageNystroem(
                gamma=gamma, ridge=ridge, method=name, n_components=m, random_state=seed
            )
            if name == "squeak":
                model.set_params(budget=60)
            start = time.perf_counter()
            model.fit(X)
            seconds.append(time.perf_counter() - start)
            some.append(error(model, X, K))
        errors.append(np.median(some))
    axes[2].semilogy(sizes, errors, "o-", label=name)
    fit = 1000 * np.median(seconds)
    print(f"{name:>9}    " + "  ".join(f"{e:7.3f}" for e in errors) + f"    fit {fit:.0f} ms")
axes[2].axhline(2 * ridge, color="grey", linestyle=":", label="ridge / (1 - eps)")
axes[2].set(xlabel="landmarks", ylabel="spectral error", title="error against landmarks")
axes[2].legend()
fig.savefig("leverage_vs_uniform.png")

# %%
# Where scores have nothing to say
# --------------------------------
# On a sphere all points matter alike, and sampling by the exact scores is uniform sampling. What
# SQUEAK still has is memory: it seldom takes a point next to a landmark that it already holds.
sphere = rng.standard_normal((600, 3))
sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
K = pairwise_kernel(sphere, gamma=gamma)
for name in ("uniform", "exact", "squeak"):
    some, sizes = [], []
    for seed in range(5):
        model = RidgeLeverageNystroem(
            gamma=gamma, ridge=ridge, method=name, n_components=40, random_state=seed
        )
        some.append(error(model.fit(sphere), sphere, K))
        sizes.append(len(model.component_indices_))
    print(f"sphere, {np.median(sizes):.0f} landmarks, {name}: error {np.median(some):.2f}")
plt.show()
