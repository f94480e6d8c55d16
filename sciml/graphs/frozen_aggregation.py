"""Run one layer on features that do not change, aggregating the neighbours only once.

When a layer trains alone its input x is fixed. GCN, GraphSAGE and GIN aggregate before anything
learnable acts, so their aggregated features (for GCN, A x with the normalised adjacency A) are
computed once, and an epoch costs a matrix product, whatever the number of edges:

    conv(x, edges) = transform(A x)         A x is a constant, transform is learned.

Other convolutions run on the whole graph, or on the exact one-hop neighbourhood of a minibatch:
one hop is all a layer needs when its input is a table.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from scipy import sparse
from torch import Tensor, nn
from torch_geometric.nn import EdgeConv, GATConv, GATv2Conv, GCNConv, GINConv, PNAConv, SAGEConv
from torch_geometric.nn.conv import GraphConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from sciml.graphs.sparse_matrices import (
    FactoredRows,
    SparseRows,
    entries_of_rows,
    factor_product,
    row_starts,
)
from sciml.graphs.stages import GraphStage

Table = Tensor | FactoredRows

__all__ = ["FixedGraph", "FrozenInput", "aggregates_once", "transform"]

# Convolutions whose output at a node depends on its incoming edges and their sources only.
ONE_HOP = (EdgeConv, GATConv, GATv2Conv, GINConv, GraphConv, PNAConv, SAGEConv)


class FixedGraph:
    """Edges of a graph, with the sorted and the normalised forms that layers ask for.

    Parameters
    ----------
    edge_index : LongTensor of shape (2, n_edges)
        Source and target of every edge.
    num_nodes : int
    edge_weight : Tensor of shape (n_edges,), optional
    edge_attr : Tensor of shape (n_edges, n_edge_features), optional
    """

    def __init__(
        self,
        edge_index: Tensor,
        num_nodes: int,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> None:
        self.edge_index = edge_index
        self.num_nodes = num_nodes
        self.edge_weight = edge_weight
        self.edge_attr = edge_attr
        self._matrices: dict[Any, SparseRows] = {}
        self._sorted: tuple[Tensor, Tensor] | None = None

    def gcn_matrix(self, conv: GCNConv, dtype: torch.dtype) -> SparseRows:
        """Return the adjacency matrix as `conv` normalises it."""
        key = ("gcn", conv.normalize, conv.improved, conv.add_self_loops)
        if key not in self._matrices:
            edge_index, weight = self.edge_index, self.edge_weight
            if conv.normalize:
                edge_index, weight = gcn_norm(
                    edge_index,
                    weight,
                    self.num_nodes,
                    conv.improved,
                    conv.add_self_loops,
                    conv.flow,
                    dtype,
                )
            elif weight is None:
                weight = torch.ones(edge_index.shape[1], dtype=dtype, device=edge_index.device)
            self._matrices[key] = SparseRows(edge_index, weight, self.num_nodes)
        return self._matrices[key]

    def sum_matrix(self, mean: bool, dtype: torch.dtype) -> SparseRows:
        """Return the matrix that sums (or averages) the features of all sources of a node."""
        if mean not in self._matrices:
            targets = self.edge_index[1]
            values = torch.ones(len(targets), dtype=dtype, device=targets.device)
            if mean:
                values = values / torch.bincount(targets, minlength=self.num_nodes)[targets]
            self._matrices[mean] = SparseRows(self.edge_index, values, self.num_nodes)
        return self._matrices[mean]

    def one_hop(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the nodes of the one-hop neighbourhood of `nodes`, and its renumbered edges.

        The first ``len(nodes)`` of the returned nodes are `nodes`; all their incoming edges are
        there, and no others.
        """
        if self._sorted is None:
            order = torch.argsort(self.edge_index[1], stable=True)
            self._sorted = order, row_starts(self.edge_index[1], self.num_nodes)
        order, starts = self._sorted
        entries, counts = entries_of_rows(starts, nodes)
        edges = order[entries]
        sources = self.edge_index[0, edges]
        place = torch.full((self.num_nodes,), -1, dtype=torch.long, device=nodes.device)
        place[nodes] = torch.arange(len(nodes), device=nodes.device)
        others = sources[place[sources] < 0].unique()
        place[others] = torch.arange(len(others), device=nodes.device) + len(nodes)
        targets = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        return (
            torch.cat([nodes, others]),
            torch.stack([place[sources], targets]),
            None if self.edge_weight is None else self.edge_weight[edges],
            None if self.edge_attr is None else self.edge_attr[edges],
        )


def aggregates_once(conv: nn.Module) -> bool:
    """Tell whether `conv` aggregates before anything learnable acts.

    Exactly GCNConv, SAGEConv without projection and GINConv, each with sum, mean, max or min:
    a subclass may do anything.
    """
    if type(conv) not in (GCNConv, SAGEConv, GINConv) or conv.flow != "source_to_target":
        return False
    if type(conv) is SAGEConv:
        return not conv.project and conv.aggr in ("add", "sum", "mean", "max", "min")
    return conv.aggr in ("add", "sum")


def aggregate(
    conv: Any, x: Tensor, graph: FixedGraph, rows: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return what `transform` needs to know of `x`: constants with one row per node."""
    if type(conv) is GCNConv:
        return (graph.gcn_matrix(conv, x.dtype).matmul(x, rows),)
    if conv.aggr in ("max", "min"):
        with torch.no_grad():
            summed = conv.propagate(graph.edge_index, x=(x, x), size=None)
        summed = summed if rows is None else summed[rows]
    else:
        summed = graph.sum_matrix(conv.aggr == "mean", x.dtype).matmul(x, rows)
    if type(conv) is SAGEConv and not conv.root_weight:
        return (summed,)
    return (summed, x if rows is None else x[rows])


def factored(conv: nn.Module, x: Tensor, graph: FixedGraph) -> tuple[Table, ...] | None:
    """Return what `aggregate` does with sparse features kept sparse, or None if that is no gain."""
    if x.device.type != "cpu":
        return None
    if type(conv) is GCNConv:
        table = factor_product(graph.gcn_matrix(conv, x.dtype).scipy(), x)
        return None if table is None else (table,)
    if type(conv) is SAGEConv and conv.aggr in ("mean", "add", "sum"):
        summed = factor_product(graph.sum_matrix(conv.aggr == "mean", x.dtype).scipy(), x)
        own = factor_product(sparse.eye(len(x), format="csr", dtype=x.numpy().dtype), x)
        if summed is None or own is None:
            return None
        return (summed, own) if conv.root_weight else (summed,)
    return None


def transform(conv: Any, aggregated: tuple[Table, ...]) -> Tensor:
    """Apply the learnable part of `conv` to what `aggregate` or `factored` returned."""
    if type(conv) is GCNConv:
        out = _linear(conv.lin, aggregated[0])
        return out if conv.bias is None else out + conv.bias
    if type(conv) is GINConv:
        return conv.nn(aggregated[0] + (1 + conv.eps) * aggregated[1])
    out = _linear(conv.lin_l, aggregated[0])
    if conv.root_weight:
        out = out + _linear(conv.lin_r, aggregated[1])
    return nn.functional.normalize(out, p=2.0, dim=-1) if conv.normalize else out


def _linear(lin: Any, table: Table) -> Tensor:
    if isinstance(table, Tensor):
        return lin(table)
    out = table.times(lin.weight.T)
    return out if lin.bias is None else out + lin.bias


class FrozenInput:
    """The fixed input of one stage, from which its output at any nodes is computed.

    Parameters
    ----------
    stage : GraphStage
    x : Tensor of shape (n_nodes, in_channels)
        Must not require a gradient: nothing may flow to earlier stages.
    graph : FixedGraph
    cache : bool, default=True
        Aggregate once, where `aggregates_once` holds, rather than at every call.
    one_hop : bool, default=False
        Run other convolutions on one-hop neighbourhoods rather than on the whole graph.
    """

    def __init__(
        self,
        stage: GraphStage,
        x: Tensor,
        graph: FixedGraph,
        *,
        cache: bool = True,
        one_hop: bool = False,
    ) -> None:
        if x.requires_grad:
            raise ValueError("x must be detached from the stages before, but it requires grad")
        self.stage, self.x, self.graph = stage, x, graph
        self.one_hop = one_hop
        self.once = aggregates_once(stage.conv)
        self.aggregated: tuple[Table, ...] | None = None
        if cache and self.once:
            sparse_tables = None if one_hop else factored(stage.conv, x, graph)
            self.aggregated = sparse_tables or aggregate(stage.conv, x, graph)
        if one_hop and not self.once:
            if getattr(stage.conv, "flow", None) != "source_to_target":
                raise ValueError("batch_size needs convolutions with flow='source_to_target'")
            if type(stage.conv) not in ONE_HOP:
                warnings.warn(
                    f"batch_size runs {type(stage.conv).__name__} on one-hop neighbourhoods, which "
                    "is exact only if a node's output depends on its incoming edges alone",
                    stacklevel=2,
                )

    def __call__(self, nodes: Tensor | None = None) -> Tensor:
        """Return the stage's output at `nodes`, or at all."""
        if self.aggregated is not None:
            rows = None if self.stage.mixes_rows and not self.one_hop else nodes
            picked = self.aggregated if rows is None else tuple(t[rows] for t in self.aggregated)
            out = self.stage.finish(transform(self.stage.conv, picked))
            return out if rows is nodes or nodes is None else out[nodes]
        if nodes is not None and self.one_hop:
            if self.once:
                picked = aggregate(self.stage.conv, self.x, self.graph, nodes)
                return self.stage.finish(transform(self.stage.conv, picked))
            known, edge_index, edge_weight, edge_attr = self.graph.one_hop(nodes)
            out = self.stage(self.x[known], edge_index, edge_weight, edge_attr)
            return out[: len(nodes)]
        graph = self.graph
        out = self.stage(self.x, graph.edge_index, graph.edge_weight, graph.edge_attr)
        return out if nodes is None else out[nodes]

    def at(self, nodes: Tensor) -> Callable[[], Tensor]:
        """Return a function of no arguments that computes the output at `nodes`.

        Gathers the aggregated rows once rather than at every call.
        """
        if self.aggregated is None or self.stage.mixes_rows:
            return lambda: self(nodes)
        picked = tuple(t[nodes] for t in self.aggregated)
        return lambda: self.stage.finish(transform(self.stage.conv, picked))

    @torch.no_grad()
    def output(self, batch_size: int | None = None) -> Tensor:
        """Return the output of the stage in evaluation mode at all nodes, in chunks."""
        self.stage.eval()
        if batch_size is None or not self.one_hop:
            return self()
        nodes = torch.arange(self.graph.num_nodes, device=self.x.device)
        return torch.cat([self(chunk) for chunk in nodes.split(batch_size)])
