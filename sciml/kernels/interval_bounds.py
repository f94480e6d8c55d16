"""Bound the outputs of a finite network on a box of inputs by interval bound propagation (IBP).

Centre mu and radius r of a box pass through a linear layer as W mu + b and |W| r, and through a
ReLU by its two ends. The bounds hold for every input of the box, and grow loose with the width:
in a network in NTK parametrisation the weights |W| / sqrt(width) add up to a radius of order
sqrt(width), so a certificate by IBP shrinks like 1 / sqrt(width). It is the baseline for the
certificate of the infinitely wide network, `sciml.kernels.certified_radius`, which does not. Both
find the largest radius by the search at the end of this module.

References
----------
S. Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018, arXiv:1810.12715.
Y. Chen et al., "On the Equivalence between Neural Network and Support Vector Machine", NeurIPS
2021, arXiv:2111.06063.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sciml._check import check_finite, check_interval, check_same_length, check_shape
from sciml.kernels.ntk_network import NTKNetwork

__all__ = ["ibp_bounds", "ibp_certified_radius", "largest_certified_radii"]


def ibp_bounds(network: nn.Module, X: Any, eps: Any) -> tuple[Tensor, Tensor]:
    """Bound the outputs of a network for all inputs within eps of X in every coordinate.

    Parameters
    ----------
    network : NTKNetwork or torch.nn.Sequential of Linear and ReLU
        Network. The two copies of a symmetric `NTKNetwork` are bounded one by one and subtracted:
        lower minus upper, upper minus lower.
    X : Tensor or array of shape (n, in_features)
        Centres of the boxes.
    eps : float or Tensor of shape (n,)
        Radius of the boxes in the maximum norm, >= 0; one for all or one a sample.

    Returns
    -------
    lower, upper : Tensor of shape (n,) or (n, n_outputs)
        Bounds, of the shape of the network's output, without autograd graph.

    Raises
    ------
    TypeError
        If a layer is of another kind.
    ValueError
        If a shape does not fit or a value is NaN, infinite or negative.

    Notes
    -----
    Computed in the dtype of the network, without directed rounding.

    References
    ----------
    Gowal et al., arXiv:1810.12715.

    Examples
    --------
    >>> import torch
    >>> from sciml.kernels import ibp_bounds
    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = network[0].weight.copy_(torch.tensor([[1.0, -2.0]]))
    >>> lower, upper = ibp_bounds(network, torch.tensor([[2.0, 0.5]]), 0.5)
    >>> lower.tolist(), upper.tolist()
    ([[0.0]], [[2.5]])
    """
    X = _prepare(network, X)
    if isinstance(eps, Tensor):
        check_shape("eps", eps, (len(X),))
        check_finite("eps", eps)
        if len(eps) and bool(eps.min() < 0):
            raise ValueError(f"eps must be >= 0, got {eps.min().item()}")
        radius = eps.to(X)[:, None]
    else:
        check_interval("eps", eps, 0, math.inf, closed="left")
        radius = X.new_full((len(X), 1), float(eps))
    with torch.no_grad():
        return _propagate(network, X - radius, X + radius)


def ibp_certified_radius(
    network: nn.Module,
    X: Any,
    y: Any = None,
    *,
    max_radius: float | None = None,
    tol: float = 1e-6,
) -> Tensor:
    """Compute the largest radius in maximum norm for which IBP proves the decision constant.

    Parameters
    ----------
    network : NTKNetwork or torch.nn.Sequential of Linear and ReLU
        Network. One output decides by its sign, several by the largest.
    X : Tensor or array of shape (n, in_features)
        Samples.
    y : Tensor or array of shape (n,), default=None
        True classes: -1 and +1 for one output, 0, 1, ... for several. Misclassified samples get
        radius 0. None certifies the decision, right or wrong.
    max_radius : float, default=None
        Largest radius of interest; None sets no limit, and samples that stay certified get the
        last radius tried, about 1e6 times the largest absolute value in X.
    tol : float, default=1e-6
        Relative width of the bracket at which bisection ends. The lower end is returned.

    Returns
    -------
    Tensor of shape (n,)
        Certified radii in the dtype of the network. A tie at X itself has radius 0.

    Raises
    ------
    TypeError, ValueError
        As for `ibp_bounds`, or if y does not fit.

    See Also
    --------
    certified_radius : Certificate of the infinitely wide network.

    References
    ----------
    Gowal et al., arXiv:1810.12715; Chen et al., arXiv:2111.06063.

    Examples
    --------
    >>> import torch
    >>> from sciml.kernels import ibp_certified_radius
    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = network[0].weight.copy_(torch.tensor([[1.0, -2.0]]))
    >>> ibp_certified_radius(network, torch.tensor([[3.0, 0.0]])).round(decimals=4).tolist()
    [1.0]
    """
    X = _prepare(network, X)
    with torch.no_grad():
        centre, _ = _propagate(network, X, X)
        single = centre.ndim == 1 or centre.shape[1] == 1
        scores = torch.stack([-centre.flatten(), centre.flatten()], 1) if single else centre
        decision = scores.argmax(1)
        correct = torch.ones_like(decision, dtype=torch.bool)
        if y is not None:
            check_same_length(X=X, y=y)
            truth = torch.as_tensor(y, device=X.device)
            check_shape("y", truth, (None,))
            classes = {-1, 1} if single else set(range(scores.shape[1]))
            if not set(truth.tolist()) <= classes:
                raise ValueError(f"y must hold the classes {sorted(classes)}, got {y!r}")
            correct = truth == (2 * decision - 1 if single else decision)

        def certified(rows: Any, radii: Any) -> Any:
            eps = torch.as_tensor(radii).to(X)[:, None]
            lower, upper = _propagate(network, X[rows] - eps, X[rows] + eps)
            chosen = decision[rows]
            if single:
                proved = torch.where(chosen == 1, lower.flatten() > 0, upper.flatten() < 0)
            else:
                rivals = upper.scatter(1, chosen[:, None], -math.inf)
                proved = lower.gather(1, chosen[:, None])[:, 0] > rivals.amax(1)
            return proved.cpu().numpy()

        radii = largest_certified_radii(
            certified,
            correct.cpu().numpy(),
            scale=float(X.abs().max()) or 1.0 if len(X) else 1.0,
            max_radius=max_radius,
            tol=tol,
        )
    return torch.as_tensor(radii).to(X)


def largest_certified_radii(
    certified: Callable[[Any, Any], Any],
    wanted: Any,
    *,
    scale: float,
    max_radius: float | None,
    tol: float,
) -> Any:
    """Bracket the largest certified radius of every sample by doubling, then bisect.

    Parameters
    ----------
    certified : callable
        ``certified(rows, radii)`` takes the indices of samples and a radius for each, and returns
        a boolean array. What is certified at a radius must be certified at all smaller ones.
    wanted : ndarray of shape (n,), dtype bool
        Samples to treat; the others get radius 0.
    scale : float
        Size of the data: the first radius is ``scale / 32``.
    max_radius : float or None
        Largest radius to try; None means ``2**20 * scale``.
    tol : float
        Relative width of the bracket at which bisection ends, in (0, 1).

    Returns
    -------
    ndarray of shape (n,), dtype float64
        Lower ends of the brackets, so each has itself been certified (or is 0).

    Raises
    ------
    TypeError, ValueError
        If `max_radius` or `tol` is not a number in its range.
    """
    check_interval("tol", tol, 0, 1, closed="neither")
    if max_radius is not None:
        check_interval("max_radius", max_radius, 0, np.inf, closed="neither")
    limit = 2.0**20 * scale if max_radius is None else float(max_radius)
    low = np.zeros(len(wanted))
    high = np.full(len(wanted), min(scale / 32, limit))
    rows = np.flatnonzero(wanted)
    rows = rows[certified(rows, low[rows])]  # ties are not
    bracketed = []
    while len(rows):
        passed = certified(rows, high[rows])
        bracketed.append(rows[~passed])
        rows = rows[passed]
        low[rows] = high[rows]
        rows = rows[high[rows] < limit]
        high[rows] = np.minimum(2 * high[rows], limit)
    rows = np.concatenate(bracketed) if bracketed else rows
    while True:
        rows = rows[high[rows] - low[rows] > tol * high[rows]]
        if not len(rows):
            return low
        middle = (low[rows] + high[rows]) / 2
        passed = certified(rows, middle)
        low[rows[passed]] = middle[passed]
        high[rows[~passed]] = middle[~passed]


def _prepare(network: Any, X: Any) -> Tensor:
    """Check the layers and return X as a finite tensor in the dtype of the network."""
    if isinstance(network, NTKNetwork):
        weight, in_features = network.weights[0], network.in_features
    elif isinstance(network, nn.Sequential):
        for layer in network:
            if not isinstance(layer, (nn.Linear, nn.ReLU)):
                raise TypeError(
                    "network must consist of Linear and ReLU layers, got the layer "
                    f"{type(layer).__name__}"
                )
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError("network must have at least one Linear layer, got none")
        weight, in_features = linear[0].weight, linear[0].in_features
    else:
        raise TypeError(
            "network must be an NTKNetwork or a Sequential of Linear and ReLU, got "
            f"{type(network).__name__}"
        )
    X = torch.as_tensor(X).to(weight)
    check_shape("X", X, (None, in_features))
    check_finite("X", X)
    return X


def _propagate(network: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds of the outputs from bounds of the inputs."""
    if isinstance(network, nn.Sequential):
        for module in network:
            if isinstance(module, nn.Linear):
                lower, upper = _through_linear(lower, upper, module.weight, module.bias)
            else:
                lower, upper = lower.relu(), upper.relu()
        return lower, upper
    lower, upper = lower[None], upper[None]  # (copies, n, features)
    for layer, weight in enumerate(network.weights):
        scaled = weight * (network.w_std / math.sqrt(weight.shape[-1]))
        bias = network.b_std * network.biases[layer] if len(network.biases) else None
        lower, upper = _through_linear(lower, upper, scaled, bias)
        if layer < network.depth:
            lower, upper = lower.relu(), upper.relu()
    centre, radius = (lower + upper)[..., 0] / 2, (upper - lower)[..., 0] / 2
    output, spread = network.signs @ centre, network.signs.abs() @ radius
    return output - spread, output + spread


def _through_linear(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    centre = (lower + upper) / 2 @ weight.mT
    radius = (upper - lower) / 2 @ weight.abs().mT
    if bias is not None:
        centre = centre + bias
    return centre - radius, centre + radius
