"""
A trained network is a kernel machine
=====================================

Train a ReLU network by gradient descent on the objective of a support vector machine, the hinge
loss with an l2-regularised last layer. What does it compute?

* A network of any width is a kernel machine, exactly up to the step size: its kernel is the path
  kernel, the tangent kernel averaged along training.
* A wide network is the machine of the *fixed* NTK, as Chen et al. (NeurIPS 2021, arXiv:2111.06063)
  show. The gap falls as 1 / sqrt(width), as long as the regularisation has not acted, lam t << 1.
* For lam t of order 1 the regulariser has shrunk the last layer's random weights, at every width,
  and with them the part of the tangent kernel that belongs to the layers below. Then the gap to the
  fixed kernel stays, while the gap to the *decaying* kernel closes.
"""

# %%
# Digits 0 against 1.
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

from sciml.kernels import (
    NTKNetwork,
    decaying_ntk_descent,
    kernel_gradient_descent,
    ntk,
    train_ntk_network,
)

data = load_digits(n_class=2)
order = np.random.RandomState(0).permutation(len(data.target))[:360]
X, y = data.data[order] / 16, 2.0 * data.target[order] - 1
X_train, X_test, y_train = X[:260], X[260:], y[:260]
inputs, targets, points = (torch.from_numpy(a).float() for a in (X_train, y_train, X_test))

# %%
# Any width: the path kernel
# --------------------------
# Halving the step halves the gap between the network and ``path_kernel @ y``.
for n_steps in (25, 50, 100):
    generator = torch.Generator().manual_seed(1)
    network = NTKNetwork(64, width=64, generator=generator, dtype=torch.float64)
    training = train_ntk_network(
        network, inputs.double(), targets.double(), lam=1.0, learning_rate=0.5 / n_steps,
        n_steps=n_steps, X_path=points.double(),
    )  # fmt: skip
    gap = (network(points.double()) - training.machine_output).abs().max().item()
    print(f"step {0.5 / n_steps:.3f}: largest gap to the path kernel machine {gap:.5f}")

# %%
# Growing width: the NTK, fixed or decaying
# -----------------------------------------
# Both machines start from 0 and take the same steps as the network.
K, S = ntk(X_train), ntk(X_train, kind="nngp")
K_test, S_test = ntk(X_test, X_train), ntk(X_test, X_train, kind="nngp")
widths, n_steps, seeds = [64, 128, 256, 512, 1024, 2048, 4096], 50, 2
fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for ax, (lam, t) in zip(axes, ((0.01, 0.5), (12.0, 0.1)), strict=True):
    step = t / n_steps
    fixed = K_test @ kernel_gradient_descent(K, y_train, "hinge", lam, step, n_steps)
    machine = decaying_ntk_descent(K, S, y_train, lam=lam, step=step, n_steps=n_steps)
    decaying = S_test @ machine.last + (K_test - S_test) @ machine.hidden
    gaps = np.zeros((len(widths), 2))
    for row, width in zip(gaps, widths, strict=True):
        for seed in range(seeds):
            network = NTKNetwork(64, width, generator=torch.Generator().manual_seed(seed))
            train_ntk_network(
                network, inputs, targets, lam=lam, learning_rate=step, n_steps=n_steps
            )
            f = network(points).detach().numpy()
            row += np.abs(f - fixed).max() / seeds, np.abs(f - decaying).max() / seeds
    print(f"\nlam t = {lam * t:g}, largest output {np.abs(decaying).max():.2f}")
    for width, row in zip(widths, gaps, strict=True):
        print(f"width {width:>5}: sup-gap to fixed NTK {row[0]:.3f}, to decaying NTK {row[1]:.3f}")
    slopes = [np.polyfit(np.log(widths), np.log(gap), 1)[0] for gap in gaps.T]
    print(f"slopes in log width: {slopes[0]:.2f} (fixed), {slopes[1]:.2f} (decaying)")
    ax.loglog(widths, gaps[:, 0], "o-", label=f"fixed NTK: width$^{{{slopes[0]:.2f}}}$")
    ax.loglog(widths, gaps[:, 1], "s--", label=f"decaying NTK: width$^{{{slopes[1]:.2f}}}$")
    ax.set(xlabel="width", title=f"lam t = {lam * t:g}")
    ax.legend()
axes[0].set_ylabel("largest gap between network and machine")
fig.savefig("network_is_kernel_machine.png")
plt.show()
