"""Class nodes: who is linked to whom, what becomes of the other attributes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.datasets import KarateClub

from sciml.graphs import AddClassNodes, add_class_nodes
from sciml.graphs.class_nodes import append_labels, draw_wrong_labels


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=12),
    chosen=st.integers(1, 2**12 - 1),
    direction=st.sampled_from(["bidirectional", "to_class"]),
)
def test_edges_join_exactly_the_masked_nodes_to_their_class(labels, chosen, direction):
    n = len(labels)
    mask = torch.tensor([bool(chosen >> i & 1) for i in range(n)])
    if not mask.any():
        mask[0] = True
    y = torch.tensor(labels)
    old = torch.tensor([[0, 1], [1, 0]])
    data = Data(x=torch.randn(n, 3), edge_index=old, y=y)
    out = add_class_nodes(data, mask=mask, direction=direction, num_classes=4, random_state=0)
    assert out.num_nodes == n + 4
    torch.testing.assert_close(out.edge_index[:, :2], old)
    new = [tuple(edge) for edge in out.edge_index[:, 2:].T.tolist()]
    wanted = [(i, n + labels[i]) for i in range(n) if mask[i]]
    if direction == "bidirectional":
        wanted += [(b, a) for a, b in wanted]
    assert new == wanted
    kinds = [1 + labels[i] for i in range(n) if mask[i]]
    kinds += [4 + k for k in kinds] if direction == "bidirectional" else []
    assert out.edge_type.tolist() == [0, 0, *kinds]
    assert out.y[n:].tolist() == [-1] * 4


def test_attributes_of_nodes_and_edges_are_extended():
    data = Data(
        x=torch.ones(3, 2),
        edge_index=torch.tensor([[0, 1], [1, 2]]),
        y=torch.tensor([0, 1, 0]),
        train_mask=torch.tensor([True, True, False]),
        edge_weight=torch.tensor([0.5, 2.0]),
        edge_attr=torch.ones(2, 1),
        year=torch.tensor([7, 8, 9]),
        name="toy",
    )
    before = copy.deepcopy(data)
    x_class = torch.arange(4.0).view(2, 2)
    out = data.clone()
    out = AddClassNodes(x_class=x_class, class_edge_attr=0.25)(out)
    assert out.edge_weight.tolist() == [0.5, 2.0, 1, 1, 1, 1]
    assert out.edge_attr.flatten().tolist() == [1, 1, 0.25, 0.25, 0.25, 0.25]
    assert out.year.tolist() == [7, 8, 9, 0, 0]
    assert out.train_mask.tolist() == [True, True, False, False, False]
    assert out.name == "toy"
    torch.testing.assert_close(out.x[3:], x_class)
    AddClassNodes(class_edge_attr=0.0)(data)
    for key, value in before.to_dict().items():
        assert torch.equal(data[key], value) if torch.is_tensor(value) else data[key] == value


def test_transform_is_registered_and_draws_the_same_features():
    data = KarateClub()[0]
    first, second = (AddClassNodes(random_state=3)(data).x for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, AddClassNodes(random_state=4)(data).x)


def test_label_columns():
    out = append_labels(
        torch.zeros(5, 1), torch.tensor([2]), torch.tensor([1]), 2, class_nodes=True
    )
    wanted = [[0.5, 0.5], [0.5, 0.5], [0, 1], [1, 0], [0, 1]]
    assert out[:, 1:].tolist() == wanted


@settings(max_examples=30, deadline=None)
@given(n_classes=st.integers(2, 6), seed=st.integers(0, 99))
def test_wrong_labels_are_wrong_and_distinct(n_classes, seed):
    labels = torch.arange(20) % n_classes
    wrong = draw_wrong_labels(labels, n_classes, n_classes - 1, seed)
    assert not (wrong == labels).any()
    together = torch.cat([wrong, labels[None]]).sort(0).values
    assert (together == torch.arange(n_classes)[:, None]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "both"}, "direction must be one of"),
        ({"mask": torch.zeros(34, dtype=torch.bool)}, "at least one node"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must have shape \\(34\\), got"),
        ({"mask": "no_mask"}, "mask names 'no_mask'"),
        ({"y": torch.zeros(3)}, "y must have shape"),
        ({"y": torch.full((34,), -1), "num_classes": 4}, "got values from -1"),
        ({"num_classes": 2}, "must be in 0, ..., 1"),
        ({"x_class": torch.ones(4, 3)}, "x_class must have shape"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        add_class_nodes(KarateClub()[0], **change)


def test_edge_features_need_a_value():
    data = KarateClub()[0]
    data.edge_attr = torch.ones(data.num_edges, 1)
    with pytest.raises(ValueError, match="class_edge_attr"):
        add_class_nodes(data)
