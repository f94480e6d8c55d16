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


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Largest number of bytes that autograd keeps at one moment; a storage counts once."""

    def __init__(self):
        self.users, self.now, self.peak = {}, 0, 0
        super().__init__(self.pack, lambda held: held.tensor)

    def pack(self, tensor):
        return Held(self, tensor)


class Held:
    def __init__(self, counter, tensor):
        self.counter, self.tensor = counter, tensor
        self.key = tensor.untyped_storage().data_ptr()
        self.bytes = tensor.untyped_storage().nbytes()
        if counter.users.setdefault(self.key, 0) == 0:
            counter.now += self.bytes
            counter.peak = max(counter.peak, counter.now)
        counter.users[self.key] += 1

    def __del__(self):
        self.counter.users[self.key] -= 1
        if self.counter.users[self.key] == 0:
            self.counter.now -= self.bytes


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
        saved = SavedBytes()
        with saved:
            ForwardGNNClassifier(
                model, num_layers=depth, max_epochs=2, patience=None, random_state=0
            ).fit(data)
        ours.append(saved.peak)
        gcn = GCN(64, 128, depth, 10)
        saved = SavedBytes()
        with saved:
            loss = torch.nn.functional.cross_entropy(gcn(data.x, data.edge_index), data.y)
            loss.backward()
        theirs.append(saved.peak)
    assert min(ours) > 0
    assert max(ours) <= 1.01 * min(ours)
    per_layer = np.diff(theirs) / np.diff(depths)
    np.testing.assert_allclose(per_layer, per_layer[0], rtol=0.05)
    assert per_layer[0] >= 4 * len(data.x) * 128
