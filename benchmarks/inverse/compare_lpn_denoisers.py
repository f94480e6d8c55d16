"""Deblurring and compressed sensing: learned proximal network, DnCNN, TV and Tikhonov.

Trains a learned proximal network (LPN), and for the same CPU time on the same data a DnCNN of
equal size, then reconstructs held-out images with both as plug-and-play priors in the same
ADMM, and with total variation and Tikhonov regularisation. Every method's weight is tuned on
images apart from the test images. The LPN appears twice: with rho restricted to what the
convergence theorem allows, and with any rho, like the DnCNN. Last, both run for 500
iterations in float64 and the fixed-point residuals are compared (figure).

    python benchmarks/inverse/compare_lpn_denoisers.py digits
    python benchmarks/inverse/compare_lpn_denoisers.py natural --steps 4000
"""

import argparse
import copy
import time

import deepinv
import matplotlib
import numpy as np
import torch
from deepinv.optim import L2, PGD, TVPrior
from deepinv.physics.functional.blur import gaussian_blur
from sklearn.datasets import load_digits

from sciml.inverse import (
    LearnedProximalNetwork,
    ProximalMatchingSchedule,
    convergence_certificate,
    pnp_admm,
    train_lpn,
)

SIGMA = 0.05  # noise the denoisers are trained on, and of the measurements


def digit_images():
    """Digits of scikit-learn, 8 x 8: training, tuning and test images."""
    X = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:, None]
    X = X[np.random.default_rng(0).permutation(len(X))]
    return X[:1500], X[1500:1532], X[1532:1596]


def natural_images():
    """Patches of 32 x 32 of photographs in scikit-image, halved in size; two are held out."""
    from skimage import color, data, transform

    def patches(names, n, seed):
        rng = np.random.default_rng(seed)
        out = []
        for name in names:
            image = getattr(data, name)()
            image = image[0] if isinstance(image, tuple) else image
            gray = color.rgb2gray(image[..., :3]) if image.ndim == 3 else image / 255.0
            gray = transform.rescale(gray, 0.5, anti_aliasing=True)
            for _ in range(n):
                i, j = (rng.integers(0, side - 31) for side in gray.shape)
                out.append(gray[i : i + 32, j : j + 32])
        tensor = torch.tensor(np.array(out), dtype=torch.float32)[:, None]
        return tensor[torch.as_tensor(rng.permutation(len(tensor)))]

    names = ["astronaut", "coffee", "chelsea", "rocket", "moon", "coins", "brick", "gravel"]
    train = patches(names, 600, 0)
    train = torch.cat([train, train.flip(-1)])
    return train, patches(["stereo_motorcycle"], 16, 1), patches(["camera"], 32, 2)


def train_dncnn(net, train, seconds, batch_size):
    """Adam on squared error, for a given CPU time; the last quarter at a tenth of the rate."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    start, steps = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if spent < 0.75 * seconds else 1e-4
        x = train[torch.randint(len(train), (batch_size,), generator=generator)]
        loss = (
            (net(x + SIGMA * torch.randn(x.shape, generator=generator), SIGMA) - x).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return steps


def psnr(x_hat, x):
    """Mean over images, peak 1."""
    mse = (x_hat - x).square().flatten(1).mean(1)
    return float((-10 * torch.log10(mse)).mean())


def operators(side, dtype):
    """Gaussian blur, and random signs, sine transform and subsampling; both of norm 1."""
    img_size = (1, side, side)
    rows = 3 * side // 4 if side == 8 else side // 2
    return {
        "deblurring": deepinv.physics.BlurFFT(
            img_size=img_size, filter=gaussian_blur(sigma=(1.0, 1.0), dtype=dtype)
        ),
        f"compressed sensing {rows / side:g}": deepinv.physics.StructuredRandom(
            img_size, (1, rows, side), n_layers=2, rng=torch.Generator().manual_seed(0)
        ),
    }


def measure(physics, x, seed):
    y = physics.A(x)
    return y + SIGMA * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))


def tikhonov(weight):
    return lambda y, physics: physics.prox_l2(0.0, y, gamma=1 / weight)


def total_variation(weight):
    def solve(y, physics):
        solver = PGD(
            data_fidelity=L2(),
            prior=TVPrior(n_it_max=50),
            lambda_reg=weight,
            stepsize=0.95,
            max_iter=60,
        )
        return solver(y, physics)

    return solve


def plug_and_play(net, rho):
    return lambda y, physics: pnp_admm(y, physics, net, rho=rho, max_iter=60)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=["digits", "natural"])
    parser.add_argument("--steps", type=int, default=None, help="training steps of the LPN")
    arguments = parser.parse_args()
    digits = arguments.data == "digits"
    train, tune, test = digit_images() if digits else natural_images()
    side, batch_size = train.shape[-1], 64 if digits else 32
    steps = arguments.steps or (2500 if digits else 1500)

    lpn = LearnedProximalNetwork(
        1,
        side,
        width=32,
        n_downsamples=1 if digits else 2,
        beta=10.0 if digits else 100.0,
        strong_convexity=0.01,
        generator=torch.Generator().manual_seed(0),
    )
    torch.manual_seed(0)
    dncnn = deepinv.models.DnCNN(
        1, 1, depth=7 if digits else 6, nf=32 if digits else 64, pretrained=None
    )
    wall, cpu = time.perf_counter(), time.process_time()
    schedule = ProximalMatchingSchedule(side * side, steps)
    train_lpn(lpn, train, sigma=SIGMA, schedule=schedule, batch_size=batch_size, random_state=0)
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    print(f"LPN trained in {wall:.0f} s wall clock, {cpu:.0f} s CPU", flush=True)
    dncnn_steps = train_dncnn(dncnn, train, cpu, batch_size)
    dncnn.eval()
    for name, net in (("LPN", lpn), ("DnCNN", dncnn)):
        noisy = test + SIGMA * torch.randn(test.shape, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            denoised = net(noisy, SIGMA)
        size = sum(p.numel() for p in net.parameters())
        taken = steps if net is lpn else dncnn_steps
        print(
            f"{name}: {size} parameters, {taken} steps, {cpu:.0f} s CPU; denoising "
            f"{psnr(noisy, test):.2f} -> {psnr(denoised, test):.2f} dB"
        )
    print()

    tasks = operators(side, torch.float32)
    certified, any_rho = (1.02, 1.5, 2.5, 4.0), (0.05, 0.1, 0.2, 0.5)
    methods = {
        "Tikhonov": (tikhonov, (0.01, 0.03, 0.1, 0.3)),
        "TV": (total_variation, (0.003, 0.01, 0.02, 0.05, 0.1)),
        "DnCNN": (lambda rho: plug_and_play(dncnn, rho), any_rho + certified),
        "LPN, any rho": (lambda rho: plug_and_play(lpn, rho), any_rho + certified),
        "LPN, certified": (lambda rho: plug_and_play(lpn, rho), certified),
    }
    chosen = {}
    for task, physics in tasks.items():
        print(f"{task}, noise {SIGMA}, {len(test)} test images")
        y_tune, y_test = measure(physics, tune, 3), measure(physics, test, 4)
        for name, (make, weights) in methods.items():
            with torch.no_grad():
                scores = [psnr(make(w)(y_tune, physics), tune) for w in weights]
                best = weights[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]
                score = psnr(make(best)(y_test, physics), test)
            chosen[task, name] = best
            print(f"  {name:15s} weight {best:<6g} PSNR {score:6.2f} dB")
        print(" ", convergence_certificate(physics, lpn, chosen[task, "LPN, certified"]), "\n")

    # Fixed-point residuals in float64, where rounding does not hide convergence.
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for ax, (task, physics) in zip(axes, tasks.items(), strict=True):
        y = measure(physics, test[:16], 4).double()
        physics64 = operators(side, torch.float64)[task]
        runs = {
            "LPN, certified rho": (lpn, chosen[task, "LPN, certified"]),
            "LPN, any rho": (lpn, chosen[task, "LPN, any rho"]),
            "DnCNN, same rho as certified": (dncnn, chosen[task, "LPN, certified"]),
            "DnCNN, its best rho": (dncnn, chosen[task, "DnCNN"]),
        }
        print(f"{task}: residual ||x_k+1 - x_k|| / ||x_k+1||, 500 iterations, 16 images")
        for name, (net, rho) in runs.items():
            net64 = copy.deepcopy(net).double()
            _, metrics = pnp_admm(
                y, physics64, net64, rho=rho, max_iter=501, solver_tol=1e-10, solver_max_iter=20
            )
            residual = np.array(metrics["residual"])
            below = (residual < 1e-6).any(1)
            first = np.where(below, (residual < 1e-6).argmax(1), residual.shape[1])
            monotone = [
                bool((np.diff(r[: max(f, 1) + 1]) <= 0).all())
                for r, f in zip(residual, first, strict=True)
            ]
            print(
                f"  {name:29s} rho {rho:<5g} last: median {np.median(residual[:, -1]):.1e}, "
                f"worst {residual[:, -1].max():.1e}; below 1e-6 for {below.mean():.0%} "
                f"(median after {np.median(first):.0f}), falling all the way for "
                f"{np.mean(monotone):.0%}"
            )
            ax.semilogy(np.median(residual, axis=0), label=f"{name} ({rho:g})")
        ax.set(title=task, xlabel="iteration")
        ax.legend(fontsize=7)
    axes[0].set_ylabel("median residual")
    fig.tight_layout()
    fig.savefig(f"compare_lpn_denoisers_{arguments.data}.png", dpi=120)


if __name__ == "__main__":
    main()
