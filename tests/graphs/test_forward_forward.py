"""Forward-Forward training equals loops written by hand from the definition."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.datasets import KarateClub

from sciml.graphs import ForwardGNNClassifier

EPOCHS, THETA = 5, 1.5


@pytest.mark.parametrize("method", ["ff_label", "ff_virtual"])
def test_training_and_prediction_equal_a_loop(method):
    data = KarateClub()[0]
    train = data.train_mask.nonzero()[:, 0]
    y, n = data.y[train], 34
    wrong = torch.stack([(y + shift) % 4 for shift in (1, 3)])
    est = ForwardGNNClassifier(
        method=method, theta=THETA, wrong_labels=wrong, hidden_channels=[8, 6], lr=0.02,
        patience=None, max_epochs=0, random_state=0,
    ).fit(data)  # fmt: skip
    network = est.network_
    convs = [copy.deepcopy(stage.conv) for stage in network.stages]
    est.set_params(max_epochs=EPOCHS).fit(data)

    def shown(nodes, labels):
        """Features and edges of a graph in which nodes are shown labels."""
        if method == "ff_label":
            columns = torch.full((n, 4), 0.25)
            columns[nodes] = torch.eye(4)[labels]
            return torch.cat([data.x, columns], 1), data.edge_index
        new = torch.stack([nodes, n + labels])
        edges = torch.cat([data.edge_index, new, new.flip(0)], 1)
        return torch.cat([data.x, network.x_class]), edges

    def run(conv, h, edges):
        return conv(h / (h.norm(dim=1, keepdim=True) + 1e-8), edges).relu()

    def loss(z, target):
        g = z[train].square().sum(1) - THETA
        wanted = torch.full_like(g, target)
        return nn.functional.binary_cross_entropy_with_logits(g, wanted)

    graphs = [shown(train, labels) for labels in (y, *wrong)]
    inputs, edges = [h for h, _ in graphs], [e for _, e in graphs]
    for conv in convs:
        optimizer = torch.optim.Adam(conv.parameters(), lr=0.02, weight_decay=5e-4)
        for _ in range(EPOCHS):
            z = [run(conv, h, e) for h, e in zip(inputs, edges, strict=True)]
            optimizer.zero_grad()
            (loss(z[0], 1.0) + (loss(z[1], 0.0) + loss(z[2], 0.0)) / 2).backward()
            optimizer.step()
        with torch.no_grad():
            out = [run(conv, h, e) for h, e in zip(inputs, edges, strict=True)]
        # The negative graphs of class nodes differ by edges alone: features are the positive ones.
        inputs = out if method == "ff_label" else [out[0]] * 3
    everyone = torch.cat([train, (~data.train_mask).nonzero()[:, 0]])
    scores = torch.zeros(n, 4)
    with torch.no_grad():
        for c in range(4):
            h, e = shown(everyone, torch.cat([y, torch.full((n - len(y),), c)]))
            for conv in convs:
                h = run(conv, h, e)
                scores[:, c] += h[:n].square().mean(1)
    asked = ~data.train_mask.numpy()
    got = est.predict_proba()
    np.testing.assert_allclose(got[asked], scores.softmax(1)[asked], atol=1e-5)
    np.testing.assert_array_equal(got[~asked], np.eye(4)[y])
