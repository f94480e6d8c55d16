"""Networks that are exactly the proximal operator of some function.

A continuous map f is a proximal operator if and only if it is the gradient of a convex
function psi (Gribonval and Nikolova, 2020). A learned proximal network therefore is the
gradient, taken by automatic differentiation, of an input-convex network psi: whatever its
weights are, f(y) = argmin_x R(x) + ||x - y||^2 / 2 for some R, convex or not.

    z_1 = g(W_1 y + b_1),  z_k = g(W_k z_{k-1} + H_k y + b_k),  psi = w^T z_K + c ||y||^2

is convex in y when the W_k (k > 1) and w have no negative entry and g (softplus) is convex
and non-decreasing. After each optimiser step the constrained weights are clamped at zero.

References
----------
.. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
   Problems", ICLR 2024, arXiv:2310.14344.
.. [2] Gribonval and Nikolova, "A Characterization of Proximity Operators", JMIV 2020,
   arXiv:1807.04014.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from deepinv.models import Denoiser
from torch import Tensor, nn
from torch.nn import functional as F

from .._check import check_finite, check_integer, check_interval, check_shape

__all__ = ["FullyConnectedLPN", "LearnedProximalNetwork", "PatchLPN", "ProximalOperator"]

# Constrained weights start at exp(N(-10, 0.1)), biases and free weights as torch starts them.
LOG_WEIGHT_MEAN, LOG_WEIGHT_STD = -10.0, 0.1


class _PotentialGradient(Denoiser, ABC):
    """What all proximal networks share: the gradient of `potential` and its constraint."""

    strong_convexity: float

    @abstractmethod
    def potential(self, x: Tensor) -> Tensor:
        """Compute the convex function psi whose gradient the network is.

        Parameters
        ----------
        x : Tensor of shape (batch, ...)
            Points.

        Returns
        -------
        Tensor of shape (batch,)
            psi(x), one value a sample.
        """

    def forward(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        """Compute the proximal operator f(x), the gradient of the potential.

        The result carries an autograd graph in training mode, or when `x` itself requires
        a gradient; otherwise none is built. The caller's tensor is left as it is.

        Parameters
        ----------
        x : Tensor of shape (batch, ...)
            Noisy points, of the network's dtype.
        sigma : float or Tensor, default=None
            Part of deepinv's `Denoiser` contract and without effect here: one network is the
            proximal operator of one function, the prior at the noise level it was trained on.

        Returns
        -------
        Tensor of the shape of `x`
            f(x).
        """
        self.check_input(x)
        create_graph = torch.is_grad_enabled() and (self.training or x.requires_grad)
        if not create_graph:
            return self._plain_gradient(x)
        with torch.inference_mode(False), torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            psi = self.potential(point)
            (gradient,) = torch.autograd.grad(psi.sum(), point, create_graph=True)
        return gradient

    def _plain_gradient(self, x: Tensor) -> Tensor:
        """Compute the gradient of the potential, without an autograd graph of it."""
        # A graph of psi must be built here even where the caller has switched graphs off.
        with torch.inference_mode(False), torch.enable_grad():
            point = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            (gradient,) = torch.autograd.grad(self.potential(point).sum(), point)
        return gradient

    def check_input(self, x: Tensor) -> None:
        """Raise unless `x` is a finite floating point tensor of the network's dtype.

        Raises
        ------
        TypeError
            If `x` is no tensor, or not of the parameters' dtype.
        ValueError
            If it holds NaN or infinity.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating point dtype, got {x.dtype}")
        own = next(self.parameters(), None)
        if own is not None and x.dtype != own.dtype:
            raise TypeError(f"x must have the network's dtype {own.dtype}, got {x.dtype}")
        check_finite("x", x.detach())

    def constrained_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that must not be negative, by their names in the state dict."""
        return {}

    @torch.no_grad()
    def project_(self) -> Self:
        """Clamp the constrained weights at zero, in place, which makes the potential convex."""
        for weight in self.constrained_weights().values():
            weight.clamp_(min=0)
        return self

    def is_convex(self) -> bool:
        """Whether all constrained weights are finite and not negative."""
        return all(bool((w >= 0).all()) for w in self.constrained_weights().values())

    def project_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of a state dict with the constrained weights clamped at zero.

        Parameters
        ----------
        state_dict : mapping of str to Tensor
            Weights from elsewhere, for instance trained without the constraint.

        Returns
        -------
        dict of str to Tensor
            Weights that `load_state_dict` accepts.
        """
        constrained = self.constrained_weights()
        return {k: v.clamp(min=0) if k in constrained else v for k, v in state_dict.items()}


def _refuse_negative(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Before weights are loaded: refuse those that would make the potential non-convex."""
    assert isinstance(module, _PotentialGradient)
    for name, own in module.constrained_weights().items():
        weight = state_dict.get(prefix + name)
        if weight is None:
            continue
        if weight.dim() == 4 and own.dim() == 2:
            # The published 128 x 128 layout holds this layer as a convolution of image size.
            state_dict[prefix + name] = weight = weight.flatten(1)
        if bool((weight < 0).any()):
            raise ValueError(
                f"{prefix + name} must not be negative, got {int((weight < 0).sum())} negative "
                f"entries, the least {float(weight.min()):.3g}: the potential would not be "
                "convex. If that is acceptable as a start, clamp them: "
                "net.load_state_dict(net.project_state_dict(state_dict))"
            )
    for name in [name for name in state_dict if name.startswith(prefix + "res.")]:
        own_parameter = dict(module.named_parameters()).get(name[len(prefix) :])
        if own_parameter is not None and state_dict[name].dim() == 4 and own_parameter.dim() == 2:
            state_dict[name] = state_dict[name].flatten(1)


def _reset(layer: nn.Module, generator: torch.Generator | None) -> None:
    """Start a layer as torch does, uniform on +-1 / sqrt(fan_in), from a given generator."""
    bound = layer.weight[0].numel() ** -0.5  # type: ignore[index]
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)


class LearnedProximalNetwork(_PotentialGradient):
    r"""Convolutional network that is the proximal operator of a learned function.

    The input-convex network alternates 3 x 3 convolutions of stride 2 and 1, each added to a
    free convolution of the bilinearly resized image, and ends in two dense layers [1]_. With
    ``image_size=28, width=64`` and ``image_size=128, width=256`` it has the layers of the
    published networks.

    Parameters
    ----------
    in_channels : int, default=1
        Channels of the image.
    image_size : int or (int, int), default=128
        Height and width; the network takes images of this size alone (`PatchLPN` takes
        larger ones).
    width : int, default=256
        Channels of the hidden layers (paper: 64 at 28 x 28, 256 at 128 x 128).
    n_downsamples : int, default=None
        Convolutions of stride 2. None means the published 3 for sides of 64 and more, 2 for
        sides of 16 and more, 1 below.
    beta : float, default=100.0
        Sharpness of the softplus (paper: 10 at 28 x 28, 100 at 128 x 128).
    strong_convexity : float, default=1e-6
        c in the term c ||x||^2 of the potential, so f has slope at least 2 c: the convention
        of the published code, where the paper writes alpha / 2 = c. Positive values make f
        invertible (paper: 0.01 at 28 x 28, 1e-6 at 128 x 128).
    bias : bool, default=None
        Biases in the first and the last layer. None follows the published tables: with three
        or more downsamplings, and not with fewer.
    generator : torch.Generator, default=None
        Source of the initial weights; None is torch's global one.

    Attributes
    ----------
    lin : ModuleList
        Layers along the path; all but the first have non-negative weights.
    res : ModuleList
        Free layers fed with the resized image.

    Notes
    -----
    The published code sets ``requires_grad`` on the caller's tensor and always keeps the
    graph; this class does neither.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
       Problems", ICLR 2024, arXiv:2310.14344.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import LearnedProximalNetwork
    >>> net = LearnedProximalNetwork(1, image_size=28, width=64, beta=10.0, strong_convexity=0.01)
    >>> sum(p.numel() for p in net.parameters())
    317056
    >>> net(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 128,
        width: int = 256,
        n_downsamples: int | None = None,
        beta: float = 100.0,
        strong_convexity: float = 1e-6,
        bias: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        height, width_ = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        for name, value in (("in_channels", in_channels), ("width", width)):
            check_integer(name, value, 1)
        for value in (height, width_):
            check_integer("image_size", value, 1)
        check_interval("beta", beta, 0, closed="neither")
        check_interval("strong_convexity", strong_convexity, 0)
        if n_downsamples is None:
            side = min(height, width_)
            n_downsamples = 3 if side >= 64 else 2 if side >= 16 else 1
        check_integer("n_downsamples", n_downsamples, 0)
        if bias is None:
            bias = n_downsamples >= 3
        self.in_channels = in_channels
        self.image_size = (int(height), int(width_))
        self.beta = float(beta)
        self.strong_convexity = float(strong_convexity)

        # Strides 1 | 2 1 2 1 ... 2: between two downsamplings one convolution keeps the size.
        strides = [2 if k % 2 == 0 else 1 for k in range(2 * n_downsamples - 1)]
        sizes = [self.image_size]
        for stride in strides:
            sizes.append((-(-sizes[-1][0] // stride), -(-sizes[-1][1] // stride)))
        self.sizes = sizes
        pixels = sizes[-1][0] * sizes[-1][1]
        lin: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, 1, 1, bias=bias)]
        res: list[nn.Module] = []
        for stride in strides:
            lin.append(nn.Conv2d(width, width, 3, stride, 1, bias=False))
            res.append(nn.Conv2d(in_channels, width, 3, stride, 1))
        lin += [nn.Linear(width * pixels, 64, bias=False), nn.Linear(64, 1, bias=bias)]
        res += [nn.Linear(in_channels * pixels, 64)]
        self.lin = nn.ModuleList(lin)
        self.res = nn.ModuleList(res)
        self.reset_parameters(generator)
        self.register_load_state_dict_pre_hook(_refuse_negative)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights: exp(N(-10, 0.1)) where constrained, torch's default elsewhere."""
        for layer in (*self.lin, *self.res):
            _reset(layer, generator)
        with torch.no_grad():
            for weight in self.constrained_weights().values():
                weight.normal_(LOG_WEIGHT_MEAN, LOG_WEIGHT_STD, generator=generator).exp_()

    def constrained_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that must not be negative, by their names in the state dict."""
        return {f"lin.{k}.weight": self.lin[k].weight for k in range(1, len(self.lin))}  # type: ignore[misc]

    def check_input(self, x: Tensor) -> None:
        """Raise unless `x` is finite and of shape (batch, in_channels, height, width)."""
        super().check_input(x)
        wanted = (None, self.in_channels, *self.image_size)
        if x.dim() == 4 and x.shape[1] == self.in_channels and x.shape[2:] != self.image_size:
            raise ValueError(
                f"x must be of image size {self.image_size}, got {tuple(x.shape[2:])}; "
                "PatchLPN applies a network to larger images"
            )
        check_shape("x", x, wanted)

    def potential(self, x: Tensor) -> Tensor:
        """Compute the convex function psi whose gradient the network is.

        Parameters
        ----------
        x : Tensor of shape (batch, in_channels, height, width)
            Images.

        Returns
        -------
        Tensor of shape (batch,)
            psi(x).
        """
        z = _softplus(self.lin[0](x), self.beta)
        image = x
        for lin, res, size in zip(self.lin[1:-2], self.res[:-1], self.sizes[:-1], strict=True):
            image = _resize(x, image, size)
            z = _softplus(lin(z) + res(image), self.beta)
        image = _resize(x, image, self.sizes[-1])
        z = _softplus(self.lin[-2](z.flatten(1)) + self.res[-1](image.flatten(1)), self.beta)
        return self.lin[-1](z)[:, 0] + self.strong_convexity * x.square().flatten(1).sum(1)

    @torch.no_grad()
    def _plain_gradient(self, x: Tensor) -> Tensor:
        """Compute the gradient of the potential by the chain rule, layer by layer.

        Automatic differentiation takes about as long with a graph of the result as without.
        """
        convolutions = list(zip(self.lin[1:-2], self.res[:-1], self.sizes[:-1], strict=True))
        z = [_softplus(self.lin[0](x), self.beta)]
        image = x
        for lin, res, size in convolutions:
            image = _resize(x, image, size)
            z.append(_softplus(lin(z[-1]) + res(image), self.beta))
        image = _resize(x, image, self.sizes[-1])
        last = self.lin[-2](z[-1].flatten(1)) + self.res[-1](image.flatten(1))
        hidden, output_layer, skip = (
            cast(Tensor, layer.weight) for layer in (self.lin[-2], self.lin[-1], self.res[-1])
        )
        slope = output_layer * _softplus_slope(_softplus(last, self.beta), self.beta)
        # Gradients by the hidden layer below, and by the image at each size.
        below = (slope @ hidden).reshape(z[-1].shape)
        by_image = {self.sizes[-1]: (slope @ skip).reshape(image.shape)}
        for (lin, res, size), output in zip(reversed(convolutions), reversed(z[1:]), strict=True):
            slope = below.mul_(_softplus_slope(output, self.beta))
            below = _convolution_adjoint(lin, slope, size)
            part = _convolution_adjoint(res, slope, size)
            by_image[size] = by_image[size] + part if size in by_image else part
        slope = below.mul_(_softplus_slope(z[0], self.beta))
        gradient = _convolution_adjoint(self.lin[0], slope, self.image_size)
        gradient.add_(x, alpha=2 * self.strong_convexity)
        for size, part in by_image.items():
            if size != self.image_size:
                part = torch.ops.aten.upsample_bilinear2d_backward(
                    part, list(size), list(x.shape), False, None, None
                )
            gradient += part
        return gradient

    def extra_repr(self) -> str:
        """Describe the network in `print`."""
        return (
            f"in_channels={self.in_channels}, image_size={self.image_size}, beta={self.beta:g}, "
            f"strong_convexity={self.strong_convexity:g}"
        )


def _softplus(x: Tensor, beta: float) -> Tensor:
    """Softplus, held constant below -40 / beta, where it has come down to 4e-18 / beta.

    Still convex and non-decreasing. Further down its derivatives are denormal numbers, with
    which a CPU takes five times as long for a training step at beta = 100.
    """
    return F.softplus(x.clamp(min=-40 / beta), beta)


def _softplus_slope(value: Tensor, beta: float) -> Tensor:
    """Derivative of softplus from its value: 1 - exp(-beta value).

    Where torch cuts softplus off to x, at beta x = 20, this is 2e-9 below torch's derivative.
    """
    return torch.expm1(value.mul(-beta)).neg_()


def _convolution_adjoint(layer: nn.Module, output: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply the transpose of a 3 x 3 convolution, without its bias, giving images of `size`."""
    convolution = cast(nn.Conv2d, layer)
    weight, stride = convolution.weight, convolution.stride[0]
    if weight.shape[1] < 8:
        # To few channels: a matrix product and a fold, where a convolution is slow.
        matrix = weight.flatten(1).T.expand(len(output), -1, -1)
        columns = torch.bmm(matrix, output.flatten(2))
        return F.fold(columns, size, 3, padding=1, stride=stride)
    left = tuple(n - stride * (m - 1) - 1 for n, m in zip(size, output.shape[2:], strict=True))
    return F.conv_transpose2d(output, weight, None, stride, 1, left)


def _resize(x: Tensor, last: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `x` bilinearly to `size`, or reuse `last` where that has this size already."""
    if last.shape[2:] == size:
        return last
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class FullyConnectedLPN(_PotentialGradient):
    """Dense network that is the proximal operator of a learned function of a vector.

    Parameters
    ----------
    in_features : int, default=1
        Length of the vectors; images of as many pixels are taken too and flattened inside.
    hidden : int, default=50
        Width of the hidden layers (paper: 50).
    n_layers : int, default=4
        Constrained hidden layers (paper: 4).
    beta : float, default=10.0
        Sharpness of the softplus (paper: 10).
    strong_convexity : float, default=0.0
        c in the term c ||x||^2 of the potential. The paper's dense network has none;
        inversion, and so the prior, wants a positive value.
    generator : torch.Generator, default=None
        Source of the initial weights; None is torch's global one.

    Notes
    -----
    Weights start as torch starts them and are clamped at once; the published run clamps them
    first after its first step.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
       Problems", ICLR 2024, arXiv:2310.14344.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import FullyConnectedLPN
    >>> net = FullyConnectedLPN(in_features=1, hidden=50, n_layers=4)
    >>> sum(p.numel() for p in net.parameters())
    10502
    >>> y = torch.linspace(-3, 3, 7)[:, None]
    >>> bool((net.eval()(y).diff(dim=0) >= 0).all())  # a proximal operator on R never decreases
    True
    """

    def __init__(
        self,
        in_features: int = 1,
        hidden: int = 50,
        n_layers: int = 4,
        beta: float = 10.0,
        strong_convexity: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = (("in_features", in_features), ("hidden", hidden), ("n_layers", n_layers))
        for name, value in sizes:
            check_integer(name, value, 1)
        check_interval("beta", beta, 0, closed="neither")
        check_interval("strong_convexity", strong_convexity, 0)
        self.in_features = in_features
        self.beta = float(beta)
        self.strong_convexity = float(strong_convexity)
        self.lin = nn.ModuleList(
            [nn.Linear(in_features, hidden, bias=False)]
            + [nn.Linear(hidden, hidden, bias=False) for _ in range(n_layers)]
            + [nn.Linear(hidden, 1, bias=False)]
        )
        self.res = nn.ModuleList(
            [nn.Linear(in_features, hidden) for _ in range(n_layers)] + [nn.Linear(in_features, 1)]
        )
        self.reset_parameters(generator)
        self.register_load_state_dict_pre_hook(_refuse_negative)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights as torch does and clamp the constrained ones at zero."""
        for layer in (*self.lin, *self.res):
            _reset(layer, generator)
        self.project_()

    def constrained_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that must not be negative, by their names in the state dict."""
        return {f"lin.{k}.weight": self.lin[k].weight for k in range(1, len(self.lin))}  # type: ignore[misc]

    def check_input(self, x: Tensor) -> None:
        """Raise unless `x` is finite and has `in_features` entries a sample."""
        super().check_input(x)
        if x.dim() < 2 or x[0:1].numel() != self.in_features * min(len(x), 1):
            raise ValueError(
                f"x must have shape (batch, {self.in_features}), or images of as many pixels, "
                f"got {tuple(x.shape)}"
            )

    def potential(self, x: Tensor) -> Tensor:
        """Compute the convex function psi whose gradient the network is.

        Parameters
        ----------
        x : Tensor of shape (batch, in_features)
            Vectors, or images of as many pixels.

        Returns
        -------
        Tensor of shape (batch,)
            psi(x).
        """
        x = x.flatten(1)
        z = _softplus(self.lin[0](x), self.beta)
        for lin, res in zip(self.lin[1:-1], self.res[:-1], strict=True):
            z = _softplus(lin(z) + res(x), self.beta)
        psi = self.lin[-1](z) + self.res[-1](x)
        return psi[:, 0] + self.strong_convexity * x.square().sum(1)

    def extra_repr(self) -> str:
        """Describe the network in `print`."""
        return (
            f"in_features={self.in_features}, beta={self.beta:g}, "
            f"strong_convexity={self.strong_convexity:g}"
        )


class ProximalOperator(_PotentialGradient):
    """Proximal operator made from any convex module: f(x) is the gradient of the potential.

    Parameters
    ----------
    potential : nn.Module or callable
        Maps (batch, ...) to (batch,) or (batch, 1), convex in each sample, twice
        differentiable if it is to be trained. Convexity is the module's own affair: a module
        with a method ``project_()`` is projected by it, any other must be convex as it is.
    strong_convexity : float, default=0.0
        c in the term c ||x||^2 that is added to the potential.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import ProximalOperator
    >>> prox = ProximalOperator(lambda x: 0.25 * x.square().flatten(1).sum(1))
    >>> prox.eval()(torch.tensor([[2.0, -4.0]]))  # of R(x) = ||x||^2 / 2
    tensor([[ 1., -2.]])
    """

    def __init__(
        self, potential: nn.Module | Callable[[Tensor], Tensor], strong_convexity: float = 0.0
    ) -> None:
        super().__init__()
        if not callable(potential):
            raise TypeError(f"potential must be callable, got {type(potential).__name__}")
        check_interval("strong_convexity", strong_convexity, 0)
        self.convex = potential
        self.strong_convexity = float(strong_convexity)

    def project_(self) -> Self:
        """Call the module's own ``project_``, if it has one."""
        project = getattr(self.convex, "project_", None)
        if project is not None:
            project()
        return self

    def potential(self, x: Tensor) -> Tensor:
        """Compute the module's value plus c ||x||^2.

        Parameters
        ----------
        x : Tensor of shape (batch, ...)
            Points.

        Returns
        -------
        Tensor of shape (batch,)
            psi(x).

        Raises
        ------
        ValueError
            If the module does not return one value a sample.
        """
        psi = self.convex(x)
        if psi.numel() != len(x):
            raise ValueError(
                f"potential must return one value a sample, shape ({len(x)},), "
                f"got {tuple(psi.shape)}"
            )
        return psi.reshape(len(x)) + self.strong_convexity * x.square().flatten(1).sum(1)

    def extra_repr(self) -> str:
        """Describe the operator in `print`."""
        return f"strong_convexity={self.strong_convexity:g}"


class PatchLPN(_PotentialGradient):
    r"""Proximal operator for images of any size: a network's average over equal patches.

    The zero-padded image is cut into p x p patches with stride s such that each pixel lies in
    exactly (p / s)^2 of them. Then the average of the network's outputs is the gradient of

    .. math:: \psi_{tot}(x) = (s / p)^2 \sum_{patches} \psi(patch)

    and thus itself a proximal operator. (Averages over patches that cover border pixels less
    often, as in the published large-image experiments, are not.)

    Parameters
    ----------
    net : LearnedProximalNetwork
        Network for square patches.
    overlap : int, default=None
        Pixels that neighbouring patches share; the stride p - overlap must divide p. None is
        half a patch (paper: stride 64 for patches of 128).
    batch_size : int, default=64
        Patches that pass the network at once, which bounds memory.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
       Problems", ICLR 2024, arXiv:2310.14344.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import LearnedProximalNetwork, PatchLPN
    >>> patches = PatchLPN(LearnedProximalNetwork(1, image_size=8, width=4), overlap=6)
    >>> patches(torch.zeros(1, 1, 21, 30)).shape
    torch.Size([1, 1, 21, 30])
    """

    def __init__(
        self, net: LearnedProximalNetwork, overlap: int | None = None, batch_size: int = 64
    ) -> None:
        super().__init__()
        if not isinstance(net, LearnedProximalNetwork):
            raise TypeError(f"net must be a LearnedProximalNetwork, got {type(net).__name__}")
        patch, other = net.image_size
        if patch != other:
            raise ValueError(f"net must take square patches, got image_size {net.image_size}")
        overlap = patch // 2 if overlap is None else overlap
        check_integer("overlap", overlap, 0, patch - 1)
        if patch % (patch - overlap):
            raise ValueError(
                f"overlap must leave a stride that divides the patch side {patch}, "
                f"got overlap {overlap}, stride {patch - overlap}"
            )
        check_integer("batch_size", batch_size, 1)
        self.net = net
        self.overlap = overlap
        self.batch_size = batch_size

    @property
    def strong_convexity(self) -> float:  # type: ignore[override]
        """Coefficient of ||x||^2 in the potential: the network's, as all pixels count once."""
        return self.net.strong_convexity

    def constrained_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that must not be negative, by their names in the state dict."""
        return {f"net.{name}": weight for name, weight in self.net.constrained_weights().items()}

    def check_input(self, x: Tensor) -> None:
        """Raise unless `x` is a finite image batch with the network's channels."""
        super().check_input(x)
        check_shape("x", x, (None, self.net.in_channels, None, None))

    def _geometry(self, x: Tensor) -> tuple[int, int, list[int]]:
        """Patch side, stride, and padding (left, right, top, bottom) of equal coverage."""
        patch = self.net.image_size[0]
        stride = patch - self.overlap
        # `overlap` zeros on every side, and on the far sides up to a multiple of the stride.
        far_bottom, far_right = (self.overlap + -n % stride for n in x.shape[2:])
        return patch, stride, [self.overlap, far_right, self.overlap, far_bottom]

    def _patches(self, x: Tensor) -> Tensor:
        """Cut the padded image into patches, (batch * n_patches, channels, p, p)."""
        patch, stride, padding = self._geometry(x)
        columns = F.unfold(F.pad(x, padding), patch, stride=stride)
        return columns.transpose(1, 2).reshape(-1, x.shape[1], patch, patch)

    def potential(self, x: Tensor) -> Tensor:
        """Compute the sum of the patches' potentials over the number of patches a pixel is in.

        Parameters
        ----------
        x : Tensor of shape (batch, in_channels, height, width)
            Images.

        Returns
        -------
        Tensor of shape (batch,)
            psi_tot(x).
        """
        patch, stride, _ = self._geometry(x)
        chunks = self._patches(x).split(self.batch_size)
        psi = torch.cat([self.net.potential(chunk) for chunk in chunks])
        return (stride / patch) ** 2 * psi.reshape(len(x), -1).sum(1)

    def forward(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        """Compute the average of the network's outputs over all patches.

        Equal to the gradient of `potential`, but no graph spans more than `batch_size`
        patches outside training.

        Parameters
        ----------
        x : Tensor of shape (batch, in_channels, height, width)
            Noisy images.
        sigma : float or Tensor, default=None
            Part of deepinv's `Denoiser` contract and without effect here.

        Returns
        -------
        Tensor of the shape of `x`
            The proximal operator at `x`.
        """
        self.check_input(x)
        patch, stride, padding = self._geometry(x)
        chunks = self._patches(x).split(self.batch_size)
        outputs = torch.cat([self.net(chunk) for chunk in chunks])
        columns = outputs.reshape(len(x), -1, x.shape[1] * patch * patch).transpose(1, 2)
        height, width = x.shape[2:]
        padded = (height + padding[2] + padding[3], width + padding[0] + padding[1])
        total = F.fold(columns, padded, patch, stride=stride) * (stride / patch) ** 2
        top, left = padding[2], padding[0]
        return total[:, :, top : top + height, left : left + width]

    def extra_repr(self) -> str:
        """Describe the operator in `print`."""
        return f"overlap={self.overlap}, batch_size={self.batch_size}"
