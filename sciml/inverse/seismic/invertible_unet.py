"""Invertible U-Net: a bijection between images that keeps U-Net's many scales.

Additive couplings transform, orthogonal 1x1 convolutions mix channels, and orthogonal 2x2
kernels of stride two move from scale to scale; every step is undone exactly, so one network
serves both directions [1]_ [2]_. Orthogonal matrices are Cayley transforms

    Q = (I + A)^{-1} (I - A),   A = W - W^T,

of free matrices W. Gradients flow through `torch.linalg.solve` and are exact; the package that
the published results of GFI [3]_ used had a Cayley gradient that differs in sign or direction
from the true one.

References
----------
.. [1] L. Dinh, D. Krueger, Y. Bengio, "NICE: Non-linear independent components estimation",
   2014. arXiv:1410.8516
.. [2] C. Etmann, R. Ke, C.-B. Schönlieb, "iUNets: Fully invertible U-Nets with learnable up-
   and downsampling", 2020. arXiv:2005.05220
.. [3] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._check import check_choice, check_integer

__all__ = ["InvertibleUNet", "cayley"]


def cayley(weight: Tensor) -> Tensor:
    """Orthogonal matrices from arbitrary square ones.

    Parameters
    ----------
    weight : Tensor of shape (..., n, n)
        Free parameters W.

    Returns
    -------
    Tensor of shape (..., n, n)
        ``(I + A)^{-1} (I - A)`` with ``A = W - W^T``: orthogonal, with determinant 1.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import cayley
    >>> q = cayley(torch.arange(9.0).reshape(3, 3))
    >>> bool(torch.allclose(q @ q.T, torch.eye(3), atol=1e-6))
    True
    """
    skew = weight - weight.transpose(-1, -2)
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return torch.linalg.solve(eye + skew, eye - skew)


class _Coupling(nn.Module):
    """``(x1, x2) -> (x2, x1 + F(x2))``; F starts at zero, the coupling as a swap."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.convolution = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, half, eps=1e-3)
        nn.init.kaiming_normal_(self.convolution.weight, a=0.01, mode="fan_out")
        nn.init.zeros_(self.norm.weight)

    def transform(self, x: Tensor) -> Tensor:
        return self.norm(F.leaky_relu(self.convolution(x), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([second, first + self.transform(second)], dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        second, sum_ = y.chunk(2, dim=1)
        return torch.cat([sum_ - self.transform(second), second], dim=1)


class _ChannelMixing(nn.Module):
    """Orthogonal 1x1 convolution, the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, cayley(self.weight)[:, :, None, None])

    def inverse(self, y: Tensor) -> Tensor:
        return F.conv2d(y, cayley(self.weight).T[:, :, None, None])


class _Downsampling(nn.Module):
    """Each channel becomes four of half the size: an orthogonal map of its 2x2 blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The Cayley transform of this W is the Haar wavelet transform up to signs.
        haar = torch.zeros(4, 4)
        haar[0, 2:], haar[1, 2:] = 0.5, -0.5
        self.weight = nn.Parameter(haar.repeat(channels, 1, 1))

    def kernel(self) -> Tensor:
        return cayley(self.weight).reshape(-1, 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), stride=2, groups=len(self.weight))

    def inverse(self, y: Tensor) -> Tensor:
        return F.conv_transpose2d(y, self.kernel(), stride=2, groups=len(self.weight))


class _Upsampling(_Downsampling):
    """The inverse of a downsampling with a kernel of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().inverse(x)

    def inverse(self, y: Tensor) -> Tensor:
        return super().forward(y)


class _Split(nn.Module):
    """Set the first half of the channels aside for the way up."""


class _Join(nn.Module):
    """Put the half that was set aside last in front again."""


class InvertibleUNet(nn.Module):
    """U-Net that is a bijection of images whose sides it can halve evenly.

    Parameters
    ----------
    channels : int, default=128
        Channels of the image; even, and divisible by 2 on each level.
    architecture : sequence of int, default=(4, 4, 4, 4)
        Couplings on the way down, and as many on the way up, for each level.
    padding : {"error", "crop"}, default="error"
        What to do with sides that are not divisible by ``2 ** (levels - 1)``. "error" raises.
        "crop" pads with zeros and crops the result, as published: the network is then **not**
        invertible, `inverse` only undoes it approximately, and warns.
    memory_efficient : bool, default=False
        Whether to store nothing but the output for the backward pass and recompute the rest by
        inversion. What is stored then does not grow with the number of couplings; a training
        step takes 2.4 to 3 times as long (128 channels, 64 x 64, on an H200).

    Raises
    ------
    ValueError
        If the channels cannot be halved, or a side does not fit (see `padding`).

    References
    ----------
    .. [1] C. Etmann, R. Ke, C.-B. Schönlieb, "iUNets", 2020. arXiv:2005.05220
    .. [2] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import InvertibleUNet
    >>> net = InvertibleUNet(8, (2, 2))
    >>> x = torch.randn(1, 8, 16, 16)
    >>> bool(torch.allclose(net.inverse(net(x)), x, atol=1e-5))
    True
    """

    def __init__(
        self,
        channels: int = 128,
        architecture: Sequence[int] = (4, 4, 4, 4),
        *,
        padding: str = "error",
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        check_choice("padding", padding, ("error", "crop"))
        check_integer("channels", channels, 2)
        if not architecture:
            raise ValueError("architecture must name at least one level, got none")
        for level, couplings in enumerate(architecture):
            check_integer(f"architecture[{level}]", couplings, 1)
        if channels % 2:
            raise ValueError(f"channels must be even, got {channels}")
        self.channels = channels
        self.padding = padding
        self.memory_efficient = memory_efficient
        self.divisor = 2 ** (len(architecture) - 1)

        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for level, couplings in enumerate(architecture):
            width = channels * 2**level
            descent: list[nn.Module] = [_Coupling(width) for _ in range(couplings)]
            ascent: list[nn.Module] = [_Coupling(width) for _ in range(couplings)]
            if level < len(architecture) - 1:
                descent += [_ChannelMixing(width), _Split(), _Downsampling(width // 2)]
                ascent = [
                    *(_Upsampling(width // 2), _Join(), ascent[0], _ChannelMixing(width)),
                    *ascent[1:],
                ]
            down += descent
            up = ascent + up
        self.steps = nn.ModuleList(down + up)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to an image of the same shape.

        Parameters
        ----------
        x : Tensor of shape (batch, channels, height, width)

        Returns
        -------
        Tensor of shape (batch, channels, height, width)
        """
        return self._run(x, inverse=False)

    def inverse(self, y: Tensor) -> Tensor:
        """Find the image that `forward` maps to `y`.

        Parameters
        ----------
        y : Tensor of shape (batch, channels, height, width)

        Returns
        -------
        Tensor of shape (batch, channels, height, width)
        """
        return self._run(y, inverse=True)

    def _run(self, x: Tensor, *, inverse: bool) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"image must have shape (batch, {self.channels}, height, width), "
                f"got {tuple(x.shape)}"
            )
        height, width = x.shape[-2:]
        rows, columns = -height % self.divisor, -width % self.divisor
        if rows or columns:
            if self.padding == "error":
                raise ValueError(
                    f"height and width must be divisible by {self.divisor} for this network to "
                    f"be invertible, got {height} x {width}; padding='crop' gives up on that"
                )
            if inverse:
                warnings.warn(
                    f"a {height} x {width} image was padded to {height + rows} x "
                    f"{width + columns} and cropped: inverse is only approximate",
                    stacklevel=3,
                )
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        steps = list(self.steps)
        if self.memory_efficient and torch.is_grad_enabled():
            parameters = [p for p in self.parameters() if p.requires_grad]
            y = _Reversible.apply(x, steps, inverse, *parameters)
        else:
            y = _forward(steps, x, inverse)
        return y[..., rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]


def _forward(steps: list[Any], x: Tensor, inverse: bool) -> Tensor:
    """Run the steps, or their inverses backwards; `_Split` and `_Join` swap roles."""
    aside: list[Tensor] = []
    for step in reversed(steps) if inverse else steps:
        if isinstance(step, _Join if inverse else _Split):
            kept, x = x.chunk(2, dim=1)
            aside.append(kept)
        elif isinstance(step, _Split if inverse else _Join):
            x = torch.cat([aside.pop(), x], dim=1)
        else:
            x = step.inverse(x) if inverse else step(x)
    return x


class _Reversible(torch.autograd.Function):
    """All steps as one function that keeps its output only and undoes steps to differentiate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, steps: list[Any], inverse: bool, *parameters: Tensor
    ) -> Tensor:
        with torch.no_grad():
            y = _forward(steps, x, inverse)
        ctx.save_for_backward(y)
        ctx.steps, ctx.inverse, ctx.parameters = steps, inverse, parameters
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        inverse = ctx.inverse
        gradient = dict.fromkeys(ctx.parameters)
        aside: list[tuple[Tensor, Tensor]] = []
        for step in ctx.steps if inverse else reversed(ctx.steps):
            if isinstance(step, _Split if inverse else _Join):
                kept, y = y.chunk(2, dim=1)
                kept_grad, grad = grad.chunk(2, dim=1)
                aside.append((kept, kept_grad))
            elif isinstance(step, _Join if inverse else _Split):
                kept, kept_grad = aside.pop()
                y = torch.cat([kept, y], dim=1)
                grad = torch.cat([kept_grad, grad], dim=1)
            else:
                with torch.no_grad():
                    x = step(y) if inverse else step.inverse(y)
                own = [p for p in step.parameters() if p.requires_grad]
                with torch.enable_grad():
                    x.requires_grad_()
                    y_again = step.inverse(x) if inverse else step(x)
                    grad, *own_grads = torch.autograd.grad(y_again, [x, *own], grad)
                for parameter, own_grad in zip(own, own_grads, strict=True):
                    gradient[parameter] = own_grad
                y = x.detach()
        return grad, None, None, *(gradient[p] for p in ctx.parameters)
