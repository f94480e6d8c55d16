"""U-Net between latent images of the same size, as in the Latent U-Net of GFI.

Two levels down with skip connections, two up. The published network takes the skips *after*
pooling and crops or pads the upsampled features to them, so fine detail cannot pass; with
``legacy_alignment=False`` skips are taken before pooling, with the same parameters.

References
----------
.. [1] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._check import check_integer

__all__ = ["UNetTranslation"]


class UNetTranslation(nn.Module):
    """Translate a latent image with a U-Net.

    Parameters
    ----------
    channels : int, default=128
        Channels of the latent image.
    depth : int, default=2
        Levels, each halving the size and doubling the channels.
    repeats : int, default=1
        Double convolutions a level: 1 in the published small network, 2 in the large.
    skip : bool, default=True
        Whether levels are joined by skip connections.
    legacy_alignment : bool, default=False
        Whether to take skips after pooling and crop what comes up from below, as published.
        The output then has twice the size of the first pooled image, which is one less than
        the input for odd sizes.

    Raises
    ------
    ValueError
        If a number is below 1, or in `forward` the image is too small to be halved that often.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import UNetTranslation
    >>> net = UNetTranslation(16)
    >>> net(torch.zeros(1, 16, 35, 35)).shape
    torch.Size([1, 16, 35, 35])
    """

    def __init__(
        self,
        channels: int = 128,
        depth: int = 2,
        repeats: int = 1,
        *,
        skip: bool = True,
        legacy_alignment: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("depth", depth), ("repeats", repeats)):
            check_integer(name, value, 1)
        self.skip = skip
        self.legacy_alignment = legacy_alignment
        widths = [channels * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(_double(a, b) for a, b in pairwise(widths))
        self.repeats = nn.ModuleList(_repeat(b, repeats - 1) for b in widths[1:])
        self.bottom = _repeat(widths[-1], 2 * repeats)
        self.up = nn.ModuleList(
            nn.Sequential(_double(a * (2 if skip else 1), b), _repeat(b, repeats - 1))
            for a, b in pairwise(reversed(widths))
        )
        self.last = _double(channels, channels)

    def forward(self, latent: Tensor) -> Tensor:
        """Translate a latent image.

        Parameters
        ----------
        latent : Tensor of shape (batch, channels, height, width)

        Returns
        -------
        Tensor
            Of the shape of `latent`; see `legacy_alignment` for odd sizes.
        """
        smallest = min(latent.shape[-2:]) >> len(self.down)
        if smallest < 1:
            raise ValueError(
                f"latent must be at least {2 ** len(self.down)} pixels high and wide, "
                f"got shape {tuple(latent.shape)}"
            )
        x = latent
        skips = []
        for double, repeat in zip(self.down, self.repeats, strict=True):
            before = double(x)
            x = repeat(F.max_pool2d(before, 2))
            skips.append(x if self.legacy_alignment else before)
        x = self.bottom(x)
        for up in self.up:
            skip = skips.pop()
            if self.legacy_alignment:
                x = _fit(_upsample(x, (2 * x.shape[-2], 2 * x.shape[-1])), skip.shape[-2:])
            else:
                x = _upsample(x, skip.shape[-2:])
            x = up(torch.cat([skip, x], dim=1) if self.skip else x)
        if self.legacy_alignment:
            x = _upsample(x, (2 * x.shape[-2], 2 * x.shape[-1]))
        return self.last(x)


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.GroupNorm(1, out_channels, eps=1e-3),
        nn.LeakyReLU(0.01),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.GroupNorm(1, out_channels, eps=1e-3),
        nn.LeakyReLU(0.01),
    )


def _repeat(channels: int, times: int) -> nn.Sequential:
    return nn.Sequential(*(_double(channels, channels) for _ in range(times)))


def _upsample(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def _fit(x: Tensor, size: torch.Size) -> Tensor:
    """Pad with zeros, or crop, evenly to `size`."""
    rows, columns = size[0] - x.shape[-2], size[1] - x.shape[-1]
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
