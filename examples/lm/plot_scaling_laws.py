"""
Scaling laws for training on little data
========================================

Runs that repeat a small corpus for many epochs do not follow Chinchilla's law, which adds a term
for parameters and a term for data: when data are scarce more parameters hardly help, and the other
way round. `SoftQ` joins the two terms by a soft minimum.

Losses come from a model of learning by *quanta* here: pieces of knowledge used with a power-law
frequency, of which a model holds the most used ones and a corpus teaches those it shows often
enough. The laws see small models and small corpora and predict large ones.
"""

import matplotlib.pyplot as plt
import numpy as np

from sciml.lm import Chinchilla, SoftQ

# %%
# Losses of the quanta model on a grid of parameters N and unique tokens D.


def quanta_loss(X, n_quanta=200_000):
    k = np.arange(1, n_quanta + 1)
    p = k**-1.6
    p /= p.sum()
    kept = k <= X[:, :1] / 4e4
    learned = kept * -np.expm1(-X[:, 1:] * p / 400)
    return 1.7 + 3 * (1 - (learned * p).sum(1))


N, D = np.meshgrid([72e6, 140e6, 257e6, 664e6, 1.4e9], [1e8, 2e8, 3e8, 4e8], indexing="ij")
X = np.column_stack([N.ravel(), D.ravel()])
loss = quanta_loss(X)
seen = (X[:, 0] < 1e9) & (X[:, 1] < 3.5e8)

# %%
# Fit to the runs that were seen, predict the others.
laws = {"Chinchilla": Chinchilla(), "SoftQ": SoftQ()}
for name, law in laws.items():
    law.fit(X[seen], loss[seen])
    error = np.sqrt(np.mean((law.predict(X[~seen]) - loss[~seen]) ** 2))
    print(f"{name:10s} held-out error {error:.4f}, alpha {law.alpha_:.3f}, beta {law.beta_:.3f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, (name, law) in zip(axes, laws.items(), strict=True):
    law.plot(X, loss, ax=ax)
    ax.axvspan(3.5e8, 9e8, color="0.9", zorder=0)
    ax.set(title=f"{name} (grey: not seen)")
figure.tight_layout()
plt.show()

# %%
# What is a method worth in data? Let another method learn as if it had 30 % more of it. Seen from
# the baseline's law its losses need the same factor everywhere.
better = quanta_loss(X * [1, 1.3])
multiplier = SoftQ().fit(X, loss).data_multiplier(X, better)
print("data multiplier, parameters by tokens:")
print(multiplier.reshape(N.shape).round(2))

# %%
# How sure is the fit? Bootstrap intervals, with noise on the losses as of a few seeds.
rng = np.random.default_rng(0)
noisy = loss * np.exp(0.001 * rng.standard_normal(len(loss)))
law = SoftQ().fit(X, noisy)
for name, (low, high) in law.confidence_intervals(X, noisy, n_resamples=50, random_state=0).items():
    print(f"{name:6s} {getattr(law, name + '_'):12.4g}   [{low:.4g}, {high:.4g}]")
