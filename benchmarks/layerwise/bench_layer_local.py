"""Time of layer-local training against scikit-learn and backpropagation of equal width.

    python benchmarks/layerwise/bench_layer_local.py [--n 5000] [--width 500] [--repeats 3]

Random float32 data of the size of MNIST's images, no early stopping. Times are minima over repeats,
the competitors taking turns in one process.

1. Epochs of a two-layer network: scikit-learn's MLPClassifier, backpropagation, Mono-Forward
   (each of its two layers trained for the same number of epochs) and Forward-Forward.
2. Mono-Forward with the input of a layer computed once against running the lower layers again for
   every batch, by depth.
3. Forward-Forward's prediction with the product of first layer and features shared by all labels
   against one forward pass for each label.
"""

import argparse
import itertools
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from sciml.layerwise import (
    BackpropClassifier,
    ForwardForwardClassifier,
    MonoForwardClassifier,
    embed_label,
    rms_normalize,
)


def race(competitors, repeats):
    """Return the shortest time of each, called in turns."""
    best = dict.fromkeys(competitors, np.inf)
    for _ in range(repeats):
        for name, call in competitors.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def recomputing_mono_forward(X, y, width, depth, epochs, batch_size=128):
    """Mono-Forward as the published loop runs it: lower layers again for every batch."""
    X, y = torch.from_numpy(X), torch.from_numpy(y)
    sizes = [X.shape[1]] + [width] * depth
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for i, layer in enumerate(layers):
        projection = torch.nn.Linear(width, 10, bias=False)
        parameters = [*layer.parameters(), *projection.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
        for _ in range(epochs):
            for batch in torch.randperm(len(X)).split(batch_size):
                a = X[batch]
                with torch.no_grad():
                    for lower in layers[:i]:
                        a = lower(a).relu()
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(projection(layer(a).relu()), y[batch])
                loss.backward()
                optimizer.step()


def naive_scores(model, x):
    """Goodness by one forward pass for each label."""
    found = []
    for c in range(10):
        v, goodness = embed_label(x, torch.full((len(x),), c), 10), 0
        for i, layer in enumerate(model.layers_):
            v = layer(rms_normalize(v)).relu()
            goodness = goodness + (v.square().sum(1) if i else 0)
        found.append(goodness)
    return torch.stack(found, dim=1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    rng = np.random.default_rng(0)
    X = rng.random((options.n, 784), dtype=np.float32)
    y = rng.integers(10, size=options.n)
    sizes, epochs = (options.width,) * 2, options.epochs
    settings = {"max_iter": epochs, "batch_size": 128, "early_stopping": False}
    print(f"{options.n} x 784, layers {sizes}, {epochs} epochs, {torch.get_num_threads()} threads")
    times = race(
        {
            "scikit-learn MLPClassifier": lambda: MLPClassifier(
                sizes, batch_size=128, max_iter=epochs, n_iter_no_change=10**6, tol=0
            ).fit(X, y),
            "backpropagation": lambda: BackpropClassifier(sizes, **settings).fit(X, y),
            "Mono-Forward, sequential": lambda: MonoForwardClassifier(sizes, **settings).fit(X, y),
            "Mono-Forward, joint": lambda: MonoForwardClassifier(
                sizes, schedule="joint", **settings
            ).fit(X, y),
            "Forward-Forward": lambda: ForwardForwardClassifier(sizes, **settings).fit(X, y),
        },
        options.repeats,
    )
    for name, seconds in times.items():
        ratio = seconds / times["backpropagation"]
        print(f"  {name:28} {seconds:7.2f} s  {ratio:5.2f} x backpropagation")

    print("Mono-Forward, layer input computed once / lower layers run again for every batch")
    for depth in (2, 4, 8):
        times = race(
            {
                "once": lambda depth=depth: MonoForwardClassifier(
                    (options.width,) * depth, **settings
                ).fit(X, y),
                "again": lambda depth=depth: recomputing_mono_forward(
                    X, y, options.width, depth, epochs
                ),
            },
            options.repeats,
        )
        print(
            f"  {depth} layers: {times['once']:6.2f} s / {times['again']:6.2f} s, "
            f"{times['again'] / times['once']:.2f} x"
        )

    model = ForwardForwardClassifier(sizes, **settings, random_state=0).fit(X, y)
    x = torch.from_numpy(X)
    with torch.no_grad():
        times = race(
            {"shared": lambda: model.predict(X), "naive": lambda: naive_scores(model, x)},
            options.repeats,
        )
        agree = np.mean(model.predict(X) == naive_scores(model, x).argmax(1).numpy())
    print(
        f"Forward-Forward, {options.n} predictions: shared {times['shared']:.2f} s, a pass for "
        f"each label {times['naive']:.2f} s, {times['naive'] / times['shared']:.2f} x; "
        f"{100 * agree:.1f} % agree"
    )


if __name__ == "__main__":
    main()
