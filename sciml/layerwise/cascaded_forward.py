"""Classify by linear heads on every block of a cascade that backpropagation never crosses.

Blocks are 3x3 convolution, ReLU, 2x2 max pooling and batch normalisation. They stay random
(CaFo-Rand) or are trained by direct feedback alignment (CaFo-DFA), which sends the error of one
classifier on the top block to every other block through a fixed random matrix. Then each block gets
a linear head, trained alone; the sum of the heads' probabilities classifies.

Where paper and published code differ from this module: the official code leaves batch
normalisation in training mode, so that predictions depend on the other samples of a test batch,
and the umbrella study normalises by statistics that never saw data; here they are those of the
training samples. Features without images (``image_shape=None``) go through dense blocks (linear,
ReLU, batch normalisation), an extension of ours.

References
----------
G. Zhao, T. Wang, Y. Li, Y. Jin, C. Lang, H. Ling, "The Cascaded Forward Algorithm for Neural
Network Training", arXiv:2303.09728, 2023.
P. Spyra, "Beyond Backpropagation: Exploring Innovative Algorithms for Energy-Efficient Deep Neural
Network Training", arXiv:2509.19063, 2025.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional

from sciml._check import check_choice, check_integer, check_interval
from sciml.layerwise.cascaded_heads import ridge_weights, train_head
from sciml.layerwise.local_training import train_locally
from sciml.layerwise.sparsemax import sparsemax
from sciml.layerwise.torch_classifier import (
    Array,
    ShuffledBatches,
    TorchClassifier,
    check_sizes,
    convolution,
    linear,
    output_shape,
)

__all__ = ["CascadedForwardClassifier", "direct_feedback_losses"]

_CHUNK = 1024  # samples that go through a block at a time


class CascadedForwardClassifier(TorchClassifier):
    """Classify by linear heads on the blocks of a random or feedback-aligned cascade.

    Parameters
    ----------
    blocks : int, sequence of int or of torch.nn.Module, default=(32, 128, 512)
        Channels of convolutional blocks (the paper's three), or widths of dense blocks if there
        are no images. Modules are copied, used with the weights they have and, for
        ``block_training="random"``, in evaluation mode.
    image_shape : (channels, height, width) or None, default=None
        How the features of a sample form an image, if X is not of shape
        (n_samples, channels, height, width).
    block_training : {"random", "dfa"}, default="random"
        Whether the blocks keep their initial weights or learn by direct feedback alignment.
    head : {"mse", "ce", "sparsemax"}, default="mse"
        Loss of the heads: squared error of the one-hot classes, in closed form; cross entropy;
        sparsemax loss.
    ridge : float, default=1.0
        Penalty ``ridge / 2 ||W||^2`` on a head, beside the sum over all samples of the loss (for
        "mse" of half the squared error). The paper has 0, which overfits where features are many.
    aggregate : {"probabilities", "logits"}, default="probabilities"
        Whether the heads' probabilities (sparsemax of the scores for that head, else softmax) or
        their scores are summed, the official and the study's code.
    solver : {"gd", "adam"}, default="gd"
        How heads other than "mse" are trained: full-batch gradient descent (the official code) or
        Adam on batches (the study).
    learning_rate_init : float, default=0.01
        Learning rate of these heads (the official code's).
    max_iter : int, default=500
        Steps ("gd") or epochs ("adam") of these heads.
    batch_size : int, default=128
        Samples of a step of "dfa" and "adam" (the study's).
    block_learning_rate : float, default=5e-4
        Learning rate of Adam for "dfa" (the study's tuned values are 1.4e-4 to 5e-4).
    block_max_iter : int, default=10
        Epochs of "dfa" (the study has 5 to 250).
    device : str or torch.device, default="cpu"
        Where to train and predict.
    random_state : int, RandomState or None, default=None
        Initial weights, feedback and order of the batches.
    verbose : bool, default=False
        Whether to show progress bars.

    Attributes
    ----------
    blocks_ : torch.nn.ModuleList
        The blocks, in evaluation mode.
    coefs_ : list of ndarray of shape (n_block_features, n_classes)
        Weights of the heads; there are no intercepts.
    history_ : list of list of dict
        For each head what `train_locally` returned; empty for "mse".
    block_history_ : list of dict
        What `train_locally` returned for the blocks; empty for "random". The loss is that of the
        classifier on the last block.
    n_iter_ : ndarray of shape (n_blocks,)
        Epochs of each head; 1 for "mse".
    classes_ : ndarray of shape (n_classes,)
        The classes.
    n_features_in_ : int
        Number of features; ``c * h * w`` of images.
    image_shape_ : tuple or None
        Shape of the images.

    Notes
    -----
    The features of all samples after one block are held in memory, in the dtype of X: float32
    takes half and is twice as fast. A ridge head of n samples with d features takes
    O(n d min(n, d)) time and 8 min(n, d)^2 bytes.

    References
    ----------
    Zhao et al., "The Cascaded Forward Algorithm", arXiv:2303.09728. Spyra, "Beyond
    Backpropagation", arXiv:2509.19063.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.layerwise import CascadedForwardClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> model = CascadedForwardClassifier((16, 32), image_shape=(1, 8, 8), random_state=0)
    >>> model.fit(X[::3] / 16, y[::3]).score(X[1::3] / 16, y[1::3]) > 0.9
    True
    """

    def __init__(
        self,
        blocks: int | Sequence[int] | Sequence[nn.Module] = (32, 128, 512),
        *,
        image_shape: Sequence[int] | None = None,
        block_training: str = "random",
        head: str = "mse",
        ridge: float = 1.0,
        aggregate: str = "probabilities",
        solver: str = "gd",
        learning_rate_init: float = 0.01,
        max_iter: int = 500,
        batch_size: int = 128,
        block_learning_rate: float = 5e-4,
        block_max_iter: int = 10,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.blocks = blocks
        self.image_shape = image_shape
        self.block_training = block_training
        self.head = head
        self.ridge = ridge
        self.aggregate = aggregate
        self.solver = solver
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.block_learning_rate = block_learning_rate
        self.block_max_iter = block_max_iter
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Train the blocks, if wanted, and the heads.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.
        y : array-like of shape (n_samples,)
            Classes, of two kinds or more.

        Returns
        -------
        CascadedForwardClassifier
            The classifier itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or an array does not fit, or holds NaN or infinity.
        FloatingPointError
            If a loss becomes infinite.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            If ``ridge`` is too small for the best squared error to be unique.
        """
        check_choice("block_training", self.block_training, ("random", "dfa"))
        check_choice("head", self.head, ("mse", "ce", "sparsemax"))
        check_choice("aggregate", self.aggregate, ("probabilities", "logits"))
        check_choice("solver", self.solver, ("gd", "adam"))
        check_interval("ridge", self.ridge, 0, math.inf, "left")
        check_interval("learning_rate_init", self.learning_rate_init, 0, math.inf, "neither")
        check_interval("block_learning_rate", self.block_learning_rate, 0, math.inf, "neither")
        for name in ("max_iter", "batch_size", "block_max_iter"):
            check_integer(name, getattr(self, name), 1)
        x, target, random = self._training_data(X, y, self.image_shape)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        self.blocks_ = self._blocks(x.dtype, generator).to(x.device)
        x = self._shaped(x)
        batches = ShuffledBatches(len(x), self.batch_size, generator, x.device, smallest=2)
        self.block_history_: list[dict[str, float]] = []
        if self.block_training == "dfa":
            self.block_history_ = self._train_blocks(x, target, batches, generator)
        # The blocks are frozen from here on; their statistics are set below.
        self.blocks_.requires_grad_(False).eval()
        self._heads: list[Tensor] = []
        self.history_: list[list[dict[str, float]]] = []
        for i, block in enumerate(self.blocks_):
            x = _features(block, x)
            features = x.flatten(1)
            if self.head == "mse":
                one_hot = functional.one_hot(target, len(self.classes_))
                self._heads.append(ridge_weights(features, one_hot.to(x.dtype), self.ridge))
                self.history_.append([])
                continue
            head, history = train_head(
                features,
                target,
                len(self.classes_),
                loss=self.head,
                ridge=self.ridge,
                solver=self.solver,
                learning_rate=self.learning_rate_init,
                max_iter=self.max_iter,
                batches=batches,
                progress=f"head {i + 1}/{len(self.blocks_)}" if self.verbose else None,
            )
            self._heads.append(head)
            self.history_.append(history)
        self.n_iter_ = np.array([max(1, len(history)) for history in self.history_])
        return self

    def _shaped(self, x: Tensor) -> Tensor:
        return x if self.image_shape_ is None else x.unflatten(1, self.image_shape_)

    def _blocks(self, dtype: torch.dtype, generator: torch.Generator) -> nn.ModuleList:
        """Return blocks with their initial weights, which are torch's defaults."""
        given = self.blocks if isinstance(self.blocks, Sequence) else ()
        modules = [block for block in given if isinstance(block, nn.Module)]
        if modules and len(modules) == len(given):
            return nn.ModuleList(copy.deepcopy(block) for block in modules).to(dtype)
        sizes = check_sizes("blocks", self.blocks)
        blocks = nn.ModuleList()
        if self.image_shape_ is None:
            n_in = self.n_features_in_
            for n_out in sizes:
                layer = linear(n_in, n_out, generator, dtype, bias="uniform")
                normalize = nn.BatchNorm1d(n_out, eps=1e-4, dtype=dtype)
                blocks.append(CascadedForwardBlock(layer, nn.ReLU(), normalize))
                n_in = n_out
            return blocks
        output_shape("blocks", sizes, self.image_shape_)  # raises if the image is too small
        n_in = self.image_shape_[0]
        for n_out in sizes:
            conv = convolution(n_in, n_out, generator, dtype, bias="uniform")
            normalize2d = nn.BatchNorm2d(n_out, eps=1e-4, dtype=dtype)
            blocks.append(CascadedForwardBlock(conv, nn.ReLU(), nn.MaxPool2d(2), normalize2d))
            n_in = n_out
        return blocks

    def _train_blocks(
        self, x: Tensor, target: Tensor, batches: ShuffledBatches, generator: torch.Generator
    ) -> list[dict[str, float]]:
        """Train the blocks by direct feedback alignment."""
        sizes, probe = [], x[:2]
        self.blocks_.eval()
        with torch.no_grad():
            for block in self.blocks_:
                probe = block(probe)
                sizes.append(probe[0].numel())
        n_classes = len(self.classes_)
        auxiliary = linear(sizes[-1], n_classes, generator, x.dtype).to(x.device)
        feedback = []
        for size in sizes[:-1]:
            matrix = torch.randn(n_classes, size, generator=generator, dtype=x.dtype)
            feedback.append(functional.normalize(matrix, dim=1).to(x.device))
        module = nn.ModuleList([self.blocks_, auxiliary])
        return train_locally(
            module,
            lambda module, batch: direct_feedback_losses(
                module[0], module[1], feedback, x[batch], target[batch]
            ),
            batches,
            optimizer=torch.optim.Adam(
                module.parameters(),
                lr=self.block_learning_rate,
                fused=x.device.type in ("cpu", "cuda"),
            ),
            max_epochs=self.block_max_iter,
            progress="blocks" if self.verbose else None,
        )

    @torch.no_grad()
    def _scores(self, X: Any) -> Tensor:
        check_is_fitted(self)
        found = []
        for x in self._shaped(self._samples(X, self.blocks_)).split(_CHUNK):
            scores = []
            for block, head in zip(self.blocks_, self._heads, strict=True):
                x = block(x)
                scores.append(x.flatten(1) @ head)
            found.append(torch.stack(scores))
        return torch.cat(found, dim=1)

    def layer_scores(self, X: Any) -> Array:
        """Compute the scores of the head of every block.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.

        Returns
        -------
        ndarray of shape (n_blocks, n_samples, n_classes)
            Scores Z W.
        """
        return self._scores(X).cpu().numpy()

    def predict_proba(self, X: Any) -> Array:
        """Compute a probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, c, h, w)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Mean of the heads' probabilities, or softmax of the sum of their scores. With squared
            error they rank the classes but are close to each other: its scores lie near 0 and 1.
        """
        scores = self._scores(X)
        if self.aggregate == "logits":
            return scores.sum(dim=0).softmax(dim=1).cpu().numpy()
        probability = sparsemax(scores) if self.head == "sparsemax" else scores.softmax(dim=2)
        return probability.mean(dim=0).cpu().numpy()

    @property
    def coefs_(self) -> list[Array]:
        """Weights of the heads."""
        return [head.cpu().numpy() for head in self._heads]


class CascadedForwardBlock(nn.Sequential):
    """Layers of a block, of which the last is batch normalisation."""


def direct_feedback_losses(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    auxiliary: nn.Module,
    feedback: Sequence[Tensor],
    x: Tensor,
    target: Tensor,
) -> Iterator[Tensor]:
    """Yield scalars whose gradients are those of direct feedback alignment.

    The first is the mean cross entropy of the auxiliary classifier, whose gradient reaches it and
    the last block. For every other block follows a scalar of value 0, whose gradient is the product
    of the block's Jacobian with ``delta = e B``: e is the error softmax - one-hot of each sample
    (not divided by the number of samples, as in the umbrella study) and B the block's feedback.

    Parameters
    ----------
    blocks : sequence of torch.nn.Module
        The blocks, from the bottom.
    auxiliary : torch.nn.Module
        Classifier of the flattened output of the last block.
    feedback : sequence of Tensor of shape (n_classes, n_block_features)
        Feedback of every block but the last.
    x : Tensor of shape (n_samples, ...)
        Input.
    target : Tensor of shape (n_samples,), integer
        Classes.

    Yields
    ------
    Tensor of shape ()
        For `train_locally`; at any time one block's graph is alive.

    References
    ----------
    Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks",
    arXiv:1609.01596. Zhao et al., "The Cascaded Forward Algorithm", arXiv:2303.09728.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import direct_feedback_losses
    >>> blocks = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)]
    >>> x, y = torch.ones(5, 3), torch.zeros(5, dtype=torch.long)
    >>> losses = direct_feedback_losses(blocks, torch.nn.Linear(4, 2), [torch.ones(2, 4)], x, y)
    >>> [loss.item() == 0 for loss in losses]
    [False, True]
    """
    if len(feedback) != len(blocks) - 1:
        raise ValueError(
            f"feedback must hold a matrix for each of {len(blocks) - 1} blocks (all but the "
            f"last), got {len(feedback)}"
        )
    inputs = [x]
    with torch.no_grad():
        for block in list(blocks)[:-1]:
            inputs.append(block(inputs[-1]))
    scores = auxiliary(blocks[-1](inputs[-1]).flatten(1))
    error = scores.detach().softmax(dim=1)
    error[torch.arange(len(target), device=target.device), target] -= 1
    yield functional.cross_entropy(scores, target)
    for block, x, matrix in zip(list(blocks)[:-1], inputs[:-1], feedback, strict=True):
        product = (block(x).flatten(1) * (error @ matrix)).sum()
        yield product - product.detach()


@torch.no_grad()
def _features(block: nn.Module, x: Tensor) -> Tensor:
    """Return a block's output for all samples, having set its statistics to theirs."""
    if not isinstance(block, CascadedForwardBlock):
        return torch.cat([block(chunk) for chunk in x.split(_CHUNK)])
    layers: Any = block[:-1]
    normalize: Any = block[-1]
    x = torch.cat([layers(chunk) for chunk in x.split(_CHUNK)])
    axes = [axis for axis in range(x.ndim) if axis != 1]
    normalize.running_mean.copy_(x.mean(dim=axes))
    normalize.running_var.copy_(x.var(dim=axes, correction=0))
    for chunk in x.split(_CHUNK):
        chunk.copy_(normalize(chunk))
    return x
