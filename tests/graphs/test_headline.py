"""Layer by layer is as accurate as backpropagation, on a graph that a package ships."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch_geometric.data import Data
from torch_geometric.nn import GCN
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

from sciml.graphs import ForwardGNNClassifier


def digits_graph(seed):
    x, y = load_digits(return_X_y=True)
    edges = to_undirected(from_scipy_sparse_matrix(kneighbors_graph(x, 5))[0])
    x = torch.as_tensor(x / x.sum(1, keepdims=True), dtype=torch.float32)
    part = torch.rand(len(x), generator=torch.Generator().manual_seed(seed))
    return Data(
        x=x,
        edge_index=edges,
        y=torch.as_tensor(y),
        train_mask=part < 0.64,
        val_mask=(part >= 0.64) & (part < 0.8),
        test_mask=part >= 0.8,
    )


def backprop(data, seed, max_epochs=500, patience=50):
    torch.manual_seed(seed)
    gcn = GCN(64, 128, 2, 10)
    optimizer = torch.optim.Adam(gcn.parameters(), lr=1e-3, weight_decay=5e-4)
    best, test, waited = -1.0, 0.0, 0
    for epoch in range(1, max_epochs + 1):
        optimizer.zero_grad()
        out = gcn(data.x, data.edge_index)
        torch.nn.functional.cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
        if epoch % 2 == 0:
            with torch.no_grad():
                right = (gcn(data.x, data.edge_index).argmax(1) == data.y).float()
            if (score := right[data.val_mask].mean().item()) > best:
                best, test, waited = score, right[data.test_mask].mean().item(), 0
            else:
                waited += 1
                if waited == patience:
                    break
    return test


@pytest.mark.slow
def test_single_forward_ties_backpropagation_on_the_digits_graph():
    ours, theirs = [], []
    for seed in range(3):
        data = digits_graph(seed)
        model = ForwardGNNClassifier(max_epochs=500, patience=50, random_state=seed).fit(data)
        ours.append(model.score(data))
        theirs.append(backprop(data, seed))
    assert np.mean(ours) > 0.95
    assert np.mean(ours) > np.mean(theirs) - 0.015
