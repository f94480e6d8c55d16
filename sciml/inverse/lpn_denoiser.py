"""Learn from clean samples, as plain arrays, to denoise and to score by the learned prior.

References
----------
.. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
   Problems", ICLR 2024, arXiv:2310.14344.
"""

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from .._check import check_integer, check_interval
from .lpn import FullyConnectedLPN, LearnedProximalNetwork
from .lpn_prior import LPNPrior
from .lpn_training import train_lpn
from .proximal_matching import ProximalMatchingSchedule

__all__ = ["LPNDenoiser"]


class LPNDenoiser(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Denoiser and prior learned from clean samples by proximal matching.

    ``transform`` applies the learned proximal operator, a MAP denoiser at the noise level
    `sigma`; ``score_samples`` evaluates the learned log-prior. Two-dimensional `X` is fitted
    with a dense network, images with a convolutional one.

    Parameters
    ----------
    sigma : float, default=0.1
        Standard deviation of the noise to remove (paper: 0.1 on MNIST).
    width : int, default=64
        Channels or units of the hidden layers (paper: 64 on MNIST).
    beta : float, default=10.0
        Sharpness of the softplus (paper: 10 on MNIST).
    strong_convexity : float, default=0.01
        c in the term c ||x||^2 of the potential, positive so that the prior exists
        everywhere (paper: 0.01 on MNIST).
    n_steps : int, default=40000
        Training steps of the published schedule (paper: 40 000).
    gamma_min : float, default=None
        Last gamma of proximal matching; None is the published 0.08 sqrt(n_features).
    batch_size : int, default=200
        Samples a step (paper: 200).
    validation_fraction : float, default=0.0
        Part of `X` that is kept for the validation curve.
    random_state : int, RandomState or None, default=None
        Source of weights, batches and noise.
    verbose : bool, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    network_ : FullyConnectedLPN or LearnedProximalNetwork
        The network, in evaluation mode: a deepinv ``Denoiser``.
    history_ : TrainingHistory
        Losses and validation curve.
    n_iter_ : int
        Steps taken.
    n_features_in_ : int
        Columns, or the first axis of the images.

    See Also
    --------
    train_lpn : Training with checkpoints, other schedules and networks.
    LPNPrior : The prior for deepinv's solvers.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
       Problems", ICLR 2024, arXiv:2310.14344.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.inverse import LPNDenoiser
    >>> X = load_digits().images[:100] / 16.0
    >>> denoiser = LPNDenoiser(width=4, n_steps=20, batch_size=10, random_state=0).fit(X)
    >>> denoiser.transform(X).shape
    (100, 8, 8)
    """

    def __init__(
        self,
        sigma: float = 0.1,
        width: int = 64,
        beta: float = 10.0,
        strong_convexity: float = 0.01,
        n_steps: int = 40_000,
        gamma_min: float | None = None,
        batch_size: int = 200,
        validation_fraction: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.sigma = sigma
        self.width = width
        self.beta = beta
        self.strong_convexity = strong_convexity
        self.n_steps = n_steps
        self.gamma_min = gamma_min
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Learn the proximal operator of the prior from clean samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), (n_samples, height, width) or \
                (n_samples, channels, height, width)
            Clean samples, scaled to about [0, 1] or unit variance.
        y : Ignored
            For the scikit-learn interface.

        Returns
        -------
        LPNDenoiser
            The fitted estimator.
        """
        X = self._validate(X, reset=True)
        check_interval("sigma", self.sigma, 0, closed="neither")
        check_interval("strong_convexity", self.strong_convexity, 0, closed="neither")
        check_integer("n_steps", self.n_steps, 1)
        check_interval("validation_fraction", self.validation_fraction, 0, 1, closed="left")
        random_state = check_random_state(self.random_state)
        samples = self._tensor(X)
        generator = torch.Generator().manual_seed(int(random_state.randint(2**31 - 1)))
        network: FullyConnectedLPN | LearnedProximalNetwork
        if samples.dim() == 2:
            network = FullyConnectedLPN(
                samples.shape[1],
                hidden=self.width,
                beta=self.beta,
                strong_convexity=self.strong_convexity,
                generator=generator,
            )
        else:
            network = LearnedProximalNetwork(
                samples.shape[1],
                (samples.shape[2], samples.shape[3]),
                width=self.width,
                beta=self.beta,
                strong_convexity=self.strong_convexity,
                generator=generator,
            )
        network.to(samples.dtype)
        n_held_out = int(self.validation_fraction * len(samples))
        order = torch.as_tensor(random_state.permutation(len(samples)))
        schedule = ProximalMatchingSchedule(
            samples[0].numel(), self.n_steps, gamma_min=self.gamma_min
        )
        self.history_ = train_lpn(
            network,
            samples[order[n_held_out:]],
            sigma=float(self.sigma),
            schedule=schedule,
            batch_size=self.batch_size,
            validation=samples[order[:n_held_out]] if n_held_out else None,
            random_state=random_state,
            verbose=self.verbose,
        )
        self.network_ = network
        self.sample_shape_ = X.shape[1:]
        self.n_iter_ = self.history_.n_steps
        return self

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """Denoise: apply the learned proximal operator.

        Parameters
        ----------
        X : array-like of the shape of the training samples
            Noisy samples.

        Returns
        -------
        ndarray of the shape of `X`
            Denoised samples, float32 for float32 input and float64 otherwise.
        """
        check_is_fitted(self)
        X = self._validate(X, reset=False)
        samples = self._tensor(X)
        with torch.no_grad():
            out = self.network_(samples.to(self._dtype()))
        return out.to(samples.dtype).reshape(X.shape).numpy()

    def score_samples(self, X: ArrayLike) -> NDArray[Any]:
        """Compute the learned log-prior -R(x), up to a constant, in units of 1 / sigma^2.

        Parameters
        ----------
        X : array-like of the shape of the training samples
            Samples; those outside the range of the network draw a warning.

        Returns
        -------
        ndarray of shape (n_samples,)
            -R(x) / sigma^2, which approximates log p(x) plus a constant.
        """
        check_is_fitted(self)
        samples = self._tensor(self._validate(X, reset=False))
        energy = LPNPrior(self.network_).fn(samples.to(self._dtype()))
        return -energy.to(samples.dtype).numpy() / float(self.sigma) ** 2

    def _dtype(self) -> torch.dtype:
        return next(self.network_.parameters()).dtype

    def _validate(self, X: ArrayLike, reset: bool) -> NDArray[Any]:
        array: NDArray[Any] = validate_data(
            self, X, reset=reset, allow_nd=True, dtype=[np.float64, np.float32]
        )
        if array.ndim > 4:
            raise ValueError(
                "X must have 2 (samples, features), 3 (samples, height, width) or 4 (samples, "
                f"channels, height, width) dimensions, got {array.ndim}"
            )
        if not reset and array.shape[1:] != self.sample_shape_:
            raise ValueError(
                f"X must have samples of shape {self.sample_shape_}, got {array.shape[1:]}"
            )
        return array

    @staticmethod
    def _tensor(X: NDArray[Any]) -> Tensor:
        """Return the samples as (n, features) or (n, channels, height, width)."""
        tensor = torch.tensor(X)  # a copy: torch wants memory it may write to
        return tensor[:, None] if tensor.dim() == 3 else tensor

    def __sklearn_tags__(self) -> Tags:
        tags: Tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
