"""ForwardGNN node classification: the identities of the method, and the estimator's manners."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import kneighbors_graph
from torch import nn
from torch_geometric.data import Data
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GCN, GCNConv, Sequential
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

from sciml.graphs import ForwardGNNClassifier, add_class_nodes, ff_loss, goodness, unit_rows
from sciml.graphs.forward_forward import ForwardForwardTraining
from sciml.graphs.single_forward import SingleForwardGNN, SingleForwardTraining, class_logits
from sciml.graphs.stages import GraphStage

METHODS = ["sf", "sf_top_to_loss", "sf_top_to_input", "ff_label", "ff_virtual"]
ZOO = ["GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN"]


def karate():
    data = KarateClub()[0]
    data.val_mask = torch.zeros(34, dtype=torch.bool)
    data.val_mask[[1, 2, 9, 30]] = True
    data.val_mask &= ~data.train_mask
    data.test_mask = ~(data.train_mask | data.val_mask)
    return data


def digits_graph(n=400):
    """Five nearest neighbours of the images of handwritten digits; a third are labelled."""
    x, y = load_digits(return_X_y=True)
    x, y = x[:n] / 16, y[:n]
    edges = to_undirected(from_scipy_sparse_matrix(kneighbors_graph(x, 5))[0])
    part = np.arange(n) % 6
    masks = {
        name: torch.as_tensor(np.isin(part, parts))
        for name, parts in (("train_mask", (0, 1)), ("val_mask", (2,)), ("test_mask", (3, 4, 5)))
    }
    return Data(
        x=torch.as_tensor(x, dtype=torch.float32), edge_index=edges, y=torch.as_tensor(y), **masks
    )


def quick(model="GCN", **kwargs):
    settings = {"hidden_channels": 8, "max_epochs": 6, "random_state": 0} | kwargs
    return ForwardGNNClassifier(model, **settings)


# Losses and logits


def test_ff_loss_of_zero_embeddings():
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    assert ff_loss(zeros, 2.0, 1).item() == pytest.approx(math.log1p(math.exp(2)))
    assert ff_loss(zeros, 2.0, 1).item() == pytest.approx(2.126928, abs=1e-6)
    assert ff_loss(zeros, 2.0, 0).item() == pytest.approx(0.126928, abs=1e-6)


def test_ff_loss_is_binary_cross_entropy_of_the_sum_of_squares():
    z = torch.randn(7, 4, dtype=torch.float64)
    for target in (0, 1):
        wanted = nn.functional.binary_cross_entropy_with_logits(
            (z**2).sum(1) - 1.5, torch.full((7,), float(target), dtype=torch.float64)
        )
        torch.testing.assert_close(ff_loss(z, 1.5, target), wanted)
    torch.testing.assert_close(goodness(z), (z**2).sum(1))
    with pytest.raises(ValueError, match="target must be 0 or 1, got 2"):
        ff_loss(z, 1.5, 2)
    with pytest.raises(ValueError, match="theta"):
        ff_loss(z, float("nan"), 1)


def test_logits_are_dot_products():
    z, z_class = torch.randn(4, 3), torch.randn(2, 3)
    got = class_logits(z, z_class, temperature=0.5)
    for i in range(4):
        for c in range(2):
            assert got[i, c].item() == pytest.approx(2 * float(z[i] @ z_class[c]), rel=1e-5)


# Single forward


def single_forward(data, layers=2, **kwargs):
    torch.manual_seed(0)
    widths = [data.num_features, *[8] * layers]
    stages = [GraphStage(GCNConv(a, b), [nn.ReLU()]) for a, b in pairwise(widths)]
    train, val = data.train_mask.nonzero()[:, 0], data.val_mask.nonzero()[:, 0]
    x_class = torch.randn(int(data.y.max()) + 1, data.num_features)
    network = SingleForwardGNN(stages, x_class, train, data.y[train])
    graph = (data.x, data.edge_index, None, None)
    return network, SingleForwardTraining(network, *graph, val, data.y[val], **kwargs)


def test_augmented_graph_is_that_of_the_transform():
    data = karate()
    network, training = single_forward(data)
    wanted = add_class_nodes(data, x_class=network.x_class)
    torch.testing.assert_close(training.h, wanted.x)
    torch.testing.assert_close(training.graph.edge_index, wanted.edge_index)
    added = wanted.edge_index[:, data.num_edges :]
    real = added[added < 34]
    assert len(real) == 2 * int(data.train_mask.sum())
    assert data.train_mask[real].all()  # no validation or test node is linked


def test_loss_is_that_of_the_definition_with_all_its_gradients():
    data = karate()
    network, training = single_forward(data)
    training.prepare(0)
    parameters = list(network.stages[0].parameters())
    got = training.loss()
    gradients = torch.autograd.grad(got, parameters)
    augmented = add_class_nodes(data, x_class=network.x_class)
    z = network.stages[0].conv(unit_rows(augmented.x), augmented.edge_index).relu()
    logits = z[:34][data.train_mask] @ z[34:].T
    wanted = nn.functional.cross_entropy(logits, data.y[data.train_mask])
    torch.testing.assert_close(got, wanted)
    for a, b in zip(gradients, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_of_dead_embeddings_is_log_of_the_number_of_classes():
    network, training = single_forward(karate())
    for parameter in network.stages[0].parameters():
        nn.init.zeros_(parameter)
    training.prepare(0)
    assert training.loss().item() == pytest.approx(math.log(4))


def test_a_layer_trains_alone_on_a_detached_input():
    network, training = single_forward(karate())
    training.prepare(0)
    training.freeze()
    before = copy.deepcopy(network.stages[0].state_dict())
    training.prepare(1)
    assert not training.input.x.requires_grad
    training.loss().backward()
    assert all(p.grad is None for p in network.stages[0].parameters())
    torch.optim.Adam(network.stages[1].parameters(), lr=1.0).step()
    for key, value in network.stages[0].state_dict().items():
        assert torch.equal(value, before[key])
    pointers = [{p.data_ptr() for p in stage.parameters()} for stage in network.stages]
    assert not pointers[0] & pointers[1]


@pytest.mark.parametrize("model", ZOO)
def test_deeper_training_leaves_the_first_layer_as_it_was(model):
    data = karate()
    one, two = (quick(model, num_layers=n).fit(data) for n in (1, 2))
    for a, b in zip(one.stages_[0].parameters(), two.stages_[0].parameters(), strict=True):
        # The same draws, as the first layer is initialised first.
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    np.testing.assert_array_equal(one.layer_proba_[0], two.layer_proba_[0])


@pytest.mark.parametrize("model", ["GCN", "GraphSAGE", "GIN"])
@pytest.mark.parametrize("method", METHODS)
def test_aggregating_once_changes_nothing(model, method):
    data = karate()
    a, b = (quick(model, method=method, cache_aggregation=c).fit(data) for c in (True, False))
    np.testing.assert_allclose(a.layer_proba_, b.layer_proba_, atol=2e-6)
    for x, y in zip(a.history_, b.history_, strict=True):
        np.testing.assert_allclose(x[-1]["loss"], y[-1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("model", ZOO)
def test_one_minibatch_of_all_nodes_is_the_full_batch(model):
    data = karate()
    for method in ("sf", "ff_virtual"):
        a = quick(model, method=method).fit(data)
        b = quick(model, method=method, batch_size=1000).fit(data)
        np.testing.assert_allclose(a.layer_proba_, b.layer_proba_, atol=1e-5)


def test_minibatches_learn_as_well():
    data = digits_graph()
    model = quick(hidden_channels=64, max_epochs=100, batch_size=32, lr=5e-3).fit(data)
    assert model.score(data) > 0.9


def test_prediction_of_one_layer_is_its_softmax():
    data = karate()
    model = quick(num_layers=1).fit(data)
    logits = model.network_.layer_logits(data.x, data.edge_index)[0]
    np.testing.assert_allclose(model.predict_proba(), logits.detach().softmax(1), atol=1e-6)
    np.testing.assert_array_equal(model.predict(), logits.argmax(1))


def test_prediction_is_the_mean_of_the_layers_softmaxes():
    data = karate()
    model = quick(num_layers=3).fit(data)
    np.testing.assert_allclose(model.predict_proba(), model.layer_proba_.mean(0), atol=1e-6)


@pytest.mark.parametrize("method", ["sf", "sf_top_to_loss"])
def test_renaming_classes_permutes_the_columns(method):
    data = karate()
    order = torch.tensor([2, 0, 3, 1])
    x_class = torch.randn(4, 34, generator=torch.Generator().manual_seed(1))
    renamed = data.clone()
    renamed.y = order[data.y]
    a = quick(method=method, x_class=x_class, num_layers=3).fit(data)
    b = quick(method=method, x_class=x_class[order.argsort()], num_layers=3).fit(renamed)
    np.testing.assert_allclose(a.predict_proba(), b.predict_proba()[:, order], atol=1e-5)


# All methods


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("method", METHODS)
def test_every_model_trains_and_exports_what_it_predicts(model, method):
    data = karate()
    before = copy.deepcopy(data)
    est = quick(model, method=method).fit(data)
    assert all(torch.equal(before[k], v) for k, v in data.to_dict().items())
    module = est.export()
    proba = module(data.x, data.edge_index).detach().exp().numpy()
    np.testing.assert_allclose(proba, est.predict_proba(), atol=1e-5)
    np.testing.assert_allclose(est.predict_proba().sum(1), 1, rtol=1e-5)
    losses = [entry["loss"] for history in est.history_ for entry in history]
    assert np.isfinite(losses).all()
    assert len(est.stages_) == 2


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_result_and_global_state_is_untouched(method):
    data = karate()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    runs = [
        quick(method=method, model_kwargs={"dropout": 0.5}).fit(data).predict_proba()
        for _ in range(2)
    ]
    torch.testing.assert_close(torch.rand(3), wanted)
    np.testing.assert_array_equal(*runs)
    other = quick(method=method, random_state=1).fit(data).predict_proba()
    assert not np.array_equal(runs[0], other)


def test_sf_learns_the_digits_graph_and_layers_add_up():
    data = digits_graph()
    model = ForwardGNNClassifier(
        hidden_channels=64, lr=1e-2, max_epochs=150, patience=20, random_state=0
    ).fit(data)
    assert model.score(data) > 0.93
    assert model.best_val_[1] >= model.best_val_[0] - 0.05
    assert model.n_iter_ == [len(h) for h in model.history_]


def test_best_state_is_restored():
    data = digits_graph(200)
    model = quick(hidden_channels=16, lr=0.05, max_epochs=60, patience=5, num_layers=1).fit(data)
    scores = [e["val_score"] for e in model.history_[0] if "val_score" in e]
    assert model.best_val_ == [max(scores)]
    assert model.score(mask=data.val_mask) == pytest.approx(max(scores), abs=1e-6)
    assert len(scores) - 1 - scores.index(max(scores)) == 5 or model.n_iter_ == [60]


def test_forward_forward_loss_is_that_of_the_definition():
    data = karate()
    est = quick(method="ff_label", max_epochs=0).fit(data)
    network = est.network_
    train, labels = network.train_nodes, network.train_labels
    wrong = torch.stack([(labels + k) % 4 for k in (1, 2, 3)])
    graph = (data.x, data.edge_index, None, None)
    training = ForwardForwardTraining(
        network, *graph, train[:0], labels[:0], wrong_labels=wrong, theta=2.0
    )
    training.prepare(0)
    losses = []
    for shown in (labels, *wrong):
        columns = torch.full((34, 4), 0.25)
        columns[train] = torch.eye(4)[shown]
        x = unit_rows(torch.cat([data.x, columns], 1))
        g = network.stages[0].conv(x, data.edge_index).relu()[train].square().sum(1)
        target = torch.full_like(g, float(shown is labels))
        losses.append(nn.functional.binary_cross_entropy_with_logits(g - 2.0, target))
    torch.testing.assert_close(training.loss(), losses[0] + sum(losses[1:]) / 3)


def test_top_to_loss_averages_the_states_above():
    data = karate()
    network = quick(method="sf_top_to_loss", num_layers=3, max_epochs=0).fit(data).network_
    states = [torch.randn(38, 8) for _ in range(4)]
    output = torch.randn(38, 8)
    mean = (output + states[2] + states[3]) / 3
    torch.testing.assert_close(network.logits(output, states, 0), mean[:34] @ mean[34:].T)
    torch.testing.assert_close(network.logits(output, states, 2), output[:34] @ output[34:].T)


def test_top_to_input_shows_labels_to_the_top_layer_only():
    data = karate()
    est = quick(method="sf_top_to_input", num_layers=2, max_epochs=0).fit(data)
    assert [s.conv.in_channels for s in est.stages_] == [34 + 8, 8 + 4]
    h, _ = est.network_.augment(data.x, data.edge_index)
    labels = est.network_.fixed_inputs(h)[1]
    train = est.network_.train_nodes
    torch.testing.assert_close(labels[train], torch.eye(4)[data.y[train]])
    torch.testing.assert_close(labels[34:], torch.eye(4))
    torch.testing.assert_close(
        labels[~torch.cat([data.train_mask, torch.ones(4) > 0])].max(), torch.tensor(0.5)
    )


# Models


def test_instances_lists_sequentials_and_callables_agree():
    data = karate()
    torch.manual_seed(0)
    convs = [GCNConv(34, 8), GCNConv(8, 8)]
    gcn = GCN(34, 8, 2)
    gcn.convs = nn.ModuleList(copy.deepcopy(convs))
    steps = [(convs[0], "x, edge_index -> x"), nn.ReLU(), (convs[1], "x, edge_index -> x")]
    made = iter(copy.deepcopy(convs))
    forms = [convs, gcn, Sequential("x, edge_index", steps), lambda i, o: next(made)]
    start = copy.deepcopy(convs[0].state_dict())
    wanted = quick(convs).fit(data).predict_proba()
    for form in forms[1:]:
        np.testing.assert_allclose(quick(form).fit(data).predict_proba(), wanted, atol=1e-6)
    for key, value in convs[0].state_dict().items():
        assert torch.equal(value, start[key])


def test_label_columns_widen_the_layers():
    data = karate()
    for append, widths in ((None, [34, 8]), ("input", [38, 8]), ("all", [38, 12])):
        est = quick(append_label=append).fit(data)
        assert [stage.conv.in_channels for stage in est.stages_] == widths
        proba = est.export()(data.x, data.edge_index).detach().exp().numpy()
        np.testing.assert_allclose(proba, est.predict_proba(), atol=1e-6)


def test_edge_features_and_weights_reach_the_layers():
    data = karate()
    data.edge_attr = torch.rand(data.num_edges, 3)
    est = quick("GAT", model_kwargs={"edge_dim": 3}, class_edge_attr=0.0).fit(data)
    assert est.predict().shape == (34,)
    with pytest.raises(ValueError, match="class_edge_attr is missing"):
        quick("GAT", model_kwargs={"edge_dim": 3}).fit(data)
    weighted = karate()
    weighted.edge_weight = torch.full((data.num_edges,), 3.0)
    a, b = quick().fit(karate()).predict_proba(), quick().fit(weighted).predict_proba()
    assert np.abs(a - b).max() > 1e-5


def test_to_backprop_has_the_logits_of_the_last_layer():
    data = karate()
    est = quick(num_layers=3).fit(data)
    gnn = est.to_backprop()
    assert isinstance(gnn, BasicGNN)
    augmented = add_class_nodes(data, x_class=est.network_.x_class)
    got = gnn(augmented.x, augmented.edge_index)[:34]
    torch.testing.assert_close(got, est.network_.layer_logits(data.x, data.edge_index)[-1])
    nn.functional.cross_entropy(gnn(data.x, data.edge_index), data.y).backward()
    assert all(p.grad is not None for p in gnn.parameters())
    gnn.reset_parameters()
    with pytest.raises(ValueError, match="to_backprop needs layers"):
        quick(method="sf_top_to_input").fit(data).to_backprop()


# Estimator


def test_new_graphs_are_scored_beside_the_fitted_one():
    data = digits_graph(300)
    est = quick(hidden_channels=64, max_epochs=100, lr=1e-2).fit(data)
    copy_of_it = data.clone()
    copy_of_it.x = copy_of_it.x + 1e-4  # not the same graph any more
    accuracy = float((est.predict(copy_of_it) == data.y.numpy()).mean())
    assert accuracy > 0.85
    np.testing.assert_array_equal(est.predict(data.clone()), est.predict())
    with pytest.raises(ValueError, match="data.x must have 64 columns"):
        est.predict(karate())


def test_cross_validation_and_grid_search_by_node_ids():
    data = digits_graph(300)
    ids, y = np.arange(300), data.y.numpy()
    names = np.array(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    )
    est = quick(data=data, hidden_channels=32, max_epochs=60, lr=1e-2)
    assert cross_val_score(est, ids, names[y], cv=3).mean() > 0.85
    search = GridSearchCV(est, {"num_layers": [1, 2]}, cv=2).fit(ids[:, None], y)
    assert search.best_score_ > 0.8
    assert search.best_estimator_.predict(ids[:5]).shape == (5,)


def test_clone_keeps_parameters_and_init_only_stores():
    template = GCN(34, 8, 2)
    est = quick(template, data=karate())
    again = clone(est)
    assert again.get_params().keys() == est.get_params().keys()
    assert again.hidden_channels == 8
    assert again.model is not template
    with pytest.raises(NotFittedError):
        est.predict()


def test_bad_data():
    data = karate()

    def changed(**values):
        out = data.clone()
        for key, value in values.items():
            out[key] = value
        return out

    two_splits = torch.stack([data.train_mask, data.train_mask], 1)
    table = [
        (quick(), ({"train_mask": torch.ones(5, dtype=torch.bool)}), "train_mask must have shape"),
        (quick(), {"train_mask": torch.zeros(34, dtype=torch.bool)}, "at least one node"),
        (quick(), {"train_mask": two_splits}, "choose a split column"),
        (quick(), {"val_mask": data.train_mask}, "must not overlap train_mask"),
        (quick(), {"train_mask": torch.arange(34)}, "must be a boolean mask"),
        (quick(), {"edge_index": torch.tensor([[0], [34]])}, "edge_index must be in 0, ..., 33"),
        (quick(), {"edge_index": torch.tensor([[0], [-1]])}, "edge_index must be in 0, ..., 33"),
        (quick(), {"x": torch.full((34, 2), float("nan"))}, "x must be finite"),
        (quick(), {"x": torch.ones(34, 2, dtype=torch.long)}, "floating-point dtype"),
        (quick(), {"y": torch.full((34,), -1)}, "must be a class >= 0 at all nodes of train_mask"),
        (quick(), {"y": torch.full((34,), -2)}, "unlabelled"),
        (quick(), {"y": torch.ones(34)}, "integer classes"),
        (quick(), {"y": torch.zeros(34, dtype=torch.long)}, "at least two classes"),
        (quick(), {"y": torch.zeros(34, 1, dtype=torch.long)}, "y must have shape"),
    ]
    for est, values, message in table:
        with pytest.raises(ValueError, match=message):
            est.fit(changed(**values))
    bare = KarateClub()[0]
    with pytest.raises(ValueError, match="patience=100 needs val_mask"):
        quick().fit(bare)
    quick(patience=None).fit(bare)
    with pytest.raises(ValueError, match="X must hold node ids in 0, ..., 33"):
        quick(data=bare).fit([0, 99], [0, 1])
    with pytest.raises(ValueError, match="data is missing"):
        quick().fit([0, 1], [0, 1])
    with pytest.raises(ValueError, match="mask is missing"):
        quick(patience=None).fit(bare).score()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "bp"}, "method must be one of"),
        ({"class_edges": "none"}, "class_edges must be one of"),
        (
            {"method": "sf_top_to_loss", "hidden_channels": [8, 9]},
            "must be the same for all layers",
        ),
        ({"method": "sf_top_to_loss", "batch_size": 3}, "batch_size must be None"),
        ({"method": "sf_top_to_input", "model": GCN(34, 8, 2)}, "must be a zoo name"),
        ({"hidden_channels": [8]}, "must hold num_layers=2 widths"),
        ({"model": "GAT", "model_kwargs": {"heads": 3}}, "divisible by heads=3"),
        ({"model": GCN(5, 8, 2)}, "layer 1 would read 34 columns"),
        ({"append_label": "all", "method": "ff_label"}, "append_label"),
        ({"x_class": torch.ones(2, 2)}, "x_class must have shape"),
        ({"method": "ff_label", "wrong_labels": torch.zeros(3, 4, dtype=torch.long)}, "differ"),
        ({"lr": 0.0}, "lr must be in"),
        ({"temperature": 0.0}, "temperature must be in"),
        ({"eval_burn_in": 10}, "eval_burn_in must be an integer in"),
        ({"patience": 0}, "patience must be an integer"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        quick(**{"model": "GCN"} | parameters).fit(karate())


def test_warnings_of_directed_graphs_and_absent_classes():
    data = karate()
    data.edge_index = data.edge_index[:, data.edge_index[0] < data.edge_index[1]]
    with pytest.warns(UserWarning, match="directed graph"):
        quick().fit(data)
    data = karate()
    data.train_mask = data.train_mask & (data.y != 2)
    with pytest.warns(UserWarning, match="no training node has class 2"):
        quick().fit(data)
