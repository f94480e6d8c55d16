"""Smoothed features are those of SGConv with the identity as weight."""

import pytest
import torch
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import SGConv

from sciml.graphs import SmoothFeatures


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_sgconv(k, weighted):
    data = KarateClub()[0]
    weight = torch.rand(data.num_edges) if weighted else None
    data.edge_weight = weight
    before = data.x.clone()
    got = SmoothFeatures(k)(data).x
    assert torch.equal(data.x, before)
    wanted = before
    if k:
        conv = SGConv(34, 34, K=k, bias=False)
        torch.nn.init.eye_(conv.lin.weight)
        wanted = conv(before, data.edge_index, weight).detach()
    torch.testing.assert_close(got, wanted)


def test_bad_input():
    with pytest.raises(ValueError, match="k must be an integer in"):
        SmoothFeatures(-1)
    data = KarateClub()[0]
    data.x = data.x.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        SmoothFeatures()(data)
