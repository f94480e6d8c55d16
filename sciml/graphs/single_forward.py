"""Train a graph neural network layer by layer against class nodes, in a single forward pass.

The graph gets one node per class, linked to the training nodes of that class. Each layer learns to
place the training nodes near their class node,

    z = ReLU(conv(h / ||h||)),    loss = cross entropy of softmax(z_i . z_class / temperature),

with h the frozen output of the layer below, so that nothing is kept for a backward pass through
other layers. Every layer predicts, and the prediction of the network is the mean of the layers'
softmaxes.

References
----------
Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, arXiv:2403.11004.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sciml.graphs.class_nodes import append_labels, class_edges
from sciml.graphs.frozen_aggregation import FixedGraph, FrozenInput
from sciml.graphs.stages import GraphStage, unit_rows

__all__ = ["ClassNodeGNN", "SingleForwardGNN", "SingleForwardTraining", "class_logits"]


def class_logits(z: Tensor, z_class: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the dot products of node and class embeddings, divided by a temperature.

    Parameters
    ----------
    z : Tensor of shape (n_nodes, n_channels)
        Embeddings of nodes.
    z_class : Tensor of shape (n_classes, n_channels)
        Embeddings of the class nodes.
    temperature : float, default=1.0
        Positive.

    Returns
    -------
    Tensor of shape (n_nodes, n_classes)
    """
    return z @ z_class.T / temperature


class ClassNodeGNN(nn.Module):
    """Base of the networks that add class nodes to the graph they are given.

    Parameters
    ----------
    stages : sequence of GraphStage
    x_class : Tensor of shape (n_classes, n_features)
        Features of the class nodes.
    train_nodes, train_labels : LongTensor of shape (n_train,)
        Nodes whose class is known, and these classes.
    direction : {"bidirectional", "to_class"}, default="bidirectional"
        Edges both ways or from the nodes to the class nodes only.
    append_label : {None, "input", "all"}, default=None
        Append label columns to the input of the first layer, or of all.
    temperature : float, default=1.0
        Divides the logits.
    class_edge_attr : float or None, default=None
        Value of the edge features of class edges.
    """

    stages: Any  # ModuleList of GraphStage
    x_class: Tensor
    train_nodes: Tensor
    train_labels: Tensor

    def __init__(
        self,
        stages: Sequence[GraphStage],
        x_class: Tensor,
        train_nodes: Tensor,
        train_labels: Tensor,
        *,
        direction: str = "bidirectional",
        append_label: str | None = None,
        temperature: float = 1.0,
        class_edge_attr: float | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.register_buffer("x_class", x_class)
        self.register_buffer("train_nodes", train_nodes)
        self.register_buffer("train_labels", train_labels)
        self.direction = direction
        self.append_label = append_label
        self.temperature = temperature
        self.class_edge_attr = class_edge_attr

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.x_class)

    def augment(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        nodes: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, FixedGraph]:
        """Add the class nodes, linked to `nodes` by `labels` (default: the training nodes)."""
        nodes = self.train_nodes if nodes is None else nodes
        labels = self.train_labels if labels is None else labels
        new = class_edges(nodes, labels, len(x), self.direction)
        if edge_weight is not None:
            edge_weight = torch.cat([edge_weight, edge_weight.new_ones(new.shape[1])])
        if edge_attr is not None:
            fill = edge_attr.new_full(
                (new.shape[1], *edge_attr.shape[1:]), self.class_edge_attr or 0.0
            )
            edge_attr = torch.cat([edge_attr, fill])
        x = torch.cat([x, self.x_class.to(x)])
        edges = torch.cat([edge_index, new], 1)
        return x, FixedGraph(edges, len(x), edge_weight, edge_attr)

    def with_labels(self, h: Tensor, layer: int) -> Tensor:
        """Append the label columns to the input of a layer, where it is to have them."""
        if self.append_label == "all" or (self.append_label == "input" and layer == 0):
            return append_labels(
                h, self.train_nodes, self.train_labels, self.num_classes, class_nodes=True
            )
        return h


class SingleForwardGNN(ClassNodeGNN):
    """Predict the classes of the nodes of a graph by dot products with class nodes.

    An ordinary module: what `ForwardGNNClassifier.export` returns for ``method="sf"``.
    Parameters are those of `ClassNodeGNN`.
    """

    def layer_logits(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the logits of every layer, each of shape (n_nodes, n_classes)."""
        h, graph = self.augment(x, edge_index, edge_weight, edge_attr)
        logits = []
        for layer, stage in enumerate(self.stages):
            h = unit_rows(self.with_labels(h, layer))
            h = stage(h, graph.edge_index, graph.edge_weight, graph.edge_attr)
            logits.append(class_logits(h[: len(x)], h[len(x) :], self.temperature))
        return logits

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
        logits = self.layer_logits(x, edge_index, edge_weight, edge_attr)
        return torch.stack([z.softmax(1) for z in logits]).mean(0).log()


class SingleForwardTraining:
    """The local losses of a `SingleForwardGNN` on one graph, layer after layer.

    Parameters
    ----------
    network : SingleForwardGNN
    x, edge_index, edge_weight, edge_attr : Tensor
        The graph, without class nodes.
    validation_nodes, validation_labels : LongTensor of shape (n_validation,)
        Nodes on which `score` is computed.
    cache, one_hop : bool
        See `FrozenInput`.
    chunk : int or None
        Nodes per step where nothing is learned; needs `one_hop`.
    """

    def __init__(
        self,
        network: SingleForwardGNN,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None,
        edge_attr: Tensor | None,
        validation_nodes: Tensor,
        validation_labels: Tensor,
        *,
        cache: bool = True,
        one_hop: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.network = network
        self.stages: list[GraphStage] = list(network.stages)
        self.n_nodes = len(x)
        self.h, self.graph = network.augment(x, edge_index, edge_weight, edge_attr)
        self.class_nodes = torch.arange(self.n_nodes, len(self.h), device=x.device)
        self.labels = network.train_labels
        self.n_samples = len(self.labels)
        self.validation_nodes, self.validation_labels = validation_nodes, validation_labels
        self.frozen_proba = torch.zeros(self.n_nodes, network.num_classes, device=x.device)
        self.layer_proba: list[Tensor] = []
        self.cache, self.one_hop, self.chunk = cache, one_hop, chunk

    def prepare(self, layer: int) -> None:
        """Fix the input of a layer: the output of the one below, rows scaled to norm 1."""
        h = unit_rows(self.network.with_labels(self.h, layer))
        self.input = FrozenInput(
            self.stages[layer], h, self.graph, cache=self.cache, one_hop=self.one_hop
        )
        # The loss reads the training and class nodes only, validation those to validate.
        train = torch.cat([self.network.train_nodes, self.class_nodes])
        self.train_output = None if self.one_hop else self.input.at(train)
        held_out = torch.cat([self.validation_nodes, self.class_nodes])
        self.validation_output = None if self.one_hop else self.input.at(held_out)

    def loss(self, batch: Tensor | None = None) -> Tensor:
        """Return the mean cross entropy of the training nodes, or of those at places `batch`."""
        if self.train_output is not None and batch is None:
            z, labels = self.train_output(), self.labels
        else:
            nodes, labels = self.network.train_nodes, self.labels
            if batch is not None:
                nodes, labels = nodes[batch], labels[batch]
            z = self.input(torch.cat([nodes, self.class_nodes]))
        return nn.functional.cross_entropy(self._logits(z), labels)

    @torch.no_grad()
    def score(self) -> float:
        """Return the accuracy on the validation nodes of this and all frozen layers together."""
        nodes = self.validation_nodes
        if self.validation_output is not None:
            logits = self._logits(self.validation_output())
        else:
            z_class = self.input(self.class_nodes)
            chunks = nodes.split(self.chunk or len(nodes))
            z = torch.cat([self.input(chunk) for chunk in chunks])
            logits = class_logits(z, z_class, self.network.temperature)
        proba = self.frozen_proba[nodes] + logits.softmax(1)
        return (proba.argmax(1) == self.validation_labels).float().mean().item()

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute the output of the trained layer, which the next one reads."""
        self.h = self.input.output(self.chunk)
        self.layer_proba.append(self._logits(self.h).softmax(1))
        self.frozen_proba += self.layer_proba[-1]
        del self.input, self.train_output, self.validation_output

    def _logits(self, z: Tensor) -> Tensor:
        last = len(z) - self.network.num_classes
        return class_logits(z[:last], z[last:], self.network.temperature)
