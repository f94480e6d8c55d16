"""The steps of `ForwardGNNClassifier.fit`: check arguments, read nodes and labels, build, train."""

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch_geometric.data import Data

from sciml._check import check_shape
from sciml.graphs.checks import TOP_DOWN, check_graph, check_labels, check_mask, check_node_ids
from sciml.graphs.class_nodes import (
    class_edges,
    draw_class_features,
    draw_wrong_labels,
)
from sciml.graphs.forward_forward import ClassNodeFFGNN, ForwardForwardTraining, LabelFFGNN
from sciml.graphs.layer_training import derived_seed, train_layers
from sciml.graphs.single_forward import ClassNodeGNN, SingleForwardGNN, SingleForwardTraining
from sciml.graphs.stages import layer_widths, make_stages
from sciml.graphs.top_down import StageRunner, TopToInputGNN, TopToLossGNN, train_top_down

if TYPE_CHECKING:
    from sciml.graphs.forward_gnn import ForwardGNNClassifier

__all__ = ["NodeTask", "build_network", "read_task", "train_network"]


class NodeTask(NamedTuple):
    """Graph, nodes to learn from, nodes to validate on, and codes of the classes of all nodes."""

    data: Data
    train: Tensor
    validation: Tensor
    codes: Tensor  # -1 where unlabelled
    classes: np.ndarray


def read_task(
    estimator: "ForwardGNNClassifier",
    X: Any,
    y: Any,
    train_mask: Any,
    val_mask: Any,
    rng: np.random.RandomState,
) -> NodeTask:
    """Return what `fit` was asked to learn."""
    by_ids = X is not None and not isinstance(X, Data)
    data = X if isinstance(X, Data) else estimator.data
    if data is None:
        raise ValueError("data is missing: give fit a graph, or the estimator the parameter data")
    check_graph(data)
    n_nodes = len(data.x)
    if (
        estimator.class_edge_attr is None
        and data.edge_attr is not None
        and (_uses_edge_attr(estimator))
    ):
        raise ValueError(
            "class_edge_attr is missing: model uses data.edge_attr, and class edges need a value"
        )
    if by_ids:
        if train_mask is not None or val_mask is not None:
            raise ValueError("train_mask and val_mask are for graphs, but X holds ids of nodes")
        train, validation, codes, classes = _read_ids(estimator, X, y, n_nodes, rng)
    else:
        train, validation, codes, classes = _read_masks(
            estimator, data, data.get("y") if y is None else y, train_mask, val_mask
        )
    if len(classes) < 2:
        raise ValueError(f"y must hold at least two classes, got {classes.tolist()}")
    counts = torch.bincount(codes[train], minlength=len(classes))
    if len(absent := classes[(counts == 0).numpy()]):
        warnings.warn(
            f"no training node has class {', '.join(map(str, absent))}: its class node has no edge",
            stacklevel=3,
        )
    return NodeTask(data, train, validation, codes, classes)


def _uses_edge_attr(estimator: "ForwardGNNClassifier") -> bool:
    if isinstance(estimator.model, torch.nn.Module):
        return any(getattr(m, "edge_dim", None) is not None for m in estimator.model.modules())
    return (estimator.model_kwargs or {}).get("edge_dim") is not None


def _read_ids(
    estimator: "ForwardGNNClassifier", X: Any, y: Any, n_nodes: int, rng: np.random.RandomState
) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    ids = check_node_ids(X, n_nodes)
    if y is None:
        raise ValueError("y is missing: ids of nodes need their classes")
    y = np.asarray(y)
    check_shape("y", y, (len(ids),))
    if len(np.unique(ids)) < len(ids):
        raise ValueError("X must hold each node once")
    classes, places = np.unique(y, return_inverse=True)
    codes = torch.full((n_nodes,), -1)
    codes[torch.as_tensor(ids)] = torch.as_tensor(places)
    train, validation = ids, ids[:0]
    if estimator.patience is not None:
        can_stratify = np.bincount(places).min() >= 2 and len(ids) * min(
            estimator.validation_fraction, 1 - estimator.validation_fraction
        ) >= len(classes)
        train, validation = train_test_split(
            ids,
            test_size=estimator.validation_fraction,
            random_state=rng.randint(2**31 - 1),
            stratify=places if can_stratify else None,
        )
    return torch.as_tensor(np.sort(train)), torch.as_tensor(np.sort(validation)), codes, classes


def _read_masks(
    estimator: "ForwardGNNClassifier", data: Data, y: Any, train_mask: Any, val_mask: Any
) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    n_nodes = len(data.x)
    labels = check_labels(y, n_nodes)
    train_mask = data.get("train_mask") if train_mask is None else train_mask
    if train_mask is None:
        raise ValueError("train_mask is missing: pass it, or set data.train_mask")
    train_mask = check_mask("train_mask", train_mask, n_nodes).cpu()
    validation_mask = torch.zeros(n_nodes, dtype=torch.bool)
    if estimator.patience is not None:
        val_mask = data.get("val_mask") if val_mask is None else val_mask
        if val_mask is None:
            raise ValueError(
                f"patience={estimator.patience} needs val_mask: pass it, set data.val_mask, or "
                "train for max_epochs with patience=None"
            )
        validation_mask = check_mask("val_mask", val_mask, n_nodes).cpu()
        if both := int((train_mask & validation_mask).sum()):
            raise ValueError(f"val_mask must not overlap train_mask, but {both} nodes are in both")
    for name, mask in (("train_mask", train_mask), ("val_mask", validation_mask)):
        if (labels[mask.numpy()] < 0).any():
            raise ValueError(f"y must be a class >= 0 at all nodes of {name}, got -1 there")
    classes = np.unique(labels[labels >= 0])
    codes = np.where(labels >= 0, np.searchsorted(classes, labels), -1)
    return (
        train_mask.nonzero().flatten(),
        validation_mask.nonzero().flatten(),
        torch.as_tensor(codes, dtype=torch.long),
        classes,
    )


def build_network(estimator: "ForwardGNNClassifier", task: NodeTask, seed: int) -> ClassNodeGNN:
    """Return the untrained network of an estimator for a task."""
    data, method = task.data, estimator.method
    n_classes, labels = len(task.classes), task.codes[task.train]
    labelled = method == "ff_label" or estimator.append_label is not None
    in_channels = data.num_features + (n_classes if labelled and method != "sf" else 0)
    x_class = estimator.x_class
    if x_class is None:
        x_class = draw_class_features(n_classes, data.num_features, derived_seed(seed, 0))
    check_shape("x_class", x_class, (n_classes, data.num_features))
    widths = layer_widths(estimator.hidden_channels, estimator.num_layers)
    extra = [0] * len(widths)
    if method == "sf" and labelled:
        extra = [n_classes] + [n_classes if estimator.append_label == "all" else 0] * len(widths)
        extra = extra[: len(widths)]
    if method == "sf_top_to_input":
        extra = [*widths[1:], n_classes]
    edges, n_nodes = data.edge_index, len(data.x)
    if method != "ff_label":
        new = class_edges(task.train, labels, n_nodes, estimator.class_edges)
        edges, n_nodes = torch.cat([edges.cpu(), new], 1), n_nodes + n_classes
    stages = make_stages(
        estimator.model,
        estimator.model_kwargs,
        in_channels=in_channels,
        widths=widths,
        extra=extra,
        data=data,
        edge_index=edges,
        num_nodes=n_nodes,
    )
    got = [stage.out_channels for stage in stages]
    if method == "sf_top_to_loss" and len(set(got)) > 1:
        raise ValueError(
            "hidden_channels must be the same for all layers with method='sf_top_to_loss', which "
            f"averages their states, got {got}"
        )
    network: type[Any] = {
        "sf": SingleForwardGNN,
        "sf_top_to_loss": TopToLossGNN,
        "sf_top_to_input": TopToInputGNN,
        "ff_label": LabelFFGNN,
        "ff_virtual": ClassNodeFFGNN,
    }[method]
    options: dict[str, Any] = {}
    if method == "sf_top_to_input":
        options = {
            "widths": [in_channels, *widths, n_classes],
            "alternating": estimator.alternating,
            "eval_steps": estimator.eval_steps,
            "eval_burn_in": estimator.eval_burn_in,
        }
    built = network(
        stages,
        x_class.to(data.x.dtype),
        task.train,
        labels,
        direction=estimator.class_edges,
        append_label=estimator.append_label,
        temperature=estimator.temperature,
        class_edge_attr=estimator.class_edge_attr,
        **options,
    )
    return built


def train_network(
    estimator: "ForwardGNNClassifier",
    network: Any,
    task: NodeTask,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, list[list[dict[str, float]]]]:
    """Train a network; return probabilities, those of the layers, and the histories."""
    data = task.data
    graph: Any = tuple(
        value if value is None else value.detach().to(device)
        for value in (data.x, data.edge_index, data.get("edge_weight"), data.get("edge_attr"))
    )
    held_out: Any = task.validation.to(device), task.codes[task.validation].to(device)
    settings: dict[str, Any] = {
        "lr": estimator.lr,
        "weight_decay": estimator.weight_decay,
        "max_epochs": estimator.max_epochs,
        "val_every": estimator.val_every,
        "patience": estimator.patience,
    }
    if estimator.method in TOP_DOWN:
        clip = estimator.grad_clip
        if estimator.method == "sf_top_to_loss" and clip is None:
            clip = 1.0
        layer_proba, history = _train_top_down(
            network,
            graph,
            held_out,
            cache=estimator.cache_aggregation,
            grad_clip=clip,
            verbose=estimator.verbose,
            settings=settings,
        )
        return layer_proba.mean(0), layer_proba, [history]

    where: dict[str, Any] = {
        "cache": estimator.cache_aggregation,
        "one_hop": estimator.batch_size is not None,
        "chunk": None if estimator.batch_size is None else max(estimator.batch_size, 1024),
    }
    training: SingleForwardTraining | ForwardForwardTraining
    if estimator.method == "sf":
        training = SingleForwardTraining(network, *graph, *held_out, **where)
    else:
        wrong = _wrong_labels(estimator, task, seed).to(device)
        training = ForwardForwardTraining(
            network, *graph, *held_out, wrong_labels=wrong, theta=estimator.theta, **where
        )
    fingerprint = settings | {
        "method": estimator.method,
        "classes": len(task.classes),
        "nodes": len(data.x),
        "edges": data.num_edges,
        "sum of features": float(data.x.double().sum()),
        "sum of training nodes": int(task.train.sum()),
        "temperature": estimator.temperature,
        "theta": estimator.theta,
        "grad_clip": estimator.grad_clip,
        "class_edges": estimator.class_edges,
        "append_label": estimator.append_label,
        "seed": seed,
    }
    histories = train_layers(
        training,
        **settings,
        batch_size=estimator.batch_size,
        grad_clip=estimator.grad_clip,
        seed=derived_seed(seed, 2),
        verbose=estimator.verbose,
        checkpoint_dir=estimator.checkpoint_dir,
        resume_from=estimator.resume_from,
        fingerprint=fingerprint,
    )
    layer_proba = torch.stack(training.layer_proba)
    if isinstance(training, ForwardForwardTraining):
        return training.proba(), layer_proba, histories
    return layer_proba.mean(0), layer_proba, histories


def _train_top_down(
    network: Any,
    graph: tuple[Any, ...],
    held_out: tuple[Tensor, Tensor],
    *,
    cache: bool,
    grad_clip: float | None,
    verbose: int,
    settings: dict[str, Any],
) -> tuple[Tensor, list[dict[str, float]]]:
    h, full = network.augment(*graph)
    fixed = network.fixed_inputs(network.with_labels(h, 0))
    run = StageRunner(network.stages, full, fixed, cache)
    nodes, labels = network.train_nodes, network.train_labels

    @torch.no_grad()
    def score() -> float:
        predicted = network.layer_proba(fixed, run).sum(0)[held_out[0]].argmax(1)
        return (predicted == held_out[1]).float().mean().item()

    history = train_top_down(
        network,
        fixed,
        run,
        lambda logits: torch.nn.functional.cross_entropy(logits[nodes], labels),
        score,
        grad_clip=grad_clip,
        verbose=verbose,
        **settings,
    )
    with torch.no_grad():
        return network.layer_proba(fixed, run), history


def _wrong_labels(estimator: "ForwardGNNClassifier", task: NodeTask, seed: int) -> Tensor:
    n_classes, labels = len(task.classes), task.codes[task.train]
    given = estimator.wrong_labels
    if given is None:
        wanted = estimator.num_negatives or n_classes - 1
        return draw_wrong_labels(
            labels, n_classes, min(wanted, n_classes - 1), derived_seed(seed, 1)
        )
    given = torch.as_tensor(given)
    check_shape("wrong_labels", given, (None, len(labels)))
    if not len(given) or bool((given < 0).any() | (given >= n_classes).any()):
        raise ValueError(f"wrong_labels must be in 0, ..., {n_classes - 1}, got others")
    if bool((given == labels).any()):
        raise ValueError("wrong_labels must differ from the true classes, but some are equal")
    return given
