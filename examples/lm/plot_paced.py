"""
Distil where the student sometimes succeeds
===========================================

Problems that the student never solves can do harm: their gradients are large and lead nowhere.
PACED weighs every problem by ``p (1 - p)`` of the student's pass rate p. The note's experiment in
small: a pool of images of digits of which two thirds carry targets that nothing explains.
"""

# %%
# A pool with intractable problems
# --------------------------------
# The student has seen 110 images, mostly of the digits 0 to 4. On 400 images of the pool the
# teacher is a trained network; on 800 others it gives probability 0.9 to a random class, which is
# also what the checker accepts.
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from sciml.lm import (
    adaptive_kl,
    beta_kernel_weights,
    gradient_snr,
    hard_filter_weights,
    paced_loss,
    plot_gradient_snr,
    token_kl,
)

N_ROLLOUTS, STEPS, N_SEEDS = 8, 300, 8
X, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
X = (X / 16).float()


def network(hidden):
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def fit(model, images, labels, n_steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(n_steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_problem(seed):
    """Student, pool with targets and keys, and test set."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    order = torch.from_numpy(rng.permutation(len(X)))
    train, test = order[:1200], order[1200:]
    known, new = train[y[train] < 5], train[y[train] >= 5]
    few = torch.cat([known[:80], new[:30]])
    student, teacher = network(32), network(256)
    fit(student, X[few], y[few], 100)
    fit(teacher, X[train], y[train], 300)
    pool = train[torch.from_numpy(rng.permutation(1200))]
    random_class = torch.from_numpy(rng.integers(10, size=800))
    with torch.no_grad():
        targets = teacher(X[pool])
        targets[400:] = 4.4 * nn.functional.one_hot(random_class, 10).float()
    return student, X[pool], targets, targets.argmax(1), X[test], y[test]


def pass_rates(student, images, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        p = student(images).softmax(-1)
    drawn = torch.multinomial(p, N_ROLLOUTS, replacement=True, generator=generator)
    return (drawn == keys[:, None]).double().mean(1)


# %%
# Five recipes, the same 300 updates
# ----------------------------------
# Adaptive KL leaves the weights alone and leans to reverse KL where the teacher's tail is missed,
# which is another way not to be dragged along by targets that the student finds absurd.
def distil(student, images, targets, weights, divergence, seed):
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        batch = torch.from_numpy(rng.integers(len(images), size=64))
        logits = student(images[batch])[:, None]
        loss = paced_loss(logits, targets[batch, None], weights[batch], divergence=divergence)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model, images, labels):
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double()
    return [100 * float(part.mean()) for part in (right, right[labels < 5], right[labels >= 5])]


methods = {
    "uniform": (torch.ones_like, token_kl),
    "adaptive KL": (torch.ones_like, adaptive_kl),
    "hard filter": (hard_filter_weights, token_kl),
    "PACED": (beta_kernel_weights, token_kl),
    "both": (beta_kernel_weights, adaptive_kl),
}
results = {name: [] for name in ("base", *methods)}
for seed in range(N_SEEDS):
    base, images, targets, keys, test_images, test_labels = make_problem(seed)
    rates = pass_rates(base, images, keys, seed)
    results["base"].append(accuracy(base, test_images, test_labels))
    for name, (weigh, divergence) in methods.items():
        student = network(32)
        student.load_state_dict(base.state_dict())
        distil(student, images, targets, weigh(rates), divergence, seed)
        results[name].append(accuracy(student, test_images, test_labels))
print("test accuracy %       all      known        new")
for name, rows in results.items():
    mean, deviation = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
    cells = "  ".join(f"{m:5.1f} ±{d:4.1f}" for m, d in zip(mean, deviation, strict=True))
    print(f"{name:>12}   {cells}")

# %%
# Where the signal is
# -------------------
# Gradients of single problems, grouped by pass rate: do they agree with each other?
base, images, targets, keys, *_ = make_problem(0)
rates = pass_rates(base, images, keys, 0)
parameters = dict(base.named_parameters())


def problem_loss(parameters, image, target):
    logits = torch.func.functional_call(base, parameters, image[None])
    p = target.softmax(-1)
    return (p * (target.log_softmax(-1) - logits.log_softmax(-1)[0])).sum()


per_problem = torch.func.vmap(torch.func.grad(problem_loss), in_dims=(None, 0, 0))
gradients = torch.cat([g.flatten(1) for g in per_problem(parameters, images, targets).values()], 1)
fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plot_gradient_snr(gradient_snr(gradients.detach(), rates), ax=axes[0])
axes[0].set_title("agreement of gradients in the pool")
names = list(results)
for offset, column in enumerate(("all", "known digits", "new digits")):
    mean = [np.mean(results[name], axis=0)[offset] for name in names]
    axes[1].bar(np.arange(len(names)) + 0.27 * (offset - 1), mean, 0.25, label=column)
axes[1].set_xticks(range(len(names)), names)
axes[1].set(ylim=(60, 100), ylabel="test accuracy %", title=f"mean of {N_SEEDS} seeds")
axes[1].legend()
fig.savefig("paced.png")
plt.show()
