"""What PS-KD adds to an epoch of training, against label smoothing.

    python benchmarks/lm/bench_pskd.py [--n 2560] [--repeats 3] [--files]

A ResNet of three stages on random 32 x 32 colour images with 100 classes, batches of 128, SGD: the
losses take turns in one process on the same network, times are minima over repeats. PS-KD adds one
gather and one scatter of (128, 100) numbers a batch.
"""

import argparse
import tempfile
import time

import torch
from torch import nn

from sciml.lm import ProgressiveSelfKDLoss


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(n_in), nn.ReLU(), nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(n_out), nn.ReLU(), nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),
        )  # fmt: skip
        self.skip = nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x):
        return self.body(x) + self.skip(x)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100),
    )  # fmt: skip


def epoch(net, optimizer, X, y, loss_of):
    start = time.perf_counter()
    for index in torch.randperm(len(X)).split(128):
        optimizer.zero_grad()
        loss_of(net(X[index]), y[index], index).backward()
        optimizer.step()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--files", action="store_true", help="predictions in files too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    X, y = torch.randn(arguments.n, 3, 32, 32), torch.randint(100, (arguments.n,))
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    progressive = ProgressiveSelfKDLoss(arguments.n, 100, 10)
    losses = {
        "cross entropy": lambda z, y, _: nn.functional.cross_entropy(z, y),
        "label smoothing": lambda z, y, _: nn.functional.cross_entropy(z, y, label_smoothing=0.1),
        "PS-KD": lambda z, y, index: progressive(z, y, index),
    }
    with tempfile.TemporaryDirectory() as folder:
        if arguments.files:
            in_files = ProgressiveSelfKDLoss(arguments.n, 100, 10, path=folder)
            losses["PS-KD, files"] = lambda z, y, index: in_files(z, y, index)
        for loss_of in losses.values():  # warm up; every sample has a prediction afterwards
            epoch(net, optimizer, X, y, loss_of)
        best = dict.fromkeys(losses, float("inf"))
        for _ in range(arguments.repeats):
            for name, loss_of in losses.items():
                best[name] = min(best[name], epoch(net, optimizer, X, y, loss_of))
        z, index = torch.randn(128, 100, requires_grad=True), torch.arange(128)
        alone = dict.fromkeys(losses, float("inf"))
        for _ in range(50):
            for name, loss_of in losses.items():
                start = time.perf_counter()
                loss_of(z, y[:128], index).backward()
                alone[name] = min(alone[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(
            f"{name:16} {seconds:7.3f} s an epoch, {seconds / best['label smoothing']:.3f} of "
            f"label smoothing; loss and its gradient alone {1e6 * alone[name]:.0f} us a batch"
        )


if __name__ == "__main__":
    main()
