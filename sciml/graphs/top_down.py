"""Train all layers of a graph neural network at once, with signals from the layers above.

Layers still learn from local losses on detached inputs, but at every time step all of them take a
step, reading the states that the others left at the step before. The layers above reach a layer
j in one of two ways:

- *top-to-loss*: its output is averaged with the states of the layers above in its loss;
- *top-to-input*: the state of the layer above is a second input, next to the one below. The top
  layer sees the known labels.

References
----------
Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, arXiv:2403.11004.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sciml.graphs.class_nodes import append_labels
from sciml.graphs.frozen_aggregation import FixedGraph, aggregate, aggregates_once, transform
from sciml.graphs.single_forward import ClassNodeGNN, class_logits
from sciml.graphs.stages import GraphStage, unit_rows
from sciml.layerwise import train_locally

__all__ = [
    "StageRunner",
    "TopDownNetwork",
    "TopToInputGNN",
    "TopToLossGNN",
    "time_step",
    "train_top_down",
]


class StageRunner:
    """Run stages on the columns of several tensors side by side, on one graph.

    Parameters
    ----------
    stages : iterable of GraphStage
    graph : FixedGraph
    fixed : tuple of Tensor, default=()
        Inputs that never change: with `cache`, their neighbours are aggregated once.
    cache : bool, default=False
        Aggregate before the learnable part where the convolution allows it, so that no gradient
        passes through the aggregation.
    """

    def __init__(
        self,
        stages: Iterable[GraphStage],
        graph: FixedGraph,
        fixed: tuple[Tensor, ...] = (),
        cache: bool = False,
    ) -> None:
        self.stages, self.graph, self.fixed, self.cache = list(stages), graph, fixed, cache
        self._aggregated: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def __call__(self, layer: int, *parts: Tensor) -> Tensor:
        """Return the output of a stage whose input has the columns of all `parts`."""
        stage, graph = self.stages[layer], self.graph
        if not (self.cache and aggregates_once(stage.conv)):
            x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            return stage(x, graph.edge_index, graph.edge_weight, graph.edge_attr)
        # Aggregation works on each column by itself.
        tables = [self._aggregate(layer, stage.conv, part) for part in parts]
        joined = (
            tables[0]
            if len(parts) == 1
            else tuple(torch.cat(t, 1) for t in zip(*tables, strict=True))
        )
        return stage.finish(transform(stage.conv, joined))

    def _aggregate(self, layer: int, conv: nn.Module, part: Tensor) -> tuple[Tensor, ...]:
        for place, fixed in enumerate(self.fixed):
            if part is fixed:
                if (layer, place) not in self._aggregated:
                    self._aggregated[layer, place] = aggregate(conv, part, self.graph)
                return self._aggregated[layer, place]
        return aggregate(conv, part, self.graph)


class TopToLossGNN(ClassNodeGNN):
    """Average a layer's embedding with the states of the layers above it, then predict.

    What `ForwardGNNClassifier.export` returns for ``method="sf_top_to_loss"``. Parameters are
    those of `ClassNodeGNN`; all stages have the same width.
    """

    def fixed_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the layers read and never changes: the features, scaled and as they are."""
        return (unit_rows(x), x)

    def start(self, fixed: tuple[Tensor, ...], run: StageRunner) -> list[Tensor]:
        """Return the states of a bottom-up pass, which feeds outputs upwards unscaled."""
        states, h = [fixed[0]], fixed[1]
        for layer in range(len(self.stages)):
            h = run(layer, h)
            states.append(unit_rows(h))
        return states

    @property
    def groups(self) -> list[list[int]]:
        """Layers that are updated together: all."""
        return [list(range(len(self.stages)))]

    def output(self, states: list[Tensor], layer: int, run: StageRunner) -> Tensor:
        """Return the output of a layer, given all states."""
        return run(layer, states[layer])

    def logits(self, output: Tensor, states: list[Tensor], layer: int) -> Tensor:
        """Return the class logits of all nodes after averaging with the states above."""
        mean = torch.stack([output, *states[layer + 2 :]]).mean(0)
        last = len(mean) - self.num_classes
        return class_logits(mean[:last], mean[last:], self.temperature)

    def state(self, output: Tensor) -> Tensor:
        """Return the state that an output becomes."""
        return unit_rows(output)

    def layer_proba(self, fixed: tuple[Tensor, ...], run: StageRunner) -> Tensor:
        """Return the softmaxes of all layers, shape (n_layers, n_nodes, n_classes)."""
        states = self.start(fixed, run)
        layers = range(len(self.stages))
        outputs = [self.output(states, layer, run) for layer in layers]
        return torch.stack(
            [
                self.logits(o, states, layer).softmax(1)
                for layer, o in zip(layers, outputs, strict=True)
            ]
        )

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probabilities, shape (n_nodes, n_classes).

        The graph must begin with the nodes of the training graph, whose labels are known; further
        nodes may follow them.
        """
        h, graph = self.augment(x, edge_index, edge_weight, edge_attr)
        fixed = self.fixed_inputs(self.with_labels(h, 0))
        return self.layer_proba(fixed, StageRunner(self.stages, graph)).mean(0).log()


class TopToInputGNN(ClassNodeGNN):
    """Give every layer the state above it as a second input, then predict.

    What `ForwardGNNClassifier.export` returns for ``method="sf_top_to_input"``.

    Parameters
    ----------
    stages, x_class, train_nodes, train_labels, direction, append_label, temperature, \
    class_edge_attr
        Those of `ClassNodeGNN`.
    widths : sequence of int
        Of the features, of every layer, and the number of classes. The input of layer j has
        ``widths[j] + widths[j + 2]`` columns.
    alternating : bool, default=True
        Update layers 1, 3, ... and then 2, 4, ... within a step rather than all at once.
    eval_steps, eval_burn_in : int, default=10 and 2
        Steps without learning when predicting, and how many of them are left out of the mean.
    """

    def __init__(
        self,
        stages: Sequence[GraphStage],
        x_class: Tensor,
        train_nodes: Tensor,
        train_labels: Tensor,
        *,
        widths: Sequence[int],
        direction: str = "bidirectional",
        append_label: str | None = None,
        temperature: float = 1.0,
        class_edge_attr: float | None = None,
        alternating: bool = True,
        eval_steps: int = 10,
        eval_burn_in: int = 2,
    ) -> None:
        super().__init__(
            stages,
            x_class,
            train_nodes,
            train_labels,
            direction=direction,
            append_label=append_label,
            temperature=temperature,
            class_edge_attr=class_edge_attr,
        )
        self.widths = list(widths)
        self.alternating = alternating
        self.eval_steps, self.eval_burn_in = eval_steps, eval_burn_in

    def fixed_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the layers read and never changes: the features and the known labels."""
        empty = x[:, :0]
        labels = append_labels(
            empty, self.train_nodes, self.train_labels, self.num_classes, class_nodes=True
        )
        return (unit_rows(x), unit_rows(labels))

    def start(self, fixed: tuple[Tensor, ...], run: StageRunner) -> list[Tensor]:
        """Return the states of a bottom-up pass in which all states above are zero."""
        x, labels = fixed
        states = [x]
        for layer in range(len(self.stages)):
            below = states[-1] if layer == 0 else unit_rows(states[-1])
            above = x.new_zeros(len(x), self.widths[layer + 2])
            states.append(run(layer, below, above))
        return [*states, labels]

    def output(self, states: list[Tensor], layer: int, run: StageRunner) -> Tensor:
        """Return the output of a layer, given all states."""
        last = len(self.stages) - 1
        below = states[layer] if layer == 0 else unit_rows(states[layer])
        above = states[layer + 2] if layer == last else unit_rows(states[layer + 2])
        return run(layer, below, above)

    def logits(self, output: Tensor, states: list[Tensor], layer: int) -> Tensor:
        """Return the class logits of all nodes."""
        last = len(output) - self.num_classes
        return class_logits(output[:last], output[last:], self.temperature)

    def state(self, output: Tensor) -> Tensor:
        """Return the state that an output becomes."""
        return output

    @property
    def groups(self) -> list[list[int]]:
        """Layers that are updated together, group after group."""
        layers = list(range(len(self.stages)))
        return [g for g in (layers[::2], layers[1::2]) if g] if self.alternating else [layers]

    def layer_proba(self, fixed: tuple[Tensor, ...], run: StageRunner) -> Tensor:
        """Return the mean softmaxes of all layers, shape (n_layers, n_nodes, n_classes)."""
        states = self.start(fixed, run)
        proba = torch.zeros(())
        for step in range(self.eval_steps):
            logits = time_step(self, states, run)
            if step >= self.eval_burn_in:
                proba = torch.stack([z.softmax(1) for z in logits]) + proba.to(logits[0])
        return proba / (self.eval_steps - self.eval_burn_in)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probabilities, shape (n_nodes, n_classes).

        The graph must begin with the nodes of the training graph, whose labels are known; further
        nodes may follow them.
        """
        h, graph = self.augment(x, edge_index, edge_weight, edge_attr)
        fixed = self.fixed_inputs(self.with_labels(h, 0))
        return self.layer_proba(fixed, StageRunner(self.stages, graph)).mean(0).log()


class TopDownNetwork(Protocol):
    """What a time step asks of a network."""

    stages: Any

    @property
    def groups(self) -> list[list[int]]:
        """Layers that are updated together, group after group."""

    def start(self, fixed: tuple[Tensor, ...], run: StageRunner) -> list[Tensor]:
        """Return the first states."""

    def output(self, states: list[Tensor], layer: int, run: StageRunner) -> Tensor:
        """Return the output of a layer, given all states."""

    def logits(self, output: Tensor, states: list[Tensor], layer: int) -> Tensor:
        """Return what the loss of a layer reads."""

    def state(self, output: Tensor) -> Tensor:
        """Return the state that an output becomes."""


def group_step(
    network: TopDownNetwork, group: list[int], states: list[Tensor], run: StageRunner
) -> Iterator[Tensor]:
    """Yield the logits of the layers of a group, then replace their states in place.

    A layer may be updated between its logits and the next: its state becomes the output that it had
    before, and the layers of a group read the states that were there before all of them.
    """
    outputs = []
    for layer in group:
        output = network.output(states, layer, run)
        outputs.append(output.detach())
        yield network.logits(output, states, layer)
    for layer, output in zip(group, outputs, strict=True):
        states[layer + 1] = network.state(output)


@torch.no_grad()
def time_step(network: TopDownNetwork, states: list[Tensor], run: StageRunner) -> list[Tensor]:
    """Let all layers compute once from the newest states, which are replaced in place.

    Returns
    -------
    list of Tensor
        The logits of the layers.
    """
    logits: list[Tensor] = [torch.empty(0)] * len(network.stages)
    for group in network.groups:
        for layer, z in zip(group, group_step(network, group, states, run), strict=True):
            logits[layer] = z
    return logits


def train_top_down(
    network: Any,
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
    """Train all layers of a network together, each by its own loss: an epoch is a time step.

    Parameters
    ----------
    network : TopDownNetwork and torch.nn.Module
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
        As in `ForwardGNNClassifier`.

    Returns
    -------
    list of dict
        As `sciml.layerwise.train_locally` returns it; the loss is the mean over the layers.
    """
    network.eval()
    with torch.no_grad():
        states = network.start(fixed, run)

    def losses(_: nn.Module, group: list[int]) -> Iterator[Tensor]:
        logits = group_step(network, group, states, run)
        for layer, z in zip(group, logits, strict=True):
            yield loss(z)
            # The gradient of this layer is there now; every layer is clipped by itself.
            if grad_clip is not None:
                nn.utils.clip_grad_norm_(network.stages[layer].parameters(), grad_clip)

    # Adam passes over parameters without a gradient, so that one of them serves as one per layer.
    history = train_locally(
        network,
        losses,
        network.groups,
        optimizer=torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay),
        max_epochs=max_epochs,
        validate=None if patience is None else lambda _: score(),
        val_every=val_every,
        n_iter_no_change=patience,
        progress="all layers" if verbose else None,
    )
    for entry in history:
        entry["loss"] *= len(network.groups) / len(network.stages)
    return history
