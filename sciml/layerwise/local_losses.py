"""Parts of the Forward-Forward algorithm: goodness, its loss, normalisation, the ReLU's gradient.

References
----------
G. Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", arXiv:2212.13345, 2022.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sciml._check import check_interval, check_same_length, check_shape

__all__ = ["goodness_loss", "rms_normalize", "straight_through_relu"]


class _StraightThroughReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def straight_through_relu(x: Tensor) -> Tensor:
    """Compute max(x, 0) with the derivative 1 everywhere, also where the output is 0.

    With the goodness of Forward-Forward the gradient arriving at an output of 0 is 0 anyway; it is
    other terms, such as peer normalisation, that can wake a silent unit through this derivative.

    Parameters
    ----------
    x : Tensor
        Any shape and floating dtype.

    Returns
    -------
    Tensor
        Of the shape of `x`.

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import straight_through_relu
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> straight_through_relu(x).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """
    output: Tensor = _StraightThroughReLU.apply(x)
    return output


def rms_normalize(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Divide each row by its root mean square, so that a layer cannot read its length.

    Parameters
    ----------
    x : Tensor of shape (..., n_features)
        Activations.
    eps : float, default=1e-8
        Added to the root mean square; a zero row stays zero.

    Returns
    -------
    Tensor of shape (..., n_features)
        Rows of mean square 1.

    Raises
    ------
    ValueError
        If `eps` is negative.

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import rms_normalize
    >>> rms_normalize(torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    tensor([[1., 1.],
            [0., 0.]])
    """
    check_interval("eps", eps, 0)
    return x / (x.square().mean(dim=-1, keepdim=True).sqrt() + eps)


def goodness_loss(activation: Tensor, positive: Tensor, threshold: float | None = None) -> Tensor:
    """Compute the loss of telling positive from negative samples by a layer's goodness.

    The goodness of a sample is the sum of its squared activations g; the loss is the mean binary
    cross entropy of the probability ``sigmoid(g - threshold)`` that the sample is positive.

    Parameters
    ----------
    activation : Tensor of shape (n_samples, n_units)
        Output of the layer.
    positive : Tensor of shape (n_samples,)
        1 for positive samples, 0 for negative ones.
    threshold : float or None, default=None
        Goodness of even odds; None is the number of units.

    Returns
    -------
    Tensor of shape ()
        The loss.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    References
    ----------
    Hinton, "The Forward-Forward Algorithm", arXiv:2212.13345.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import goodness_loss
    >>> goodness_loss(torch.zeros(3, 2), torch.ones(3))  # log(1 + e^2)
    tensor(2.1269)
    """
    check_shape("activation", activation, (None, None))
    check_shape("positive", positive, (None,))
    check_same_length(activation=activation, positive=positive)
    if threshold is None:
        threshold = activation.shape[1]
    logit = activation.square().sum(dim=1) - threshold
    return functional.binary_cross_entropy_with_logits(logit, positive.to(logit.dtype))
