"""Train the layers of a graph network one after the other, each by its own loss.

A task says what a layer reads, what it is to learn and how it is scored. This module runs the
epochs: full batches or minibatches (shared among processes when torch.distributed is running),
early stopping, and a checkpoint of every layer that is done.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from sciml._checkpoint import load_checkpoint, save_checkpoint
from sciml.graphs.stages import GraphStage
from sciml.layerwise import train_locally

__all__ = ["LayerTask", "SharedBatches", "derived_seed", "torch_device", "train_layers"]


class LayerTask(Protocol):
    """What `train_layers` asks of a training task."""

    stages: list[GraphStage]
    n_samples: int

    def prepare(self, layer: int) -> None:
        """Fix the input of a layer."""

    def loss(self, batch: Tensor | None = None) -> Tensor:
        """Return the mean loss over all samples, or those at places `batch`."""

    def score(self) -> float:
        """Return the validation score so far; larger is better."""

    def freeze(self) -> None:
        """Compute the output of the layer, once it is trained."""


class SharedBatches:
    """Random minibatches of an epoch, of which every process gets its share.

    All processes draw the same permutation, so that the shares of a batch are disjoint and add up
    to the batch that a single process would have taken.

    Parameters
    ----------
    n_samples, batch_size : int
    seed : int
        The same on all processes.
    """

    def __init__(self, n_samples: int, batch_size: int, seed: int) -> None:
        self.n_samples, self.batch_size = n_samples, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        rank, world = process_rank()
        order = torch.randperm(self.n_samples, generator=self.generator)
        for batch in order.split(self.batch_size):
            share = batch[rank::world]
            # A process without a share runs one sample for nothing: all must take part.
            yield (share, len(share) / len(batch)) if len(share) else (batch[:1], 0.0)


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of those that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(loss: Tensor) -> Tensor:
    """Return a loss with the value summed over all processes and the gradient of this one."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return loss + (total - loss.detach())


def derived_seed(seed: int, use: int) -> int:
    """Return a seed for one of several uses, so that their draws are independent."""
    return int(np.random.SeedSequence(seed).generate_state(use + 1)[use])


def torch_device(device: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def train_layers(
    task: LayerTask,
    *,
    lr: float,
    weight_decay: float,
    max_epochs: int,
    val_every: int,
    patience: int | None,
    batch_size: int | None,
    grad_clip: float | None,
    seed: int,
    verbose: int,
    checkpoint_dir: str | os.PathLike[str] | None,
    resume_from: str | os.PathLike[str] | None,
    fingerprint: Mapping[str, Any],
) -> list[list[dict[str, float]]]:
    """Train all layers of a task and return one history per layer.

    Parameters
    ----------
    task : LayerTask
    lr, weight_decay : float
        Of one Adam per layer.
    max_epochs : int
        Per layer.
    val_every : int
        Epochs from one evaluation to the next.
    patience : int or None
        Evaluations without improvement after which a layer stops; its best state is restored.
        None trains for `max_epochs` without validation.
    batch_size : int or None
        Samples per step; None takes all.
    grad_clip : float or None
        Largest norm of a layer's gradient.
    seed : int
        Draws the order of the minibatches and dropout; torch's global generators are seeded by it.
    verbose : int
        Show progress if positive.
    checkpoint_dir, resume_from : path or None
        Where finished layers are written to and read from.
    fingerprint : mapping
        What must be the same when training resumes, as JSON-serialisable values.

    Returns
    -------
    list of list of dict
        For every layer what `sciml.layerwise.train_locally` returns.
    """
    histories = []
    for layer, stage in enumerate(task.stages):
        task.prepare(layer)
        # Dropout draws from the global generator; so it does the same after a resumption.
        torch.manual_seed(seed + layer)
        one_line = " ".join(str(stage).split())
        fingerprint = {**fingerprint, "stage": one_line, "batch_size": batch_size}
        done = None if resume_from is None else load_layer(resume_from, layer, fingerprint)
        if done is not None:
            state, history = done
            stage.load_state_dict(state)
        else:
            history = _train_layer(
                task,
                stage,
                optimizer=torch.optim.Adam(stage.parameters(), lr=lr, weight_decay=weight_decay),
                max_epochs=max_epochs,
                val_every=val_every,
                patience=patience,
                batch_size=batch_size,
                grad_clip=grad_clip,
                seed=seed + layer,
                progress=f"layer {layer + 1}/{len(task.stages)}" if verbose else None,
            )
        task.freeze()
        histories.append(history)
        if checkpoint_dir is not None and process_rank()[0] == 0:
            metadata = {"fingerprint": fingerprint, "history": history}
            save_checkpoint(layer_path(checkpoint_dir, layer), stage.state_dict(), metadata)
    return histories


def layer_path(folder: str | os.PathLike[str], layer: int) -> Path:
    """Return the file of a layer's checkpoint."""
    return Path(folder) / f"layer_{layer + 1}.safetensors"


def load_layer(
    folder: str | os.PathLike[str], layer: int, fingerprint: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[dict[str, float]]] | None:
    """Read the checkpoint of a layer, or return None if that layer was not finished."""
    path = layer_path(folder, layer)
    if not path.exists():
        return None
    state, metadata = load_checkpoint(path)
    saved = metadata["fingerprint"]
    if differing := [key for key in fingerprint if saved.get(key) != fingerprint[key]]:
        listed = ", ".join(
            f"{key} ({saved.get(key)} then, {fingerprint[key]} now)" for key in differing
        )
        raise ValueError(f"resume_from={str(folder)!r} holds layers of another training: {listed}")
    return state, metadata["history"]


def _train_layer(
    task: LayerTask,
    stage: GraphStage,
    *,
    optimizer: torch.optim.Optimizer,
    max_epochs: int,
    val_every: int,
    patience: int | None,
    batch_size: int | None,
    grad_clip: float | None,
    seed: int,
    progress: str | None,
) -> list[dict[str, float]]:
    shared = batch_size is not None and process_rank()[1] > 1

    def loss(_: torch.nn.Module, batch: tuple[Tensor, float] | None) -> Tensor:
        if batch is None:
            return task.loss()
        part = task.loss(batch[0]) * batch[1]
        return sum_over_processes(part) if shared else part

    hooks = []
    if shared:
        # Right after backward, so that clipping sees the gradient of the whole batch.
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
            for parameter in stage.parameters()
        ]
    history = train_locally(
        stage,
        loss,
        None if batch_size is None else SharedBatches(task.n_samples, batch_size, seed),
        optimizer=optimizer,
        max_epochs=max_epochs,
        validate=None if patience is None else lambda _: task.score(),
        val_every=val_every,
        n_iter_no_change=patience,
        grad_clip=grad_clip,
        progress=progress,
    )
    for hook in hooks:
        hook.remove()
    return history
