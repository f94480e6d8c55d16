"""Classify the nodes of a graph with a network whose layers are trained by local losses.

No gradient crosses a layer, so the memory of training does not grow with depth. The estimator
wraps five ways to train, for any message-passing model of PyG; the modules `single_forward`,
`top_down` and `forward_forward` hold the losses.

Where paper and code differ, this follows the code, as the published numbers come from it: gradient
clipping in top-to-loss only, validation every second epoch, ReLU after the last layer too. It
departs from the code in one thing: in the Forward-Forward methods the official code shows the
labels of validation nodes when it predicts test nodes; here only training labels are ever shown.

References
----------
Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, arXiv:2403.11004.
"""

import copy
import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn.models.basic_gnn import BasicGNN

from sciml.graphs.backprop_export import to_basic_gnn
from sciml.graphs.checks import (
    check_graph,
    check_labels,
    check_mask,
    check_node_ids,
    check_parameters,
)
from sciml.graphs.forward_gnn_fit import build_network, read_task, train_network
from sciml.graphs.layer_training import torch_device
from sciml.graphs.stages import unit_rows

__all__ = ["ForwardGNNClassifier"]


class ForwardGNNClassifier(ClassifierMixin, BaseEstimator):
    """Node classifier whose layers each learn from their own loss, without backpropagation.

    Layer l reads the frozen, row-normalised output of layer l - 1 on a graph that has one more
    node per class, linked to the training nodes of that class. It learns to place the training
    nodes near their class node, and the softmaxes of all layers are averaged to predict (method
    ``"sf"``). The defaults are those of the published experiments.

    Parameters
    ----------
    model : str, class, module, list or callable, default="GCN"
        Message-passing layers: ``"GCN"``, ``"GraphSAGE"``, ``"GIN"``, ``"GAT"``, ``"PNA"`` or
        ``"EdgeCNN"``; a class or an instance of PyG's `BasicGNN`; a list of convolutions (ReLU is
        added) with or without other modules between them; a ``torch_geometric.nn.Sequential``; or
        a callable ``(in_channels, out_channels) -> convolution``. Instances are copied, keep their
        own depth and widths and start from the parameters they have.
    method : {"sf", "sf_top_to_loss", "sf_top_to_input", "ff_label", "ff_virtual"}, default="sf"
        Single forward; all layers at once with signals from above, through the loss or the input;
        Forward-Forward with labels as features or as edges to class nodes.
    data : torch_geometric.data.Data, optional
        Graph, when nodes are given to `fit` and `predict` by their ids, as cross-validation does.
    hidden_channels : int or sequence of int, default=128
        Width of all layers, or of each.
    num_layers : int, default=2
        Number of layers, unless `model` has its own.
    model_kwargs : dict, optional
        Further arguments of a zoo class, such as ``{"heads": 4}`` for GAT (as published),
        ``dropout``, ``norm`` or ``act``. PNA's degree histogram is counted when not given.
    class_edges : {"bidirectional", "to_class"}, default="bidirectional"
        Edges between training and class nodes: both ways, or to the class nodes only.
    append_label : {None, "input", "all"}, default=None
        Append C label columns to the input of the first or of every layer: one-hot for training
        nodes, 1 / C for others.
    theta : float, default=2.0
        Threshold of the goodness in Forward-Forward.
    num_negatives : int, optional
        Wrong classes shown to each training node in Forward-Forward; None means all C - 1.
    temperature : float, default=1.0
        Divides the logits.
    lr : float, default=1e-3
        Learning rate of Adam.
    weight_decay : float, default=5e-4
        L2 penalty of Adam.
    max_epochs : int, default=1000
        Epochs of each layer, or time steps of a top-down method.
    val_every : int, default=2
        Epochs between evaluations on the validation nodes.
    patience : int or None, default=100
        Evaluations without a better validation accuracy after which training stops and the best
        parameters are restored. None trains for `max_epochs` and needs no validation nodes.
    alternating : bool, default=True
        Top-to-input only: update every other layer first, then the rest.
    eval_steps, eval_burn_in : int, default=10 and 2
        Top-to-input only: time steps when predicting, and the first of them that do not count.
    grad_clip : float, optional
        Largest gradient norm of a layer. None means 1.0 for top-to-loss and no limit otherwise.
    cache_aggregation : bool, default=True
        Aggregate the fixed inputs of GCN, GraphSAGE and GIN layers once per layer.
    batch_size : int, optional
        Training nodes per step, with their exact one-hop neighbourhoods and all class nodes. None
        takes all at once. Not for top-down methods.
    validation_fraction : float, default=0.2
        Part of the given node ids held out for early stopping; only when `fit` gets ids.
    class_edge_attr : float, optional
        Value of every edge feature of the class edges, for graphs whose ``edge_attr`` is used.
    x_class : Tensor of shape (C, n_features), optional
        Features of the class nodes; None draws them from N(0, 1).
    wrong_labels : LongTensor of shape (n_negatives, n_train), optional
        Places in ``classes_`` of the wrong classes shown to the training nodes; None draws them.
    checkpoint_dir : path, optional
        Folder to write every layer to, when it is trained. Not for top-down methods.
    resume_from : path, optional
        Folder of such checkpoints: layers found there are not trained again.
    device : str, default="auto"
        Device of the training; "auto" takes CUDA if there is one.
    verbose : int, default=0
        Show progress bars if positive.
    random_state : int, RandomState or None, default=None
        Draws initial parameters, class features, wrong labels, minibatches and dropout.

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
        Labels found, -1 (unlabelled) left out.
    layer_proba_ : ndarray of shape (n_layers, n_nodes, C)
        Class probabilities that each layer gives by itself, for the nodes of the fitted graph.
    history_ : list of list of dict
        For every layer (once for all in top-down methods) and every epoch its "epoch", "loss" and,
        where it was validated, "val_score".
    n_iter_ : list of int
        Epochs run, per layer.
    best_val_ : list of float
        Best validation accuracy, of each layer together with those below it. Empty without
        validation.
    stages_ : list of GraphStage
        The trained layers.
    n_features_in_ : int
        Number of node features.

    See Also
    --------
    sciml.graphs.ForwardGNNLinkPredictor : The same for links.
    sciml.graphs.AddClassNodes : The class nodes as a transform.
    sciml.graphs.SmoothFeatures : Averages features before training, which helps with few labels.

    Notes
    -----
    With E edges, widths F and H, and n training nodes, a layer of GCN, GraphSAGE or GIN aggregates
    once, O(E F), and an epoch costs O(n F H). Memory for the backward pass is that of one layer.
    Forward-Forward takes C passes wherever the others take one.

    Training nodes are linked to their class node when they are predicted too: accuracy on them
    tells nothing. In Forward-Forward they simply get their own label.

    With few labels, `SmoothFeatures` before training made up what ``"sf"`` lost to backpropagation
    on Cora's public split. ``"ff_virtual"`` needs a convolution that keeps the class node audible:
    GraphSAGE weighs it like any neighbour, while GCN divides it by the root of its degree and then
    needs long training (``patience=None``) at a larger `lr`.

    References
    ----------
    Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed, "Forward Learning of Graph Neural
    Networks", ICLR 2024, arXiv:2403.11004.

    Examples
    --------
    >>> from torch_geometric.datasets import KarateClub
    >>> data = KarateClub()[0]
    >>> model = ForwardGNNClassifier(patience=None, max_epochs=50, random_state=0)
    >>> model = model.fit(data, train_mask=data.train_mask)
    >>> model.predict(data).shape
    (34,)
    >>> model.layer_proba_.shape
    (2, 34, 4)
    """

    def __init__(
        self,
        model: Any = "GCN",
        *,
        method: str = "sf",
        data: Data | None = None,
        hidden_channels: int | Sequence[int] = 128,
        num_layers: int = 2,
        model_kwargs: dict[str, Any] | None = None,
        class_edges: str = "bidirectional",
        append_label: str | None = None,
        theta: float = 2.0,
        num_negatives: int | None = None,
        temperature: float = 1.0,
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        max_epochs: int = 1000,
        val_every: int = 2,
        patience: int | None = 100,
        alternating: bool = True,
        eval_steps: int = 10,
        eval_burn_in: int = 2,
        grad_clip: float | None = None,
        cache_aggregation: bool = True,
        batch_size: int | None = None,
        validation_fraction: float = 0.2,
        class_edge_attr: float | None = None,
        x_class: Tensor | None = None,
        wrong_labels: Tensor | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        device: str = "auto",
        verbose: int = 0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self.data = data
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.model_kwargs = model_kwargs
        self.class_edges = class_edges
        self.append_label = append_label
        self.theta = theta
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.lr = lr
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.val_every = val_every
        self.patience = patience
        self.alternating = alternating
        self.eval_steps = eval_steps
        self.eval_burn_in = eval_burn_in
        self.grad_clip = grad_clip
        self.cache_aggregation = cache_aggregation
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.class_edge_attr = class_edge_attr
        self.x_class = x_class
        self.wrong_labels = wrong_labels
        self.checkpoint_dir = checkpoint_dir
        self.resume_from = resume_from
        self.device = device
        self.verbose = verbose
        self.random_state = random_state

    def fit(
        self,
        X: Any = None,
        y: Any = None,
        *,
        train_mask: Any = None,
        val_mask: Any = None,
    ) -> Self:
        """Train on a graph with masks, or on nodes of ``data`` given by their ids.

        Parameters
        ----------
        X : torch_geometric.data.Data, ndarray of shape (n,) or (n, 1), or None
            A graph; or ids of labelled nodes of the graph `data`; None means that graph. Nothing
            in a graph is modified.
        y : array-like of shape (n_nodes,) or (n,), optional
            With a graph, a class for every node, -1 where unlabelled; None means ``data.y``. With
            ids, the class of each.
        train_mask, val_mask : BoolTensor of shape (n_nodes,), optional
            Nodes to learn from and to stop early by; None means those of the graph. With ids, a
            part `validation_fraction` of them is held out.

        Returns
        -------
        self
        """
        check_parameters(self)
        rng = check_random_state(self.random_state)
        task = read_task(self, X, y, train_mask, val_mask, rng)
        seed = int(rng.randint(2**31 - 1))
        device = torch_device(self.device)
        # Parameters and dropout draw from torch's global generators, which fit leaves as they were.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            network = build_network(self, task, seed).to(device)
            proba, layer_proba, histories = train_network(self, network, task, seed, device)
        self.network_ = network.cpu()
        self.stages_ = list(network.stages)
        self.classes_ = task.classes
        self.n_features_in_ = task.data.num_features
        self.layer_proba_ = layer_proba.cpu().numpy()
        self.history_ = histories
        self.n_iter_ = [len(history) for history in histories]
        scores = [[e["val_score"] for e in h if "val_score" in e] for h in histories]
        self.best_val_ = [max(layer) for layer in scores if layer]
        self._data, self._proba = copy.copy(task.data).cpu(), proba.cpu().numpy()
        return self

    def predict(self, X: Any = None) -> np.ndarray:
        """Return the most probable class of nodes.

        Parameters
        ----------
        X : Data, ndarray of shape (n,) or (n, 1), or None
            None means all nodes of the fitted graph, ids those nodes of it. Any other graph is put
            beside the fitted one, so that its nodes meet the same class nodes.

        Returns
        -------
        ndarray of shape (n_nodes,) or (n,)
        """
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(1)]

    def predict_proba(self, X: Any = None) -> np.ndarray:
        """Return the class probabilities of nodes, `X` as in `predict`.

        Returns
        -------
        ndarray of shape (n_nodes, C) or (n, C)
            Mean of the layers' softmaxes; in Forward-Forward the softmax of the summed goodness.
        """
        check_is_fitted(self)
        if X is None:
            return self._proba
        if not isinstance(X, Data):
            return self._proba[check_node_ids(X, len(self._proba))]
        check_graph(X, warn_directed=False)
        if same_graph(self._data, X):
            return self._proba
        union = union_of_graphs(self._data, X)
        self.network_.eval()
        with torch.no_grad():
            log_proba = self.network_(
                union.x, union.edge_index, union.get("edge_weight"), union.get("edge_attr")
            )
        return log_proba[len(self._data.x) :].exp().cpu().numpy()

    def score(self, X: Any = None, y: Any = None, *, mask: Any = None) -> float:
        """Return the accuracy on nodes.

        Parameters
        ----------
        X : Data, ndarray of shape (n,) or (n, 1), or None
            As in `predict`.
        y : array-like, optional
            True classes; None means those in the graph.
        mask : BoolTensor of shape (n_nodes,), optional
            Nodes of the graph to count; None means its ``test_mask``. Not with ids.

        Returns
        -------
        float
        """
        check_is_fitted(self)
        if X is not None and not isinstance(X, Data):
            if mask is not None:
                raise ValueError("mask is for graphs, but X holds ids of nodes")
            return float(np.mean(self.predict(X) == np.asarray(y)))
        graph = self._data if X is None else X
        mask = graph.get("test_mask") if mask is None else mask
        if mask is None:
            raise ValueError("mask is missing: pass it, or set data.test_mask")
        predicted = self.predict(X)
        chosen = check_mask("mask", mask, len(predicted)).cpu().numpy()
        true = check_labels(graph.get("y") if y is None else y, len(predicted))
        return float(np.mean(predicted[chosen] == true[chosen]))

    def export(self) -> nn.Module:
        """Return the trained network as an ordinary PyG module.

        Returns
        -------
        torch.nn.Module
            ``module(x, edge_index, edge_weight=None, edge_attr=None)`` returns log-probabilities
            of shape (n_nodes, C). It adds the class nodes by itself, so the graph must begin with
            the nodes of the fitted graph.
        """
        check_is_fitted(self)
        return copy.deepcopy(self.network_).eval()

    def to_backprop(self) -> BasicGNN:
        """Return the layers as a PyG `BasicGNN`, for fine-tuning by backpropagation.

        Its output layer starts from the class embeddings of the last layer, so that on the graph
        with class nodes its output is the logits of the last layer; without them it is near that.

        Returns
        -------
        BasicGNN

        Raises
        ------
        ValueError
            If the layers read more than the output of the layer below: top-to-input, labels.
        """
        check_is_fitted(self)
        if self.method not in ("sf", "sf_top_to_loss") or self.append_label is not None:
            raise ValueError(
                "to_backprop needs layers that read the layer below only: method 'sf' or "
                f"'sf_top_to_loss' with append_label=None, got {self.method!r} with "
                f"append_label={self.append_label!r}"
            )
        network, graph = copy.deepcopy(self.network_).eval(), self._data
        with torch.no_grad():
            h, full = network.augment(
                graph.x, graph.edge_index, graph.get("edge_weight"), graph.get("edge_attr")
            )
            for stage in network.stages:
                h = stage(unit_rows(h), full.edge_index, full.edge_weight, full.edge_attr)
        embedding = h[len(graph.x) :]
        return to_basic_gnn(network.stages, self.n_features_in_, embedding, self.temperature)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "network_")


def union_of_graphs(first: Data, second: Data) -> Data:
    """Return one graph of two parts: the nodes of `first`, then those of `second`, unconnected."""
    if first.num_features != second.num_features:
        raise ValueError(
            f"data.x must have {first.num_features} columns as in fit, got {second.num_features}"
        )
    union = Data(
        x=torch.cat([first.x, second.x.to(first.x)]),
        edge_index=torch.cat(
            [first.edge_index, second.edge_index.to(first.edge_index) + len(first.x)], 1
        ),
    )
    for key in ("edge_weight", "edge_attr"):
        parts = [first.get(key), second.get(key)]
        if (parts[0] is None) != (parts[1] is None):
            raise ValueError(f"data.{key} must be there exactly if it was there in fit")
        if parts[0] is not None:
            union[key] = torch.cat([parts[0], parts[1].to(parts[0])])
    return union


def same_graph(first: Data, second: Data) -> bool:
    """Tell whether two graphs have the same features and edges."""
    for key in ("x", "edge_index", "edge_weight", "edge_attr"):
        a, b = first.get(key), second.get(key)
        if (a is None) != (b is None):
            return False
        if a is not None and not (a is b or (a.shape == b.shape and torch.equal(a, b.to(a)))):
            return False
    return True
