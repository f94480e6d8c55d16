"""One estimator of each domain on real data, against its baseline, in one table.

Every data set ships with scikit-learn. Figures and `tour.json` are written to `tour/`.
"""

import json
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

mpl.use("agg")
import matplotlib.pyplot as plt

OUT = Path("tour")
DIGITS = load_digits()


def save(figure, name):
    figure.tight_layout()
    figure.savefig(OUT / f"{name}.png", dpi=120)
    plt.close(figure)


def row(method, data, metric, ours, baseline, baseline_name):
    return {
        "method": method,
        "data": data,
        "metric": metric,
        "ours": float(ours),
        "baseline": float(baseline),
        "baseline_name": baseline_name,
    }


def certified_kernel_machine():
    """The SVM of an infinitely wide network proves more robustness than kernel regression."""
    from sciml.kernels import NTK, KernelMachineClassifier, certified_radius

    X, y = DIGITS.data[DIGITS.target < 2] / 16, DIGITS.target[DIGITS.target < 2]
    parts = train_test_split(X, y, test_size=100, random_state=0, stratify=y)
    X_train, X_test, y_train, y_test = parts
    radii = {}
    for name, loss, C in (("SVM", "hinge", 1 / 0.064), ("kernel regression", "squared", np.inf)):
        machine = KernelMachineClassifier(NTK(depth=1), loss=loss, C=C).fit(X_train, y_train)
        radii[name] = certified_radius(machine, X_test, y_test)
    figure, ax = plt.subplots(figsize=(5, 3))
    for name, radius in radii.items():
        ax.step(np.sort(radius), 1 - np.arange(len(radius)) / len(radius), label=name)
    ax.set(xlabel="pixel change eps", ylabel="share proved right for all changes up to eps")
    ax.set_title("Certified accuracy, digits 0 against 1")
    ax.legend()
    save(figure, "certified_kernel_machine")
    ours, baseline = (r.mean() for r in radii.values())
    return row(
        "Certified NTK machine",
        "digits 0/1",
        "mean certified radius",
        ours,
        baseline,
        "kernel regression",
    )


def leverage_nystroem():
    """Kernel features from landmarks chosen by leverage, against uniformly drawn ones."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.kernel_approximation import Nystroem
    from sklearn.preprocessing import StandardScaler

    from sciml.kernels import RidgeLeverageNystroem, pairwise_kernel

    # Tumours vary along a few directions, and some are like no other: uniform landmarks miss them.
    X = StandardScaler().fit_transform(load_breast_cancer().data)
    gamma = 0.01
    K = pairwise_kernel(X, gamma=gamma)
    sizes, ours, theirs = [], [], []
    for budget in (3, 5, 10):
        found = []
        for seed in range(3):
            model = RidgeLeverageNystroem(gamma=gamma, ridge=0.1, budget=budget, random_state=seed)
            model.fit(X)
            m = len(model.component_indices_)
            peer = Nystroem(gamma=gamma, n_components=m, random_state=seed).fit(X)
            features = (model.transform(X), peer.transform(X))
            found.append((m, *(np.linalg.norm(K - Z @ Z.T, 2) for Z in features)))
        m, error, peer_error = np.median(found, axis=0)
        sizes.append(int(m))
        ours.append(error)
        theirs.append(peer_error)
    figure, ax = plt.subplots(figsize=(5, 3))
    ax.plot(sizes, ours, "o-", label="ridge leverage")
    ax.plot(sizes, theirs, "o-", label="uniform")
    ax.set(xlabel="landmarks", ylabel="spectral error", yscale="log", title="Breast cancer data")
    ax.legend()
    save(figure, "leverage_nystroem")
    return row(
        f"Ridge-leverage Nyström, m={sizes[-1]}",
        "breast cancer",
        "spectral error",
        ours[-1],
        theirs[-1],
        "uniform Nystroem",
    )


def mono_forward():
    """Layers that each learn alone, against backpropagation through the same network."""
    from sciml.layerwise import BackpropClassifier, MonoForwardClassifier

    X_train, X_test, y_train, y_test = train_test_split(
        DIGITS.data / 16, DIGITS.target, test_size=0.25, random_state=0, stratify=DIGITS.target
    )
    ours = MonoForwardClassifier((256, 256), random_state=0, max_iter=30).fit(X_train, y_train)
    twin = BackpropClassifier((256, 256), random_state=0, max_iter=30).fit(X_train, y_train)
    figure, ax = plt.subplots(figsize=(5, 3))
    scores = [ours.score(X_test, y_test), twin.score(X_test, y_test)]
    ax.barh(["Mono-Forward", "backpropagation"], scores, color=["C0", "C1"])
    ax.set(xlim=(0.9, 1), xlabel="test accuracy", title="Digits, two layers of 256")
    save(figure, "mono_forward")
    return row("Mono-Forward", "digits", "test accuracy", *scores, "backpropagation")


def forward_gnn():
    """A GCN trained layer by layer, against the same GCN trained end to end."""
    from sklearn.neighbors import kneighbors_graph
    from torch_geometric.data import Data
    from torch_geometric.nn import GCN
    from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

    from sciml.graphs import ForwardGNNClassifier

    X = DIGITS.data / 16
    edges = from_scipy_sparse_matrix(kneighbors_graph(X, 8))[0]
    x, y = torch.tensor(X, dtype=torch.float32), torch.tensor(DIGITS.target)
    data = Data(x=x, y=y, edge_index=to_undirected(edges))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, val, test = (torch.zeros(len(y), dtype=torch.bool) for _ in range(3))
    train[order[:1150]], val[order[1150:1437]], test[order[1437:]] = True, True, True

    ours = ForwardGNNClassifier("GCN", max_epochs=300, patience=30, random_state=0)
    ours.fit(data, train_mask=train, val_mask=val)
    accuracy = ours.score(data, mask=test)

    torch.manual_seed(0)
    twin = GCN(64, 128, 2, 10)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, weight_decay=5e-4)
    best, baseline = 0.0, 0.0
    for _ in range(300):
        optimizer.zero_grad()
        logits = twin(data.x, data.edge_index)
        torch.nn.functional.cross_entropy(logits[train], y[train]).backward()
        optimizer.step()
        right = (logits.argmax(1) == y).float()
        if right[val].mean() > best:
            best, baseline = float(right[val].mean()), float(right[test].mean())
    figure, ax = plt.subplots(figsize=(5, 3))
    layers = [
        (ours.layer_proba_[: k + 1].mean(0).argmax(1) == DIGITS.target)[test.numpy()].mean()
        for k in range(2)
    ]
    ax.plot([1, 2], layers, "o-", label="ForwardGNN, layers up to here")
    ax.axhline(baseline, color="C1", label="backpropagation")
    ax.set(xticks=[1, 2], xlabel="layer", ylabel="test accuracy", title="kNN graph of digits")
    ax.legend()
    save(figure, "forward_gnn")
    return row("ForwardGNN", "digits, kNN graph", "test accuracy", accuracy, baseline, "GCN, BP")


def learned_proximal_network():
    """Deblur digits with a learned prior, against Tikhonov's."""
    import deepinv

    from sciml.inverse import LPNDenoiser, pnp_admm

    images = (DIGITS.images[:, None] / 16).astype(np.float32)
    clean = torch.tensor(images[-50:])
    lpn = LPNDenoiser(sigma=0.1, width=16, n_steps=1200, batch_size=64, random_state=0)
    net = lpn.fit(images[:-50]).network_
    physics = deepinv.physics.Blur(
        deepinv.physics.functional.gaussian_blur(sigma=(0.7, 0.7)), padding="circular"
    )
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    y = physics.A(clean) + 0.05 * noise

    def psnr(x):
        return float((-10 * (x - clean).square().mean((1, 2, 3)).log10()).mean())

    ours, _ = pnp_admm(y, physics, net, rho=0.6, max_iter=60)
    tikhonov = max(
        (physics.prox_l2(torch.zeros_like(clean), y, gamma) for gamma in (1, 3, 10, 30, 100, 300)),
        key=psnr,
    )
    figure, axes = plt.subplots(4, 6, figsize=(6, 4))
    rows = {"clean": clean, "blurred": y, "Tikhonov": tikhonov, "LPN": ours}
    for line, (name, batch) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, batch, strict=False):
            ax.imshow(image[0].detach(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    save(figure, "learned_proximal_network")
    return row(
        "Learned proximal network",
        "digits, deblurring",
        "PSNR (dB)",
        psnr(ours),
        psnr(tikhonov),
        "Tikhonov, best of 6",
    )


def progressive_self_distillation():
    """A network that learns from its own last epoch, against plain cross-entropy."""
    from sciml.lm import PSKDClassifier, negative_log_likelihood

    X_train, X_test, y_train, y_test = train_test_split(
        (DIGITS.data / 16).astype(np.float32), DIGITS.target, train_size=500, random_state=0
    )
    rng = np.random.default_rng(0)
    y_train[rng.choice(500, 100, replace=False)] = rng.integers(10, size=100)
    weights, losses = (0.0, 0.4, 0.8), []
    for alpha_T in weights:  # the weight of the past; 0 is cross-entropy
        model = PSKDClassifier(alpha_T=alpha_T, random_state=0).fit(X_train, y_train)
        losses.append(negative_log_likelihood(y_test, model.predict_proba(X_test)))
    figure, ax = plt.subplots(figsize=(5, 3))
    ax.plot(weights, losses, "o-")
    ax.set(xlabel="weight of its own predictions", ylabel="test negative log-likelihood")
    ax.set_title("Digits, a fifth of the labels drawn at random")
    save(figure, "progressive_self_distillation")
    return row(
        "PS-KD",
        "digits, wrong labels",
        "test NLL",
        losses[-1],
        losses[0],
        "cross-entropy",
    )


TOUR = [
    certified_kernel_machine,
    leverage_nystroem,
    mono_forward,
    forward_gnn,
    learned_proximal_network,
    progressive_self_distillation,
]


def main():
    OUT.mkdir(exist_ok=True)
    results = []
    with tqdm(TOUR, unit="method") as progress:
        for example in progress:
            progress.set_description(example.__name__.replace("_", " "))
            start = time.perf_counter()
            result = example()
            result["seconds"] = round(time.perf_counter() - start, 1)
            results.append(result)
    (OUT / "tour.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    header = ("method", "data", "metric", "ours", "baseline", "seconds")
    cells = [header]
    for r in results:
        values = (f"{r['ours']:.4g}", f"{r['baseline']:.4g} ({r['baseline_name']})")
        cells.append((r["method"], r["data"], r["metric"], *values, f"{r['seconds']:.0f}"))
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    print()
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\nFigures and tour.json are in {OUT.resolve()}")


if __name__ == "__main__":
    main()
