"""What is kept for the backward pass does not grow with depth; with backpropagation it does."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch_geometric.data import Data
from torch_geometric.nn import GCN
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

from sciml.graphs import ForwardGNNClassifier
from sciml.layerwise import BackwardMemoryMonitor


def digits_graph(n=300):
    x, y = load_digits(return_X_y=True)
    edges = to_undirected(from_scipy_sparse_matrix(kneighbors_graph(x[:n], 5))[0])
    x = torch.as_tensor(x[:n] / 16, dtype=torch.float32)
    train = torch.arange(n) % 2 == 0
    return Data(x=x, edge_index=edges, y=torch.as_tensor(y[:n]), train_mask=train)


@pytest.mark.parametrize("model", ["GCN", "GraphSAGE", "GAT"])
def test_saved_bytes_are_flat_in_depth(model):
    data, depths, ours, theirs = digits_graph(), [2, 4, 8, 16], [], []
    for depth in depths:
        with BackwardMemoryMonitor() as saved:
            ForwardGNNClassifier(
                model, num_layers=depth, max_epochs=2, patience=None, random_state=0
            ).fit(data)
        ours.append(saved.peak_bytes)
        gcn = GCN(64, 128, depth, 10)
        with BackwardMemoryMonitor() as saved:
            loss = torch.nn.functional.cross_entropy(gcn(data.x, data.edge_index), data.y)
            loss.backward()
        theirs.append(saved.peak_bytes)
    assert min(ours) > 0
    assert max(ours) <= 1.01 * min(ours)
    per_layer = np.diff(theirs) / np.diff(depths)
    np.testing.assert_allclose(per_layer, per_layer[0], rtol=0.05)
    assert per_layer[0] >= 4 * len(data.x) * 128
