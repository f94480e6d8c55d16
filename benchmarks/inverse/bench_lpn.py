"""Race the batched evaluation of the learned prior, and measure what a forward costs.

1. R of 100 images: `LPNPrior` (batched L-BFGS and CG) against SciPy's conjugate gradients one
   image at a time, as in the published code, to the same accuracy.
2. Forward in evaluation against forward with `create_graph`, and a training step.

The networks are trained first for a few hundred steps, so that the inversion is a real one.

    python benchmarks/inverse/bench_lpn.py
"""

import time

import numpy as np
import torch
from scipy.optimize import fmin_cg
from sklearn.datasets import load_digits
from torch.nn import functional as F

from sciml.inverse import LearnedProximalNetwork, LPNPrior, ProximalMatchingSchedule, train_lpn


def median_seconds(calls, repeats=7):
    """Median wall clock of each call, the calls taking turns."""
    spent = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, spent, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in spent]


def scipy_prior(net, images, gtol):
    """R by SciPy's fmin_cg per image, float32 network, start y = x."""
    values, residuals = [], []
    for x in images:

        def value(y, x=x):
            y = torch.tensor(y, dtype=x.dtype).reshape(1, *x.shape)
            with torch.no_grad():
                return float(net.potential(y) - (y * x).sum())

        def gradient(y, x=x):
            y = torch.tensor(y, dtype=x.dtype).reshape(1, *x.shape)
            return (net(y) - x).flatten().numpy().astype(float)

        y = fmin_cg(value, x.flatten().numpy(), gradient, gtol=gtol, disp=False)
        y = torch.tensor(y, dtype=x.dtype).reshape(1, *x.shape)
        with torch.no_grad():
            values.append(float((y * x).sum() - x.square().sum() / 2 - net.potential(y)))
        residuals.append(float((net(y) - x).norm() / x.norm()))
    return torch.tensor(values), max(residuals)


def race(digits, side, width, steps, n_slow):
    """Train briefly at one size, then time the prior and the forward."""
    images = digits if side == 8 else F.interpolate(digits, (side, side), mode="bilinear")
    generator = torch.Generator().manual_seed(0)
    net = LearnedProximalNetwork(
        1, side, width=width, beta=10.0, strong_convexity=0.01, generator=generator
    )
    schedule = ProximalMatchingSchedule.from_stages([("l1", steps, 1e-3)])
    train_lpn(net, images[:1500], schedule=schedule, batch_size=32, random_state=0)
    x = images[1500:1600]
    print(f"{side} x {side}, width {width}, {len(x)} images, {torch.get_num_threads()} threads")

    start = time.perf_counter()
    # fmin_cg's default tolerance, 1e-5 on the largest entry of the gradient.
    slow, slow_residual = scipy_prior(net, x[:n_slow], gtol=1e-5)
    slow_seconds = (time.perf_counter() - start) * len(x) / n_slow
    print(f"  SciPy CG, one at a time: {slow_seconds:.2f} s, worst residual {slow_residual:.0e}")
    for method in ("lbfgs", "cg"):
        for tol in (min(slow_residual, 1e-2), 1e-5):
            prior = LPNPrior(net, method=method, tol=tol)
            (seconds,) = median_seconds([lambda prior=prior: prior.fn(x)], repeats=3)
            difference = float(((prior.fn(x[:n_slow]) - slow).abs() / slow.abs()).max())
            print(
                f"  batched {method}, worst residual {tol:.0e}: {seconds:.3f} s, "
                f"{slow_seconds / seconds:.1f} x; values differ by {difference:.0e}"
            )

    batch = x[:32]

    def with_graph():
        net.train()(batch)

    def without_graph():
        net.eval()(batch)

    def training_step():
        net.zero_grad()
        (net.train()(batch) - batch).square().mean().backward()

    graph, bare, step = median_seconds([with_graph, without_graph, training_step], repeats=25)
    print(
        f"  forward of 32: create_graph {1e3 * graph:.1f} ms, evaluation {1e3 * bare:.1f} ms: "
        f"{bare / graph:.2f} x; training step {step / graph:.2f} x"
    )


def main():
    digits = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:, None]
    race(digits, side=8, width=32, steps=400, n_slow=100)
    race(digits, side=28, width=64, steps=100, n_slow=5)


if __name__ == "__main__":
    main()
