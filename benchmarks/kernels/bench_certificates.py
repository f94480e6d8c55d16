"""Time the certificates of 100 samples against a loop over the samples in torch.

Both use the same bound (`norm_bound="l2"`), the same start and the same final bracket; the loop is
written as the formulas read, one sample at a time, all training points at once.
"""

import math
import time

import numpy as np
import torch
from sklearn.datasets import load_digits

from sciml.kernels import NTK, KernelMachineClassifier, certified_radius

U_STAR, H_STAR = -0.7940998648103225, -0.4297378205183164


def h(u):
    return 2 * u * (math.pi - torch.arccos(u)) + torch.sqrt(1 - u * u)


def margin(dual, points, lengths, x, sign, delta):
    d = len(x)
    reach = math.sqrt(d) * delta
    low, high = max(float(x.norm()) - reach, 0.0), float(x.norm()) + reach
    dot_low, dot_high = points @ x - reach * lengths, points @ x + reach * lengths
    u_low = dot_low / (torch.where(dot_low >= 0, high, low) * lengths)
    u_high = dot_high / (torch.where(dot_high >= 0, low, high) * lengths)
    u_low, u_high = u_low.clamp(-1, 1), u_high.clamp(-1, 1)
    h_left, h_right = h(u_low), h(u_high)
    h_low = torch.minimum(h_left, h_right)
    h_low = torch.where((u_low <= U_STAR) & (u_high >= U_STAR), H_STAR, h_low)
    h_high = torch.maximum(h_left, h_right)
    scale = lengths / (2 * math.pi * d)
    K_low = torch.where(h_low >= 0, low, high) * h_low * scale
    K_high = torch.where(h_high >= 0, high, low) * h_high * scale
    weight = sign * dual
    return float((weight * torch.where(weight > 0, K_low, K_high)).sum())


def loop(machine, X, tol=1e-6):
    dual, points = torch.from_numpy(machine.dual_coef_), torch.from_numpy(machine.X_fit_)
    lengths = points.norm(dim=1)
    signs = np.sign(machine.decision_function(X))
    radii = []
    for x, sign in zip(torch.from_numpy(X), signs, strict=True):
        low, high = 0.0, 1 / 32
        while margin(dual, points, lengths, x, sign, high) > 0:
            low, high = high, 2 * high
        while high - low > tol * high:
            middle = (low + high) / 2
            if margin(dual, points, lengths, x, sign, middle) > 0:
                low = middle
            else:
                high = middle
        radii.append(low)
    return np.array(radii)


def main():
    torch.set_default_dtype(torch.float64)  # for the Python numbers that torch.where takes
    data = load_digits(n_class=2)
    order = np.random.RandomState(0).permutation(len(data.target))[:360]
    X, y = data.data[order] / 16, data.target[order]
    for loss, C in (("hinge", 1 / 0.064), ("squared", 10.0)):
        machine = KernelMachineClassifier(NTK(), loss=loss, C=C).fit(X[:260], y[:260])
        ours = certified_radius(machine, X[260:], norm_bound="l2")  # compiles
        peer = loop(machine, X[260:])
        assert np.allclose(ours, peer, rtol=3e-6)
        times = np.empty((5, 2))
        for row in times:
            start = time.perf_counter()
            certified_radius(machine, X[260:], norm_bound="l2")
            middle = time.perf_counter()
            loop(machine, X[260:])
            row[:] = middle - start, time.perf_counter() - middle
        best = times.min(axis=0)
        support = np.count_nonzero(machine.dual_coef_)
        print(
            f"certificates, 100 samples x 260 points, loss={loss!r} ({support} support vectors): "
            f"{best[0] * 1e3:.1f} ms, torch loop {best[1] * 1e3:.0f} ms, "
            f"ratio {best[1] / best[0]:.1f}"
        )


if __name__ == "__main__":
    main()
