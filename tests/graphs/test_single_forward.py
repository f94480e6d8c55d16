"""Single-forward training equals a loop written by hand from the definition, stopping included."""

import copy

import numpy as np
import torch
from torch import nn
from torch_geometric.datasets import KarateClub

from sciml.graphs import ForwardGNNClassifier


def test_training_equals_a_loop_with_early_stopping():
    data = KarateClub()[0]
    data.val_mask = (torch.arange(34) % 3 == 1) & ~data.train_mask
    settings = {"num_layers": 2, "hidden_channels": 8, "lr": 0.02, "patience": 4, "val_every": 2}
    est = ForwardGNNClassifier(max_epochs=0, random_state=0, **settings).fit(data)
    network = est.network_
    convs = [copy.deepcopy(stage.conv) for stage in network.stages]
    est.set_params(max_epochs=60).fit(data)
    x, graph = network.augment(data.x, data.edge_index)
    train, val, n = data.train_mask, data.val_mask, 34

    def run(conv, h):
        return conv(h / (h.norm(dim=1, keepdim=True) + 1e-8), graph.edge_index).relu()

    frozen, h, epochs = torch.zeros(n, 4), x, []
    for conv in convs:
        optimizer = torch.optim.Adam(conv.parameters(), lr=0.02, weight_decay=5e-4)
        best, waited = -1.0, 0
        for epoch in range(1, 61):
            z = run(conv, h)
            loss = nn.functional.cross_entropy((z[:n] @ z[n:].T)[train], data.y[train])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch % 2:
                continue
            with torch.no_grad():
                z = run(conv, h)
                proba = frozen + (z[:n] @ z[n:].T).softmax(1)
            score = float((proba.argmax(1) == data.y)[val].double().mean())
            if score > best:
                best, waited, state = score, 0, copy.deepcopy(conv.state_dict())
            else:
                waited += 1
                if waited == 4:
                    break
        epochs.append(epoch)
        conv.load_state_dict(state)
        with torch.no_grad():
            h = run(conv, h)
            frozen += (h[:n] @ h[n:].T).softmax(1)
    assert est.n_iter_ == epochs
    assert min(epochs) < 60  # the rule was at work
    np.testing.assert_allclose(est.predict_proba(), frozen / 2, atol=1e-5)
