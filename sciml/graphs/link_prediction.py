"""Predict links with a graph network whose layers are trained by local losses.

Each layer learns embeddings z whose dot products tell linked from unlinked pairs of nodes,

    loss = binary cross entropy of sigmoid(z_u . z_v),

reading the frozen, row-normalised output of the layer below. The mean of the layers' probabilities
ranks the pairs. There are no class nodes.

Where paper and code differ: the official code halves every score, which changes no ranking; here
scores are probabilities. Negative pairs are drawn once, by PyG's RandomLinkSplit, not per epoch.

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
from sklearn.base import BaseEstimator
from sklearn.metrics import roc_auc_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch_geometric.data import Data

from sciml._check import check_choice, check_integer
from sciml.graphs.checks import check_graph, check_pairs, check_training_parameters
from sciml.graphs.layer_training import derived_seed, torch_device, train_layers
from sciml.graphs.link_networks import (
    LinkGNN,
    LinkTraining,
    TopDownLinkGNN,
    labelled_pairs,
    link_loss,
)
from sciml.graphs.stages import has_fixed_widths, layer_widths, make_stages, unit_rows
from sciml.graphs.top_down import StageRunner, train_top_down

__all__ = ["ForwardGNNLinkPredictor"]


class ForwardGNNLinkPredictor(BaseEstimator):
    """Link predictor whose layers each learn from their own loss, without backpropagation.

    Parameters
    ----------
    model : str, class, module, list or callable, default="GCN"
        Message-passing layers, as in `ForwardGNNClassifier`.
    objective : {"ce", "ff"}, default="ce"
        Binary cross entropy of dot products, or Forward-Forward: linked pairs are positive
        samples, others negative, and the goodness is that of the elementwise product.
    top_down : bool, default=False
        Train all layers at once, each with the state of the layer above as a second input.
    hidden_channels : int or sequence of int, default=128
        Width of all layers, or of each.
    num_layers : int, default=2
        Number of layers, unless `model` has its own.
    model_kwargs : dict, optional
        Further arguments of a zoo class.
    theta : float, default=2.0
        Threshold of the goodness in Forward-Forward.
    lr : float, default=1e-3
        Learning rate of Adam.
    weight_decay : float, optional
        L2 penalty of Adam. None means 5e-4, or 0 with `top_down`, as published.
    max_epochs : int, default=1000
        Epochs of each layer, or time steps with `top_down`.
    val_every : int, default=2
        Epochs between evaluations on the validation graph.
    patience : int or None, default=100
        Evaluations without a better ROC-AUC after which training stops and the best parameters are
        restored. None trains for `max_epochs` and needs no validation graph.
    alternating : bool, default=True
        With `top_down`: update every other layer first, then the rest.
    eval_steps, eval_burn_in : int, default=10 and 2
        With `top_down`: time steps when scoring, and the first of them that do not count.
    grad_clip : float, optional
        Largest gradient norm of a layer.
    cache_aggregation : bool, default=True
        Aggregate the fixed inputs of GCN, GraphSAGE and GIN layers once per layer.
    batch_size : int, optional
        Pairs per step; None takes all. Not with `top_down`.
    checkpoint_dir, resume_from : path, optional
        Folder to write every finished layer to, and to read finished layers from. Not with
        `top_down`.
    device : str, default="auto"
        Device of the training; "auto" takes CUDA if there is one.
    verbose : int, default=0
        Show progress bars if positive.
    random_state : int, RandomState or None, default=None
        Draws initial parameters, minibatches and dropout.

    Attributes
    ----------
    history_ : list of list of dict
        For every layer (once for all with `top_down`) and epoch its "epoch", "loss" and, where it
        was validated, "val_score".
    n_iter_ : list of int
        Epochs run, per layer.
    best_val_ : list of float
        Best validation ROC-AUC, of each layer together with those below it.
    stages_ : list of GraphStage
        The trained layers.
    n_features_in_ : int
        Number of node features.

    See Also
    --------
    sciml.graphs.ForwardGNNClassifier : The same for classes of nodes.

    References
    ----------
    Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed, "Forward Learning of Graph Neural
    Networks", ICLR 2024, arXiv:2403.11004.

    Examples
    --------
    >>> import torch
    >>> from torch_geometric.datasets import KarateClub
    >>> from torch_geometric.transforms import RandomLinkSplit
    >>> _ = torch.manual_seed(0)
    >>> split = RandomLinkSplit(is_undirected=True, num_val=0.1, num_test=0.1)
    >>> train, val, test = split(KarateClub()[0])
    >>> model = ForwardGNNLinkPredictor(max_epochs=20, random_state=0).fit(train, val)
    >>> model.decision_function(test, test.edge_label_index).shape
    (14,)
    """

    def __init__(
        self,
        model: Any = "GCN",
        *,
        objective: str = "ce",
        top_down: bool = False,
        hidden_channels: int | Sequence[int] = 128,
        num_layers: int = 2,
        model_kwargs: dict[str, Any] | None = None,
        theta: float = 2.0,
        lr: float = 1e-3,
        weight_decay: float | None = None,
        max_epochs: int = 1000,
        val_every: int = 2,
        patience: int | None = 100,
        alternating: bool = True,
        eval_steps: int = 10,
        eval_burn_in: int = 2,
        grad_clip: float | None = None,
        cache_aggregation: bool = True,
        batch_size: int | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        device: str = "auto",
        verbose: int = 0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.top_down = top_down
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.model_kwargs = model_kwargs
        self.theta = theta
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
        self.checkpoint_dir = checkpoint_dir
        self.resume_from = resume_from
        self.device = device
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X: Data, y: Data | None = None) -> Self:
        """Train on the pairs of one graph, with early stopping on those of another.

        Parameters
        ----------
        X : torch_geometric.data.Data
            Training graph with ``edge_label_index`` and ``edge_label`` (1 linked, 0 not), as
            `torch_geometric.transforms.RandomLinkSplit` makes it; messages pass along its
            ``edge_index``. It is not modified.
        y : torch_geometric.data.Data, optional
            The same for validation.

        Returns
        -------
        self
        """
        self._check_parameters(y)
        check_graph(X, name="X")
        if y is not None:
            check_graph(y, name="y", warn_directed=False)
            if y.num_features != X.num_features:
                raise ValueError(f"y.x must have {X.num_features} columns, got {y.num_features}")
        device = torch_device(self.device)
        training = labelled_pairs("X", X, device)
        validation = None if y is None else labelled_pairs("y", y, device)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            network = self._network(X).to(device)
            histories = self._train(network, training, validation, seed)
        self.network_ = network.cpu()
        self.stages_ = list(network.stages)
        self.n_features_in_ = X.num_features
        self.history_ = histories
        self.n_iter_ = [len(history) for history in histories]
        scores = [[e["val_score"] for e in h if "val_score" in e] for h in histories]
        self.best_val_ = [max(layer) for layer in scores if layer]
        return self

    def decision_function(self, data: Data, edge_label_index: Tensor) -> np.ndarray:
        """Return the mean over layers of the probability of a link.

        Parameters
        ----------
        data : torch_geometric.data.Data
            Graph along which messages pass.
        edge_label_index : LongTensor of shape (2, n_pairs)
            Pairs of its nodes.

        Returns
        -------
        ndarray of shape (n_pairs,)
            With the objective "ce" and ReLU, dot products are not negative and so all
            probabilities are at least 1/2: they rank pairs, 1/2 is no threshold.
        """
        check_is_fitted(self)
        check_graph(data, warn_directed=False)
        check_pairs("edge_label_index", edge_label_index, len(data.x))
        if data.num_features != self.n_features_in_:
            raise ValueError(
                f"data.x must have {self.n_features_in_} columns as in fit, got {data.num_features}"
            )
        self.network_.eval()
        with torch.no_grad():
            graph = (data.x, data.edge_index, edge_label_index)
            weights = (data.get("edge_weight"), data.get("edge_attr"))
            scores = self.network_(*(None if t is None else t.cpu() for t in (*graph, *weights)))
        return scores.numpy()

    def score(self, X: Data, y: Any = None) -> float:
        """Return the area under the ROC curve on the pairs of a graph.

        Parameters
        ----------
        X : torch_geometric.data.Data
            Graph with ``edge_label_index``.
        y : array-like of shape (n_pairs,), optional
            1 linked, 0 not; None means ``X.edge_label``.

        Returns
        -------
        float
        """
        scores = self.decision_function(X, X.edge_label_index)
        labels = X.edge_label if y is None else y
        labels = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
        return float(roc_auc_score(labels, scores))

    def export(self) -> nn.Module:
        """Return the trained network as an ordinary PyG module.

        Returns
        -------
        torch.nn.Module
            ``module(x, edge_index, edge_label_index, edge_weight=None, edge_attr=None)`` returns
            what `decision_function` does.
        """
        check_is_fitted(self)
        return copy.deepcopy(self.network_).eval()

    def _check_parameters(self, validation: Data | None) -> None:
        check_training_parameters(self)
        check_choice("objective", self.objective, ("ce", "ff"))
        check_integer("eval_steps", self.eval_steps, 1)
        check_integer("eval_burn_in", self.eval_burn_in, 0, self.eval_steps - 1)
        if self.patience is not None and validation is None:
            raise ValueError(
                f"patience={self.patience} needs validation data as second argument of fit, or "
                "train for max_epochs with patience=None"
            )
        if not self.top_down:
            return
        for name in ("batch_size", "checkpoint_dir", "resume_from"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None with top_down=True, which trains all layers together, "
                    f"got {getattr(self, name)!r}"
                )
        if has_fixed_widths(self.model):
            raise ValueError(
                "model must be a zoo name, a class or a callable with top_down=True, whose layers "
                f"read two states at once, got {type(self.model).__name__}"
            )

    def _network(self, data: Data) -> Any:
        widths = layer_widths(self.hidden_channels, self.num_layers)
        stages = make_stages(
            self.model,
            self.model_kwargs,
            in_channels=data.num_features,
            widths=widths,
            extra=[*widths[1:], 0] if self.top_down else [0] * len(widths),
            data=data,
            edge_index=data.edge_index,
            num_nodes=len(data.x),
        )
        if not self.top_down:
            return LinkGNN(stages, self.objective, self.theta)
        return TopDownLinkGNN(
            stages,
            self.objective,
            self.theta,
            widths=[data.num_features, *widths],
            alternating=self.alternating,
            eval_steps=self.eval_steps,
            eval_burn_in=self.eval_burn_in,
        )

    def _train(
        self, network: Any, training: Any, validation: Any, seed: int
    ) -> list[list[dict[str, float]]]:
        default = 0.0 if self.top_down else 5e-4
        settings: dict[str, Any] = {
            "lr": self.lr,
            "weight_decay": default if self.weight_decay is None else self.weight_decay,
            "max_epochs": self.max_epochs,
            "val_every": self.val_every,
            "patience": self.patience,
        }
        if self.top_down:
            return [self._train_top_down(network, training, validation, settings)]
        x, graph, pairs, linked = training
        task = LinkTraining(
            network,
            x,
            graph,
            pairs,
            linked,
            validation if self.patience is not None else None,
            cache=self.cache_aggregation,
            one_hop=self.batch_size is not None,
            chunk=None if self.batch_size is None else max(self.batch_size, 1024),
        )
        fingerprint = settings | {
            "objective": self.objective,
            "theta": self.theta,
            "grad_clip": self.grad_clip,
            "nodes": len(x),
            "pairs": int(pairs.sum()),
            "sum of features": float(x.double().sum()),
            "seed": seed,
        }
        return train_layers(
            task,
            **settings,
            batch_size=self.batch_size,
            grad_clip=self.grad_clip,
            seed=derived_seed(seed, 2),
            verbose=self.verbose,
            checkpoint_dir=self.checkpoint_dir,
            resume_from=self.resume_from,
            fingerprint=fingerprint,
        )

    def _train_top_down(
        self, network: TopDownLinkGNN, training: Any, validation: Any, settings: dict[str, Any]
    ) -> list[dict[str, float]]:
        x, graph, pairs, linked = training
        fixed = (unit_rows(x),)
        run = StageRunner(network.stages, graph, fixed, self.cache_aggregation)

        if validation is not None:
            fixed_there = (unit_rows(validation[0]),)
            there = StageRunner(network.stages, validation[1], fixed_there, self.cache_aggregation)

        @torch.no_grad()
        def score() -> float:
            scores = network.scores(fixed_there, there, validation[2])
            return float(roc_auc_score(validation[3].cpu(), scores.cpu()))

        return train_top_down(
            network,
            fixed,
            run,
            lambda z: link_loss(z, pairs, linked, self.objective, self.theta),
            score,
            grad_clip=self.grad_clip,
            verbose=self.verbose,
            **settings,
        )
