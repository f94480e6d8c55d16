r"""
Deblurring with a guarantee of convergence
==========================================

Plug-and-play solvers put a denoiser where an optimiser has the proximal operator of a prior. If
the denoiser *is* a proximal operator the iteration provably converges, once three numbers are in
range. Here a learned proximal network deblurs digits with deepinv's ADMM, next to a DnCNN trained
on the same data for the same number of steps, total variation and Tikhonov regularisation.
"""

import deepinv
import matplotlib.pyplot as plt
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

# Of the noise to train on, a range because the solver starts far from the images, and of the
# measurements.
low, high, noise = 0.05, 0.4, 0.1
digits = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:, None]
digits = digits[np.random.default_rng(0).permutation(len(digits))]
train, test = digits[:1500], digits[1500:1532]

# %%
# Two denoisers of about 45 000 parameters.

lpn = LearnedProximalNetwork(
    1,
    image_size=8,
    width=32,
    beta=10.0,
    strong_convexity=0.01,
    generator=torch.Generator().manual_seed(0),
)
schedule = ProximalMatchingSchedule(n_features=64, n_steps=1500, learning_rate=(1e-3, 3e-4))
train_lpn(lpn, train, sigma=(low, high), schedule=schedule, batch_size=64, random_state=0)

torch.manual_seed(0)
dncnn = deepinv.models.DnCNN(1, 1, depth=7, nf=32, pretrained=None)
optimizer = torch.optim.Adam(dncnn.parameters(), lr=1e-3)
for _ in range(1500):
    x = train[torch.randint(len(train), (64,))]
    level = low + (high - low) * torch.rand(())
    loss = (dncnn(x + level * torch.randn_like(x)) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# Blurred and noisy digits, and the certificate: rho must exceed the norm of the blur. That would
# fix the weight of the prior as well, and too high for this noise; ``weight`` takes it down again
# by the proximal operator of a fraction of the prior, which keeps the guarantee.

kernel = gaussian_blur(sigma=(1.0, 1.0), dtype=torch.float64)
physics = deepinv.physics.BlurFFT((1, 8, 8), filter=kernel)
lpn, dncnn, truth = lpn.double(), dncnn.double().eval(), test.double()
generator = torch.Generator().manual_seed(1)
clean = physics.A(truth)
y = clean + noise * torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
rho = 1.02
print(convergence_certificate(physics, lpn, rho))

# %%
# Reconstruct with all four, each at the best of a few weights.


def psnr(x):
    return float((-10 * torch.log10((x - truth).square().flatten(1).mean(1))).mean())


def total_variation(weight):
    solver = PGD(
        data_fidelity=L2(),
        prior=TVPrior(n_it_max=50),
        stepsize=0.95,
        lambda_reg=weight,
        max_iter=40,
    )
    return solver(y, physics)


def plug_and_play(net, rho, weight):
    return pnp_admm(y, physics, net, rho=rho, weight=weight, max_iter=200, solver_tol=1e-9)


with torch.no_grad():
    runs = {
        "DnCNN": [plug_and_play(dncnn, rho=r, weight=1.0) for r in (0.2, 0.5, rho)],
        "LPN": [plug_and_play(lpn, rho=rho, weight=w) for w in (0.2, 0.3)],
    }
    best = {name: max(tried, key=lambda run: psnr(run[0])) for name, tried in runs.items()}
    reconstructions = {
        "blurred": y,
        "Tikhonov": max((physics.prox_l2(0.0, y, gamma=g) for g in (3, 10, 30)), key=psnr),
        "total variation": max(map(total_variation, (0.01, 0.03, 0.1)), key=psnr),
        **{name: x for name, (x, _) in best.items()},
    }
    residuals = {name: np.array(metrics["residual"]) for name, (_, metrics) in best.items()}
for name, x in reconstructions.items():
    print(f"{name:16s} {psnr(x):6.2f} dB")
for name, residual in residuals.items():
    print(
        f"{name}: residual after 199 steps, median {np.median(residual[:, -1]):.1e}, worst "
        f"{residual[:, -1].max():.1e}; falling at every step for "
        f"{np.mean((np.diff(residual, axis=1) <= 0).all(1)):.0%} of the digits"
    )

# %%
# One row a method, and the residuals of the two plug-and-play runs.

figure = plt.figure(figsize=(10, 5))
left, right = figure.subfigures(1, 2)
rows = {"truth": truth, **reconstructions}
axes = left.subplots(len(rows), 6)
for row, (name, images) in zip(axes, rows.items(), strict=True):
    for ax, image in zip(row, images, strict=False):
        ax.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        ax.set_axis_off()
    row[0].text(-0.3, 0.5, name, ha="right", va="center", transform=row[0].transAxes, fontsize=8)
left.subplots_adjust(left=0.25, right=0.98, top=0.98, bottom=0.02, hspace=0.1, wspace=0.1)
ax = right.subplots()
for name, residual in residuals.items():
    ax.semilogy(np.median(residual, axis=0), label=name)
ax.set(xlabel="iteration", ylabel="median relative change of x")
ax.legend()
figure.savefig("lpn_deblurring.png")
plt.show()
