"""Check graphs, masks, labels and the estimators' parameters, and say what is wrong with them."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from sciml._check import check_choice, check_finite, check_integer, check_interval, check_shape
from sciml.graphs.class_nodes import DIRECTIONS
from sciml.graphs.stages import has_fixed_widths

if TYPE_CHECKING:
    from sciml.graphs.forward_gnn import ForwardGNNClassifier

__all__ = [
    "TOP_DOWN",
    "check_graph",
    "check_labels",
    "check_mask",
    "check_node_ids",
    "check_pairs",
    "check_parameters",
    "check_training_parameters",
]

TOP_DOWN = ("sf_top_to_loss", "sf_top_to_input")
FORWARD_FORWARD = ("ff_label", "ff_virtual")
METHODS = ("sf", *TOP_DOWN, *FORWARD_FORWARD)


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


def check_node_ids(X: Any, n_nodes: int) -> np.ndarray:
    """Return node ids as an integer ndarray of shape (n,), or raise."""
    ids = np.asarray(X)
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    check_shape("X", ids, (None,))
    if ids.dtype.kind not in "iu":
        raise ValueError(f"X must be a Data or integer node ids, got dtype {ids.dtype}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < n_nodes:
        raise ValueError(
            f"X must hold node ids in 0, ..., {n_nodes - 1}, got {ids.min()} to {ids.max()}"
        )
    return ids


def check_parameters(estimator: "ForwardGNNClassifier") -> None:
    """Raise unless the parameters are in range and fit each other."""
    check_training_parameters(estimator)
    check_interval("weight_decay", estimator.weight_decay, 0, np.inf, closed="left")
    check_choice("method", estimator.method, METHODS)
    check_choice("class_edges", estimator.class_edges, DIRECTIONS)
    check_choice("append_label", estimator.append_label, (None, "input", "all"))
    check_interval("temperature", estimator.temperature, 0, np.inf, closed="neither")
    check_integer("eval_steps", estimator.eval_steps, 1)
    check_integer("eval_burn_in", estimator.eval_burn_in, 0, estimator.eval_steps - 1)
    check_interval("validation_fraction", estimator.validation_fraction, 0, 1, closed="neither")
    if estimator.num_negatives is not None:
        check_integer("num_negatives", estimator.num_negatives, 1)
    if estimator.class_edge_attr is not None:
        check_interval("class_edge_attr", estimator.class_edge_attr)
    if estimator.append_label == "all" and estimator.method != "sf":
        raise ValueError(f"append_label='all' needs method='sf', got {estimator.method!r}")
    if estimator.append_label is not None and estimator.method in FORWARD_FORWARD:
        raise ValueError(
            f"append_label must be None with method={estimator.method!r}, which shows labels in "
            f"its own way, got {estimator.append_label!r}"
        )
    if estimator.method in TOP_DOWN:
        for name in ("batch_size", "checkpoint_dir", "resume_from"):
            if getattr(estimator, name) is not None:
                raise ValueError(
                    f"{name} must be None with method={estimator.method!r}, which trains all "
                    f"layers together on the whole graph, got {getattr(estimator, name)!r}"
                )
    if estimator.method == "sf_top_to_input" and has_fixed_widths(estimator.model):
        raise ValueError(
            "model must be a zoo name, a class or a callable with method='sf_top_to_input', whose "
            f"layers read two states at once, got {type(estimator.model).__name__}"
        )


def check_training_parameters(estimator: Any) -> None:
    """Raise unless the parameters of the optimisation are in range."""
    check_interval("theta", estimator.theta, -np.inf, np.inf, closed="neither")
    check_interval("lr", estimator.lr, 0, np.inf, closed="neither")
    if estimator.weight_decay is not None:
        check_interval("weight_decay", estimator.weight_decay, 0, np.inf, closed="left")
    check_integer("max_epochs", estimator.max_epochs, 0)
    check_integer("val_every", estimator.val_every, 1)
    if estimator.patience is not None:
        check_integer("patience", estimator.patience, 1)
    if estimator.grad_clip is not None:
        check_interval("grad_clip", estimator.grad_clip, 0, np.inf, closed="neither")
    if estimator.batch_size is not None:
        check_integer("batch_size", estimator.batch_size, 1)
