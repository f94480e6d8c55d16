"""Deblurring and compressed sensing: learned proximal network, DnCNN, BM3D, TV and Tikhonov.

Trains a learned proximal network (LPN), and for the same CPU time on the same data a DnCNN of
equal size, then reconstructs held-out images with both as plug-and-play priors in the same
ADMM, and with BM3D (deepinv's, if its requirement ptwt is there; digits are too small for it),
total variation and Tikhonov regularisation. Every method's weight is tuned on images apart from
the test images. The LPN appears twice: as in the paper, with any rho, and certified, where rho
exceeds the norm of the operator and the weight of the prior is tuned instead. Last, the
fixed-point residuals ||x - z|| / ||x|| of 500 iterations in float64 are compared (figure).

    python benchmarks/inverse/compare_lpn_denoisers.py digits
    python benchmarks/inverse/compare_lpn_denoisers.py natural
    python benchmarks/inverse/compare_lpn_denoisers.py natural --steps 16000 --beta 100
"""

import argparse
import copy
import importlib.util
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
    LPNPrior,
    ProximalMatchingSchedule,
    convergence_certificate,
    pnp_admm,
    train_lpn,
)

RHO = 1.02  # both operators have norm 1


def digit_images():
    """Digits of scikit-learn, 8 x 8: training, tuning and test images."""
    X = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:, None]
    X = X[np.random.default_rng(0).permutation(len(X))]
    return X[:1500], X[1500:1532], X[1532:1596]


def natural_images():
    """Patches of 24 x 24 of photographs in scikit-image, halved in size; two are held out."""
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
                i, j = (rng.integers(0, side - 23) for side in gray.shape)
                out.append(gray[i : i + 24, j : j + 24])
        tensor = torch.tensor(np.array(out), dtype=torch.float32)[:, None]
        return tensor[torch.as_tensor(rng.permutation(len(tensor)))]

    names = ["astronaut", "coffee", "chelsea", "rocket", "moon", "coins", "brick", "gravel"]
    train = patches(names, 600, 0)
    train = torch.cat([train, train.flip(-1)])
    return train, patches(["stereo_motorcycle"], 16, 1), patches(["camera"], 32, 2)


def lpn_schedule(n_features, steps):
    """Published gammas, with learning rates for a run of minutes instead of 40 000 steps."""
    gamma = 0.08 * n_features**0.5
    tenth = steps // 10
    return ProximalMatchingSchedule.from_stages(
        [
            ("l1", steps - 6 * tenth, 3e-3),
            (8 * gamma, tenth, 3e-3),
            (4 * gamma, tenth, 1.5e-3),
            (2 * gamma, 2 * tenth, 1e-3),
            (gamma, tenth, 3e-4),
            (gamma, tenth, 1e-4),
        ]
    )


def train_dncnn(net, train, sigma, seconds, batch_size):
    """Adam on squared error, for a given CPU time; the last quarter at a tenth of the rate."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    start, steps = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if spent < 0.75 * seconds else 1e-4
        x = train[torch.randint(len(train), (batch_size,), generator=generator)]
        level = sigma[0] + (sigma[1] - sigma[0]) * torch.rand((), generator=generator)
        noisy = x + level * torch.randn(x.shape, generator=generator)
        loss = (net(noisy, level) - x).square().mean()
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


def measure(physics, x, noise, seed):
    y = physics.A(x)
    return y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))


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


def plug_and_play(net, rho, weight=1.0, max_iter=60):
    return lambda y, physics: pnp_admm(y, physics, net, rho, weight=weight, max_iter=max_iter)[0]


class BM3D(torch.nn.Module):
    """BM3D at one noise level, as ADMM's denoiser."""

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma
        self.bm3d = deepinv.models.BM3D(use_legacy=False)

    def forward(self, x, sigma=None):
        return self.bm3d(x, self.sigma)


def fixed_point_residuals(y, physics, prox, rho, max_iter=500):
    """||x - z|| / ||x|| of `pnp_admm`'s recursion, (images, iterations).

    This is by how much the iteration, as a map of z - u, moves its argument.
    """
    z = physics.A_adjoint(y)
    u = torch.zeros_like(z)
    out = []
    for _ in range(max_iter):
        x = physics.prox_l2(z - u, y, gamma=1 / rho)
        u = u + x - z
        z = prox(x + u)
        out.append((x - z).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1))
    return torch.stack(out, 1).numpy()


def describe(residual):
    """How many images come below 1e-6, after how long, and how many fall all the way."""
    below = (residual < 1e-6).any(1)
    first = np.where(below, (residual < 1e-6).argmax(1), residual.shape[1] - 1)
    falling = [(np.diff(r[: f + 1]) <= 0).all() for r, f in zip(residual, first, strict=True)]
    return (
        f"last: median {np.median(residual[:, -1]):.0e}, worst {residual[:, -1].max():.0e}; below "
        f"1e-6 for {below.mean():.0%}, median after {np.median(first):.0f}; falling at every "
        f"step for {np.mean(falling):.0%}, both for {np.mean(below & falling):.0%}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=["digits", "natural"])
    parser.add_argument("--steps", type=int, default=None, help="training steps of the LPN")
    parser.add_argument("--beta", type=float, default=10.0, help="sharpness of its softplus")
    arguments = parser.parse_args()
    digits = arguments.data == "digits"
    train, tune, test = digit_images() if digits else natural_images()
    side, batch_size = train.shape[-1], 64 if digits else 32
    steps = arguments.steps or (30000 if digits else 6000)
    # Noise that both denoisers are trained on. Compressed sensing starts far from the images,
    # where a network that has seen one small noise level has learned nothing.
    sigma = (0.05, 0.4)
    noise = 0.1 if digits else 0.05  # of the measurements

    lpn = LearnedProximalNetwork(
        1,
        side,
        width=32,
        n_downsamples=1 if digits else 2,
        beta=arguments.beta,
        strong_convexity=0.01,
        generator=torch.Generator().manual_seed(0),
    )
    torch.manual_seed(0)
    dncnn = deepinv.models.DnCNN(
        1, 1, depth=7 if digits else 6, nf=32 if digits else 52, pretrained=None
    )
    wall, cpu = time.perf_counter(), time.process_time()
    schedule = lpn_schedule(side * side, steps)
    train_lpn(lpn, train, sigma=sigma, schedule=schedule, batch_size=batch_size, random_state=0)
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    print(f"LPN trained in {wall:.0f} s wall clock, {cpu:.0f} s CPU", flush=True)
    dncnn_steps = train_dncnn(dncnn, train, sigma, cpu, batch_size)
    dncnn.eval()
    for name, net in (("LPN", lpn), ("DnCNN", dncnn)):
        noisy = test + 0.1 * torch.randn(test.shape, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            denoised = net(noisy, 0.1)
        size = sum(p.numel() for p in net.parameters())
        taken = steps if net is lpn else dncnn_steps
        print(
            f"{name}: {size} parameters, {taken} steps, {cpu:.0f} s CPU; denoising at 0.1: "
            f"{psnr(noisy, test):.2f} -> {psnr(denoised, test):.2f} dB"
        )
    print(flush=True)

    tasks = operators(side, torch.float32)
    any_rho = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, RHO)
    weights = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    methods = {
        "Tikhonov": (tikhonov, (0.01, 0.03, 0.1, 0.3)),
        "TV": (total_variation, (0.003, 0.01, 0.02, 0.05, 0.1)),
        "DnCNN, any rho": (lambda rho: plug_and_play(dncnn, rho), any_rho),
        "LPN, any rho": (lambda rho: plug_and_play(lpn, rho), any_rho),
        "LPN, certified": (lambda weight: plug_and_play(lpn, RHO, weight, 150), weights),
    }
    if not digits and importlib.util.find_spec("ptwt"):
        # A fifth of a second an image: few tuning images, iterations and weights.
        methods["BM3D"] = (lambda level: plug_and_play(BM3D(level), 0.2, max_iter=8), (0.05, 0.1))
    chosen = {}
    for task, physics in tasks.items():
        print(f"{task}, noise {noise}, {len(test)} test images; weights tuned on {len(tune)}")
        y_tune, y_test = measure(physics, tune, noise, 3), measure(physics, test, noise, 4)
        for name, (make, weights) in methods.items():
            n_tune = 4 if name == "BM3D" else len(tune)
            with torch.no_grad():
                scores = [psnr(make(w)(y_tune[:n_tune], physics), tune[:n_tune]) for w in weights]
                best = weights[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]
                score = psnr(make(best)(y_test, physics), test)
            chosen[task, name] = best
            print(f"  {name:15s} weight {best:<6g} PSNR {score:6.2f} dB", flush=True)
        print(" ", convergence_certificate(physics, lpn, RHO), "\n", flush=True)

    # Fixed-point residuals in float64, where rounding does not hide convergence.
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    lpn, dncnn = copy.deepcopy(lpn).double(), copy.deepcopy(dncnn).double()
    prior = LPNPrior(lpn, tol=1e-9)
    for ax, (task, physics) in zip(axes, tasks.items(), strict=True):
        y = measure(physics, test[:16], noise, 4).double()
        physics = operators(side, torch.float64)[task]
        physics.set_ls_solver("CG", max_iter=20, tol=1e-12)
        weight, rho = chosen[task, "LPN, certified"], chosen[task, "DnCNN, any rho"]

        class Certified:
            """Proximal operator of weight R, each inversion starting where the last one ended."""

            start = None

            def __call__(self, v, weight=weight):
                z = prior.prox(v, gamma=weight, init=self.start)
                self.start = (v - (1 - weight) * z) / weight
                return z

        runs = {
            f"LPN, certified, weight {weight:g}": (Certified(), RHO),
            f"LPN, rho {chosen[task, 'LPN, any rho']:g}": (lpn, chosen[task, "LPN, any rho"]),
            f"DnCNN, rho {rho:g}": (dncnn, rho),
            f"DnCNN, rho {RHO:g}": (dncnn, RHO),
        }
        print(f"{task}: fixed-point residual, 500 iterations, {len(y)} images")
        for name, (prox, rho) in runs.items():
            with torch.no_grad():
                residual = fixed_point_residuals(y, physics, prox, rho)
            print(f"  {name:28s} {describe(residual)}", flush=True)
            ax.semilogy(np.median(residual, axis=0), label=name)
        ax.axhline(1e-6, color="0.7", lw=0.8)
        ax.set(title=task, xlabel="iteration")
        ax.legend(fontsize=7)
    axes[0].set_ylabel("median of ||x - z|| / ||x||")
    fig.tight_layout()
    fig.savefig(f"compare_lpn_denoisers_{arguments.data}.png", dpi=120)


if __name__ == "__main__":
    main()
