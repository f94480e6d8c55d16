"""Train a graph neural network with the Forward-Forward algorithm, two ways to show it a class.

Each layer learns to have a large goodness g_i = sum_j z_ij^2 at nodes that are shown their true
class and a small one at nodes that are shown a wrong class,

    loss = mean softplus(theta - g_i^true) + mean over wrong classes of mean softplus(g_i - theta).

The class is shown by label columns appended to the features (FF-LA) or by an edge to a class node
(FF-VN). To predict, every class is tried on the nodes in question, and the one with the largest
mean square of the embeddings, summed over the layers, is taken: one pass per class.

References
----------
Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, arXiv:2403.11004.
Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.
"""

import torch
from torch import Tensor, nn

from sciml._check import check_interval
from sciml.graphs.class_nodes import append_labels
from sciml.graphs.frozen_aggregation import FixedGraph, FrozenInput
from sciml.graphs.single_forward import ClassNodeGNN
from sciml.graphs.stages import GraphStage, unit_rows
from sciml.layerwise import goodness_loss

__all__ = ["ClassNodeFFGNN", "ForwardForwardTraining", "LabelFFGNN", "ff_loss", "goodness"]


def goodness(z: Tensor) -> Tensor:
    """Return the sum of squares of every row.

    Parameters
    ----------
    z : Tensor of shape (..., n_channels)
        Embeddings.

    Returns
    -------
    Tensor of shape (...)

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.

    Examples
    --------
    >>> import torch
    >>> goodness(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([5., 9.])
    """
    return z.square().sum(-1)


def ff_loss(z: Tensor, theta: float, target: int) -> Tensor:
    """Return the loss that pushes goodness above (target 1) or below (target 0) a threshold.

    Parameters
    ----------
    z : Tensor of shape (n, n_channels)
        Embeddings.
    theta : float
        Threshold.
    target : {0, 1}
        1 for positive samples, 0 for negative ones.

    Returns
    -------
    Tensor of shape ()
        Mean binary cross entropy with logits ``goodness(z) - theta``.

    See Also
    --------
    sciml.layerwise.goodness_loss : The same for a mixed batch.

    Raises
    ------
    ValueError
        If `target` is neither 0 nor 1 or `theta` is not finite.

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.

    Examples
    --------
    >>> import torch
    >>> ff_loss(torch.zeros(3, 4), theta=2.0, target=1)
    tensor(2.1269)
    """
    check_interval("theta", theta, float("-inf"), float("inf"), closed="neither")
    if target not in (0, 1):
        raise ValueError(f"target must be 0 or 1, got {target!r}")
    return goodness_loss(z, z.new_full((len(z),), target), theta)


class LabelFFGNN(ClassNodeGNN):
    """Score classes by the goodness of nodes whose features carry the label (FF-LA).

    What `ForwardGNNClassifier.export` returns for ``method="ff_label"``. There are no class nodes;
    ``x_class`` only says how many classes there are. Parameters are those of `ClassNodeGNN`.
    """

    def show(
        self, x: Tensor, graph: FixedGraph, nodes: Tensor, labels: Tensor
    ) -> tuple[Tensor, FixedGraph]:
        """Return features and graph in which `nodes` are shown `labels`."""
        return append_labels(x, nodes, labels, self.num_classes, class_nodes=False), graph

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the log-softmax over classes of the summed goodness, shape (n_nodes, n_classes).

        The graph must begin with the nodes of the training graph, whose labels are known; further
        nodes may follow them.
        """
        graph = FixedGraph(edge_index, len(x), edge_weight, edge_attr)
        return _log_proba(self, x, graph)


class ClassNodeFFGNN(ClassNodeGNN):
    """Score classes by the goodness of nodes linked to a class node (FF-VN).

    What `ForwardGNNClassifier.export` returns for ``method="ff_virtual"``. Parameters are those of
    `ClassNodeGNN`.
    """

    def show(
        self, x: Tensor, graph: FixedGraph, nodes: Tensor, labels: Tensor
    ) -> tuple[Tensor, FixedGraph]:
        """Return features and graph in which `nodes` are shown `labels`."""
        return self.augment(x, graph.edge_index, graph.edge_weight, graph.edge_attr, nodes, labels)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the log-softmax over classes of the summed goodness, shape (n_nodes, n_classes).

        The graph must begin with the nodes of the training graph, whose labels are known; further
        nodes may follow them.
        """
        graph = FixedGraph(edge_index, len(x), edge_weight, edge_attr)
        return _log_proba(self, x, graph)


def _asked_nodes(n_nodes: int, known: Tensor) -> Tensor:
    asked = torch.ones(n_nodes, dtype=torch.bool, device=known.device)
    asked[known] = False
    return asked.nonzero().flatten()


def _log_proba(network: "FFGNN", x: Tensor, graph: FixedGraph) -> Tensor:
    """Try every class on all nodes whose class is unknown; the others get their label."""
    known, labels = network.train_nodes, network.train_labels
    asked = _asked_nodes(len(x), known)
    scores = []
    for c in range(network.num_classes):
        classes = torch.cat([labels, torch.full_like(asked, c)])
        h, shown = network.show(x, graph, torch.cat([known, asked]), classes)
        total = x.new_zeros(len(x))
        for stage in network.stages:
            h = stage(unit_rows(h), shown.edge_index, shown.edge_weight, shown.edge_attr)
            total = total + h[: len(x)].square().mean(1)
        scores.append(total)
    log_proba = torch.stack(scores, 1).log_softmax(1)
    certain = nn.functional.one_hot(labels, network.num_classes).to(x.dtype).log()
    return log_proba.index_copy(0, known, certain)


FFGNN = LabelFFGNN | ClassNodeFFGNN


class ForwardForwardTraining:
    """The local losses of a `LabelFFGNN` or `ClassNodeFFGNN` on one graph, layer after layer.

    Parameters
    ----------
    network : LabelFFGNN or ClassNodeFFGNN
    x, edge_index, edge_weight, edge_attr : Tensor
        The graph, without class nodes.
    validation_nodes, validation_labels : LongTensor of shape (n_validation,)
        Nodes on which `score` is computed.
    wrong_labels : LongTensor of shape (n_negatives, n_train)
        Wrong classes of the training nodes, one row per negative graph.
    theta : float
        Threshold of the goodness.
    cache, one_hop, chunk
        See `SingleForwardTraining`.
    """

    def __init__(
        self,
        network: FFGNN,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None,
        edge_attr: Tensor | None,
        validation_nodes: Tensor,
        validation_labels: Tensor,
        *,
        wrong_labels: Tensor,
        theta: float,
        cache: bool = True,
        one_hop: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.network = network
        self.stages: list[GraphStage] = list(network.stages)
        self.n_nodes, self.n_samples = len(x), len(network.train_nodes)
        self.validation_nodes, self.validation_labels = validation_nodes, validation_labels
        self.theta, self.cache, self.one_hop, self.chunk = theta, cache, one_hop, chunk
        graph = FixedGraph(edge_index, len(x), edge_weight, edge_attr)
        known, labels = network.train_nodes, network.train_labels
        # Positive samples first, then the negative ones.
        self.trained = [network.show(x, graph, known, shown) for shown in (labels, *wrong_labels)]
        asked = _asked_nodes(len(x), known)
        everyone = torch.cat([known, asked])
        self.tried = [
            network.show(x, graph, everyone, torch.cat([labels, torch.full_like(asked, c)]))
            for c in range(network.num_classes)
        ]
        self.frozen_scores = x.new_zeros(len(x), network.num_classes)
        self.layer_proba: list[Tensor] = []

    def prepare(self, layer: int) -> None:
        """Fix the inputs of a layer: one for each set of shown labels."""
        stage = self.stages[layer]

        def frozen(h: Tensor, graph: FixedGraph) -> FrozenInput:
            return FrozenInput(stage, unit_rows(h), graph, cache=self.cache, one_hop=self.one_hop)

        self.trained_inputs = [frozen(h, graph) for h, graph in self.trained]
        self.tried_inputs = [frozen(h, graph) for h, graph in self.tried]
        if not self.one_hop:
            nodes, held_out = self.network.train_nodes, self.validation_nodes
            self.train_outputs = [inputs.at(nodes) for inputs in self.trained_inputs]
            self.validation_outputs = [inputs.at(held_out) for inputs in self.tried_inputs]

    def loss(self, batch: Tensor | None = None) -> Tensor:
        """Return the loss of the training nodes, or of those at places `batch`."""
        if batch is None and not self.one_hop:
            outputs = (output() for output in self.train_outputs)
        else:
            nodes = self.network.train_nodes
            nodes = nodes if batch is None else nodes[batch]
            outputs = (inputs(nodes) for inputs in self.trained_inputs)
        losses = [ff_loss(z, self.theta, int(k == 0)) for k, z in enumerate(outputs)]
        return losses[0] + torch.stack(losses[1:]).mean()

    @torch.no_grad()
    def score(self) -> float:
        """Return the accuracy on the validation nodes of this and all frozen layers together."""
        nodes = self.validation_nodes
        if self.one_hop:
            scores = self._scores(nodes)
        else:
            squares = [output().square().mean(1) for output in self.validation_outputs]
            scores = torch.stack(squares, 1)
        total = self.frozen_scores[nodes] + scores
        return (total.argmax(1) == self.validation_labels).float().mean().item()

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute the outputs of the trained layer, which the next one reads."""
        outputs = [inputs.output(self.chunk) for inputs in self.trained_inputs]
        if isinstance(self.network, ClassNodeFFGNN):
            # The negative graphs differ by their edges; all go on from the positive features.
            outputs = [outputs[0]] * len(outputs)
        self.trained = [(h, graph) for h, (_, graph) in zip(outputs, self.trained, strict=True)]
        outputs = [inputs.output(self.chunk) for inputs in self.tried_inputs]
        self.tried = [(h, graph) for h, (_, graph) in zip(outputs, self.tried, strict=True)]
        scores = torch.stack([h[: self.n_nodes].square().mean(1) for h in outputs], 1)
        self.frozen_scores += scores
        self.layer_proba.append(self._proba(scores))
        del self.trained_inputs, self.tried_inputs
        if not self.one_hop:
            del self.train_outputs, self.validation_outputs

    def proba(self) -> Tensor:
        """Return the class probabilities by all frozen layers, shape (n_nodes, n_classes)."""
        return self._proba(self.frozen_scores)

    def _proba(self, scores: Tensor) -> Tensor:
        # A training node was shown its own class at every try: only its label is known.
        proba = scores.softmax(1)
        known = nn.functional.one_hot(self.network.train_labels, self.network.num_classes)
        proba[self.network.train_nodes] = known.to(proba.dtype)
        return proba

    def _scores(self, nodes: Tensor) -> Tensor:
        columns = []
        for inputs in self.tried_inputs:
            chunks = [inputs(chunk).square().mean(1) for chunk in nodes.split(self.chunk or 1024)]
            columns.append(torch.cat(chunks))
        return torch.stack(columns, 1)
