"""Train every layer to classify through a projection of its own, without backpropagation.

Layer i computes ``a_i = ReLU(W_i a_{i-1} + b_i)`` and, by its projection M_i, a score for each
class, ``G_i = M_i a_i``. W_i, b_i and M_i learn from the cross entropy of G_i alone; a_{i-1} is
detached, so no gradient passes from one layer to another. The scores of the last layer classify.

Where paper and published code leave a choice: the umbrella study trains the layers one after
another ("sequential", the default here), the paper all of them in each step ("joint"). The study
keeps the weights of the last epoch, here those of the best validation loss return
(``restore_best=False`` keeps the last). Its extra projection of the raw input, which predicts
nothing, is left out.

References
----------
J. Gong, B. Li, W. Abdulla, "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural
Network Training Harnessing Local Errors", arXiv:2501.09238, 2025.
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
from sciml.layerwise.local_training import train_locally
from sciml.layerwise.torch_classifier import (
    Array,
    ShuffledBatches,
    TorchClassifier,
    check_sizes,
    convolution,
    linear,
    output_shape,
    split,
    weights,
)

__all__ = ["MonoForwardClassifier", "MonoForwardStage"]

_CHUNK = 4096  # samples of which a frozen stage computes its output at a time


class MonoForwardStage(nn.Module):
    """One layer and the projection of its output to a score for each class.

    Parameters
    ----------
    layer : torch.nn.Module
        Maps inputs to activations, for example a linear layer and its ReLU.
    projection : torch.nn.Linear
        Maps flattened activations to scores.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import MonoForwardStage
    >>> stage = MonoForwardStage(torch.nn.ReLU(), torch.nn.Linear(4, 2, bias=False))
    >>> activation, scores = stage(torch.ones(3, 4))
    >>> tuple(scores.shape)
    (3, 2)
    """

    def __init__(self, layer: nn.Module, projection: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.projection = projection

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return activations of shape (n, ...) and scores of shape (n, n_classes)."""
        activation = self.layer(x)
        return activation, self.projection(activation.flatten(1))


class MonoForwardClassifier(TorchClassifier):
    """Classify with a network whose layers each learn from their own cross entropy.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(256, 256)
        Widths of the dense layers (the umbrella study has 2 x 1000 for MNIST). May be empty if
        there are convolutions.
    conv_channels : sequence of int, default=()
        Channels of convolutional layers before the dense ones: 3x3 convolution, ReLU and 2x2 max
        pooling. Their projections read the flattened map.
    image_shape : (channels, height, width) or None, default=None
        How the features of a sample form an image, if X is not of shape
        (n_samples, channels, height, width).
    schedule : {"sequential", "joint"}, default="sequential"
        Train the layers one after the other, each on the finished output of the one before, which
        is computed once; or all of them in every step.
    predict_from : {"last", "sum"}, default="last"
        Classify by the scores of the last layer or by their sum over all layers.
    learning_rate_init : float, default=1e-3
        Learning rate of Adam (the study's tuned values are 1.7e-4 to 1.6e-3).
    weight_decay : float, default=0.0
        L2 penalty of Adam.
    max_iter : int, default=15
        Largest number of epochs, of each layer if sequential, of all together if joint.
    batch_size : int, default=128
        Samples of a step.
    early_stopping : bool, default=True
        Whether to set samples aside and stop a layer (if joint, all layers) when their loss no
        longer falls.
    validation_fraction : float in (0, 1), default=0.1
        Part of the samples that is set aside.
    n_iter_no_change : int, default=5
        Epochs without improvement after which to stop.
    tol : float, default=1e-4
        Least decrease of the validation loss that is an improvement.
    restore_best : bool, default=True
        Whether a layer ends with the weights of its best validation loss instead of its last.
    device : str or torch.device, default="cpu"
        Where to train and predict.
    random_state : int, RandomState or None, default=None
        Initial weights, validation samples and order of the batches.
    verbose : bool, default=False
        Whether to show a progress bar for each layer.

    Attributes
    ----------
    stages_ : torch.nn.ModuleList of MonoForwardStage
        The layers with their projections.
    coefs_, intercepts_ : list of ndarray
        Weights and biases of the layers; the weights of dense layers are (n_in, n_out).
    projections_ : list of ndarray of shape (n_units, n_classes)
        Weights of the projections.
    history_ : list of list of dict
        For every layer (if joint: one entry for all) what `train_locally` returned.
    n_iter_ : ndarray of shape (n_layers,)
        Epochs of each layer.
    classes_ : ndarray of shape (n_classes,)
        The classes.
    n_features_in_ : int
        Number of features; ``c * h * w`` of images.
    image_shape_ : tuple or None
        Shape of the images.

    Notes
    -----
    The network computes in the dtype of X: float32 is about twice as fast as float64. Memory for
    backpropagation is that of one layer; the sequential schedule also holds the input of the
    current layer for all samples.

    References
    ----------
    Gong, Li and Abdulla, "Mono-Forward", arXiv:2501.09238. Spyra, "Beyond Backpropagation",
    arXiv:2509.19063.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.layerwise import MonoForwardClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> model = MonoForwardClassifier((64, 64), batch_size=32, random_state=0)
    >>> model.fit(X[::3] / 16, y[::3]).score(X[1::3] / 16, y[1::3]) > 0.9
    True
    """

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (256, 256),
        *,
        conv_channels: Sequence[int] = (),
        image_shape: Sequence[int] | None = None,
        schedule: str = "sequential",
        predict_from: str = "last",
        learning_rate_init: float = 1e-3,
        weight_decay: float = 0.0,
        max_iter: int = 15,
        batch_size: int = 128,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        tol: float = 1e-4,
        restore_best: bool = True,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.conv_channels = conv_channels
        self.image_shape = image_shape
        self.schedule = schedule
        self.predict_from = predict_from
        self.learning_rate_init = learning_rate_init
        self.weight_decay = weight_decay
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.restore_best = restore_best
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Train the network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.
        y : array-like of shape (n_samples,)
            Classes, of two kinds or more.

        Returns
        -------
        MonoForwardClassifier
            The classifier itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or an array does not fit, or holds NaN or infinity.
        FloatingPointError
            If a loss becomes infinite.
        """
        check_choice("schedule", self.schedule, ("sequential", "joint"))
        check_choice("predict_from", self.predict_from, ("last", "sum"))
        check_interval("learning_rate_init", self.learning_rate_init, 0, math.inf, "neither")
        check_interval("weight_decay", self.weight_decay, 0, math.inf, "left")
        check_integer("max_iter", self.max_iter, 1)
        check_integer("batch_size", self.batch_size, 1)
        x, target, random = self._training_data(X, y, self.image_shape)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        self.stages_: Any = self._network(x.dtype, generator).to(x.device)
        if np.size(self.conv_channels):
            x = x.unflatten(1, self.image_shape_)
        held_out: tuple[Tensor, Tensor] | None = None
        if self.early_stopping:
            training, validation = split(target, self.validation_fraction, random)
            held_out = x[validation], target[validation]
            x, target = x[training], target[training]
        order = torch.Generator().manual_seed(int(random.randint(2**31)))
        batches = ShuffledBatches(len(x), self.batch_size, order, x.device)
        if self.schedule == "joint":
            self.history_ = [self._train(self.stages_, x, target, held_out, batches, "all layers")]
            self.n_iter_ = np.full(len(self.stages_), len(self.history_[0]))
            return self
        self.history_ = []
        for i, stage in enumerate(self.stages_):
            label = f"layer {i + 1}/{len(self.stages_)}"
            self.history_.append(
                self._train(self.stages_[i : i + 1], x, target, held_out, batches, label)
            )
            if i + 1 < len(self.stages_):
                x = _activations(stage, x)
                if held_out is not None:
                    held_out = _activations(stage, held_out[0]), held_out[1]
        self.n_iter_ = np.array([len(history) for history in self.history_])
        return self

    def _network(self, dtype: torch.dtype, generator: torch.Generator) -> nn.ModuleList:
        """Return the untrained stages."""
        channels = check_sizes("conv_channels", self.conv_channels, least=0)
        widths = check_sizes("hidden_layer_sizes", self.hidden_layer_sizes, 0 if channels else 1)
        stages, n_classes = nn.ModuleList(), len(self.classes_)
        for i, n_out in enumerate(channels):
            size = math.prod(output_shape("conv_channels", channels[: i + 1], self.image_shape_))
            n_in = self.image_shape_[0] if i == 0 else channels[i - 1]
            layer = [convolution(n_in, n_out, generator, dtype), nn.ReLU(), nn.MaxPool2d(2)]
            projection = linear(size, n_classes, generator, dtype, bias=None)
            stages.append(MonoForwardStage(nn.Sequential(*layer), projection))
        size = size if channels else self.n_features_in_
        for i, n_out in enumerate(widths):
            layer = [linear(size, n_out, generator, dtype), nn.ReLU()]
            if i == 0 and channels:
                layer.insert(0, nn.Flatten())
            projection = linear(n_out, n_classes, generator, dtype, bias=None)
            stages.append(MonoForwardStage(nn.Sequential(*layer), projection))
            size = n_out
        return stages

    def _train(
        self,
        stages: nn.ModuleList,
        x: Tensor,
        target: Tensor,
        held_out: tuple[Tensor, Tensor] | None,
        batches: ShuffledBatches,
        label: str,
    ) -> list[dict[str, float]]:
        """Train stages, each by its own loss, on the fixed input of the first one."""

        def validate(samples: tuple[Tensor, Tensor]) -> float:
            with torch.no_grad():
                return -float(sum(local_losses(stages, *samples)))

        return train_locally(
            stages,
            lambda module, batch: local_losses(stages, x[batch], target[batch]),
            batches,
            optimizer=torch.optim.Adam(
                stages.parameters(),
                lr=self.learning_rate_init,
                weight_decay=self.weight_decay,
                fused=x.device.type in ("cpu", "cuda"),
            ),
            max_epochs=self.max_iter,
            validate=None if held_out is None else lambda module: validate(held_out),
            n_iter_no_change=None if held_out is None else self.n_iter_no_change,
            tol=self.tol,
            restore_best=self.restore_best,
            progress=label if self.verbose else None,
        )

    def layer_scores(self, X: Any) -> Array:
        """Compute the scores of every layer.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.

        Returns
        -------
        ndarray of shape (n_layers, n_samples, n_classes)
            Scores G_i, whose softmax is the prediction of layer i.
        """
        check_is_fitted(self)
        x = self._samples(X, self.stages_)
        if np.size(self.conv_channels):
            x = x.unflatten(1, self.image_shape_)
        scores = []
        with torch.no_grad():
            for chunk in x.split(_CHUNK):
                found = []
                for stage in self.stages_:
                    chunk, score = stage(chunk)
                    found.append(score)
                scores.append(torch.stack(found))
        return torch.cat(scores, dim=1).cpu().numpy()

    def predict_proba(self, X: Any) -> Array:
        """Compute the probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Softmax of the scores of the last layer, or of the sum of all.
        """
        scores = self.layer_scores(X)
        total = scores[-1] if self.predict_from == "last" else scores.sum(axis=0)
        return softmax(total, axis=1)

    @property
    def coefs_(self) -> list[Array]:
        """Weights of the layers."""
        return weights(stage.layer for stage in self.stages_)[0]

    @property
    def intercepts_(self) -> list[Array]:
        """Biases of the layers."""
        return weights(stage.layer for stage in self.stages_)[1]

    @property
    def projections_(self) -> list[Array]:
        """Weights of the projections."""
        return weights(stage.projection for stage in self.stages_)[0]


def local_losses(stages: nn.ModuleList, x: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Yield the cross entropy of every stage, each on the detached activations below it."""
    for stage in stages:
        x, scores = stage(x.detach())
        yield functional.cross_entropy(scores, target)


def _activations(stage: Any, x: Tensor) -> Tensor:
    """Return the output of a trained stage for all samples."""
    with torch.no_grad():
        return torch.cat([stage.layer(chunk) for chunk in x.split(_CHUNK)])
