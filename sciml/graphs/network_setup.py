"""Make the stages of a network fit a graph and a training method."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from sciml._check import check_integer
from sciml.graphs.stages import GraphStage, has_fixed_widths, stages_from_model

__all__ = ["initialise_stages", "layer_widths", "make_stages", "union_of_graphs"]


def layer_widths(hidden_channels: int | Sequence[int], num_layers: int) -> list[int]:
    """Return the width of each layer, or raise if the arguments do not fit each other."""
    check_integer("num_layers", num_layers, 1)
    if isinstance(hidden_channels, (list, tuple)):
        if len(hidden_channels) != num_layers:
            raise ValueError(
                f"hidden_channels must hold num_layers={num_layers} widths, got {hidden_channels}"
            )
        for width in hidden_channels:
            check_integer("hidden_channels", width, 1)
        return [int(width) for width in hidden_channels]
    check_integer("hidden_channels", hidden_channels, 1)
    return [int(hidden_channels)] * num_layers  # type: ignore[arg-type]


def make_stages(
    model: Any,
    model_kwargs: dict[str, Any] | None,
    *,
    in_channels: int,
    widths: list[int],
    extra: list[int],
    data: Data,
    edge_index: Tensor,
    num_nodes: int,
) -> list[GraphStage]:
    """Build the stages, initialise lazy ones and check that each takes what it will be given.

    Parameters
    ----------
    model, model_kwargs
        See `stages_from_model`.
    in_channels : int
        Features of the nodes, without label columns.
    widths : list of int
        Width of every layer, where `model` leaves it open.
    extra : list of int
        Columns that each layer reads besides the output of the one below: labels, or the state
        above. The last entry serves all further layers.
    data : Data
        Graph whose dtype and edge features the stages have to take.
    edge_index, num_nodes
        The graph with class nodes.
    """
    below = [in_channels, *widths[:-1]]
    pairs = [(b + e, w) for b, e, w in zip(below, extra, widths, strict=True)]
    stages = stages_from_model(model, pairs, model_kwargs, edge_index, num_nodes)
    if has_fixed_widths(model):
        extra = (extra + extra[-1:] * len(stages))[: len(stages)]
    return initialise_stages(stages, in_channels, extra, data)


def initialise_stages(
    stages: list[GraphStage], in_channels: int, extra: list[int], data: Data
) -> list[GraphStage]:
    """Run every stage on two nodes: lazy parameters are made, wrong widths are found."""
    edge_index = torch.tensor([[0, 1], [1, 0]])
    edge_attr = None if data.edge_attr is None else data.edge_attr[:1].cpu().expand(2, -1)
    width = in_channels
    for layer, (stage, columns) in enumerate(zip(stages, extra, strict=True)):
        stage.to(data.x.dtype).eval()
        x = torch.zeros(2, width + columns, dtype=data.x.dtype)
        if getattr(stage.conv, "edge_dim", None) is not None and edge_attr is None:
            raise ValueError(f"data.edge_attr is missing, but layer {layer + 1} has edge_dim")
        try:
            with torch.no_grad():
                stage.out_channels = stage(x, edge_index, None, edge_attr).shape[1]
        except RuntimeError as error:
            raise ValueError(
                f"model cannot be trained on this graph: layer {layer + 1} would read "
                f"{width + columns} columns ({width} of "
                f"{'data.x' if layer == 0 else f'layer {layer}'}, {columns} of labels or other "
                f"layers), but its convolution fails on that: {error}"
            ) from error
        width = stage.out_channels
    return stages


def union_of_graphs(first: Data, second: Data) -> Data:
    """Return one graph of two parts: the nodes of `first`, then those of `second`, unconnected."""
    if first.num_features != second.num_features:
        raise ValueError(
            f"data.x must have {first.num_features} columns as in fit, got {second.num_features}"
        )
    union = Data(
        x=torch.cat([first.x, second.x.to(first.x)]),
        edge_index=torch.cat(
            [first.edge_index, second.edge_index.to(first.edge_index) + len(first.x)], 1
        ),
    )
    for key in ("edge_weight", "edge_attr"):
        parts = [first.get(key), second.get(key)]
        if (parts[0] is None) != (parts[1] is None):
            raise ValueError(f"data.{key} must be there exactly if it was there in fit")
        if parts[0] is not None:
            union[key] = torch.cat([parts[0], parts[1].to(parts[0])])
    return union


def same_graph(first: Data, second: Data) -> bool:
    """Tell whether two graphs have the same features and edges."""
    for key in ("x", "edge_index", "edge_weight", "edge_attr"):
        a, b = first.get(key), second.get(key)
        if (a is None) != (b is None):
            return False
        if a is not None and not (a is b or (a.shape == b.shape and torch.equal(a, b.to(a)))):
            return False
    return True
