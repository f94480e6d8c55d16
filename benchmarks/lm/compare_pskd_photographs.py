"""PS-KD against cross entropy and label smoothing on colour patches of photographs.

    python benchmarks/lm/compare_pskd_photographs.py [--seeds 0 1] [--epochs 60] [--methods PS-KD]

A stand-in for CIFAR that needs no download: 16 x 16 colour patches of ten photographs that
scikit-image ships, the class is the photograph. Patches of the upper two thirds train, of the lower
third test, 60 of each photograph, and a fifth of the training labels are random. A convolutional
network of three layers, SGD with Nesterov momentum, augmented by flips, as in the paper.
"""

import argparse
import time

import numpy as np
import torch
from skimage import data
from torch import nn

from sciml.lm import (
    ProgressiveSelfKDLoss,
    aurc,
    expected_calibration_error,
    negative_log_likelihood,
)

PHOTOGRAPHS = (
    "astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry",
    "hubble_deep_field", "brick", "grass", "gravel",
)  # fmt: skip
METHODS = ("cross entropy", "label smoothing", "PS-KD")


def patches(seed, n=60, size=16):
    """Training and test patches, shape (samples, 3, size, size), and their photographs."""
    rng = np.random.default_rng(seed)
    parts = {"train": ([], []), "test": ([], [])}
    for label, name in enumerate(PHOTOGRAPHS):
        image = np.asarray(getattr(data, name)())
        image = image[..., None].repeat(3, -1) if image.ndim == 2 else image[..., :3]
        image = image[::2, ::2].astype(np.float32) / 255
        border = 2 * len(image) // 3
        for part, rows in (("train", (0, border)), ("test", (border, len(image)))):
            for _ in range(n):
                i = rng.integers(rows[0], rows[1] - size)
                j = rng.integers(0, image.shape[1] - size)
                parts[part][0].append(image[i : i + size, j : j + size].transpose(2, 0, 1))
                parts[part][1].append(label)
    X_train, y_train, X_test, y_test = (
        np.stack(x) if i % 2 == 0 else np.array(x)
        for i, x in enumerate((*parts["train"], *parts["test"]))
    )
    mean, std = X_train.mean((0, 2, 3), keepdims=True), X_train.std((0, 2, 3), keepdims=True)
    wrong = rng.choice(len(y_train), len(y_train) // 5, replace=False)
    y_train[wrong] = rng.integers(len(PHOTOGRAPHS), size=len(wrong))
    return [
        torch.from_numpy(x)
        for x in ((X_train - mean) / std, y_train, (X_test - mean) / std, y_test)
    ]


def network():
    layers, width = [], 3
    for channels in (16, 32, 64):
        layers += [
            nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.MaxPool2d(2),
        ]  # fmt: skip
        width = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, len(PHOTOGRAPHS)))


def train(method, seed, n_epochs):
    X, y, X_test, y_test = patches(seed)
    torch.manual_seed(seed)
    net = network()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    drops = [n_epochs // 2, 3 * n_epochs // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    progressive = ProgressiveSelfKDLoss(len(X), len(PHOTOGRAPHS), n_epochs)
    for epoch in range(n_epochs):
        progressive.set_epoch(epoch)
        net.train()
        for index in torch.randperm(len(X)).split(128):
            flip = torch.rand(len(index), 1, 1, 1) < 0.5
            logits = net(torch.where(flip, X[index].flip(-1), X[index]))
            if method == "PS-KD":
                loss = progressive(logits, y[index], index)
            else:
                smoothing = 0.1 if method == "label smoothing" else 0.0
                loss = nn.functional.cross_entropy(logits, y[index], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        p = net(X_test).softmax(1).double().numpy()
    y_test = y_test.numpy()
    return (
        100 * (p.argmax(1) != y_test).mean(),
        negative_log_likelihood(y_test, p),
        100 * expected_calibration_error(y_test, p),
        1000 * aurc(y_test, p),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    for method in arguments.methods:
        rows = []
        for seed in arguments.seeds:
            start = time.perf_counter()
            rows.append(train(method, seed, arguments.epochs))
            error, nll, ece, area = rows[-1]
            print(
                f"{method:16} seed {seed}: error {error:5.2f} %, NLL {nll:.3f}, ECE {ece:5.2f} %, "
                f"AURC {area:6.1f}  ({time.perf_counter() - start:.1f} s)",
                flush=True,
            )
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
        print(
            f"{method:16} mean:   error {mean[0]:5.2f} ± {spread[0]:.2f} %, NLL {mean[1]:.3f} ± "
            f"{spread[1]:.3f}, ECE {mean[2]:5.2f} ± {spread[2]:.2f} %, AURC {mean[3]:6.1f} ± "
            f"{spread[3]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
