"""Train one stage of a network by its own local loss: the engine of all layer-local methods.

A stage reads an input that is fixed while it learns (the detached output of the stage below), so
no gradient leaves it and what backpropagation stores is the stage's own forward pass, however
deep the network. Which loss, which input and which score are the caller's, as plain functions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sciml._check import check_integer, check_interval

__all__ = ["train_locally"]


def train_locally(
    module: nn.Module,
    loss: Callable[[Any, Any], Tensor | Iterator[Tensor]],
    batches: Iterable[Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer,
    max_epochs: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    validate: Callable[[Any], float] | None = None,
    val_every: int = 1,
    n_iter_no_change: int | None = None,
    tol: float = 0.0,
    restore_best: bool = True,
    grad_clip: float | None = None,
    progress: str | None = None,
) -> list[dict[str, float]]:
    """Train a module in place by a local loss, with early stopping; return its history.

    Parameters
    ----------
    module : torch.nn.Module
        The stage. It is put in training mode for every epoch, in evaluation mode for every
        validation and at the end. Its parameters and buffers are what `restore_best` restores.
    loss : callable ``(module, batch) -> Tensor or iterator of Tensors``
        The loss on a batch, a scalar whose graph must not leave the stage (detach the input).
        A generator may yield several scalars, for example one for each of the layers that learn
        in the same sweep: each is backpropagated before the next is asked for, so that memory is
        that of one of them, and then one step is taken for all.
    batches : iterable or None, default=None
        Goes to `loss`, one item a step. It is iterated anew in each epoch (a list, a DataLoader;
        not a generator). None is one full-batch step an epoch, with None for the batch.
    optimizer : torch.optim.Optimizer
        Optimiser over the parameters of the stage.
    max_epochs : int
        Largest number of epochs; 0 trains nothing.
    scheduler : torch.optim.lr_scheduler.LRScheduler or None, default=None
        Learning rate schedule, stepped after each epoch.
    validate : callable ``(module) -> float`` or None, default=None
        Score of the stage; larger is better. It runs with gradients enabled, and the parameters
        do not change between it and the next call of `loss`: a full-batch `loss` may therefore
        use the forward pass that `validate` has kept, and an epoch costs one forward pass.
    val_every : int, default=1
        Number of epochs from one validation to the next.
    n_iter_no_change : int or None, default=None
        Stop after so many validations in a row without improvement; None never stops early.
    tol : float, default=0.0
        A score above the best one so far by more than `tol` is an improvement.
    restore_best : bool, default=True
        Whether the module ends in the state of its best (first best, if equal) validation
        instead of its last. Without `validate` it ends in its last.
    grad_clip : float or None, default=None
        Largest norm of the gradient of all parameters together; None does not clip.
    progress : str or None, default=None
        Label of a progress bar; None shows none.

    Returns
    -------
    list of dict
        One for each epoch: "epoch" (from 1), "loss" (the mean over the batches, taken before each
        step) and, where it was validated, "val_score".

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; `batches` is empty; `n_iter_no_change` comes without
        `validate`; a score is NaN.
    FloatingPointError
        If the loss becomes NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import train_locally
    >>> stage = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> history = train_locally(
    ...     stage,
    ...     lambda stage, batch: (stage(x) - 1).square().mean(),
    ...     optimizer=torch.optim.SGD(stage.parameters(), lr=0.5),
    ...     max_epochs=50,
    ... )
    >>> stage.weight.detach()
    tensor([[1., 1.]])
    """
    check_integer("max_epochs", max_epochs, 0)
    check_integer("val_every", val_every, 1)
    check_interval("tol", tol, 0, math.inf, closed="left")
    if grad_clip is not None:
        check_interval("grad_clip", grad_clip, 0, math.inf, closed="neither")
    if n_iter_no_change is not None:
        check_integer("n_iter_no_change", n_iter_no_change, 1)
        if validate is None:
            raise ValueError(
                f"n_iter_no_change must be None without validate, got {n_iter_no_change}"
            )
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches must be an iterable that can be read once an epoch, such as a list, got the "
            f"iterator {type(batches).__name__}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    history: list[dict[str, float]] = []
    best, best_state, waited = -math.inf, None, 0
    bar = tqdm(range(1, max_epochs + 1), desc=progress, unit="epoch", disable=progress is None)
    for epoch in bar:
        module.train()
        total, steps = torch.zeros(()), 0
        for batch in (None,) if batches is None else batches:
            optimizer.zero_grad()
            terms = loss(module, batch)
            for term in (terms,) if isinstance(terms, Tensor) else terms:
                term.backward()
                # On its own device, as a read on the CPU would wait for a GPU at every step.
                total = total.to(term.device) + term.detach()
            if grad_clip is not None:
                nn.utils.clip_grad_norm_(parameters, grad_clip)
            optimizer.step()
            steps += 1
        if steps == 0:
            raise ValueError("batches must hold one batch or more, got none")
        if scheduler is not None:
            scheduler.step()
        entry: dict[str, float] = {"epoch": epoch, "loss": float(total) / steps}
        history.append(entry)
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(
                f"the loss is {entry['loss']} in epoch {epoch}: lower the learning rate or scale "
                "the data"
            )
        if validate is not None and epoch % val_every == 0:
            module.eval()
            score = float(validate(module))
            if math.isnan(score):
                raise ValueError(f"validate must return a number, got {score} in epoch {epoch}")
            entry["val_score"] = score
            waited = 0 if score > best + tol else waited + 1
            if score > best:
                best = score
                if restore_best:
                    best_state = {k: v.detach().clone() for k, v in module.state_dict().items()}
            if n_iter_no_change is not None and waited >= n_iter_no_change:
                break
        bar.set_postfix({k: f"{v:.4g}" for k, v in entry.items() if k != "epoch"}, refresh=False)
    bar.close()
    if best_state is not None:
        module.load_state_dict(best_state)
    module.eval()
    # Gradients are of no use any more and as large as the stage.
    optimizer.zero_grad(set_to_none=True)
    return history
