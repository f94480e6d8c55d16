"""
Learn from your own last epoch: PS-KD
=====================================

A network trained on one-hot labels is too sure of itself, the more so when labels are wrong.
Progressive self-distillation (arXiv:2006.12000) mixes into each sample's target what the network
itself predicted for it in the epoch before, a little in the first epoch and mostly in the last.

500 of the 8x8 digits of scikit-learn, a fifth of them with a random label; the others test.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from sciml.lm import (
    ProgressiveSelfKDLoss,
    PSKDClassifier,
    aurc,
    expected_calibration_error,
    negative_log_likelihood,
)

torch.set_num_threads(1)
X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    (X / 16).astype(np.float32), y, train_size=500, stratify=y, random_state=0
)
rng = np.random.default_rng(0)
wrong = rng.choice(500, 100, replace=False)
y_train[wrong] = rng.integers(10, size=100)

# %%
# In a loop of your own
# ---------------------
# The loss needs to know which samples a batch holds, and which epoch it is. The rest of the loop is
# that of cross entropy, with or without label smoothing.
X_tensor, y_tensor = torch.from_numpy(X_train), torch.from_numpy(y_train)
n_epochs = 60


def train(method, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 45])
    progressive = ProgressiveSelfKDLoss(len(X_train), 10, n_epochs)
    for epoch in range(n_epochs):
        progressive.set_epoch(epoch)
        for index in torch.randperm(len(X_train)).split(64):
            logits = network(X_tensor[index])
            if method == "PS-KD":
                loss = progressive(logits, y_tensor[index], index)
            else:
                smoothing = 0.1 if method == "label smoothing" else 0.0
                loss = nn.functional.cross_entropy(
                    logits, y_tensor[index], label_smoothing=smoothing
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network(torch.from_numpy(X_test)).softmax(1).detach().numpy()


probabilities = {
    method: [train(method, seed) for seed in range(3)]
    for method in ("cross entropy", "label smoothing", "PS-KD")
}
print(f"{'':16} error %    NLL   ECE %  AURC x1000   (mean of three seeds)")
for method, results in probabilities.items():
    scores = [
        (
            100 * (p.argmax(1) != y_test).mean(),
            negative_log_likelihood(y_test, p),
            100 * expected_calibration_error(y_test, p),
            1000 * aurc(y_test, p),
        )
        for p in results
    ]
    error, nll, ece, area = np.mean(scores, axis=0)
    print(f"{method:16} {error:7.2f} {nll:6.3f} {ece:7.2f} {area:11.1f}")

# %%
# As a scikit-learn estimator
# ---------------------------
# The same with weight decay and Nesterov momentum, over any torch module.
model = PSKDClassifier(max_iter=n_epochs, batch_size=64, random_state=0).fit(X_train, y_train)
print(f"PSKDClassifier: error {100 * (1 - model.score(X_test, y_test)):.2f} %")

# %%
# How sure, how right
# -------------------
fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
edges = np.linspace(0, 1, 11)
for ax, (method, results) in zip(axes, probabilities.items(), strict=True):
    p, truth = np.concatenate(results), np.tile(y_test, len(results))
    bins = np.digitize(p.max(1), edges[1:-1], right=True)
    hit = p.argmax(1) == truth
    accuracy = [hit[bins == k].mean() if (bins == k).any() else np.nan for k in range(10)]
    ax.bar(edges[:-1], accuracy, width=0.1, align="edge", edgecolor="w")
    ax.plot([0, 1], [0, 1], "k:")
    ax.set(title=method, xlabel="confidence")
axes[0].set_ylabel("accuracy")
fig.savefig("pskd_reliability.png")
plt.show()
