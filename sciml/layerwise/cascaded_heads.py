"""Linear heads of the Cascaded Forward algorithm: ridge in closed form, others by descent."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from scipy.linalg import LinAlgWarning
from torch import Tensor, nn
from torch.nn import functional

from sciml._check import check_interval, check_same_length, check_shape
from sciml.layerwise.local_training import train_locally
from sciml.layerwise.sparsemax import sparsemax_loss

__all__ = ["ridge_weights", "train_head"]

_CHUNK = 4096  # rows or columns of the features that are held in float64 at a time


def ridge_weights(features: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Minimise ``||Z W - Y||^2 + ridge ||W||^2``, by the smaller of two Gram matrices.

    Solves ``(Z'Z + ridge I) W = Z'Y``, or ``W = Z' (ZZ' + ridge I)^-1 Y`` where there are fewer
    samples than features, by Cholesky's method in float64. The Gram matrix is accumulated in
    chunks. Where it is singular the solution of least norm is computed instead, with a warning.

    Parameters
    ----------
    features : Tensor of shape (n_samples, n_features)
        Features Z.
    targets : Tensor of shape (n_samples, n_outputs)
        Targets Y.
    ridge : float
        Penalty, not negative.

    Returns
    -------
    Tensor of shape (n_features, n_outputs)
        Weights W, in the dtype of the features.

    Raises
    ------
    ValueError
        If shapes do not fit or `ridge` is negative or infinite.

    Warns
    -----
    scipy.linalg.LinAlgWarning
        If the minimiser is not unique.

    References
    ----------
    Zhao et al., "The Cascaded Forward Algorithm for Neural Network Training", arXiv:2303.09728.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import ridge_weights
    >>> ridge_weights(torch.eye(2), torch.tensor([[2.0], [4.0]]), ridge=1.0)
    tensor([[1.],
            [2.]])
    """
    check_shape("features", features, (None, None))
    check_shape("targets", targets, (None, None))
    check_same_length(features=features, targets=targets)
    check_interval("ridge", ridge, 0, math.inf, "left")
    (n, d), wide = features.shape, features.shape[0] < features.shape[1]
    size = n if wide else d
    gram = torch.zeros(size, size, dtype=torch.float64, device=features.device)
    right = targets.double() if wide else gram.new_zeros(d, targets.shape[1])
    for chunk, target in zip(
        features.split(_CHUNK, dim=1 if wide else 0),
        [None] * math.ceil(d / _CHUNK) if wide else targets.split(_CHUNK),
        strict=True,
    ):
        z = chunk.double()
        if target is None:
            gram.addmm_(z, z.T)
        else:
            gram.addmm_(z.T, z)
            right.addmm_(z.T, target.double())
    gram.diagonal().add_(ridge)
    solution = _solve(gram, right, max(n, d), torch.finfo(features.dtype).eps)
    if wide:
        return torch.cat([z.double().T @ solution for z in features.split(_CHUNK, 1)]).to(features)
    return solution.to(features)


def _solve(gram: Tensor, right: Tensor, size: int, eps: float) -> Tensor:
    """Solve a positive semi-definite system; singular values below size * eps count as zero."""
    cut = max((size * eps) ** 2, size * torch.finfo(torch.float64).eps)
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal().square()
    if int(info) == 0 and bool(diagonal.min() > cut * diagonal.max()):
        return torch.cholesky_solve(right, factor)
    warnings.warn(
        "the features are linearly dependent and ridge is too small to decide between the "
        "solutions: taking the one of least norm",
        LinAlgWarning,
        stacklevel=4,
    )
    values, vectors = torch.linalg.eigh(gram)
    kept = values > cut * values[-1]
    vectors = vectors[:, kept]
    return vectors @ ((vectors.T @ right) / values[kept, None])


def train_head(
    features: Tensor,
    target: Tensor,
    n_classes: int,
    *,
    loss: str,
    ridge: float,
    solver: str,
    learning_rate: float,
    max_iter: int,
    batches: Iterable[Tensor],
    progress: str | None = None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Minimise the mean cross entropy or sparsemax loss plus ``ridge / (2 n) ||W||^2``.

    The weights start at one. Solver "gd" takes full-batch gradient steps, "adam" steps on
    `batches` (Adam with eps 1e-4). Returns the weights, of shape (n_features, n_classes), and the
    history.
    """
    function: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    if loss == "sparsemax":
        function = sparsemax_loss
    head = nn.ParameterDict({"weight": features.new_ones(features.shape[1], n_classes)})

    def penalized(head: Any, batch: Tensor | None) -> Tensor:
        z, y = (features, target) if batch is None else (features[batch], target[batch])
        penalty = ridge / (2 * len(features)) * head["weight"].square().sum()
        return function(z @ head["weight"], y) + penalty

    if solver == "gd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(head.parameters(), lr=learning_rate)
    else:
        optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate, eps=1e-4)
    history = train_locally(
        head,
        penalized,
        None if solver == "gd" else batches,
        optimizer=optimizer,
        max_epochs=max_iter,
        progress=progress,
    )
    return head["weight"].detach(), history
