"""Train top-down networks: all layers take a step at every time step, with one early stopping."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sciml.graphs.top_down import StageRunner, TopDownNetwork, top_down_step

__all__ = ["train_top_down"]


def train_top_down(
    network: TopDownNetwork,
    fixed: tuple[Tensor, ...],
    run: StageRunner,
    loss: Callable[[Tensor], Tensor],
    score: Callable[[], float],
    *,
    lr: float,
    weight_decay: float,
    max_epochs: int,
    val_every: int,
    patience: int | None,
    grad_clip: float | None,
    verbose: int,
) -> list[dict[str, float]]:
    """Train all layers of a network together, each by its own loss.

    Parameters
    ----------
    network : TopDownNetwork
        Trained in place; the best state is restored, and evaluation mode set.
    fixed : tuple of Tensor
        What `network.fixed_inputs` returned.
    run : StageRunner
        Runs the stages on the training graph.
    loss : callable
        Of what a layer predicts, as `network.logits` returns it.
    score : callable
        Validation score; larger is better. The network is in evaluation mode.
    lr, weight_decay, max_epochs, val_every, patience, grad_clip, verbose
        As in `ForwardGNNClassifier`; one Adam per layer.

    Returns
    -------
    list of dict
        As `sciml.layerwise.train_locally` returns it; the loss is the mean over the layers.
    """
    optimizers = [
        torch.optim.Adam(stage.parameters(), lr=lr, weight_decay=weight_decay)
        for stage in network.stages
    ]
    losses: list[float] = []

    def learn(layer: int, logits: Tensor) -> None:
        value = loss(logits)
        optimizers[layer].zero_grad()
        value.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(network.stages[layer].parameters(), grad_clip)
        optimizers[layer].step()
        losses.append(value.item())

    history: list[dict[str, float]] = []
    best_score, best_state, waited = float("-inf"), None, 0
    network.eval()
    with torch.no_grad():
        states = network.start(fixed, run)
    for epoch in tqdm(range(1, max_epochs + 1), desc="all layers", disable=not verbose):
        network.train()
        losses.clear()
        top_down_step(network, states, run, learn)
        history.append({"epoch": epoch, "loss": sum(losses) / len(losses)})
        if patience is None or epoch % val_every:
            continue
        network.eval()
        with torch.no_grad():
            history[-1]["val_score"] = current = score()
        if current > best_score:
            best_score, waited = current, 0
            best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        else:
            waited += 1
            if waited >= patience:
                break
    if best_state is not None:
        network.load_state_dict(best_state)
    for optimizer in optimizers:
        optimizer.zero_grad()
    network.eval()
    return history
