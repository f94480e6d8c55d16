"""What the classifiers of this package share: checked data as tensors, batches, layers, predict."""

import math
from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn

from sciml._check import check_integer, check_interval

__all__ = [
    "Array",
    "ShuffledBatches",
    "TorchClassifier",
    "check_sizes",
    "convolution",
    "linear",
    "output_shape",
    "weights",
]

Array: TypeAlias = NDArray[Any]


class TorchClassifier(ClassifierMixin, BaseEstimator, metaclass=ABCMeta):
    """Base of the classifiers: samples in, probabilities and classes out."""

    device: str | torch.device
    random_state: int | np.random.RandomState | None
    image_shape_: Any  # (channels, height, width) or None

    def predict(self, X: Any) -> Array:
        """Predict the class of each sample.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples,)
            The most probable classes.
        """
        probability = self.predict_proba(X)
        return self.classes_[probability.argmax(axis=1)]

    @abstractmethod
    def predict_proba(self, X: Any) -> Array:
        """Compute the probability of each class."""

    def _training_data(
        self, X: Any, y: Any, image_shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, np.random.RandomState]:
        """Check X and y, set what they tell, return them as tensors with the random numbers."""
        X, self.image_shape_ = flatten_images(X, image_shape)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_min_samples=2)
        check_classification_targets(y)
        if self.image_shape_ is not None and X.shape[1] != math.prod(self.image_shape_):
            raise ValueError(
                f"image_shape={tuple(self.image_shape_)} must hold as many values as X has "
                f"features, got {math.prod(self.image_shape_)} and {X.shape[1]}"
            )
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y must hold two classes or more, got 1 class: {self.classes_.tolist()[0]!r}"
            )
        device = torch.device(self.device)
        target = torch.from_numpy(index.astype(np.int64)).to(device)
        return as_tensor(X, device), target, check_random_state(self.random_state)

    def _samples(self, X: Any, module: nn.Module) -> Tensor:
        """Check samples for prediction and put them where the module is."""
        check_is_fitted(self)
        X, _ = flatten_images(X, self.image_shape_)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        parameter = next(module.parameters())
        return as_tensor(X, parameter.device).to(parameter.dtype)


def flatten_images(
    X: Any, image_shape: Sequence[int] | None
) -> tuple[Any, tuple[int, int, int] | None]:
    """Return images of shape (n, c, h, w) as rows, and the shape (c, h, w) if X or the user knows.

    Everything else is left for scikit-learn to judge.
    """
    shape = None
    if image_shape is not None:
        if len(image_shape) != 3:
            raise ValueError(
                f"image_shape must be (channels, height, width), got {tuple(image_shape)}"
            )
        for size in image_shape:
            check_integer("image_shape", size, 1)
        shape = (int(image_shape[0]), int(image_shape[1]), int(image_shape[2]))
    if getattr(X, "ndim", 2) == 4:
        if shape is not None and tuple(X.shape[1:]) != shape:
            raise ValueError(f"X must hold images of shape {shape}, got {tuple(X.shape[1:])}")
        _, channels, height, width = X.shape
        shape = (channels, height, width)
        X = X.reshape(X.shape[0], -1)
    return X, shape


def as_tensor(X: Array, device: torch.device) -> Tensor:
    """Return a tensor of X, which nobody writes to."""
    return torch.from_numpy(X if X.flags.writeable else X.copy()).to(device)


def split(target: Tensor, fraction: float, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
    """Return places of training and validation samples, stratified if classes are large enough."""
    check_interval("validation_fraction", fraction, 0, 1, closed="neither")
    labels = target.cpu().numpy()
    counts = np.bincount(labels)
    n_validation = math.ceil(fraction * len(labels))
    if n_validation >= len(labels):
        raise ValueError(
            f"validation_fraction={fraction} of {len(labels)} samples leaves none to train on"
        )
    room = min(n_validation, len(labels) - n_validation) >= len(counts)
    training, validation = train_test_split(
        np.arange(len(labels)),
        test_size=n_validation,
        random_state=random,
        stratify=labels if room and counts.min() >= 2 else None,
    )
    return torch.from_numpy(training).to(target.device), torch.from_numpy(validation).to(
        target.device
    )


class ShuffledBatches:
    """Batches of the numbers 0..n-1, in another random order whenever they are iterated.

    Parameters
    ----------
    n : int
        Number of samples.
    batch_size : int
        Size of all batches but the last.
    generator : torch.Generator
        Draws the orders, on the CPU.
    device : torch.device
        Where the batches are put.
    smallest : int, default=1
        A last batch smaller than this is joined to the one before it.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device,
        smallest: int = 1,
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self.generator = generator
        self.device = device
        self.smallest = smallest

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.n, generator=self.generator).to(self.device)
        batches = list(order.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) < self.smallest:
            batches[-2:] = [torch.cat(batches[-2:])]
        yield from batches


def check_sizes(name: str, sizes: Any, least: int = 1) -> tuple[int, ...]:
    """Return layer sizes as a tuple; a single integer is one layer."""
    sizes = (sizes,) if np.ndim(sizes) == 0 else tuple(sizes)
    for size in sizes:
        check_integer(name, size, 1)
    if len(sizes) < least:
        raise ValueError(f"{name} must name one layer or more, got {sizes}")
    return tuple(int(size) for size in sizes)


def linear(
    n_in: int,
    n_out: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    bias: str | None = "zero",
) -> nn.Linear:
    """Return a linear layer with weights uniform in +-1 / sqrt(n_in), without global randomness.

    The bias is "zero", "uniform" like the weights (torch's default), or None.
    """
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias is not None, dtype=dtype)
    _initialize(layer, n_in, generator, bias)
    return layer


def convolution(
    n_in: int,
    n_out: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    bias: str = "zero",
) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps height and width, initialised like `linear`."""
    layer = nn.utils.skip_init(nn.Conv2d, n_in, n_out, kernel_size=3, padding=1, dtype=dtype)
    _initialize(layer, 9 * n_in, generator, bias)
    return layer


def _initialize(layer: Any, fan_in: int, generator: torch.Generator, bias: str | None) -> None:
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    if bias == "uniform":
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    elif bias == "zero":
        nn.init.zeros_(layer.bias)


def output_shape(name: str, channels: Sequence[int], image_shape: Any) -> tuple[int, int, int]:
    """Return the shape of a map after stages that halve its height and width each."""
    if image_shape is None:
        raise ValueError(
            f"{name}={tuple(channels)} needs images: give image_shape=(channels, height, width) "
            "or X of shape (n_samples, channels, height, width)"
        )
    _, height, width = image_shape
    factor = 2 ** len(channels)
    if min(height, width) < factor:
        raise ValueError(
            f"{name}={tuple(channels)} halves the image {len(channels)} times, so height and "
            f"width must be {factor} or more, got {height} x {width}"
        )
    return channels[-1], height // factor, width // factor


def weights(modules: Iterable[nn.Module]) -> tuple[list[Array], list[Array]]:
    """Return weights and biases of all linear layers and convolutions as arrays.

    Weights of linear layers have the shape (n_in, n_out), as those of scikit-learn.
    """
    coefs, intercepts = [], []
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                weight = layer.weight.detach().cpu().numpy()
                coefs.append(weight.T if isinstance(layer, nn.Linear) else weight)
                if layer.bias is not None:
                    intercepts.append(layer.bias.detach().cpu().numpy())
    return coefs, intercepts
