"""Layers that each score links by the dot products, or the goodness, of their embeddings.

References
----------
Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, arXiv:2403.11004.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch_geometric.data import Data

from sciml._check import check_shape
from sciml.graphs.checks import check_pairs
from sciml.graphs.forward_forward import ff_loss, goodness
from sciml.graphs.frozen_aggregation import FixedGraph, FrozenInput
from sciml.graphs.stages import GraphStage, unit_rows
from sciml.graphs.top_down import StageRunner, time_step

__all__ = [
    "LinkGNN",
    "LinkTraining",
    "TopDownLinkGNN",
    "labelled_pairs",
    "link_loss",
    "link_scores",
]


def link_scores(z: Tensor, pairs: Tensor, objective: str, theta: float) -> Tensor:
    """Return the probability of a link for pairs of nodes, by the embeddings of one layer.

    Parameters
    ----------
    z : Tensor of shape (n_nodes, n_channels)
    pairs : LongTensor of shape (2, n_pairs)
    objective : {"ce", "ff"}
        Sigmoid of the dot product, or of the goodness of the elementwise product minus `theta`.
    theta : float

    Returns
    -------
    Tensor of shape (n_pairs,)
    """
    product = z[pairs[0]] * z[pairs[1]]
    return (product.sum(1) if objective == "ce" else goodness(product) - theta).sigmoid()


def link_loss(z: Tensor, pairs: Tensor, linked: Tensor, objective: str, theta: float) -> Tensor:
    """Return the loss of one layer's embeddings on linked and unlinked pairs.

    Parameters
    ----------
    z, pairs, objective, theta
        As in `link_scores`.
    linked : BoolTensor of shape (n_pairs,)

    Returns
    -------
    Tensor of shape ()
        Binary cross entropy of the dot products; or `ff_loss` of the elementwise products, linked
        pairs positive, others negative.
    """
    product = z[pairs[0]] * z[pairs[1]]
    if objective == "ce":
        return nn.functional.binary_cross_entropy_with_logits(product.sum(1), linked.to(z.dtype))
    kinds = [(product[linked], 1), (product[~linked], 0)]
    # A minibatch may happen to hold one kind only.
    return torch.stack([ff_loss(z, theta, target) for z, target in kinds if len(z)]).sum()


class LinkGNN(nn.Module):
    """Score links by the mean over layers, each of which reads the scaled output of the one below.

    What `ForwardGNNLinkPredictor.export` returns without top-down signals.

    Parameters
    ----------
    stages : sequence of GraphStage
    objective : {"ce", "ff"}
    theta : float
    """

    stages: Any  # ModuleList of GraphStage

    def __init__(self, stages: Sequence[GraphStage], objective: str, theta: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.objective, self.theta = objective, theta

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_label_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the mean probability of every pair in `edge_label_index`, shape (n_pairs,)."""
        scores = []
        for stage in self.stages:
            x = stage(unit_rows(x), edge_index, edge_weight, edge_attr)
            scores.append(link_scores(x, edge_label_index, self.objective, self.theta))
        return torch.stack(scores).mean(0)


class TopDownLinkGNN(nn.Module):
    """Score links by layers that also read the state of the layer above.

    What `ForwardGNNLinkPredictor.export` returns with ``top_down=True``.

    Parameters
    ----------
    stages : sequence of GraphStage
        Layer j reads ``widths[j] + widths[j + 2]`` columns, the last one ``widths[j]``.
    objective : {"ce", "ff"}
    theta : float
    widths : sequence of int
        Of the features and of every layer.
    alternating : bool
    eval_steps, eval_burn_in : int
    """

    stages: Any  # ModuleList of GraphStage

    def __init__(
        self,
        stages: Sequence[GraphStage],
        objective: str,
        theta: float,
        *,
        widths: Sequence[int],
        alternating: bool,
        eval_steps: int,
        eval_burn_in: int,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.objective, self.theta = objective, theta
        self.widths, self.alternating = list(widths), alternating
        self.eval_steps, self.eval_burn_in = eval_steps, eval_burn_in

    @property
    def groups(self) -> list[list[int]]:
        """Layers that are updated together, group after group."""
        layers = list(range(len(self.stages)))
        return [g for g in (layers[::2], layers[1::2]) if g] if self.alternating else [layers]

    def start(self, fixed: tuple[Tensor, ...], run: StageRunner) -> list[Tensor]:
        """Return the states of a bottom-up pass in which all states above are zero."""
        states = [fixed[0]]
        for layer in range(len(self.stages)):
            below = states[-1] if layer == 0 else unit_rows(states[-1])
            above = [below.new_zeros(len(below), width) for width in self.widths[layer + 2 :][:1]]
            states.append(run(layer, below, *above))
        return states

    def output(self, states: list[Tensor], layer: int, run: StageRunner) -> Tensor:
        """Return the output of a layer, given all states."""
        below = states[layer] if layer == 0 else unit_rows(states[layer])
        return run(layer, below, *(unit_rows(above) for above in states[layer + 2 :][:1]))

    def logits(self, output: Tensor, states: list[Tensor], layer: int) -> Tensor:
        """Return the embeddings themselves, from which pairs are scored."""
        return output

    def state(self, output: Tensor) -> Tensor:
        """Return the state that an output becomes."""
        return output

    def scores(self, fixed: tuple[Tensor, ...], run: StageRunner, pairs: Tensor) -> Tensor:
        """Return the mean probability over layers and time steps, shape (n_pairs,)."""
        states = self.start(fixed, run)
        total = states[0].new_zeros(pairs.shape[1])
        for step in range(self.eval_steps):
            embeddings = time_step(self, states, run)
            if step >= self.eval_burn_in:
                for z in embeddings:
                    total = total + link_scores(z, pairs, self.objective, self.theta)
        return total / (self.eval_steps - self.eval_burn_in) / len(self.stages)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_label_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the mean probability of every pair in `edge_label_index`, shape (n_pairs,)."""
        graph = FixedGraph(edge_index, len(x), edge_weight, edge_attr)
        return self.scores((unit_rows(x),), StageRunner(self.stages, graph), edge_label_index)


class LinkTraining:
    """The local losses of a `LinkGNN`, layer after layer.

    Parameters
    ----------
    network : LinkGNN
    x : Tensor of shape (n_nodes, n_features)
    graph : FixedGraph
        On which training passes messages.
    pairs, linked
        Pairs of nodes and whether they are linked.
    validation : tuple or None
        The same four (x, graph, pairs, linked) for validation.
    cache, one_hop : bool
        See `FrozenInput`.
    chunk : int or None
        Nodes per step where nothing is learned.
    """

    def __init__(
        self,
        network: LinkGNN,
        x: Tensor,
        graph: FixedGraph,
        pairs: Tensor,
        linked: Tensor,
        validation: tuple[Tensor, FixedGraph, Tensor, Tensor] | None,
        *,
        cache: bool = True,
        one_hop: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.network = network
        self.stages: list[GraphStage] = list(network.stages)
        self.h, self.graph, self.pairs, self.linked = x, graph, pairs, linked
        self.n_samples = len(linked)
        self.cache, self.one_hop, self.chunk = cache, one_hop, chunk
        self.validates = validation is not None
        if validation is not None:
            self.h_validation, self.validation_graph = validation[:2]
            self.validation_pairs, self.validation_linked = validation[2:]
            self.frozen_scores = x.new_zeros(len(self.validation_linked))

    def prepare(self, layer: int) -> None:
        """Fix the input of a layer."""
        self.input = self._frozen(layer, self.h, self.graph)
        if self.validates:
            self.validation_input = self._frozen(layer, self.h_validation, self.validation_graph)

    def _frozen(self, layer: int, h: Tensor, graph: FixedGraph) -> FrozenInput:
        return FrozenInput(
            self.stages[layer], unit_rows(h), graph, cache=self.cache, one_hop=self.one_hop
        )

    def loss(self, batch: Tensor | None = None) -> Tensor:
        """Return the loss of all pairs, or of those at places `batch`."""
        network, pairs, linked = self.network, self.pairs, self.linked
        if batch is None:
            z = self.input()
        else:
            pairs, linked = pairs[:, batch], linked[batch]
            nodes, places = pairs.unique(return_inverse=True)
            z, pairs = self.input(nodes), places
        return link_loss(z, pairs, linked, network.objective, network.theta)

    @torch.no_grad()
    def score(self) -> float:
        """Return the ROC-AUC on the validation pairs of this and all frozen layers together."""
        z = self.validation_input.output(self.chunk)
        scores = self.frozen_scores + self._validation_scores(z)
        return float(roc_auc_score(self.validation_linked.cpu(), scores.cpu()))

    def _validation_scores(self, z: Tensor) -> Tensor:
        return link_scores(z, self.validation_pairs, self.network.objective, self.network.theta)

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute the outputs of the trained layer, which the next one reads."""
        self.h = self.input.output(self.chunk)
        if self.validates:
            self.h_validation = self.validation_input.output(self.chunk)
            self.frozen_scores += self._validation_scores(self.h_validation)
            del self.validation_input
        del self.input


def labelled_pairs(
    name: str, data: Data, device: torch.device
) -> tuple[Tensor, FixedGraph, Tensor, Tensor]:
    """Return features, graph, pairs and whether they are linked, or raise."""
    pairs, labels = data.get("edge_label_index"), data.get("edge_label")
    if pairs is None or labels is None:
        raise ValueError(
            f"{name} must have edge_label_index and edge_label, as "
            "torch_geometric.transforms.RandomLinkSplit makes them"
        )
    check_pairs(f"{name}.edge_label_index", pairs, len(data.x))
    check_shape(f"{name}.edge_label", labels, (pairs.shape[1],))
    values = set(labels.unique().tolist())
    if values != {0, 1}:
        raise ValueError(f"{name}.edge_label must hold 0 and 1, both, got {sorted(values)}")
    weight, attr = (
        value if value is None else value.to(device)
        for value in (data.get("edge_weight"), data.get("edge_attr"))
    )
    graph = FixedGraph(data.edge_index.to(device), len(data.x), weight, attr)
    return data.x.detach().to(device), graph, pairs.to(device), (labels == 1).to(device)
