"""ForwardGNN link prediction: losses by their definition, all variants, bad input."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import kneighbors_graph
from torch import nn
from torch_geometric.data import Data
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GCN, GCNConv
from torch_geometric.transforms import RandomLinkSplit
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

from sciml.graphs import ForwardGNNLinkPredictor, ff_loss, unit_rows
from sciml.graphs.link_networks import link_loss, link_scores


def split(data, seed=0):
    torch.manual_seed(seed)
    transform = RandomLinkSplit(is_undirected=True, num_val=0.16, num_test=0.2)
    import random

    random.seed(seed)
    return transform(data)


def quick(**kwargs):
    settings = {"hidden_channels": 8, "max_epochs": 6, "random_state": 0} | kwargs
    return ForwardGNNLinkPredictor(**settings)


VARIANTS = [(objective, top_down) for objective in ("ce", "ff") for top_down in (False, True)]


def test_losses_and_scores_by_their_definition():
    z = torch.randn(6, 3, dtype=torch.float64)
    pairs = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 2]])
    linked = torch.tensor([True, False, True, False])
    dots = torch.stack([z[u] @ z[v] for u, v in pairs.T])
    wanted = nn.functional.binary_cross_entropy_with_logits(dots, linked.double())
    torch.testing.assert_close(link_loss(z, pairs, linked, "ce", 2.0), wanted)
    torch.testing.assert_close(link_scores(z, pairs, "ce", 2.0), dots.sigmoid())
    products = torch.stack([z[u] * z[v] for u, v in pairs.T])
    wanted = ff_loss(products[[0, 2]], 2.0, 1) + ff_loss(products[[1, 3]], 2.0, 0)
    torch.testing.assert_close(link_loss(z, pairs, linked, "ff", 2.0), wanted)
    wanted = (products.square().sum(1) - 2).sigmoid()
    torch.testing.assert_close(link_scores(z, pairs, "ff", 2.0), wanted)
    alone = link_loss(z, pairs[:, :1], linked[:1], "ff", 2.0)
    torch.testing.assert_close(alone, ff_loss(products[:1], 2.0, 1))


@pytest.mark.parametrize("model", ["GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN"])
@pytest.mark.parametrize(("objective", "top_down"), VARIANTS)
def test_every_model_trains(model, objective, top_down):
    train, val, test = split(KarateClub()[0])
    before = copy.deepcopy(train)
    est = quick(model=model, objective=objective, top_down=top_down, num_layers=3)
    est.fit(train, val)
    assert all(torch.equal(before[k], v) for k, v in train.to_dict().items())
    scores = est.decision_function(test, test.edge_label_index)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert est.score(test) == pytest.approx(roc_auc_score(test.edge_label, scores))
    again = quick(model=model, objective=objective, top_down=top_down, num_layers=3)
    np.testing.assert_array_equal(
        scores, again.fit(train, val).decision_function(test, test.edge_label_index)
    )


def test_scores_are_means_over_layers():
    train, val, test = split(KarateClub()[0])
    est = quick(num_layers=2).fit(train, val)
    h, pairs, scores = test.x, test.edge_label_index, []
    for stage in est.stages_:
        h = stage.conv(unit_rows(h), test.edge_index).relu()
        scores.append((h[pairs[0]] * h[pairs[1]]).sum(1).sigmoid())
    wanted = torch.stack(scores).mean(0).detach()
    np.testing.assert_allclose(est.decision_function(test, pairs), wanted, atol=1e-6)
    got = est.export()(test.x, test.edge_index, pairs)
    torch.testing.assert_close(got.detach(), wanted)


@pytest.mark.parametrize(("objective", "top_down"), VARIANTS)
def test_aggregating_once_changes_nothing(objective, top_down):
    train, val, test = split(KarateClub()[0])
    a, b = (
        quick(objective=objective, top_down=top_down, cache_aggregation=cache, num_layers=3)
        .fit(train, val)
        .decision_function(test, test.edge_label_index)
        for cache in (True, False)
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_minibatch_of_all_pairs_is_the_full_batch(tmp_path):
    train, val, test = split(KarateClub()[0])
    a = quick().fit(train, val)
    b = quick(batch_size=10_000, checkpoint_dir=tmp_path).fit(train, val)
    c = quick(batch_size=10_000, resume_from=tmp_path, max_epochs=6).fit(train, val)
    pairs = test.edge_label_index
    wanted = a.decision_function(test, pairs)
    np.testing.assert_allclose(b.decision_function(test, pairs), wanted, atol=1e-5)
    np.testing.assert_array_equal(
        c.decision_function(test, pairs), b.decision_function(test, pairs)
    )
    assert quick(batch_size=16).fit(train, val).score(test) > 0.5


def test_learns_the_links_of_the_digits_graph():
    x = load_digits().data[:400] / 16
    edges = to_undirected(from_scipy_sparse_matrix(kneighbors_graph(x, 5))[0])
    train, val, test = split(Data(x=torch.as_tensor(x, dtype=torch.float32), edge_index=edges))
    est = quick(hidden_channels=64, max_epochs=100, lr=1e-2, patience=10).fit(train, val)
    assert est.score(test) > 0.9
    assert len(est.best_val_) == 2


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"objective": "bce"}, "objective must be one of"),
        ({"top_down": True, "batch_size": 3}, "batch_size must be None"),
        ({"top_down": True, "model": GCN(34, 8, 2)}, "must be a zoo name"),
        ({"model": [GCNConv(3, 8)]}, "layer 1 would read 34 columns"),
        ({"theta": float("inf")}, "theta must be in"),
        ({"eval_burn_in": 10}, "eval_burn_in must be an integer in"),
    ],
)
def test_bad_parameters(parameters, message):
    train, val, _ = split(KarateClub()[0])
    with pytest.raises(ValueError, match=message):
        quick(**parameters).fit(train, val)


def test_bad_data():
    train, val, test = split(KarateClub()[0])
    with pytest.raises(ValueError, match="patience=100 needs validation data"):
        quick().fit(train)
    quick(patience=None).fit(train)
    with pytest.raises(ValueError, match="must have edge_label_index and edge_label"):
        quick().fit(KarateClub()[0], val)
    for label in (torch.ones_like(train.edge_label), train.edge_label * 2):
        changed = train.clone()
        changed.edge_label = label
        with pytest.raises(ValueError, match="edge_label must hold 0 and 1"):
            quick().fit(changed, val)
    est = quick().fit(train, val)
    with pytest.raises(ValueError, match="edge_label_index must be in 0, ..., 33"):
        est.decision_function(test, torch.tensor([[0], [34]]))
    with pytest.raises(ValueError, match="LongTensor"):
        est.decision_function(test, [[0], [1]])
    with pytest.raises(TypeError, match="Data"):
        est.decision_function(test.x, test.edge_label_index)
