"""Map scores to sparse probabilities by projection onto the simplex, with the loss that fits.

References
----------
A. Martins, R. Astudillo, "From Softmax to Sparsemax", ICML 2016, arXiv:1602.02068.
"""

import torch
from torch import Tensor

from sciml._check import check_same_length, check_shape

__all__ = ["sparsemax", "sparsemax_loss"]


def sparsemax(scores: Tensor) -> Tensor:
    """Project each row of scores onto the probability simplex.

    Parameters
    ----------
    scores : Tensor of shape (..., n_classes)
        Scores z.

    Returns
    -------
    Tensor of shape (..., n_classes)
        Probabilities ``max(z - tau, 0)`` with the tau of each row that makes them sum to 1.

    References
    ----------
    Martins and Astudillo, "From Softmax to Sparsemax", arXiv:1602.02068.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import sparsemax
    >>> sparsemax(torch.tensor([[3.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000]])
    """
    return (scores - _threshold(scores)).clamp(min=0)


def sparsemax_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Compute the mean loss whose gradient in the scores is sparsemax(z) less the one-hot target.

    For class y: ``-z_y + 1/2 sum over p_c > 0 of (z_c^2 - tau^2) + 1/2``, which is 0 where z_y
    exceeds all other scores by 1 or more.

    Parameters
    ----------
    scores : Tensor of shape (n_samples, n_classes)
        Scores z.
    target : Tensor of shape (n_samples,), integer
        Classes.

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
    Martins and Astudillo, "From Softmax to Sparsemax", arXiv:1602.02068.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import sparsemax_loss
    >>> sparsemax_loss(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    tensor(0.1250)
    """
    check_shape("scores", scores, (None, None))
    check_shape("target", target, (None,))
    check_same_length(scores=scores, target=target)
    # The loss does not change when a constant is added to a row; squares of small numbers do less.
    z = scores - scores.detach().amax(dim=1, keepdim=True)
    tau = _threshold(z)
    squares = torch.where(z > tau, z.square() - tau.square(), 0).sum(dim=1)
    return (squares / 2 - z.gather(1, target[:, None])[:, 0] + 0.5).mean()


def _threshold(scores: Tensor) -> Tensor:
    """Return tau, of shape (..., 1)."""
    ordered = scores.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    size = (rank * ordered > sums).sum(dim=-1, keepdim=True)
    return sums.gather(-1, size - 1) / size
