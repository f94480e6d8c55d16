"""Compute the kernel machine of an infinitely wide network whose tangent kernel decays.

Training a network on the objective of a kernel machine, ``lam / 2 ||W_last||^2 + sum_i loss``,
shrinks the random weights of the last layer like exp(-lam t), at every width. The layers below
learn through these weights, so that their share of the tangent kernel, which carries W_last
twice, decays:

    Theta_t = NNGP + exp(-2 lam t) (NTK - NNGP).

The equivalence of the network with the machine of the fixed NTK is the case lam t << 1; for longer
training a wide network follows the machine of Theta_t instead.

References
----------
Y. Chen, W. Huang, L. M. Nguyen, T.-W. Weng, "On the Equivalence between Neural Network and
Support Vector Machine", NeurIPS 2021, arXiv:2111.06063 (for the fixed kernel).
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from sciml._check import (
    check_choice,
    check_finite,
    check_integer,
    check_interval,
    check_same_length,
    check_shape,
    check_square,
)
from sciml.kernels.ntk import ntk
from sciml.kernels.ntk_network import LOSSES, check_targets, loss_and_slope

__all__ = ["DecayingMachine", "decaying_ntk", "decaying_ntk_descent"]


def decaying_ntk(
    X: Any,
    Y: Any = None,
    *,
    lam: float,
    t: float,
    depth: int = 1,
    w_std: float = 1.0,
    b_std: float = 0.0,
) -> Any:
    """Compute the tangent kernel that an infinitely wide regularised network has at time t.

    ``NNGP + exp(-2 lam t) (NTK - NNGP)``: the NTK at t = 0, the NNGP kernel (only the last layer
    learns) as lam t grows.

    Parameters
    ----------
    X : array of shape (n_X, n_features)
        NumPy array, torch tensor or CuPy array.
    Y : array of shape (n_Y, n_features), default=None
        None means X.
    lam : float
        Strength of the regularisation of the last layer, >= 0.
    t : float
        Training time, >= 0: the number of steps times the step size.
    depth, w_std, b_std : int, float, float
        The network, as in `ntk`.

    Returns
    -------
    array of shape (n_X, n_Y)
        Kernel matrix in the library, dtype and device of X.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import decaying_ntk
    >>> decaying_ntk(np.eye(2), lam=1.0, t=0.5).round(4)
    array([[0.342 , 0.0796],
           [0.0796, 0.342 ]])
    """
    check_interval("lam", lam, 0, math.inf, closed="left")
    check_interval("t", t, 0, math.inf, closed="left")
    last = ntk(X, Y, depth=depth, w_std=w_std, b_std=b_std, kind="nngp")
    full = ntk(X, Y, depth=depth, w_std=w_std, b_std=b_std, kind="ntk")
    return last + math.exp(-2 * lam * t) * (full - last)


class DecayingMachine(NamedTuple):
    """Coefficients of the machine of `decaying_ntk_descent`.

    ``f(x) = NNGP(x, X) @ last + (NTK - NNGP)(x, X) @ hidden``.

    Attributes
    ----------
    last : ndarray of shape (n,)
        Coefficients of the last layer's kernel.
    hidden : ndarray of shape (n,)
        Coefficients of the kernel of the layers below.
    """

    last: Any
    hidden: Any


def decaying_ntk_descent(
    K_ntk: Any,
    K_nngp: Any,
    y: Any,
    *,
    loss: str = "hinge",
    lam: float,
    step: float,
    n_steps: int,
) -> DecayingMachine:
    """Run the (sub)gradient descent that an infinitely wide regularised network follows.

    One step of size eta is ``g <- (1 - eta lam) g - eta sum_i loss'(g(x_i), y_i) Theta_k(., x_i)``
    with the kernel of step k, ``Theta_k = NNGP + (1 - eta lam)^(2k) (NTK - NNGP)``, from g = 0.
    As Theta_k is always a combination of two matrices, two coefficient vectors hold g everywhere.

    Parameters
    ----------
    K_ntk, K_nngp : ndarray of shape (n, n)
        NTK and NNGP matrices of the training points.
    y : ndarray of shape (n,)
        Targets; -1 and +1 for all losses but ``"squared"``.
    loss : {"hinge", "squared_hinge", "logistic", "squared"}, default="hinge"
        Loss, summed over the samples; see `train_ntk_network`.
    lam : float
        Strength of the regularisation, >= 0. With 0 both coefficient vectors agree and the
        machine is the one of the fixed NTK.
    step : float
        Step size eta, > 0, with ``step * lam < 1``.
    n_steps : int
        Number of steps.

    Returns
    -------
    DecayingMachine
        Named tuple ``(last, hidden)``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import decaying_ntk_descent, ntk
    >>> X, y = np.eye(2), np.array([1.0, -1.0])
    >>> machine = decaying_ntk_descent(
    ...     ntk(X), ntk(X, kind="nngp"), y, lam=1.0, step=0.01, n_steps=100
    ... )
    >>> bool((machine.hidden * y < machine.last * y).all())
    True
    """
    K_ntk, K_nngp, y = (np.asarray(a, dtype=np.float64) for a in (K_ntk, K_nngp, y))
    for name, K in (("K_ntk", K_ntk), ("K_nngp", K_nngp)):
        check_square(name, K)
        check_finite(name, K)
    check_shape("y", y, (None,))
    check_same_length(K_ntk=K_ntk, K_nngp=K_nngp, y=y)
    check_choice("loss", loss, LOSSES)
    targets = torch.from_numpy(y)
    check_targets(targets, loss)
    check_interval("lam", lam, 0, math.inf, closed="left")
    check_interval("step", step, 0, 1 / lam if lam > 0 else math.inf, closed="neither")
    check_integer("n_steps", n_steps, 0)
    K_hidden = torch.from_numpy(K_ntk - K_nngp)
    K_last = torch.from_numpy(K_nngp)
    last, hidden = torch.zeros_like(targets), torch.zeros_like(targets)
    share = 1.0
    for _ in range(n_steps):
        _, slope = loss_and_slope(loss, K_last @ last + K_hidden @ hidden, targets)
        last = (1 - step * lam) * last - step * slope
        hidden = (1 - step * lam) * hidden - step * share * slope
        share *= (1 - step * lam) ** 2
    return DecayingMachine(last.numpy(), hidden.numpy())
