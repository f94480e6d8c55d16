"""Training of all layers at once equals loops written by hand from the definition."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.datasets import KarateClub
from torch_geometric.transforms import RandomLinkSplit

from sciml.graphs import ForwardGNNClassifier, ForwardGNNLinkPredictor

STEPS = 6
SETTINGS = {
    "num_layers": 3,
    "hidden_channels": 8,
    "lr": 0.02,
    "patience": None,
    "random_state": 0,
}


def ln(x):
    return x / (x.norm(dim=1, keepdim=True) + 1e-8)


def untrained(estimator, *data):
    """Return the network of an estimator before training, and its convolutions."""
    network = estimator.set_params(max_epochs=0).fit(*data).network_
    estimator.set_params(max_epochs=STEPS)
    return network, [copy.deepcopy(stage.conv) for stage in network.stages]


def adams(convs, weight_decay):
    return [torch.optim.Adam(c.parameters(), lr=0.02, weight_decay=weight_decay) for c in convs]


def groups(layers, alternating):
    return [layers[::2], layers[1::2]] if alternating else [layers]


def graph_with_classes():
    data = KarateClub()[0]
    return data, data.train_mask.nonzero()[:, 0]


@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_top_to_loss_equals_a_loop(grad_clip):
    data, train = graph_with_classes()
    est = ForwardGNNClassifier(method="sf_top_to_loss", grad_clip=grad_clip, **SETTINGS)
    network, convs = untrained(est, data)
    est.fit(data)
    x, graph = network.augment(data.x, data.edge_index)
    edges, y, n = graph.edge_index, data.y[train], 34
    optimizers = adams(convs, 5e-4)

    def bottom_up():
        h, states = x, [ln(x)]
        with torch.no_grad():
            for conv in convs:
                h = conv(h, edges).relu()
                states.append(ln(h))
        return states

    def logits(output, states, j):
        mean = torch.stack([output, *states[j + 2 :]]).mean(0)
        return mean[:n] @ mean[n:].T

    states, losses = bottom_up(), []
    for _ in range(STEPS):
        new, total = [states[0]], 0.0
        for j, (conv, optimizer) in enumerate(zip(convs, optimizers, strict=True)):
            output = conv(states[j], edges).relu()
            loss = nn.functional.cross_entropy(logits(output, states, j)[train], y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(conv.parameters(), 1.0 if grad_clip is None else grad_clip)
            optimizer.step()
            new.append(ln(output.detach()))
            total += loss.item() / len(convs)
        states = new
        losses.append(total)
    states = bottom_up()
    with torch.no_grad():
        wanted = torch.stack(
            [
                logits(conv(states[j], edges).relu(), states, j).softmax(1)
                for j, conv in enumerate(convs)
            ]
        )
    np.testing.assert_allclose(est.layer_proba_, wanted, atol=1e-5)
    np.testing.assert_allclose([e["loss"] for e in est.history_[0]], losses, rtol=1e-5)


@pytest.mark.parametrize("alternating", [True, False])
def test_top_to_input_equals_a_loop(alternating):
    data, train = graph_with_classes()
    est = ForwardGNNClassifier(method="sf_top_to_input", alternating=alternating, **SETTINGS)
    network, convs = untrained(est, data)
    est.fit(data)
    x, graph = network.augment(data.x, data.edge_index)
    edges, y, n = graph.edge_index, data.y[train], 34
    optimizers = adams(convs, 5e-4)
    shown = torch.full((38, 4), 0.25)
    shown[train], shown[n:] = torch.eye(4)[y], torch.eye(4)

    def output(states, j):
        return convs[j](torch.cat([ln(states[j]), ln(states[j + 2])], 1), edges).relu()

    def bottom_up():
        states = [x]
        with torch.no_grad():
            for j, conv in enumerate(convs):
                above = torch.zeros(38, 4 if j == 2 else 8)
                states.append(conv(torch.cat([ln(states[j]), above], 1), edges).relu())
        return [*states, shown]

    def logits(z):
        return z[:n] @ z[n:].T

    states, losses = bottom_up(), []
    for _ in range(STEPS):
        total = 0.0
        for group in groups([0, 1, 2], alternating):
            new = {}
            for j in group:
                z = output(states, j)
                loss = nn.functional.cross_entropy(logits(z)[train], y)
                optimizers[j].zero_grad()
                loss.backward()
                optimizers[j].step()
                new[j + 1] = z.detach()
                total += loss.item() / 3
            for j, z in new.items():
                states[j] = z
        losses.append(total)
    states, wanted = bottom_up(), 0.0
    with torch.no_grad():
        for step in range(10):
            found = [None] * 3
            for group in groups([0, 1, 2], alternating):
                new = {j + 1: output(states, j) for j in group}
                for j, z in new.items():
                    states[j], found[j - 1] = z, logits(z).softmax(1)
            if step >= 2:
                wanted = wanted + torch.stack(found) / 8
    np.testing.assert_allclose(est.layer_proba_, wanted, atol=1e-5)
    np.testing.assert_allclose([e["loss"] for e in est.history_[0]], losses, rtol=1e-5)


@pytest.mark.parametrize("alternating", [True, False])
@pytest.mark.parametrize("objective", ["ce", "ff"])
def test_top_down_links_equal_a_loop(objective, alternating):
    random.seed(0)
    torch.manual_seed(0)
    split = RandomLinkSplit(is_undirected=True, num_val=0.1, num_test=0.1)
    data = split(KarateClub()[0])[0]
    est = ForwardGNNLinkPredictor(
        objective=objective, top_down=True, alternating=alternating, **SETTINGS
    )
    _, convs = untrained(est, data)
    est.fit(data)
    edges, (u, v), linked = data.edge_index, data.edge_label_index, data.edge_label
    optimizers = adams(convs, 0.0)  # no weight decay in this variant
    bce = nn.functional.binary_cross_entropy_with_logits

    def scores(z):
        product = z[u] * z[v]
        return product.sum(1) if objective == "ce" else product.square().sum(1) - 2.0

    def local_loss(z):
        s = scores(z)
        if objective == "ce":
            return bce(s, linked)
        kinds = [(s[linked == k], k) for k in (1, 0)]
        return sum(bce(part, torch.full_like(part, k)) for part, k in kinds)

    def output(states, j):
        above = [] if j == 2 else [ln(states[j + 2])]
        return convs[j](torch.cat([ln(states[j]), *above], 1), edges).relu()

    def bottom_up():
        states = [data.x]
        with torch.no_grad():
            for j, conv in enumerate(convs):
                above = [] if j == 2 else [torch.zeros(34, 8)]
                states.append(conv(torch.cat([ln(states[j]), *above], 1), edges).relu())
        return states

    states = bottom_up()
    for _ in range(STEPS):
        for group in groups([0, 1, 2], alternating):
            new = {}
            for j in group:
                z = output(states, j)
                optimizers[j].zero_grad()
                local_loss(z).backward()
                optimizers[j].step()
                new[j + 1] = z.detach()
            for j, z in new.items():
                states[j] = z
    states, wanted = bottom_up(), 0.0
    with torch.no_grad():
        for step in range(10):
            for group in groups([0, 1, 2], alternating):
                new = {j + 1: output(states, j) for j in group}
                for j, z in new.items():
                    states[j] = z
            if step >= 2:
                wanted = wanted + sum(scores(z).sigmoid() for z in states[1:]) / 24
    got = est.decision_function(data, data.edge_label_index)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
