"""
Memory of a deep graph network, layer by layer
==============================================

Backpropagation keeps the activations of all layers until the backward pass. When every layer has a
loss of its own and reads a detached input, only one layer's activations are ever kept. This example
counts the bytes that autograd really holds, for 2 to 16 layers, on a graph of handwritten digits:
each image is a node, linked to its nearest neighbours.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch_geometric.data import Data
from torch_geometric.nn import GCN
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

from sciml.graphs import ForwardGNNClassifier
from sciml.layerwise import BackwardMemoryMonitor

images, labels = load_digits(return_X_y=True)
edge_index, _ = from_scipy_sparse_matrix(kneighbors_graph(images, 8))
data = Data(
    x=torch.as_tensor(images / 16, dtype=torch.float32),
    edge_index=to_undirected(edge_index),
    y=torch.as_tensor(labels),
)
data.train_mask = torch.arange(data.num_nodes) % 2 == 0

# %%
# The monitor counts what autograd saves in a forward pass, for as long as it is kept.


def backpropagation(depth, epochs=3):
    model = GCN(data.num_features, 128, depth, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        optimizer.zero_grad()
        logits = model(data.x, data.edge_index)
        torch.nn.functional.cross_entropy(
            logits[data.train_mask], data.y[data.train_mask]
        ).backward()
        optimizer.step()


def local_losses(depth, epochs=3):
    ForwardGNNClassifier(
        "GCN", num_layers=depth, max_epochs=epochs, patience=None, random_state=0
    ).fit(data)


depths = [2, 4, 8, 16]
mebibytes = {}
for train in (backpropagation, local_losses):
    for depth in depths:
        with BackwardMemoryMonitor() as saved:
            train(depth)
        mebibytes[train.__name__, depth] = saved.peak_bytes / 2**20
        print(
            f"{train.__name__:16s} {depth:2d} layers: {mebibytes[train.__name__, depth]:6.2f} MiB"
        )

# %%
# Backpropagation grows by the same amount with every layer; local losses stay where they are.

flat = mebibytes["local_losses", 16] / mebibytes["local_losses", 2]
grown = mebibytes["backpropagation", 16] / mebibytes["backpropagation", 2]
print(f"from 2 to 16 layers: local losses x {flat:.3f}, backpropagation x {grown:.1f}")

fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for name, label in (("backpropagation", "backpropagation"), ("local_losses", "ForwardGNN (SF)")):
    ax.plot(depths, [mebibytes[name, depth] for depth in depths], "o-", label=label)
ax.set(xlabel="layers", ylabel="kept for the backward pass (MiB)", xticks=depths, ylim=0)
ax.set_title("GCN of width 128 on 1,797 digits")
ax.legend()
if __name__ == "__main__":
    fig.savefig("forward_gnn_memory.png", dpi=150)
plt.show()
