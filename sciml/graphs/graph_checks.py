"""Check graphs, masks and labels, and say what is wrong with them."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from sciml._check import check_finite, check_shape
from sciml.graphs.frozen_aggregation import FixedGraph

__all__ = ["check_graph", "check_labels", "check_mask", "check_pairs", "labelled_pairs"]


def check_graph(data: Any, *, name: str = "data", warn_directed: bool = True) -> None:
    """Raise unless `data` is a graph with finite features and edges between its nodes.

    Parameters
    ----------
    data : torch_geometric.data.Data
    name : str, default="data"
        Argument name, for the messages.
    warn_directed : bool, default=True
        Warn when an edge has no reverse edge.

    Raises
    ------
    TypeError
        If `data` is no `torch_geometric.data.Data`.
    ValueError
        If something is missing or does not fit.
    """
    if not isinstance(data, Data):
        raise TypeError(f"{name} must be a torch_geometric.data.Data, got {type(data).__name__}")
    if not isinstance(data.x, Tensor) or data.x.layout != torch.strided:
        raise ValueError(f"{name}.x must be a dense Tensor of node features, got {data.x!r}")
    check_shape(f"{name}.x", data.x, (None, None))
    if not data.x.is_floating_point():
        raise ValueError(f"{name}.x must have a floating-point dtype, got {data.x.dtype}")
    check_finite(f"{name}.x", data.x)
    edge_index = data.edge_index
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
        raise ValueError(
            f"{name}.edge_index must be a dense Tensor of shape (2, n_edges), got {edge_index!r}"
        )
    check_shape(f"{name}.edge_index", edge_index, (2, None))
    n_nodes = len(data.x)
    if edge_index.dtype != torch.long:
        raise ValueError(f"{name}.edge_index must have dtype int64, got {edge_index.dtype}")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < n_nodes:
        raise ValueError(
            f"{name}.edge_index must be in 0, ..., {n_nodes - 1} (data.x has {n_nodes} rows), got "
            f"values from {int(edge_index.min())} to {int(edge_index.max())}"
        )
    n_edges = edge_index.shape[1]
    for key in ("edge_weight", "edge_attr"):
        value = data.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor) or len(value) != n_edges:
            raise ValueError(f"{name}.{key} must have one row per edge ({n_edges}), got {value!r}")
        check_finite(f"{name}.{key}", value)
    if data.get("edge_weight") is not None:
        check_shape(f"{name}.edge_weight", data.edge_weight, (n_edges,))
    if warn_directed and not _is_undirected(edge_index, n_nodes):
        warnings.warn(
            f"{name} is a directed graph: information flows along its edges only; "
            "torch_geometric.transforms.ToUndirected() adds the reverse edges",
            stacklevel=3,
        )


def _is_undirected(edge_index: Tensor, n_nodes: int) -> bool:
    """Compare the sets of edges and of reverse edges; much lighter than PyG's check."""
    forward = (edge_index[0] * n_nodes + edge_index[1]).sort().values
    backward = (edge_index[1] * n_nodes + edge_index[0]).sort().values
    return bool(torch.equal(forward, backward))


def check_mask(name: str, mask: Any, n_nodes: int) -> Tensor:
    """Return a mask as a BoolTensor of shape (n_nodes,) that holds somewhere, or raise."""
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be a boolean mask, got dtype {mask.dtype}")
    if mask.ndim == 2:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, one column per split: choose a split column, "
            f"for instance {name}=data.{name}[:, 0]"
        )
    check_shape(name, mask, (n_nodes,))
    if not bool(mask.any()):
        raise ValueError(f"{name} must hold for at least one node, got none")
    return mask


def check_labels(y: Any, n_nodes: int) -> np.ndarray:
    """Return labels as an integer ndarray of shape (n_nodes,), -1 for unlabelled, or raise."""
    if y is None:
        raise ValueError("y is missing: pass it, or set data.y")
    y = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    check_shape("y", y, (n_nodes,))
    if y.dtype.kind not in "iu":
        raise ValueError(f"y must hold integer classes, -1 where unlabelled, got dtype {y.dtype}")
    if y.min() < -1:
        raise ValueError(f"y must be -1 (unlabelled) or a class >= 0, got {y.min()}")
    return y


def check_pairs(name: str, pairs: Any, n_nodes: int) -> None:
    """Raise unless `pairs` is a LongTensor of shape (2, n_pairs) of nodes."""
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.long:
        raise ValueError(f"{name} must be a LongTensor of shape (2, n_pairs), got {pairs!r}")
    check_shape(name, pairs, (2, None))
    if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < n_nodes:
        raise ValueError(
            f"{name} must be in 0, ..., {n_nodes - 1}, got values from {int(pairs.min())} to "
            f"{int(pairs.max())}"
        )


def labelled_pairs(
    name: str, data: Data, device: torch.device
) -> tuple[Tensor, FixedGraph, Tensor, Tensor]:
    """Return features, graph, pairs and whether they are linked, or raise."""
    pairs, labels = data.get("edge_label_index"), data.get("edge_label")
    if pairs is None or labels is None:
        raise ValueError(
            f"{name} must have edge_label_index and edge_label, as "
            "torch_geometric.transforms.RandomLinkSplit makes them"
        )
    check_pairs(f"{name}.edge_label_index", pairs, len(data.x))
    check_shape(f"{name}.edge_label", labels, (pairs.shape[1],))
    values = set(labels.unique().tolist())
    if values != {0, 1}:
        raise ValueError(f"{name}.edge_label must hold 0 and 1, both, got {sorted(values)}")
    weight, attr = (
        value if value is None else value.to(device)
        for value in (data.get("edge_weight"), data.get("edge_attr"))
    )
    graph = FixedGraph(data.edge_index.to(device), len(data.x), weight, attr)
    return data.x.detach().to(device), graph, pairs.to(device), (labels == 1).to(device)
