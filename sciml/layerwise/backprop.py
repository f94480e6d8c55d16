"""Train the same networks by backpropagation: the baseline of every layer-local method."""

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional

from sciml._check import check_integer, check_interval
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

__all__ = ["BackpropClassifier"]

_CHUNK = 4096  # samples of a prediction at a time


class BackpropClassifier(TorchClassifier):
    """Classify with a ReLU network trained end to end, the twin of the layer-local classifiers.

    The layers are those of `MonoForwardClassifier` (with ``batch_norm=True`` those of
    `CascadedForwardClassifier`) with one linear layer of scores on top; the whole is trained by
    the cross entropy of these scores. It exists for comparisons: same tensors, same loop, same
    optimiser, but for where the gradient goes.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(256, 256)
        Widths of the dense layers; may be empty.
    conv_channels : sequence of int, default=()
        Channels of convolutional layers before the dense ones: 3x3 convolution, ReLU, 2x2 max
        pooling and, if wanted, batch normalisation.
    image_shape : (channels, height, width) or None, default=None
        How the features of a sample form an image, if X is not of shape
        (n_samples, channels, height, width).
    batch_norm : bool, default=False
        Whether the convolutional layers end with batch normalisation.
    learning_rate_init : float, default=1e-3
        Learning rate of AdamW.
    weight_decay : float, default=1e-5
        Weight decay of AdamW.
    max_iter : int, default=50
        Largest number of epochs.
    batch_size : int, default=128
        Samples of a step.
    early_stopping : bool, default=True
        Whether to set samples aside, stop when their loss no longer falls and end with the
        weights of its minimum.
    validation_fraction : float in (0, 1), default=0.1
        Part of the samples that is set aside.
    n_iter_no_change : int, default=5
        Epochs without improvement after which to stop.
    tol : float, default=1e-4
        Least decrease of the validation loss that is an improvement.
    device : str or torch.device, default="cpu"
        Where to train and predict.
    random_state : int, RandomState or None, default=None
        Initial weights, validation samples and order of the batches.
    verbose : bool, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    network_ : torch.nn.Sequential
        The network.
    coefs_, intercepts_ : list of ndarray
        Weights and biases of its layers; the weights of dense layers are (n_in, n_out).
    history_ : list of dict
        What `train_locally` returned.
    n_iter_ : int
        Epochs.
    classes_ : ndarray of shape (n_classes,)
        The classes.
    n_features_in_ : int
        Number of features; ``c * h * w`` of images.
    image_shape_ : tuple or None
        Shape of the images.

    References
    ----------
    Spyra, "Beyond Backpropagation", arXiv:2509.19063, which compares such twins.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.layerwise import BackpropClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> model = BackpropClassifier((64, 64), batch_size=32, max_iter=20, random_state=0)
    >>> model.fit(X[::3] / 16, y[::3]).score(X[1::3] / 16, y[1::3]) > 0.9
    True
    """

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (256, 256),
        *,
        conv_channels: Sequence[int] = (),
        image_shape: Sequence[int] | None = None,
        batch_norm: bool = False,
        learning_rate_init: float = 1e-3,
        weight_decay: float = 1e-5,
        max_iter: int = 50,
        batch_size: int = 128,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        tol: float = 1e-4,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.conv_channels = conv_channels
        self.image_shape = image_shape
        self.batch_norm = batch_norm
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
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.
        y : array-like of shape (n_samples,)
            Classes, of two kinds or more.

        Returns
        -------
        BackpropClassifier
            The classifier itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or an array does not fit, or holds NaN or infinity.
        FloatingPointError
            If the loss becomes infinite.
        """
        check_interval("learning_rate_init", self.learning_rate_init, 0, math.inf, "neither")
        check_interval("weight_decay", self.weight_decay, 0, math.inf, "left")
        check_integer("max_iter", self.max_iter, 1)
        check_integer("batch_size", self.batch_size, 1)
        x, target, random = self._training_data(X, y, self.image_shape)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        self.network_ = self._network(x.dtype, generator).to(x.device)
        held_out: tuple[Tensor, Tensor] | None = None
        if self.early_stopping:
            training, validation = split(target, self.validation_fraction, random)
            held_out = x[validation], target[validation]
            x, target = x[training], target[training]
        order = torch.Generator().manual_seed(int(random.randint(2**31)))
        smallest = 2 if self.batch_norm else 1

        def validate(samples: tuple[Tensor, Tensor]) -> float:
            with torch.no_grad():
                return -float(functional.cross_entropy(self._forward(samples[0]), samples[1]))

        self.history_ = train_locally(
            self.network_,
            lambda module, batch: functional.cross_entropy(module(x[batch]), target[batch]),
            ShuffledBatches(len(x), self.batch_size, order, x.device, smallest),
            optimizer=torch.optim.AdamW(
                self.network_.parameters(),
                lr=self.learning_rate_init,
                weight_decay=self.weight_decay,
                fused=x.device.type in ("cpu", "cuda"),
            ),
            max_epochs=self.max_iter,
            validate=None if held_out is None else lambda module: validate(held_out),
            n_iter_no_change=None if held_out is None else self.n_iter_no_change,
            tol=self.tol,
            progress="backprop" if self.verbose else None,
        )
        self.n_iter_ = len(self.history_)
        return self

    def _network(self, dtype: torch.dtype, generator: torch.Generator) -> nn.Sequential:
        """Return the untrained network."""
        channels = check_sizes("conv_channels", self.conv_channels, least=0)
        widths = check_sizes("hidden_layer_sizes", self.hidden_layer_sizes, least=0)
        layers: list[nn.Module] = []
        size = self.n_features_in_
        if channels:
            size = math.prod(output_shape("conv_channels", channels, self.image_shape_))
            layers.append(nn.Unflatten(1, self.image_shape_))
            n_in = self.image_shape_[0]
            for n_out in channels:
                layers += [convolution(n_in, n_out, generator, dtype), nn.ReLU(), nn.MaxPool2d(2)]
                if self.batch_norm:
                    layers.append(nn.BatchNorm2d(n_out, eps=1e-4, dtype=dtype))
                n_in = n_out
            layers.append(nn.Flatten())
        for width in widths:
            layers += [linear(size, width, generator, dtype), nn.ReLU()]
            size = width
        scores = linear(size, len(self.classes_), generator, dtype)
        nn.init.normal_(scores.weight, std=0.01, generator=generator)
        return nn.Sequential(*layers, scores)

    def _forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.network_(chunk) for chunk in x.split(_CHUNK)])

    def predict_proba(self, X: Any) -> Array:
        """Compute the probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Softmax of the scores.
        """
        check_is_fitted(self)
        x = self._samples(X, self.network_)
        with torch.no_grad():
            return self._forward(x).softmax(dim=1).cpu().numpy()

    @property
    def coefs_(self) -> list[Array]:
        """Weights of the layers."""
        return weights([self.network_])[0]

    @property
    def intercepts_(self) -> list[Array]:
        """Biases of the layers."""
        return weights([self.network_])[1]
