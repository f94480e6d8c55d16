"""Train every layer to be active for samples with their true label and silent for wrong ones.

A class label is written into the input. Every layer gets samples with the true label (positive)
and with a wrong one (negative), normalises its detached input to root mean square 1 and learns, by
`goodness_loss`, to have a large sum of squared activations for the former and a small one for the
latter. A sample is classified by trying all labels and taking the one of the largest goodness,
summed over all layers but the first.

This is the supervised form of Hinton's paper in the details of the umbrella study: the threshold is
the layer's width, the ReLU passes gradients unchanged (`straight_through_relu`), and peer
normalisation pulls the mean activities of a layer's units together. The study's classifier on top
of the positive activations is left out: its input holds the true label, it predicts nothing, and no
gradient of it reaches a layer.

References
----------
G. Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", arXiv:2212.13345, 2022.
P. Spyra, "Beyond Backpropagation: Exploring Innovative Algorithms for Energy-Efficient Deep Neural
Network Training", arXiv:2509.19063, 2025.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from scipy.special import softmax
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional

from sciml._check import check_choice, check_integer, check_interval
from sciml.layerwise.local_losses import goodness_loss, rms_normalize, straight_through_relu
from sciml.layerwise.local_training import train_locally
from sciml.layerwise.torch_classifier import (
    Array,
    ShuffledBatches,
    TorchClassifier,
    check_sizes,
    linear,
    split,
    weights,
)

__all__ = ["ForwardForwardClassifier", "embed_label", "wrong_labels"]

_CHUNK = 2**22  # activations (samples x classes x units) that a prediction holds at a time


def embed_label(x: Tensor, label: Tensor, n_classes: int, encoding: str = "append") -> Tensor:
    """Write class labels into samples as one-hot vectors.

    Parameters
    ----------
    x : Tensor of shape (n_samples, n_features)
        Samples.
    label : Tensor of shape (n_samples,), integer
        Labels from 0 to ``n_classes - 1``.
    n_classes : int
        Number of classes.
    encoding : {"append", "overwrite"}, default="append"
        Whether the vector follows the features or replaces the first `n_classes` of them, as
        in Hinton's experiment with images that have an empty border.

    Returns
    -------
    Tensor of shape (n_samples, n_features + n_classes) or (n_samples, n_features)
        New samples.

    Raises
    ------
    ValueError
        If `encoding` is unknown or there are fewer features than classes to overwrite.

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import embed_label
    >>> embed_label(torch.tensor([[5.0, 6.0, 7.0]]), torch.tensor([1]), 2, "overwrite")
    tensor([[0., 1., 7.]])
    """
    check_choice("encoding", encoding, ("append", "overwrite"))
    one_hot = functional.one_hot(label, n_classes).to(x.dtype)
    if encoding == "append":
        return torch.cat([x, one_hot], dim=1)
    if n_classes > x.shape[1]:
        raise ValueError(
            f"encoding='overwrite' needs as many features as there are classes, got {x.shape[1]} "
            f"features and {n_classes} classes"
        )
    return torch.cat([one_hot, x[:, n_classes:]], dim=1)


def wrong_labels(label: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
    """Draw for each label one of the other labels, all with the same probability.

    Parameters
    ----------
    label : Tensor of shape (n_samples,), integer
        Labels from 0 to ``n_classes - 1``.
    n_classes : int
        Number of classes, two or more.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor of shape (n_samples,)
        Labels.

    Raises
    ------
    ValueError
        If there are fewer than two classes.

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import wrong_labels
    >>> wrong_labels(torch.tensor([0, 1]), 2, torch.Generator())
    tensor([1, 0])
    """
    check_integer("n_classes", n_classes, 2)
    shift = torch.randint(1, n_classes, label.shape, generator=generator).to(label.device)
    return (label + shift) % n_classes


class ForwardForwardClassifier(TorchClassifier):
    """Classify with a network whose layers tell samples with true from samples with wrong labels.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(256, 256, 256)
        Widths of the layers (the umbrella study has 3 x 1000 and 4 x 2000 for MNIST).
    label_encoding : {"append", "overwrite"}, default="append"
        Whether the one-hot label follows the features or replaces the first of them. Overwrite is
        for images whose corner is empty.
    threshold : float or None, default=None
        Goodness of even odds; None is the width of the layer (the study; Hinton's text leaves it
        open).
    peer_factor : float, default=0.03
        Weight of peer normalisation, the variance of the units' mean activities (the study); 0
        turns it off.
    peer_momentum : float in [0, 1), default=0.9
        Part of the mean activity that is kept from batch to batch (the study).
    straight_through : bool, default=True
        Whether the ReLU passes gradients unchanged in training (the study).
    skip_first : bool, default=True
        Whether the first layer is left out of the prediction, if there are others (Hinton).
    learning_rate_init : float, default=1e-3
        Learning rate of AdamW (the study's tuned values are 3.7e-4 to 5.3e-4). It is constant for
        half of `max_iter` and then falls linearly.
    weight_decay : float, default=4.17e-4
        Weight decay of AdamW (the study's, for MNIST).
    max_iter : int, default=60
        Largest number of epochs, of all layers together (Hinton's).
    batch_size : int, default=100
        Samples of a step (the study's); each is seen with a true and a wrong label.
    early_stopping : bool, default=True
        Whether to set samples aside, stop when their accuracy no longer rises and end with the
        weights of the best epoch. Its price is a prediction of them in each epoch.
    validation_fraction : float in (0, 1), default=0.1
        Part of the samples that is set aside.
    n_iter_no_change : int, default=20
        Epochs without improvement after which to stop (the study's).
    tol : float, default=1e-4
        Least increase of the validation accuracy that is an improvement (the study's).
    device : str or torch.device, default="cpu"
        Where to train and predict.
    random_state : int, RandomState or None, default=None
        Initial weights, wrong labels, validation samples and order of the batches.
    verbose : bool, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    layers_ : torch.nn.ModuleList of torch.nn.Linear
        The layers.
    coefs_, intercepts_ : list of ndarray
        Their weights, of shape (n_in, n_out), and biases. The rows of the label in the first are
        the last if appended, the first if overwritten.
    mean_activities_ : list of ndarray of shape (n_units,)
        Running mean activities of the units for positive samples.
    history_ : list of dict
        What `train_locally` returned; the loss is the sum over the layers.
    n_iter_ : int
        Epochs.
    classes_ : ndarray of shape (n_classes,)
        The classes.
    n_features_in_ : int
        Number of features.

    Notes
    -----
    A prediction takes as many forward passes as there are classes, but for the product of the
    first layer with the features, which all labels share. The network computes in the dtype of X:
    float32 is about twice as fast as float64.

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345. Spyra, "Beyond Backpropagation",
    arXiv:2509.19063.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.layerwise import ForwardForwardClassifier
    >>> X, y = load_digits(n_class=4, return_X_y=True)
    >>> model = ForwardForwardClassifier((64, 64), batch_size=20, max_iter=20, random_state=0)
    >>> model.fit(X[::3] / 16, y[::3]).score(X[1::3] / 16, y[1::3]) > 0.9
    True
    """

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (256, 256, 256),
        *,
        label_encoding: str = "append",
        threshold: float | None = None,
        peer_factor: float = 0.03,
        peer_momentum: float = 0.9,
        straight_through: bool = True,
        skip_first: bool = True,
        learning_rate_init: float = 1e-3,
        weight_decay: float = 4.17e-4,
        max_iter: int = 60,
        batch_size: int = 100,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        tol: float = 1e-4,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.label_encoding = label_encoding
        self.threshold = threshold
        self.peer_factor = peer_factor
        self.peer_momentum = peer_momentum
        self.straight_through = straight_through
        self.skip_first = skip_first
        self.learning_rate_init = learning_rate_init
        self.weight_decay = weight_decay
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Train the network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.
        y : array-like of shape (n_samples,)
            Classes, of two kinds or more.

        Returns
        -------
        ForwardForwardClassifier
            The classifier itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or an array does not fit, or holds NaN or infinity; if there are more
            classes than features to overwrite.
        FloatingPointError
            If the loss becomes infinite.
        """
        check_choice("label_encoding", self.label_encoding, ("append", "overwrite"))
        if self.threshold is not None:
            check_interval("threshold", self.threshold, -math.inf, math.inf, "neither")
        check_interval("peer_factor", self.peer_factor, 0, math.inf, "left")
        check_interval("peer_momentum", self.peer_momentum, 0, 1, "left")
        check_interval("learning_rate_init", self.learning_rate_init, 0, math.inf, "neither")
        check_interval("weight_decay", self.weight_decay, 0, math.inf, "left")
        check_integer("max_iter", self.max_iter, 1)
        check_integer("batch_size", self.batch_size, 1)
        widths = check_sizes("hidden_layer_sizes", self.hidden_layer_sizes)
        x, target, random = self._training_data(X, y)
        n_classes = len(self.classes_)
        if self.label_encoding == "overwrite" and n_classes > x.shape[1]:
            raise ValueError(
                "label_encoding='overwrite' needs as many features as there are classes, got "
                f"{x.shape[1]} features and {n_classes} classes"
            )
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        n_in = x.shape[1] + (n_classes if self.label_encoding == "append" else 0)
        self.layers_: Any = nn.ModuleList()
        for width in widths:
            layer = linear(n_in, width, generator, x.dtype)
            nn.init.normal_(layer.weight, std=1 / math.sqrt(width), generator=generator)
            self.layers_.append(layer)
            n_in = width
        self.layers_.to(x.device)
        activities = [x.new_full((width,), 0.5) for width in widths]

        held_out: tuple[Tensor, Tensor] | None = None
        if self.early_stopping:
            training, validation = split(target, self.validation_fraction, random)
            held_out = x[validation], target[validation]
            x, target = x[training], target[training]

        def losses(module: nn.Module, batch: Tensor) -> Iterator[Tensor]:
            label = target[batch]
            both = torch.cat([label, wrong_labels(label, n_classes, generator)])
            v = embed_label(x[batch].repeat(2, 1), both, n_classes, self.label_encoding)
            return self._losses(v, activities)

        def accuracy(samples: tuple[Tensor, Tensor]) -> float:
            label = self._total(self._goodness(samples[0])).argmax(dim=1)
            return float((label == samples[1]).double().mean())

        optimizer = torch.optim.AdamW(
            self.layers_.parameters(),
            lr=self.learning_rate_init,
            weight_decay=self.weight_decay,
            fused=x.device.type in ("cpu", "cuda"),
        )
        self.history_ = train_locally(
            self.layers_,
            losses,
            ShuffledBatches(len(x), self.batch_size, generator, x.device),
            optimizer=optimizer,
            max_epochs=self.max_iter,
            scheduler=torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda epoch: min(1.0, 2 * (self.max_iter - epoch) / self.max_iter)
            ),
            validate=None if held_out is None else lambda module: accuracy(held_out),
            n_iter_no_change=None if held_out is None else self.n_iter_no_change,
            tol=self.tol,
            progress="all layers" if self.verbose else None,
        )
        self.mean_activities_ = [activity.cpu().numpy() for activity in activities]
        self.n_iter_ = len(self.history_)
        return self

    def _losses(self, v: Tensor, activities: list[Tensor]) -> Iterator[Tensor]:
        """Yield the loss of every layer; the first half of the rows is positive.

        The running mean activities of the units are updated in place.
        """
        n = len(v) // 2
        positive = torch.cat([v.new_ones(n), v.new_zeros(n)])
        relu = straight_through_relu if self.straight_through else functional.relu
        for i, layer in enumerate(self.layers_):
            activation = relu(layer(rms_normalize(v)))
            loss = goodness_loss(activation, positive, self.threshold)
            momentum, kept = self.peer_momentum, activities[i]
            activity = momentum * kept + (1 - momentum) * activation[:n].mean(dim=0)
            activities[i] = activity.detach()
            yield loss + self.peer_factor * activity.var(correction=0)
            v = activation.detach()

    @torch.no_grad()
    def _goodness(self, x: Tensor) -> Tensor:
        """Return the goodness of all layers, samples and labels: (n_layers, n, n_classes)."""
        size = _CHUNK // (len(self.classes_) * max(layer.out_features for layer in self.layers_))
        return torch.cat([self._chunk_goodness(chunk) for chunk in x.split(max(1, size))], dim=1)

    def _chunk_goodness(self, x: Tensor) -> Tensor:
        n_classes, first = len(self.classes_), self.layers_[0]
        if self.label_encoding == "append":
            to_features, to_label = first.weight.split([x.shape[1], n_classes], dim=1)
        else:
            x = x[:, n_classes:]
            to_label, to_features = first.weight.split([n_classes, x.shape[1]], dim=1)
        # A one-hot vector has length 1 whatever the label, so all labels share the normalisation
        # and the product with the features.
        rms = ((x.square().sum(dim=1, keepdim=True) + 1) / first.in_features).sqrt() + 1e-8
        z = (x @ to_features.T / rms)[:, None] + to_label.T / rms[:, None] + first.bias
        activation = functional.relu(z)
        goodness = [activation.square().sum(dim=2)]
        for layer in list(self.layers_)[1:]:
            activation = functional.relu(layer(rms_normalize(activation)))
            goodness.append(activation.square().sum(dim=2))
        return torch.stack(goodness)

    def _total(self, goodness: Any) -> Any:
        """Sum goodness over the layers that predict."""
        return goodness[1:].sum(0) if self.skip_first and len(goodness) > 1 else goodness.sum(0)

    def layer_scores(self, X: Any) -> Array:
        """Compute the goodness of every layer for every label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_layers, n_samples, n_classes)
            Sums of squared activations.
        """
        check_is_fitted(self)
        return self._goodness(self._samples(X, self.layers_)).cpu().numpy()

    def predict_proba(self, X: Any) -> Array:
        """Compute a probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Softmax over the labels of the summed goodness. They rank the classes, but sums of
            squares of many units differ by much: nearly all values are close to 0 or 1.
        """
        return softmax(self._total(self.layer_scores(X)), axis=1)

    @property
    def coefs_(self) -> list[Array]:
        """Weights of the layers."""
        return weights(self.layers_)[0]

    @property
    def intercepts_(self) -> list[Array]:
        """Biases of the layers."""
        return weights(self.layers_)[1]
