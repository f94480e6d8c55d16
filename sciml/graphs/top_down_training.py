"""Train top-down networks: all layers take a step at every time step, with one early stopping."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sciml.graphs.top_down import StageRunner, TopDownGNN, top_down_step

__all__ = ["train_top_down"]


def train_top_down(
    network: TopDownGNN,
    x: Tensor,
    edge_index: Tensor,
    edge_weight: Tensor | None,
    edge_attr: Tensor | None,
    validation_nodes: Tensor,
    validation_labels: Tensor,
    *,
    lr: float,
    weight_decay: float,
    max_epochs: int,
    val_every: int,
    patience: int | None,
    grad_clip: float | None,
    cache: bool,
    verbose: int,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Train all layers of a network together, each by its own loss.

    Parameters
    ----------
    network : TopToLossGNN or TopToInputGNN
        Trained in place; the best state is restored.
    x, edge_index, edge_weight, edge_attr : Tensor
        The graph, without class nodes.
    validation_nodes, validation_labels : LongTensor of shape (n_validation,)
    lr, weight_decay, max_epochs, val_every, patience, grad_clip, cache, verbose
        As in `ForwardGNNClassifier`.

    Returns
    -------
    layer_proba : Tensor of shape (n_layers, n_nodes, n_classes)
        Of the trained network.
    history : list of dict
        As `sciml.layerwise.train_locally` returns it; the loss is the mean over the layers.
    """
    h, graph = network.augment(x, edge_index, edge_weight, edge_attr)
    fixed = network.fixed_inputs(network.with_labels(h, 0))
    run = StageRunner(network.stages, graph, fixed, cache)
    optimizers = [
        torch.optim.Adam(stage.parameters(), lr=lr, weight_decay=weight_decay)
        for stage in network.stages
    ]
    nodes, labels = network.train_nodes, network.train_labels
    losses: list[float] = []

    def learn(layer: int, logits: Tensor) -> None:
        loss = nn.functional.cross_entropy(logits[nodes], labels)
        optimizers[layer].zero_grad()
        loss.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(network.stages[layer].parameters(), grad_clip)
        optimizers[layer].step()
        losses.append(loss.item())

    @torch.no_grad()
    def predict() -> Tensor:
        network.eval()
        return network.layer_proba(fixed, run)

    history: list[dict[str, float]] = []
    best_score, best_state, waited = -1.0, None, 0
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
        predicted = predict().sum(0)[validation_nodes].argmax(1)
        score = (predicted == validation_labels).float().mean().item()
        history[-1]["val_score"] = score
        if score > best_score:
            best_score, waited = score, 0
            best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        else:
            waited += 1
            if waited >= patience:
                break
    if best_state is not None:
        network.load_state_dict(best_state)
    for optimizer in optimizers:
        optimizer.zero_grad()
    return predict(), history
