"""
Node classification without backpropagation
===========================================

ForwardGNN trains each layer of a graph network by itself: the graph gets one node per class, linked
to the training nodes of that class, and a layer learns to place training nodes near their class
node. Here it meets the same GCN trained by backpropagation.

With ``--data-home FOLDER`` this runs on Cora (``FOLDER/planetoid``, or downloaded there by PyG).
Without it, nothing is downloaded, and the nodes are handwritten digits, linked to their nearest
neighbours.
"""

import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.nn import GCN
from torch_geometric.transforms import NormalizeFeatures
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

from sciml.graphs import ForwardGNNClassifier

if "--data-home" in sys.argv:
    home = sys.argv[sys.argv.index("--data-home") + 1]
    data = Planetoid(f"{home}/planetoid", "Cora", transform=NormalizeFeatures())[0]
    name = "Cora"
else:
    images, labels = load_digits(return_X_y=True)
    edge_index, _ = from_scipy_sparse_matrix(kneighbors_graph(images, 5))
    data = Data(
        x=torch.as_tensor(images / images.sum(1, keepdims=True), dtype=torch.float32),
        edge_index=to_undirected(edge_index),
        y=torch.as_tensor(labels),
    )
    name = "digits"

# 64 % of the nodes for training, 16 % for validation, 20 % for test.
order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(0))
share = torch.empty(data.num_nodes)
share[order] = torch.arange(data.num_nodes) / data.num_nodes
data.train_mask, data.test_mask = share < 0.64, share >= 0.8
data.val_mask = ~(data.train_mask | data.test_mask)
print(f"{name}: {data}")

# %%
# The estimator takes the graph with its masks, and works like any of scikit-learn's.

start = time.perf_counter()
forward = ForwardGNNClassifier("GCN", num_layers=3, max_epochs=300, patience=25, random_state=0)
forward.fit(data)
seconds = time.perf_counter() - start
print(f"ForwardGNN: test accuracy {forward.score(data):.3f} after {seconds:.1f} s")
print(f"epochs of the three layers: {forward.n_iter_}")

# %%
# The baseline: PyG's GCN, end to end, with the same optimiser and stopping rule.


def fit_backprop(max_epochs=300, patience=25):
    torch.manual_seed(0)
    gcn = GCN(data.num_features, 128, 3, int(data.y.max()) + 1)
    optimizer = torch.optim.Adam(gcn.parameters(), lr=1e-3, weight_decay=5e-4)
    best, test, waited, losses = 0.0, 0.0, 0, []
    for epoch in range(1, max_epochs + 1):
        optimizer.zero_grad()
        logits = gcn(data.x, data.edge_index)
        loss = torch.nn.functional.cross_entropy(logits[data.train_mask], data.y[data.train_mask])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if epoch % 2 == 0:
            with torch.no_grad():
                right = (gcn(data.x, data.edge_index).argmax(1) == data.y).float()
            waited += 1
            if (score := right[data.val_mask].mean().item()) > best:
                best, test, waited = score, right[data.test_mask].mean().item(), 0
            if waited == patience:
                break
    return test, losses


start = time.perf_counter()
test, losses = fit_backprop()
print(f"backpropagation: test accuracy {test:.3f} after {time.perf_counter() - start:.1f} s")

# %%
# Every layer predicts. The curves show the loss of each layer, and the bars what the layers know
# by themselves and together.

test_nodes = data.test_mask.numpy()
truth = data.y.numpy()[test_nodes]
alone = [float(np.mean(p[test_nodes].argmax(1) == truth)) for p in forward.layer_proba_]
together = [
    float(np.mean(forward.layer_proba_[: n + 1].sum(0)[test_nodes].argmax(1) == truth))
    for n in range(3)
]
for n in range(3):
    print(f"layer {n + 1}: alone {alone[n]:.3f}, with those below {together[n]:.3f}")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for n, history in enumerate(forward.history_, 1):
    left.plot(
        [entry["epoch"] for entry in history],
        [entry["loss"] for entry in history],
        label=f"layer {n}",
    )
left.plot(losses, "k--", label="backpropagation")
left.set(xlabel="epoch", ylabel="training loss", yscale="log")
left.legend()
at = np.arange(3)
right.bar(at - 0.2, alone, 0.4, label="layer alone")
right.bar(at + 0.2, together, 0.4, label="with those below")
right.axhline(test, color="k", linestyle="--", label="backpropagation")
right.set(xticks=at, xticklabels=["layer 1", "layer 2", "layer 3"], ylabel="test accuracy")
right.set_ylim(min(alone + [test]) - 0.05, 1)
right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize="small")
fig.suptitle(f"{name}: each layer learns from its own loss")
if __name__ == "__main__":
    fig.savefig("forward_gnn_cora.png", dpi=150)
plt.show()
