"""Node classification on Cora and Cora_ML: every method of ForwardGNN against backpropagation.

    python benchmarks/graphs/bench_citation.py --data-home FOLDER [--methods backprop sf ...]

FOLDER holds `planetoid/` and `citation_full/` as PyG's datasets read them. Protocol of the paper:
five folds for testing, a fifth of the rest for validation (64/16/20 %), GCN, two layers of width
128, Adam 1e-3, weight decay 5e-4, evaluation every second epoch, patience 100 evaluations.
"""

import argparse
import itertools
import time

import numpy as np
import torch
from sklearn.model_selection import KFold, train_test_split
from torch_geometric.datasets import CitationFull, Planetoid
from torch_geometric.nn import GCN
from torch_geometric.transforms import NormalizeFeatures

from sciml.graphs import ForwardGNNClassifier, SmoothFeatures


def masks(n_nodes, run):
    """Masks of the published splits: 64 % training, 16 % validation, 20 % test."""
    folds = list(KFold(5, shuffle=True, random_state=101).split(np.arange(n_nodes)))
    rest, test = folds[run]
    train, val = train_test_split(rest, test_size=0.2, random_state=127 * run)
    out = torch.zeros(3, n_nodes, dtype=torch.bool)
    for mask, ids in zip(out, (train, val, test), strict=True):
        mask[ids] = True
    return out


def backprop(data, train, val, test, layers=2, seed=0, max_epochs=1000, patience=100):
    """Train PyG's GCN end to end with the same optimiser and stopping rule."""
    torch.manual_seed(seed)
    model = GCN(data.num_features, 128, layers, int(data.y.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-4)
    best, best_test, waited = -1.0, 0.0, 0
    for epoch in range(1, max_epochs + 1):
        model.train()
        optimizer.zero_grad()
        logits = model(data.x, data.edge_index)
        torch.nn.functional.cross_entropy(logits[train], data.y[train]).backward()
        optimizer.step()
        if epoch % 2 == 0:
            model.eval()
            with torch.no_grad():
                right = model(data.x, data.edge_index).argmax(1) == data.y
            score = right[val].float().mean().item()
            if score > best:
                best, best_test, waited = score, right[test].float().mean().item(), 0
            else:
                waited += 1
                if waited >= patience:
                    break
    return best_test


def load(home, name, split="public"):
    transform = NormalizeFeatures()
    if name == "Cora_ML":
        return CitationFull(f"{home}/citation_full", "Cora_ML", transform=transform)[0]
    return Planetoid(f"{home}/planetoid", name, split=split, transform=transform)[0]


if __name__ == "__main__":
    methods = ["backprop", "sf", "sf_top_to_loss", "sf_top_to_input", "ff_label", "ff_virtual"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-home", required=True)
    parser.add_argument("--data", nargs="+", default=["Cora", "Cora-public", "Cora_ML"])
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--model", default="GCN", help="for the methods of ForwardGNN")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="seeds a run")
    parser.add_argument("--smooth", type=int, default=0, help="average features so many times")
    args = parser.parse_args()
    for name in args.data:
        data = SmoothFeatures(args.smooth)(load(args.data_home, name.partition("-")[0]))
        for method in args.methods:
            tests, firsts, start = [], [], time.perf_counter()
            for run, repeat in itertools.product(range(args.runs), range(args.repeats)):
                seed = 10100 + 3 * run + 1000 * repeat
                if name.endswith("-public"):
                    train, val, test = data.train_mask, data.val_mask, data.test_mask
                else:
                    train, val, test = masks(data.num_nodes, run)
                if method == "backprop":
                    tests.append(backprop(data, train, val, test, seed=seed))
                    continue
                model = ForwardGNNClassifier(args.model, method=method, random_state=seed)
                model.fit(data, train_mask=train, val_mask=val)
                tests.append(model.score(data, mask=test))
                first = model.layer_proba_[0].argmax(1) == data.y.numpy()
                firsts.append(first[test.numpy()].mean())
            seconds = (time.perf_counter() - start) / len(tests)
            listed = " ".join(f"{100 * t:.2f}" for t in tests)
            one = f"  layer 1 alone {100 * np.mean(firsts):.2f}" if firsts else ""
            print(
                f"{name:12s} {method:16s} {listed}  mean {100 * np.mean(tests):.2f}{one}"
                f"  {seconds:.1f} s a run",
                flush=True,
            )
