"""Check the parameters of the estimators, before anything is computed."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sciml._check import check_choice, check_integer, check_interval, check_shape
from sciml.graphs.class_nodes import DIRECTIONS
from sciml.graphs.stages import has_fixed_widths

if TYPE_CHECKING:
    from sciml.graphs.forward_gnn import ForwardGNNClassifier

__all__ = [
    "check_parameters",
    "check_training_parameters",
    "derived_seed",
    "node_ids",
    "torch_device",
]

TOP_DOWN = ("sf_top_to_loss", "sf_top_to_input")
FORWARD_FORWARD = ("ff_label", "ff_virtual")
METHODS = ("sf", *TOP_DOWN, *FORWARD_FORWARD)


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


def derived_seed(seed: int, use: int) -> int:
    """Return a seed for one of several uses, so that their draws are independent."""
    return int(np.random.SeedSequence(seed).generate_state(use + 1)[use])


def torch_device(device: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def node_ids(X: Any, n_nodes: int) -> np.ndarray:
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
