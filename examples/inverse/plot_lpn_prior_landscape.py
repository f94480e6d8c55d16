r"""
What a learned prior thinks of an image
=======================================

A denoiser that is a proximal operator carries a function R, the prior it has learned from clean
samples, and R can be evaluated. Here a network learns handwritten digits (8 x 8) and is asked
about held-out digits: under growing noise, under growing blur, and on the way from one digit to
another.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from sciml.inverse import LearnedProximalNetwork, LPNPrior, ProximalMatchingSchedule, train_lpn

digits = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:, None]
digits = digits[np.random.default_rng(0).permutation(len(digits))]
train, held_out = digits[:1500], digits[1500:1600]

# %%
# Absolute error first, then proximal matching with gamma falling to 0.08 sqrt(64).

generator = torch.Generator().manual_seed(0)
net = LearnedProximalNetwork(
    1, image_size=8, width=32, beta=10.0, strong_convexity=0.01, generator=generator
)
history = train_lpn(
    net,
    train,
    sigma=0.05,
    schedule=ProximalMatchingSchedule(n_features=64, n_steps=1500),
    batch_size=64,
    validation=held_out,
    random_state=0,
)
for entry in history.validation:
    print(f"step {entry['step']:.0f}: {entry['psnr']:.2f} dB on held-out digits")

# %%
# The prior of 100 digits at once, and how many of them rise at every step.

prior = LPNPrior(net, tol=1e-4)
noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))


def blurred(x, sigma):
    images = [gaussian_filter(image[0].numpy(), sigma) for image in x]
    return torch.tensor(np.array(images))[:, None]


noise_levels, blur_levels = (0, 0.05, 0.1, 0.2, 0.3), (0, 0.75, 1, 2, 4)
by_noise = torch.stack([prior.fn((held_out + s * noise).clamp(0, 1)) for s in noise_levels])
by_blur = torch.stack([prior.fn(blurred(held_out, s) if s else held_out) for s in blur_levels])
for name, values in (("noise", by_noise), ("blur", by_blur)):
    rising = (values.diff(dim=0) > 0).all(0).float().mean()
    print(f"R rises with every level of {name} for {rising:.0%} of the digits")
slight = prior.fn(blurred(held_out, 0.5)) > by_blur[0]
print(f"a blur of half a pixel, which these coarse digits hardly show: {slight.float().mean():.0%}")

# %%
# Between two digits the prior climbs a hill: it is not convex.

t = torch.linspace(0, 1, 11)
others = held_out.flip(0)
path = torch.stack([prior.fn((1 - s) * held_out + s * others) for s in t])
chord = (1 - t)[:, None] * path[0] + t[:, None] * path[-1]
above = (path[1:-1] > chord[1:-1]).any(0).float().mean()
print(f"R lies above the chord between two digits, somewhere, for {above:.0%} of the pairs")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
panels = [
    (axes[0], noise_levels, by_noise, "noise level"),
    (axes[1], blur_levels, by_blur, "blur in pixels"),
    (axes[2], t, path, "from one digit to another"),
]
for ax, levels, values, label in panels:
    ax.plot(levels, values - values[0], color="C0", alpha=0.08)
    ax.plot(levels, (values - values[0]).mean(1), "k", lw=2)
    ax.set(xlabel=label)
axes[0].set_ylabel("R(x) - R(clean)")
figure.tight_layout()
figure.savefig("lpn_prior_landscape.png")
plt.show()
