"""
Four ways to train a network on digits
======================================

Backpropagation sends the error through all layers, and must keep what every layer computed until it
comes back. Layer-local methods give each layer a loss of its own:

* Mono-Forward (arXiv:2501.09238): every layer has a small classifier on top.
* Forward-Forward (arXiv:2212.13345): every layer is to be active for samples that carry their true
  label and silent for those that carry a wrong one.
* Cascaded Forward (arXiv:2303.09728): random convolutional blocks, a linear classifier on each.
"""

# %%
# The 8x8 digits of scikit-learn; 60 % train, 20 % decide when to stop, 20 % test.
import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sciml.layerwise import (
    BackpropClassifier,
    BackwardMemoryMonitor,
    CascadedForwardClassifier,
    ForwardForwardClassifier,
    MonoForwardClassifier,
)

X, y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, stratify=y, random_state=0)

# %%
# Accuracy
# --------
# The Cascaded Forward network is convolutional and sees images: do not compare it with the others,
# which have two or three dense layers of 256 units.
options = {"validation_fraction": 0.25, "random_state": 0}
models = {
    "backpropagation": BackpropClassifier((256, 256), max_iter=100, **options),
    "Mono-Forward": MonoForwardClassifier((256, 256), max_iter=100, **options),
    "Forward-Forward": ForwardForwardClassifier((256, 256, 256), **options),
    "Cascaded Forward": CascadedForwardClassifier((32, 128), image_shape=(1, 8, 8), random_state=0),
}
for name, model in models.items():
    start = time.perf_counter()
    model.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    print(f"{name:16} {100 * model.score(X_test, y_test):6.2f} %  {seconds:5.1f} s")

# %%
# Every layer predicts
# --------------------
# With Mono-Forward one can stop at any layer and has a classifier.
for i, scores in enumerate(models["Mono-Forward"].layer_scores(X_test), start=1):
    accuracy = (scores.argmax(axis=1) == y_test).mean()
    print(f"Mono-Forward, layer {i}: {100 * accuracy:.2f} %")

# %%
# Memory
# ------
# What autograd keeps for the backward pass of a batch of 100: with backpropagation it grows with
# each layer, with a local loss it is that of one layer, however deep the network.
depths = [2, 4, 8, 16]
kilobytes = {"backpropagation": [], "Mono-Forward": []}
for depth in depths:
    settings = {"max_iter": 1, "batch_size": 100, "early_stopping": False}
    for name, trainer in (
        ("backpropagation", BackpropClassifier((256,) * depth, **settings)),
        ("Mono-Forward", MonoForwardClassifier((256,) * depth, **settings)),
    ):
        with BackwardMemoryMonitor() as memory:
            trainer.fit(X_train, y_train)
        kilobytes[name].append(memory.peak_bytes / 1000)
        print(f"{depth:2} layers, {name:16} {memory.peak_bytes / 1000:7.1f} kB")

fig, ax = plt.subplots(layout="constrained")
for name, values in kilobytes.items():
    ax.plot(depths, values, "o-", label=name)
ax.set(xlabel="layers", ylabel="kB saved for backward", xticks=depths, ylim=(0, None))
ax.legend()
fig.savefig("layer_local_memory.png")
plt.show()
