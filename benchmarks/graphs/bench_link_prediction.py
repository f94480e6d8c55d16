"""Link prediction on Cora_ML: local losses against backpropagation, ROC-AUC.

python benchmarks/graphs/bench_link_prediction.py --data-home FOLDER [--layers 4] [--runs 3]
"""

import argparse
import random

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch_geometric.datasets import CitationFull
from torch_geometric.nn import GCN
from torch_geometric.transforms import NormalizeFeatures, RandomLinkSplit

from sciml.graphs import ForwardGNNLinkPredictor


def backprop(train, val, test, layers, seed, max_epochs, patience=100):
    """Train PyG's GCN end to end: dot products of its last layer, same optimiser and stopping."""
    torch.manual_seed(seed)
    model = GCN(train.num_features, 128, layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-4)

    def score(data):
        z = model(data.x, data.edge_index)
        return (z[data.edge_label_index[0]] * z[data.edge_label_index[1]]).sum(1)

    best, best_test, waited = -1.0, 0.0, 0
    for epoch in range(1, max_epochs + 1):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score(train), train.edge_label)
        loss.backward()
        optimizer.step()
        if epoch % 2 == 0:
            with torch.no_grad():
                auc = roc_auc_score(val.edge_label, score(val))
                if auc > best:
                    best, waited = auc, 0
                    best_test = roc_auc_score(test.edge_label, score(test))
                else:
                    waited += 1
            if waited >= patience:
                break
    return best_test


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-home", required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=["ce", "backprop", "ff", "ce_top_down"])
    args = parser.parse_args()
    data = CitationFull(
        f"{args.data_home}/citation_full", "Cora_ML", transform=NormalizeFeatures()
    )[0]
    split = RandomLinkSplit(is_undirected=True, num_val=0.16, num_test=0.2, neg_sampling_ratio=1.0)
    for method in args.methods:
        aucs = []
        for run in range(args.runs):
            torch.manual_seed(101 * run)
            random.seed(101 * run)
            train, val, test = split(data)
            if method == "backprop":
                aucs.append(backprop(train, val, test, args.layers, run, args.max_epochs))
                continue
            model = ForwardGNNLinkPredictor(
                objective=method[:2],
                top_down=method.endswith("top_down"),
                num_layers=args.layers,
                max_epochs=args.max_epochs,
                random_state=run,
            )
            aucs.append(model.fit(train, val).score(test))
        listed = " ".join(f"{100 * a:.2f}" for a in aucs)
        print(
            f"Cora_ML, {args.layers} layers, {method:12s} {listed}  mean {100 * np.mean(aucs):.2f}",
            flush=True,
        )
