"""Train finite ReLU networks that are kernel machines, and read off the kernel.

A network f(w, x) trained by gradient flow on the objective of a kernel machine,

    L(w) = lam / 2 ||W_last||^2 + sum_i loss(f(w, x_i), y_i),

in which **only the last layer is regularised** (f is linear in it, hence <grad f, lam W_last> =
lam f), follows for every width exactly the dynamics of a kernel machine with a moving kernel,

    d f_t(x) / dt = -lam f_t(x) - sum_i loss'(f_t(x_i), y_i) Theta_t(x, x_i),

where Theta_t(x, x') = <grad f(x), grad f(x')> is its empirical tangent kernel. Two machines follow:

* with f_0 = 0 and a loss whose slope never changes sign, -loss'(f, y) = y |loss'(f, y)|, the
  trained network is f_T(x) = sum_i y_i K_T(x, x_i) with the *path kernel* K_T(x, x_i) =
  exp(-lam T) int_0^T |loss'(f_t(x_i), y_i)| Theta_t(x, x_i) exp(lam t) dt;
* when the width goes to infinity, Theta_t tends to a deterministic kernel. For lam t << 1 this is
  the NTK. Beyond that the regulariser shrinks the random W_last like exp(-lam t) **at every
  width**, and with it the share of the layers below, which carries W_last twice:

      Theta_t = NNGP + exp(-2 lam t) (NTK - NNGP).

  `sciml.kernels.decaying_ntk` computes this kernel and `decaying_ntk_descent` its machine.

Where paper and code differ: the official code regularises W_last / sqrt(width), which at large
width is no regularisation at all; here the objective is the one of the theorems. The paper's
equivalence with the *fixed* NTK is the case lam t << 1 of the above.

References
----------
Y. Chen, W. Huang, L. M. Nguyen, T.-W. Weng, "On the Equivalence between Neural Network and
Support Vector Machine", NeurIPS 2021, arXiv:2111.06063.
P. Domingos, "Every Model Learned by Gradient Descent Is Approximately a Kernel Machine", 2020,
arXiv:2012.00152.
A. Jacot, F. Gabriel, C. Hongler, "Neural Tangent Kernel", NeurIPS 2018, arXiv:1806.07572.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sciml._check import (
    check_choice,
    check_finite,
    check_integer,
    check_interval,
    check_same_length,
    check_shape,
)

__all__ = [
    "LOSSES",
    "NTKNetwork",
    "NTKTraining",
    "check_targets",
    "loss_and_slope",
    "train_ntk_network",
]

LOSSES = ("hinge", "squared_hinge", "logistic", "squared")


class NTKNetwork(nn.Module):
    r"""Fully connected ReLU network in NTK parametrisation, with one output.

    .. math:: z_1 = \frac{\sigma_w}{\sqrt d} W_1 x + \sigma_b b_1, \qquad
              z_{l+1} = \frac{\sigma_w}{\sqrt m} W_{l+1} \mathrm{relu}(z_l) + \sigma_b b_{l+1},
              \qquad f(x) = z_{H+1},

    all entries of W and b drawn from N(0, 1). Its empirical tangent kernel tends to
    ``NTK(depth, w_std, b_std)`` as the width m grows.

    Parameters
    ----------
    in_features : int
        Number of features d.
    width : int, default=1024
        Width m of every hidden layer.
    depth : int, default=1
        Number of hidden layers H. The paper's two-layer network is ``depth=1``.
    w_std, b_std : float, default=1.0 and 0.0
        Scale of weights and biases, as in the paper (not He's sqrt(2)). No bias parameters
        exist if ``b_std=0``.
    symmetric : bool, default=True
        Symmetric-doubling initialisation: two copies f_1, f_2 start from the same draw and the
        network is (f_1 - f_2) / sqrt(2). Then f = 0 exactly at initialisation, as a kernel machine
        starts, while the tangent kernel is the one of a single copy. False keeps one copy, whose
        initial output is random.
    generator : torch.Generator, default=None
        Source of the initial draw; None uses torch's global generator.
    dtype : torch.dtype, default=None
        None uses torch's default.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a number in its range.

    References
    ----------
    Chen et al., arXiv:2111.06063; Jacot et al., arXiv:1806.07572.

    Examples
    --------
    >>> import torch
    >>> from sciml.kernels import NTKNetwork, ntk
    >>> network = NTKNetwork(3, width=4096, generator=torch.Generator().manual_seed(0))
    >>> X = torch.eye(3)
    >>> network(X).tolist()
    [0.0, 0.0, 0.0]
    >>> bool((network.empirical_ntk(X) - ntk(X)).abs().max() < 0.02)
    True
    """

    def __init__(
        self,
        in_features: int,
        width: int = 1024,
        depth: int = 1,
        w_std: float = 1.0,
        b_std: float = 0.0,
        symmetric: bool = True,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, 1)
        check_integer("width", width, 1)
        check_integer("depth", depth, 1)
        check_interval("w_std", w_std, 0, math.inf, closed="neither")
        check_interval("b_std", b_std, 0, math.inf, closed="left")
        check_choice("symmetric", symmetric, (True, False))
        self.in_features, self.width, self.depth = in_features, width, depth
        self.w_std, self.b_std, self.symmetric = float(w_std), float(b_std), symmetric
        sizes = [in_features] + [width] * depth + [1]
        copies = 2 if symmetric else 1
        self.weights = nn.ParameterList(
            torch.empty(copies, n_out, n_in, dtype=dtype) for n_in, n_out in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.empty(copies, 1, n_out, dtype=dtype) for n_out in sizes[1:] if b_std > 0
        )
        # The copies enter the output with these weights.
        self.signs: Tensor
        signs = torch.tensor([1.0, -1.0], dtype=dtype) / math.sqrt(2) if symmetric else [1.0]
        self.register_buffer("signs", torch.as_tensor(signs, dtype=dtype), persistent=False)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters from N(0, 1), the same for both copies."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter[0].normal_(generator=generator)
                parameter[1:] = parameter[0]

    def extra_repr(self) -> str:
        """Return the arguments for `repr`."""
        return (
            f"in_features={self.in_features}, width={self.width}, depth={self.depth}, "
            f"w_std={self.w_std}, b_std={self.b_std}, symmetric={self.symmetric}"
        )

    def last_layer(self) -> list[nn.Parameter]:
        """Return the parameters of the last layer, the ones that the objective regularises."""
        return [self.weights[-1], *self.biases[-1:]]

    def forward(self, X: Tensor) -> Tensor:
        """Compute the outputs.

        Parameters
        ----------
        X : Tensor of shape (n, in_features)
            Inputs, in the dtype and on the device of the parameters.

        Returns
        -------
        Tensor of shape (n,)
            Outputs.
        """
        self._check(X)
        return self._output(self._inputs_of_layers(X)[-1])

    def empirical_ntk(
        self, X: Tensor, Y: Tensor | None = None, *, part: str = "all", block: int = 1024
    ) -> Tensor:
        """Compute the inner products of the gradients of the outputs for all parameters.

        No gradient is formed: the share of a layer is the product of two small Gram matrices,
        of its inputs and of the derivatives with respect to its outputs. Memory is
        O(block * width * depth) and O(n_X * n_Y) for the result.

        Parameters
        ----------
        X : Tensor of shape (n_X, in_features)
            Inputs.
        Y : Tensor of shape (n_Y, in_features), default=None
            Further inputs; None means X.
        part : {"all", "last", "hidden"}, default="all"
            Tangent kernel of all parameters, of the last layer (tends to the NNGP kernel as the
            width grows) or of the layers below it (tends to NTK - NNGP).
        block : int, default=1024
            Number of rows of X and Y processed at a time.

        Returns
        -------
        Tensor of shape (n_X, n_Y)
            Kernel matrix, without autograd graph.
        """
        check_choice("part", part, ("all", "last", "hidden"))
        check_integer("block", block, 1)
        self._check(X)
        if Y is not None:
            self._check(Y, "Y")
        first = self.depth if part == "last" else 0
        stop = self.depth if part == "hidden" else self.depth + 1
        kernel = X.new_empty(len(X), len(X if Y is None else Y))
        with torch.no_grad():
            for i in range(0, len(X), block):
                left = self._tangents(X[i : i + block], first)
                for j in range(0, kernel.shape[1], block):
                    if Y is None and j == i:
                        right = left
                    else:
                        right = self._tangents((X if Y is None else Y)[j : j + block], first)
                    tile = kernel[i : i + block, j : j + block].zero_()
                    for layer in range(first, stop):
                        (h, d), (k, e) = left[layer], right[layer]
                        gram = self.w_std**2 / h.shape[-1] * (h @ k.mT) + self.b_std**2
                        tile += (gram * (d @ e.mT)).sum(0)
        return kernel

    def _linear(self, h: Tensor, layer: int) -> Tensor:
        """Apply one layer without its nonlinearity to (copies, n, fan_in)."""
        z = h @ self.weights[layer].mT * (self.w_std / math.sqrt(h.shape[-1]))
        return z + self.b_std * self.biases[layer] if len(self.biases) else z

    def _inputs_of_layers(self, X: Tensor) -> list[Tensor]:
        """Return what each layer receives, each of shape (copies, n, fan_in)."""
        inputs = [X.expand(len(self.signs), *X.shape)]
        for layer in range(self.depth):
            inputs.append(self._linear(inputs[-1], layer).relu())
        return inputs

    def _output(self, h: Tensor) -> Tensor:
        # Products, then their sum: a fused multiply-add would leave a rounding error of the zero.
        return (self.signs[:, None] * self._linear(h, self.depth).squeeze(-1)).sum(0)

    def _tangents(self, X: Tensor, first: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Return for each layer from `first` on its inputs and df / d(its outputs)."""
        inputs = self._inputs_of_layers(X)
        slope = self.signs[:, None, None].expand(-1, len(X), 1)
        tangents = {self.depth: (inputs[-1], slope)}
        for layer in reversed(range(first, self.depth)):
            weight = self.weights[layer + 1] * (self.w_std / math.sqrt(self.width))
            slope = (slope @ weight) * (inputs[layer + 1] > 0)
            tangents[layer] = (inputs[layer], slope)
        return tangents

    def _check(self, X: Any, name: str = "X") -> None:
        weight = self.weights[0]
        if not isinstance(X, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(X).__name__}")
        check_shape(name, X, (None, self.in_features))
        if X.dtype != weight.dtype or X.device != weight.device:
            raise ValueError(
                f"{name} must have the dtype and device of the network ({weight.dtype}, "
                f"{weight.device}), got {X.dtype}, {X.device}"
            )
        check_finite(name, X)


class NTKTraining(NamedTuple):
    """What `train_ntk_network` returns.

    Attributes
    ----------
    objective : Tensor of shape (n_steps,)
        Regularised objective before each step (with mini-batches: its unbiased estimate).
    path_kernel : Tensor of shape (n_path, n) or None
        Kernel K of the trained network between the points `X_path` and the training points.
    machine_output : Tensor of shape (n_path,) or None
        Output of the kernel machine, ``path_kernel @ y`` plus the decayed initial output.
    """

    objective: Tensor
    path_kernel: Tensor | None
    machine_output: Tensor | None


def train_ntk_network(
    network: NTKNetwork,
    X: Tensor,
    y: Tensor,
    *,
    loss: str = "hinge",
    lam: float = 0.0,
    learning_rate: float,
    n_steps: int,
    batch_size: int | None = None,
    X_path: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, NTKNetwork], None] | None = None,
    verbose: bool = False,
) -> NTKTraining:
    """Train a network in place by (sub)gradient descent on the objective of a kernel machine.

    The objective is ``lam / 2 ||last layer||^2 + sum_i loss(f(x_i), y_i)``: a **sum** over the
    samples, and only the last layer (with its bias, if any) is regularised, with its N(0, 1)
    entries. A mean over n samples with penalty lam' and learning rate r is the same as
    ``lam = n lam'`` and ``learning_rate = r / n``. Training for ``n_steps`` follows the gradient
    flow up to the time ``n_steps * learning_rate``.

    Parameters
    ----------
    network : NTKNetwork
        Network, changed in place.
    X : Tensor of shape (n, in_features)
        Training inputs.
    y : Tensor of shape (n,)
        Targets; -1 and +1 for all losses but ``"squared"``.
    loss : {"hinge", "squared_hinge", "logistic", "squared"}, default="hinge"
        ``max(0, 1 - y f)``, its square, ``log(1 + exp(-y f))``, ``(y - f)^2``.
    lam : float, default=0.0
        Strength of the regularisation.
    learning_rate : float
        Step size. Stable for smooth losses below 2 / (largest eigenvalue of the kernel matrix
        times the curvature of the loss).
    n_steps : int
        Number of updates.
    batch_size : int, default=None
        Samples an update, drawn without replacement within an epoch; their loss is scaled by
        n / batch. None uses all samples.
    X_path : Tensor of shape (n_path, in_features), default=None
        Points at which to track the path kernel, which costs one empirical tangent kernel a
        step. Not for ``loss="squared"``, whose slope changes sign.
    generator : torch.Generator, default=None
        Source of the mini-batches.
    callback : callable, default=None
        Called as ``callback(step, network)`` after each update; step counts from 1.
    verbose : bool, default=False
        Show a progress bar.

    Returns
    -------
    NTKTraining
        Named tuple ``(objective, path_kernel, machine_output)``. On `X_path` the trained network
        equals `machine_output` to O(learning_rate).

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or a path kernel is asked for with the squared loss.
    FloatingPointError
        If training diverges.

    References
    ----------
    Chen et al., arXiv:2111.06063.

    Examples
    --------
    >>> import torch
    >>> from sciml.kernels import NTKNetwork, train_ntk_network
    >>> generator = torch.Generator().manual_seed(0)
    >>> X = torch.randn(20, 3, generator=generator)
    >>> network = NTKNetwork(3, width=512, generator=generator)
    >>> training = train_ntk_network(
    ...     network, X, X[:, 0].sign(), lam=0.1, learning_rate=0.01, n_steps=200, X_path=X
    ... )
    >>> bool((network(X) - training.machine_output).abs().max() < 0.05)
    True
    """
    _check_training(network, X, y, loss, lam, learning_rate, n_steps, batch_size, X_path)
    n = len(X)
    regularised = network.last_layer()
    parameters = list(network.parameters())
    objective = X.new_empty(n_steps)
    path_kernel = None if X_path is None else X.new_zeros(len(X_path), n)
    output = None if X_path is None else network(X_path).detach()  # the initial one, decaying
    batches: list[Tensor] = []
    for step in tqdm(range(n_steps), disable=not verbose, desc="train_ntk_network"):
        if batch_size is None:
            rows, scale = torch.arange(n, device=X.device), 1.0
        else:
            if not batches:
                order = torch.randperm(n, generator=generator).to(X.device)
                batches = list(order.split(batch_size))
            rows = batches.pop()
            scale = n / len(rows)
        f = network(X[rows])
        value, slope = loss_and_slope(loss, f, y[rows])
        penalty = sum((p.square().sum() for p in regularised), start=f.new_zeros(()))
        total = scale * value.sum() + lam / 2 * penalty
        gradients = torch.autograd.grad(total, parameters)
        objective[step] = total.detach()
        if not bool(objective[step].isfinite()):
            raise FloatingPointError(
                f"training diverged at step {step}: learning_rate={learning_rate!r} is too large"
            )
        if path_kernel is not None and output is not None and X_path is not None:
            tangent = network.empirical_ntk(X_path, X[rows])
            path_kernel *= 1 - learning_rate * lam
            path_kernel[:, rows] += learning_rate * scale * tangent * slope.abs()
            output *= 1 - learning_rate * lam
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=learning_rate)
        if callback is not None:
            callback(step + 1, network)
    if path_kernel is not None and output is not None:
        output += path_kernel @ y
    return NTKTraining(objective, path_kernel, output)


def loss_and_slope(loss: str, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of the samples and their derivatives with respect to f."""
    margin = 1 - y * f
    g = f.detach()
    if loss == "hinge":
        return margin.clamp(min=0), -y * (y * g < 1)
    if loss == "squared_hinge":
        return margin.clamp(min=0).square(), -2 * y * (1 - y * g).clamp(min=0)
    if loss == "logistic":
        return nn.functional.softplus(-y * f), -y * (-y * g).sigmoid()
    return (y - f).square(), 2 * (g - y)


def _check_training(
    network: Any,
    X: Tensor,
    y: Any,
    loss: str,
    lam: float,
    learning_rate: float,
    n_steps: int,
    batch_size: int | None,
    X_path: Tensor | None,
) -> None:
    if not isinstance(network, NTKNetwork):
        raise TypeError(f"network must be an NTKNetwork, got {type(network).__name__}")
    network._check(X)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch tensor, got {type(y).__name__}")
    check_shape("y", y, (None,))
    check_same_length(X=X, y=y)
    if y.dtype != X.dtype or y.device != X.device:
        raise ValueError(
            f"y must have the dtype and device of X ({X.dtype}, {X.device}), "
            f"got {y.dtype}, {y.device}"
        )
    check_choice("loss", loss, LOSSES)
    check_targets(y, loss)
    check_interval("lam", lam, 0, math.inf, closed="left")
    check_interval("learning_rate", learning_rate, 0, math.inf, closed="neither")
    check_integer("n_steps", n_steps, 0)
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1, len(X))
    if X_path is not None:
        network._check(X_path, "X_path")
        if loss == "squared":
            raise ValueError(
                "X_path must be None for loss='squared': the slope of the squared loss changes "
                "sign in training, so the network is no kernel machine with coefficients y"
            )


def check_targets(y: Tensor, loss: str) -> None:
    """Raise ValueError unless the targets are finite and, for a loss of margins, -1 or +1."""
    check_finite("y", y)
    if loss != "squared" and not bool((y.abs() == 1).all()):
        raise ValueError(f"y must hold -1 and +1 for loss={loss!r}, got {y.unique().tolist()[:5]}")
