"""
A fair comparison of trainers
=============================

Is a new way to train better than backpropagation, or was it only tuned longer? Here every trainer
gets the same number of trials by the same sampler in every fold
(:func:`~sciml.layerwise.compare_trainers`). Then it is trained with its best settings, and what
that takes is measured: seconds, the bytes that autograd saves for the backward pass, and joules
where a GPU reports its power.

The study that inspired this (arXiv:2509.19063) gave 50 trials to the layer-local methods and 5 to
10 to backpropagation.
"""

# %%
# Three trainers of two layers of 64 units, and what to search for each. Backpropagation trains both
# layers for up to 40 epochs, Mono-Forward each of them for up to 20; Forward-Forward, which learns
# slowly, both for 40.
import warnings

import matplotlib.pyplot as plt
import numpy as np
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_digits

from sciml.layerwise import (
    BackpropClassifier,
    ForwardForwardClassifier,
    MonoForwardClassifier,
    compare_trainers,
)

X, y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)

trainers = {
    "backpropagation": BackpropClassifier((64, 64), max_iter=40, batch_size=64),
    "Mono-Forward": MonoForwardClassifier((64, 64), max_iter=20, batch_size=64),
    "Forward-Forward": ForwardForwardClassifier((64, 64), max_iter=40, batch_size=64),
}
rate = FloatDistribution(3e-4, 3e-2, log=True)
decay = FloatDistribution(1e-6, 1e-3, log=True)
spaces = {name: {"learning_rate_init": rate, "weight_decay": decay} for name in trainers}

# %%
# The comparison. With ``storage="comparison.db"`` it could be interrupted and resumed.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "energy is not measured")  # None in the table says it
    rows = compare_trainers(trainers, X, y, cv=2, search=5, search_spaces=spaces)

print(f"{'trainer':16} accuracy %    train s  search s  saved kB  joules")
for row in rows:
    joules = "-" if row["energy_joules"] is None else f"{row['energy_joules']:.1f}"
    print(
        f"{row['trainer']:16} {100 * row['score']:.2f} +- {100 * row['score_std']:.2f} "
        f"{row['seconds']:8.2f} {row['search_seconds']:9.1f} "
        f"{row['peak_backward_bytes'] / 1000:9.1f} {joules:>7}"
    )

# %%
# Two folds say little: the differences here are within the noise unless they are large.
fig, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for ax, key, label, scale in zip(
    axes,
    ("score", "seconds", "peak_backward_bytes"),
    ("error %", "seconds to train", "kB saved for backward"),
    (100, 1, 1e-3),
    strict=True,
):
    values = [scale * (1 - row[key] if key == "score" else row[key]) for row in rows]
    ax.bar([row["trainer"].replace("-F", "-\nF") for row in rows], values)
    ax.set_title(label)
    ax.tick_params(axis="x", labelsize=7)
fig.savefig("fair_comparison.png")
plt.show()
