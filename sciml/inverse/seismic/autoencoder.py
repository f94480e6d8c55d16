"""Encoders and decoders between seismic data, velocity maps and square latent images.

The layer tables are those of the GFI framework [1]_ for latents of 70, 64, 32, 16 and 8 cells.
A layer is a convolution (transposed in decoders), batch normalisation and an activation:
LeakyReLU(0.2) in encoders, tanh in decoders. Sizes need not match exactly, since a bilinear
resize follows the encoder and ends the decoder.

For latents of 32 cells and fewer the published seismic layers have kernels one receiver wide and
strides of two: an encoder drops every other receiver each time, and a decoder writes to every
other column and leaves the rest constant, at latent 8 seven columns of eight. By default encoders
here average the two receivers and decoders interpolate the columns between, with the same
parameters and sizes; ``legacy_alignment=True`` does as published.

References
----------
.. [1] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
"""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..._check import check_choice, check_integer

__all__ = ["LATENT_SIZES", "SeismicDecoder", "SeismicEncoder", "VelocityDecoder", "VelocityEncoder"]

LATENT_SIZES = (8, 16, 32, 64, 70)
_LATENT_CHANNELS = 128
_FEWEST_CHANNELS = 8  # the fewest of the published tables


class _Layer(NamedTuple):
    """Output channels at the published width, and the geometry of one convolution."""

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


def _square(channels: int, kernel: int, stride: int = 1, padding: int = 0) -> _Layer:
    return _Layer(channels, (kernel, kernel), (stride, stride), (padding, padding))


_TALL_7 = ((7, 1), (2, 1), (3, 0))
_TALL_5 = ((5, 1), (2, 1), (2, 0))
_TO_63 = [_Layer(c, *_TALL_7) for c in (8, 16)] + [_Layer(c, *_TALL_5) for c in (32, 64)]
_TO_32 = [*_TO_63, _Layer(128, (5, 1), (2, 2), (2, 0))]
_TO_16 = [*_TO_32, _Layer(128, (5, 1), (2, 2), (2, 2))]
_SEISMIC_ENCODER = {
    70: [
        _Layer(8, (7, 1), (3, 1), (3, 0)),
        _Layer(16, (7, 1), (2, 1), (1, 0)),
        _Layer(32, (5, 1), (2, 1), (1, 0)),
        _Layer(64, (5, 1)),
        _Layer(128, (5, 1)),
    ],
    64: [*_TO_63, _Layer(128, (5, 1), (1, 1), (2, 0))],
    32: _TO_32,
    16: _TO_16,
    8: [*_TO_16, _Layer(128, (5, 1), (2, 2), (1, 1))],
}

_WIDE_7 = ((7, 1), (2, 2), (3, 0))
_FROM_16 = [_Layer(128, *_WIDE_7), _Layer(64, *_WIDE_7)]
_FROM_16 += [_Layer(c, *_TALL_5) for c in (32, 16, 8)]
_SEISMIC_DECODER = {
    70: [
        _Layer(128, (7, 1), (3, 1), (3, 0)),
        _Layer(64, (7, 1), (2, 1), (1, 0)),
        _Layer(32, (5, 1), (2, 1), (1, 0)),
        _Layer(16, (5, 1)),
    ],
    64: [
        _Layer(128, (7, 1), (3, 1)),
        _Layer(64, (7, 1), (2, 1)),
        _Layer(32, (5, 1), (2, 1)),
        _Layer(16, (5, 1)),
    ],
    32: [
        _Layer(128, *_WIDE_7),
        _Layer(64, *_TALL_7),
        _Layer(32, *_TALL_5),
        _Layer(16, *_TALL_5),
    ],
    16: _FROM_16,
    8: [_Layer(128, *_WIDE_7), *_FROM_16],
}
# Kernel of the last layer of the table, which goes to one channel a shot.
_SEISMIC_LAST = {70: _Layer(0, (5, 1)), 64: _Layer(0, (5, 1))} | {
    size: _Layer(0, *_TALL_5) for size in (32, 16, 8)
}
# In decoders of small latents the first layers keep the LeakyReLU of encoders.
_LEAKY_LAYERS = {70: 0, 64: 0, 32: 0, 16: 1, 8: 2}

_VELOCITY_ENCODER = {
    70: [_square(c, 1) for c in (8, 16, 32, 64, 128)],
    64: [_square(c, 1) for c in (8, 16)] + [_square(c, 3) for c in (32, 64, 128)],
    32: [_square(8, 1), _square(16, 1), _square(32, 3), _square(64, 3, 2, 1), _square(128, 3)],
    16: [
        *(_square(8, 1), _square(16, 1), _square(32, 3)),
        *(_square(64, 3, 2, 1), _square(128, 3, 2), _square(128, 3, 1, 1)),
    ],
    8: [
        *(_square(8, 1), _square(16, 1), _square(32, 3)),
        *(_square(64, 3, 2, 1), _square(128, 3, 2, 1), _square(128, 3, 2), _square(128, 3, 1, 1)),
    ],
}
_VELOCITY_DECODER = {
    70: [_square(c, 1) for c in (128, 64, 32, 16)],
    64: [_square(c, 3) for c in (128, 64, 32)] + [_square(16, 1)],
    32: [_square(128, 3), _square(64, 3, 2), _square(32, 3), _square(16, 1)],
    16: [
        *(_square(128, 3, 1, 1), _square(64, 3, 2), _square(32, 3, 2)),
        *(_square(16, 3), _square(8, 1)),
    ],
    8: [
        *(_square(128, 3, 1, 1), _square(128, 3, 2), _square(64, 3, 2), _square(32, 3, 2)),
        *(_square(16, 3), _square(8, 1)),
    ],
}


class _Encoder(nn.Module):
    """Convolutions of a table, then a bilinear resize to the latent size."""

    def __init__(
        self,
        layers: list[_Layer],
        in_channels: int,
        latent_size: int,
        width: int,
        padding_mode: Literal["zeros", "reflect"],
        legacy_alignment: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.latent_size = latent_size
        modules: list[nn.Module] = []
        for layer in layers:
            channels = _scaled(layer.channels, width)
            fill = _skips_columns(layer) and not legacy_alignment
            stride = (layer.stride[0], 1) if fill else layer.stride
            modules += [
                nn.Conv2d(
                    *(in_channels, channels, layer.kernel, stride, layer.padding),
                    padding_mode=padding_mode,
                ),
                *([nn.AvgPool2d((1, 2), ceil_mode=True)] if fill else []),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
            in_channels = channels
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input must have shape (batch, {self.in_channels}, height, width), "
                f"got {tuple(x.shape)}"
            )
        return F.interpolate(self.layers(x), size=(self.latent_size,) * 2, mode="bilinear")


class _Decoder(nn.Module):
    """Transposed convolutions of a table, a plain convolution, and a resize to the output."""

    def __init__(
        self,
        layers: list[_Layer],
        last: _Layer,
        smooth: nn.Conv2d,
        out_size: tuple[int, int],
        width: int,
        leaky: int = 0,
        legacy_alignment: bool = True,
    ) -> None:
        super().__init__()
        self.out_size = out_size
        modules: list[nn.Module] = []
        in_channels = width
        for i, layer in enumerate([*layers, last]):
            channels = _scaled(layer.channels, width) if layer.channels else smooth.in_channels
            fill = _skips_columns(layer) and not legacy_alignment
            stride = (layer.stride[0], 1) if fill else layer.stride
            modules += [
                nn.ConvTranspose2d(in_channels, channels, layer.kernel, stride, layer.padding),
                *([_ColumnsBetween()] if fill else []),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2) if i < leaky else nn.Tanh(),
            ]
            in_channels = channels
        self.layers = nn.Sequential(*modules, smooth)

    def forward(self, latent: Tensor) -> Tensor:
        return F.interpolate(self.layers(latent), size=self.out_size, mode="bilinear")


class _ColumnsBetween(nn.Module):
    """Put the mean of two columns between them."""

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], 2 * x.shape[-1] - 1)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class SeismicEncoder(_Encoder):
    """Shot gathers to a latent image.

    Parameters
    ----------
    latent_size : int, default=70
        Height and width of the latent image.
    n_shots : int, default=5
        Input channels.
    width : int, default=128
        Channels of the latent image. Hidden channels scale with ``width / 128``, but not below
        8: a layer of one or two channels would let little through.
    layout : {8, 16, 32, 64, 70}, optional
        Published layer table to use; by default that of `latent_size`.
    legacy_alignment : bool, default=False
        Whether strides of two drop every other receiver, as published, instead of averaging.

    Raises
    ------
    ValueError
        If `latent_size` has no table and `layout` is not given.

    References
    ----------
    .. [1] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
       Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import SeismicEncoder
    >>> SeismicEncoder(70)(torch.zeros(1, 5, 1000, 70)).shape
    torch.Size([1, 128, 70, 70])
    """

    def __init__(
        self,
        latent_size: int = 70,
        n_shots: int = 5,
        *,
        width: int = _LATENT_CHANNELS,
        layout: int | None = None,
        legacy_alignment: bool = False,
    ) -> None:
        table = _SEISMIC_ENCODER[_layout(latent_size, layout, width)]
        super().__init__(table, n_shots, latent_size, width, "zeros", legacy_alignment)


class VelocityEncoder(_Encoder):
    """Velocity map to a latent image.

    Parameters
    ----------
    latent_size, width, layout
        As in `SeismicEncoder`.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import VelocityEncoder
    >>> VelocityEncoder(16)(torch.zeros(1, 1, 70, 70)).shape
    torch.Size([1, 128, 16, 16])
    """

    def __init__(
        self,
        latent_size: int = 70,
        *,
        width: int = _LATENT_CHANNELS,
        layout: int | None = None,
    ) -> None:
        table = _VELOCITY_ENCODER[_layout(latent_size, layout, width)]
        super().__init__(table, 1, latent_size, width, "reflect")


class SeismicDecoder(_Decoder):
    """Latent image to shot gathers.

    Parameters
    ----------
    latent_size : int, default=70
        Height and width of the latent image.
    out_shape : (int, int, int), default=(5, 1000, 70)
        Shots, time samples and receivers.
    width, layout
        As in `SeismicEncoder`.
    legacy_alignment : bool, default=False
        Whether strides of two leave every other column constant, as published, instead of
        interpolating it.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import SeismicDecoder
    >>> SeismicDecoder(8)(torch.zeros(1, 128, 8, 8)).shape
    torch.Size([1, 5, 1000, 70])
    """

    def __init__(
        self,
        latent_size: int = 70,
        out_shape: tuple[int, int, int] = (5, 1000, 70),
        *,
        width: int = _LATENT_CHANNELS,
        layout: int | None = None,
        legacy_alignment: bool = False,
    ) -> None:
        size = _layout(latent_size, layout, width)
        shots = out_shape[0]
        super().__init__(
            _SEISMIC_DECODER[size],
            _SEISMIC_LAST[size],
            nn.Conv2d(shots, shots, (7, 3), padding=(3, 1)),
            out_shape[1:],
            width,
            _LEAKY_LAYERS[size],
            legacy_alignment,
        )


class VelocityDecoder(_Decoder):
    """Latent image to a velocity map.

    Parameters
    ----------
    latent_size : int, default=70
        Height and width of the latent image.
    out_shape : (int, int), default=(70, 70)
        Cells along depth and x.
    width, layout
        As in `SeismicDecoder`.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import VelocityDecoder
    >>> VelocityDecoder(32)(torch.zeros(1, 128, 32, 32)).shape
    torch.Size([1, 1, 70, 70])
    """

    def __init__(
        self,
        latent_size: int = 70,
        out_shape: tuple[int, int] = (70, 70),
        *,
        width: int = _LATENT_CHANNELS,
        layout: int | None = None,
    ) -> None:
        table = _VELOCITY_DECODER[_layout(latent_size, layout, width)]
        super().__init__(table, _square(0, 1), nn.Conv2d(1, 1, 1), out_shape, width)


def _scaled(channels: int, width: int) -> int:
    if channels == _LATENT_CHANNELS:
        return width
    return max(_FEWEST_CHANNELS, round(channels * width / _LATENT_CHANNELS))


def _skips_columns(layer: _Layer) -> bool:
    return layer.kernel[1] < layer.stride[1]


def _layout(latent_size: int, layout: int | None, width: int) -> int:
    check_integer("latent_size", latent_size, 2)
    check_integer("width", width, 1)
    if layout is None:
        check_choice("latent_size (without layout)", latent_size, LATENT_SIZES)
        return latent_size
    check_choice("layout", layout, LATENT_SIZES)
    return layout
