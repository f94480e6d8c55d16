r"""
A denoiser that is the proximal operator of the prior
=====================================================

Samples follow the Laplace law :math:`p(x) \propto e^{-|x|}` and are seen through Gaussian noise
of variance 1. The proximal operator of :math:`-\log p` is then the soft threshold. A network
trained with squared error learns the posterior mean instead, one trained with absolute error
the posterior median. Only proximal matching, whose minimiser is the most probable clean value,
finds the soft threshold, and with it the prior itself.
"""

import copy

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softshrink

from sciml.inverse import FullyConnectedLPN, LPNPrior, ProximalMatchingSchedule, train_lpn


def laplace(n, generator):
    """Fresh samples, by inverting the distribution function."""
    u = torch.rand(n, 1, generator=generator) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def train(net, *stages):
    """Stages are (loss, steps, learning rate); a number for the loss is gamma."""
    schedule = ProximalMatchingSchedule.from_stages(stages)
    train_lpn(net, laplace, sigma=1.0, schedule=schedule, batch_size=1000, random_state=0)
    return net


# %%
# The published network of 10 502 parameters, trained with each loss. Proximal matching starts
# from the network trained with absolute error and narrows its well step by step. (The paper
# takes 20 000 steps a loss; these are enough to see the difference.)

start = FullyConnectedLPN(
    1, hidden=50, n_layers=4, strong_convexity=0.005, generator=torch.Generator().manual_seed(0)
)
squared = train(copy.deepcopy(start), ("l2", 800, 1e-3), ("l2", 300, 1e-4))
absolute = train(copy.deepcopy(start), ("l1", 800, 1e-3), ("l1", 300, 1e-4))
matched = train(
    copy.deepcopy(absolute),
    (0.5, 800, 1e-3),
    (0.5, 300, 1e-4),
    (0.4, 800, 1e-4),
    (0.3, 1200, 1e-4),
    (0.3, 300, 2e-5),
)

# %%
# How far is each from the soft threshold?

y = torch.linspace(-3, 3, 601)[:, None]
networks = {"squared error": squared, "absolute error": absolute, "proximal matching": matched}
errors = {}
for name, net in networks.items():
    difference = (net(y) - softshrink(y, 1.0)).abs()
    errors[name] = float(difference.mean())
    print(f"{name:18s} mean error {errors[name]:.3f}, largest {float(difference.max()):.3f}")
for name in ("squared error", "absolute error"):
    print(f"proximal matching / {name}: {errors['proximal matching'] / errors[name]:.2f}")

# %%
# Because every one of them is the proximal operator of *some* function R, that function can be
# evaluated by inverting the network. Only the one trained by proximal matching has found the
# absolute value.

x = torch.linspace(-2, 2, 201)[:, None]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
axes[0].plot(y, softshrink(y, 1.0), "k", label="soft threshold")
axes[1].plot(x, x.abs(), "k", label="|x|")
for name, net in networks.items():
    axes[0].plot(y, net(y), "--", label=name)
    prior = LPNPrior(net, tol=1e-4).fn(x)
    axes[1].plot(x, prior - prior.min(), "--", label=name)
axes[0].set(xlabel="y", ylabel="f(y)", title="network")
axes[1].set(xlabel="x", ylabel="R(x)", title="function it is the proximal operator of")
axes[0].legend()
figure.tight_layout()
figure.savefig("laplace_prox.png")
plt.show()
