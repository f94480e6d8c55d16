"""Stages do what the models of PyG's zoo do, layer by layer."""

import copy

import pytest
import torch
from torch import nn
from torch_geometric.nn import (
    GAT,
    GCN,
    GIN,
    LINKX,
    PNA,
    EdgeCNN,
    GATConv,
    GCNConv,
    GINConv,
    GraphConv,
    GraphSAGE,
    GraphUNet,
    PNAConv,
    SAGEConv,
    Sequential,
)

from sciml.graphs.frozen_aggregation import FixedGraph, FrozenInput, aggregates_once
from sciml.graphs.stages import GraphStage, initialise_stages, stages_from_model, unit_rows

N, F, H = 30, 7, 8
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, F, generator=GENERATOR, dtype=torch.float64)
EDGES = torch.randint(N, (2, 90), generator=GENERATOR)
DEG = torch.bincount(torch.bincount(EDGES[1], minlength=N))
PNA_KWARGS = {"aggregators": ["mean", "std"], "scalers": ["identity", "amplification"], "deg": DEG}
ZOO = [(GCN, {}), (GraphSAGE, {}), (GIN, {}), (GAT, {"heads": 2}), (PNA, PNA_KWARGS), (EdgeCNN, {})]


def cut(model, widths=((F, H), (H, H)), **kwargs):
    return stages_from_model(model, widths, kwargs, EDGES, N)


@pytest.mark.parametrize("norm", [None, "batch_norm", "graph_norm"])
@pytest.mark.parametrize("act_first", [False, True])
@pytest.mark.parametrize(("cls", "kwargs"), ZOO, ids=lambda v: getattr(v, "__name__", ""))
def test_stages_of_an_instance_equal_its_forward(cls, kwargs, norm, act_first):
    gnn = cls(F, H, 3, norm=norm, act_first=act_first, dropout=0.3, **kwargs).double().eval()
    stages = [stage.eval() for stage in cut(gnn)]
    h = X
    for stage in stages[:-1]:
        h = stage(h, EDGES)
    # The zoo leaves the last convolution bare; a stage always ends with what follows it.
    torch.testing.assert_close(stages[-1].conv(h, EDGES), gnn(X, EDGES))
    torch.testing.assert_close(stages[-1](h, EDGES), gnn(X, EDGES).relu())
    before = copy.deepcopy(gnn.state_dict())
    for stage in stages:
        for parameter in stage.parameters():
            parameter.data += 1
    for key, value in gnn.state_dict().items():
        torch.testing.assert_close(value, before[key])


@pytest.mark.parametrize(("cls", "kwargs"), ZOO, ids=lambda v: getattr(v, "__name__", ""))
def test_stages_of_a_class_have_the_activation_of_jk_models(cls, kwargs):
    stages = [s.double().eval() for s in cut(cls, norm="layer_norm", **kwargs)]
    gnn = cls(F, H, 2, jk="last", norm="layer_norm", **kwargs).double().eval()
    gnn.lin = nn.Identity()
    for i, stage in enumerate(stages):
        gnn.convs[i], gnn.norms[i] = stage.conv, stage.after[0]
    torch.testing.assert_close(stages[1](stages[0](X, EDGES), EDGES), gnn(X, EDGES))


def test_sequential_and_list():
    torch.manual_seed(0)
    conv1, conv2 = GCNConv(F, H), GCNConv(H, H)
    model = Sequential(
        "x, edge_index",
        [(conv1, "x, edge_index -> x"), nn.ReLU(), (conv2, "x, edge_index -> x")],
    )
    x = X.float()
    wanted = conv2(conv1(x, EDGES).relu(), EDGES).relu()
    for form in (model, [conv1, conv2], [conv1, nn.ReLU(), conv2]):
        stages = cut(form)
        torch.testing.assert_close(stages[1](stages[0](x, EDGES), EDGES), wanted)
        assert stages[0].conv is not conv1


def test_lazy_parameters_are_initialised():
    from torch_geometric.data import Data

    stages = initialise_stages(cut(GCN(-1, H, 2)), F, [0, 0], Data(x=X, edge_index=EDGES))
    assert stages[0].conv.lin.weight.shape == (H, F)
    assert stages[1].out_channels == H


def test_warnings_of_what_is_left_out():
    with pytest.warns(UserWarning, match="jumping knowledge"):
        cut(GCN(F, H, 2, out_channels=3, jk="cat"))
    with pytest.warns(UserWarning, match="output layer of width 3"):
        cut(GCN(F, H, 2, out_channels=3))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (LINKX(N, F, H, 3, 2), TypeError, "LINKX.*one row per node"),
        (LINKX, TypeError, "LINKX.*one row per node"),
        (GraphUNet(F, H, 3, 2), TypeError, "GraphUNet.*pooling"),
        (nn.Linear(2, 2), TypeError, "no list of convolutions"),
        ("GNN", ValueError, "model must be one of 'GCN'"),
        (3, TypeError, "model must be one of 'GCN'"),
        ([nn.ReLU()], ValueError, "without a message-passing layer"),
        ([nn.ReLU(), GCNConv(2, 2)], ValueError, "must begin with a message-passing layer"),
        ([GCNConv(2, 2), 3], TypeError, "must hold Modules"),
        (lambda i, o: 3, TypeError, "must return a Module"),
        (GraphSAGE((F, F), H, 2), ValueError, "one in_channels"),
    ],
)
def test_models_that_cannot_be_cut(model, error, message):
    with pytest.raises(error, match=message):
        cut(model)


def test_a_skip_connection_is_no_chain():
    parts = [
        (GCNConv(F, F), "x, edge_index -> h"),
        (nn.ReLU(), "h -> h"),
        (GCNConv(F, F), "x, edge_index -> g"),
    ]
    with pytest.raises(ValueError, match="no chain"):
        cut(Sequential("x, edge_index", parts))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_channels must be divisible by heads=3, got 8"):
        cut("GAT", heads=3)
    with pytest.raises(ValueError, match="must not hold 'jk'"):
        cut("GCN", jk="cat")
    with pytest.raises(ValueError, match="model_kwargs is for zoo names"):
        cut([GCNConv(F, H)], heads=3)


def test_own_cache_of_a_convolution_is_dropped():
    conv = GCNConv(F, H, cached=True)
    conv(X.float(), EDGES)
    stage = cut([conv])[0]
    assert not stage.conv.cached
    assert stage.conv._cached_edge_index is None
    assert conv._cached_edge_index is not None


def test_unit_rows():
    rows = unit_rows(torch.cat([X, torch.zeros(1, F)]))
    torch.testing.assert_close(rows.norm(dim=1)[:-1], torch.ones(N, dtype=torch.float64))
    assert (rows[-1] == 0).all()


CONVS = {
    "gcn": GCNConv(F, H),
    "gcn improved, no bias": GCNConv(F, H, improved=True, bias=False),
    "gcn without loops": GCNConv(F, H, add_self_loops=False),
    "gcn unnormalised": GCNConv(F, H, normalize=False),
    "sage": SAGEConv(F, H),
    "sage sum": SAGEConv(F, H, aggr="sum", normalize=True),
    "sage max": SAGEConv(F, H, aggr="max", root_weight=False),
    "gin": GINConv(nn.Sequential(nn.Linear(F, H), nn.ReLU(), nn.Linear(H, H)), train_eps=True),
}
OTHERS = {
    "gat": GATConv(F, 4, heads=2),
    "pna": PNAConv(F, H, **PNA_KWARGS),
    "graph conv": GraphConv(F, H),
    "sage project": SAGEConv(F, H, project=True),
}


def outputs_and_gradients(function, module, nodes):
    module.zero_grad()
    out = function()
    weights = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    (out * weights).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [*CONVS, *OTHERS])
def test_every_way_to_run_a_layer_gives_the_same(name, weighted, sparse):
    conv = {**CONVS, **OTHERS}[name]
    stage = GraphStage(copy.deepcopy(conv), [nn.ReLU()]).double()
    assert aggregates_once(conv) == (name in CONVS)
    x = X.clone()
    if sparse:  # few words, except in the last rows
        x = torch.zeros(N, 200, dtype=torch.float64)
        x[torch.arange(N - 2), torch.arange(N - 2) * 5] = 1.0
        x[-2:] = 0.5
        torch.manual_seed(0)
        wide = {"gcn": GCNConv(200, H), "sage": SAGEConv(200, H)}
        if name not in wide:
            return
        stage = GraphStage(wide[name], [nn.ReLU()]).double()
    weight = torch.rand(90, dtype=torch.float64) if weighted else None
    edges = torch.cat([EDGES, EDGES[:, :3]], 1)[:, :90]
    edges[:, -1] = edges[:, 0]  # the same edge twice
    nodes = torch.tensor([3, 0, 17, 29])
    wanted = outputs_and_gradients(lambda: stage(x, edges, weight)[nodes], stage, nodes)
    for cache in (True, False):
        for one_hop in (True, False):
            frozen = FrozenInput(
                stage, x, FixedGraph(edges, N, weight), cache=cache, one_hop=one_hop
            )
            for run in (lambda f=frozen: f(nodes), lambda f=frozen: f.at(nodes)()):
                got = outputs_and_gradients(run, stage, nodes)
                for a, b in zip(got, wanted, strict=True):
                    torch.testing.assert_close(a, b)
            torch.testing.assert_close(
                frozen.output(batch_size=7), stage(x, edges, weight).detach()
            )
    if sparse:
        from sciml.graphs.sparse_matrices import FactoredRows

        assert isinstance(
            FrozenInput(stage, x, FixedGraph(edges, N, weight)).aggregated[0], FactoredRows
        )


def test_input_must_be_detached():
    stage = GraphStage(GCNConv(F, H))
    with pytest.raises(ValueError, match="detached"):
        FrozenInput(stage, X.float().requires_grad_(), FixedGraph(EDGES, N))


def test_unknown_convolutions_in_minibatches_warn_and_reversed_flow_fails():
    class Own(GCNConv):
        pass

    with pytest.warns(UserWarning, match="Own on one-hop"):
        FrozenInput(GraphStage(Own(F, H)), X.float(), FixedGraph(EDGES, N), one_hop=True)
    with pytest.raises(ValueError, match="source_to_target"):
        FrozenInput(
            GraphStage(GATConv(F, H, flow="target_to_source")),
            X,
            FixedGraph(EDGES, N),
            one_hop=True,
        )
