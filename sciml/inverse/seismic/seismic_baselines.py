"""Prior work as instances of the GFI framework: InversionNet, VelocityGAN, WaveformNet, FNO.

Each function returns a `GFIModel`, so that what a method leaves out is visible: InversionNet is
an encoder of seismic data, no translation, and a decoder of velocity.

References
----------
.. [1] Y. Wu, Y. Lin, "InversionNet: An efficient and accurate data-driven full waveform
   inversion", IEEE Trans. Comput. Imaging 2019. arXiv:1811.07875
.. [2] Z. Zhang, Y. Lin, "Data-driven seismic waveform inversion: a study on the robustness and
   generalization" (VelocityGAN), IEEE TGRS 2020. arXiv:1809.10262
.. [3] Z. Li et al., "Fourier neural operator for parametric partial differential equations",
   ICLR 2021. arXiv:2010.08895
.. [4] Y. Feng et al., "Auto-linear phenomenon in subsurface imaging", ICML 2024.
   arXiv:2305.13314
.. [5] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._check import check_integer
from .gfi_model import GFIModel, _autoencoders

__all__ = [
    "VelocityCritic",
    "auto_linear",
    "fno",
    "inversion_net",
    "velocity_gan",
    "waveform_net",
]


def inversion_net(
    *,
    width: int = 32,
    seismic_shape: tuple[int, int, int] = (5, 1000, 70),
    velocity_shape: tuple[int, int] = (70, 70),
) -> GFIModel:
    """InversionNet: convolutions down to one pixel and up to a velocity map.

    Parameters
    ----------
    width : int, default=32
        Channels of the first layer; the bottleneck has ``16 * width``. 32 gives the published
        24,409,123 parameters.
    seismic_shape : (int, int, int), default=(5, 1000, 70)
        Shots, time samples, receivers.
    velocity_shape : (int, int), default=(70, 70)
        Cells along depth and x.

    Returns
    -------
    GFIModel
        With ``direction="inverse"`` and an identity as translation.

    References
    ----------
    .. [1] Y. Wu, Y. Lin, "InversionNet", 2019. arXiv:1811.07875

    Examples
    --------
    >>> from sciml.inverse.seismic import inversion_net
    >>> sum(p.numel() for p in inversion_net().parameters())
    24409123
    """
    check_integer("width", width, 1)
    shots, samples, receivers = seismic_shape
    tall = [(2, 3), (2, 1), (1, 1), (2, 1), (1, 1), (2, 1), (1, 1)]  # (stride, padding) in time
    channels = [width * c for c in (1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8)]
    layers: list[nn.Module] = []
    height, breadth, before = samples, receivers, shots
    for i, after in enumerate(channels):
        if i < len(tall):
            stride, pad = tall[i]
            kernel = 7 if i == 0 else 3
            layers.append(_conv(before, after, (kernel, 1), (stride, 1), (pad, 0)))
            height = (height + 2 * pad - kernel) // stride + 1
        else:
            stride = 2 - (i - len(tall)) % 2
            layers.append(_conv(before, after, 3, stride, 1))
            height, breadth = (height - 1) // stride + 1, (breadth - 1) // stride + 1
        before = after
    layers.append(_conv(before, 16 * width, (height, breadth)))
    return GFIModel(
        None,
        nn.Sequential(*layers),
        nn.Identity(),
        _InversionDecoder(width, velocity_shape),
        None,
        direction="inverse",
    )


def velocity_gan(
    *,
    width: int = 32,
    seismic_shape: tuple[int, int, int] = (5, 1000, 70),
    velocity_shape: tuple[int, int] = (70, 70),
) -> tuple[GFIModel, "VelocityCritic"]:
    """VelocityGAN: InversionNet as generator, and the critic that judges its maps.

    Parameters
    ----------
    width, seismic_shape, velocity_shape
        As in `inversion_net`.

    Returns
    -------
    generator : GFIModel
        `inversion_net` of the same arguments.
    critic : VelocityCritic
        Train both with the Wasserstein loss and gradient penalty; `train_gfi` takes it as
        ``critic``.

    References
    ----------
    .. [1] Z. Zhang, Y. Lin, VelocityGAN, 2020. arXiv:1809.10262
    """
    generator = inversion_net(
        width=width, seismic_shape=seismic_shape, velocity_shape=velocity_shape
    )
    return generator, VelocityCritic(width, velocity_shape)


class VelocityCritic(nn.Module):
    """Score of how real a velocity map looks, unbounded.

    Parameters
    ----------
    width : int, default=32
        Channels of the first layer; 32 gives the published 1,180,003 parameters.
    velocity_shape : (int, int), default=(70, 70)
        Cells along depth and x.

    References
    ----------
    .. [1] Z. Zhang, Y. Lin, VelocityGAN, 2020. arXiv:1809.10262

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import VelocityCritic
    >>> VelocityCritic(4)(torch.randn(2, 1, 70, 70)).shape
    torch.Size([2])
    """

    def __init__(self, width: int = 32, velocity_shape: tuple[int, int] = (70, 70)) -> None:
        super().__init__()
        check_integer("width", width, 1)
        layers: list[nn.Module] = []
        before = 1
        size = velocity_shape
        for after in (width, 2 * width, 4 * width, 8 * width):
            layers += [_conv(before, after, 3, 2, 1), _conv(after, after, 3, 1, 1)]
            size = ((size[0] - 1) // 2 + 1, (size[1] - 1) // 2 + 1)
            before = after
        self.layers = nn.Sequential(*layers, _conv(before, 1, size))

    def forward(self, velocity: Tensor) -> Tensor:
        """Score maps of shape (batch, 1, nz, nx); returns shape (batch,)."""
        return self.layers(velocity).flatten()


def waveform_net(
    *,
    width: int = 32,
    seismic_shape: tuple[int, int, int] = (5, 1000, 70),
) -> GFIModel:
    """WaveformNet: convolutions from a velocity map down, and up to shot gathers.

    Parameters
    ----------
    width : int, default=32
        Channels of the first layer; 32 gives the published 10,217,718 parameters.
    seismic_shape : (int, int, int), default=(5, 1000, 70)
        Shots, time samples, receivers.

    Returns
    -------
    GFIModel
        With ``direction="forward"`` and an identity as translation.

    Notes
    -----
    The paddings of the published network are not on record; here convolutions keep the size
    divided by their stride, and the final resize brings any size to `seismic_shape`.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> from sciml.inverse.seismic import waveform_net
    >>> sum(p.numel() for p in waveform_net().parameters())
    10217718
    """
    check_integer("width", width, 1)
    encoder: list[nn.Module] = []
    before = 1
    for after, kernel, stride in ((1, 5, 2), (2, 5, 2), (4, 3, 2), (8, 3, 2), (16, 3, 1)):
        encoder += [
            nn.Conv2d(before, width * after, kernel, stride, kernel // 2),
            nn.BatchNorm2d(width * after),
            nn.GELU(),
        ]
        before = width * after
    shots = seismic_shape[0]
    decoder: list[nn.Module] = []
    table = [(8 * width, (10, 5), (4, 4))]
    table += [(channels * width, (10, 5), (4, 2)) for channels in (4, 2)]
    table += [(shots, (8, 4), (4, 2))]
    for channels, size, step in table:
        padding = ((size[0] - step[0]) // 2, (size[1] - step[1]) // 2)
        decoder += [
            nn.ConvTranspose2d(before, channels, size, step, padding),
            nn.BatchNorm2d(channels),
            nn.Tanh(),
        ]
        before = channels
    decoder += [
        nn.Conv2d(shots, shots, (10, 5), 2, (4, 2)),
        nn.Upsample(size=seismic_shape[1:], mode="bilinear"),
    ]
    return GFIModel(
        nn.Sequential(*encoder),
        None,
        nn.Identity(),
        None,
        nn.Sequential(*decoder),
        direction="forward",
    )


def fno(
    *,
    width: int = 32,
    modes: int = 30,
    seismic_shape: tuple[int, int, int] = (5, 1000, 70),
) -> GFIModel:
    """Fourier neural operator from a velocity map to shot gathers.

    Parameters
    ----------
    width : int, default=32
        Channels.
    modes : int, default=30
        Fourier modes kept along either axis. 32 channels and 30 modes give the published
        7,382,021 parameters (a complex number counts once).
    seismic_shape : (int, int, int), default=(5, 1000, 70)
        Shots, time samples, receivers.

    Returns
    -------
    GFIModel
        With ``direction="forward"``: lifting, Fourier layers that grow the time axis, and
        projection as encoder, translation and decoder.

    References
    ----------
    .. [1] Z. Li et al., "Fourier neural operator", ICLR 2021. arXiv:2010.08895

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import fno
    >>> model = fno(width=4, modes=6, seismic_shape=(2, 200, 32))
    >>> model(torch.zeros(1, 1, 32, 32)).shape
    torch.Size([1, 2, 200, 32])
    """
    check_integer("width", width, 1)
    check_integer("modes", modes, 1)
    shots, samples, receivers = seismic_shape
    # The published layers end at 128, 256, 512 and 1000 samples.
    heights = [max(1, round(samples * share)) for share in (0.128, 0.256, 0.512, 1.0)]
    layers = [
        _FourierLayer(width, modes, (height + _FNO_PADDING, receivers + _FNO_PADDING), last=last)
        for height, last in zip(heights, (False, False, False, True), strict=True)
    ]
    project = nn.Sequential(
        _Crop((samples, receivers)),
        nn.Conv2d(width, 128, 1),
        nn.GELU(),
        nn.Conv2d(128, shots, 1),
    )
    return GFIModel(_Lift(width), None, nn.Sequential(*layers), None, project, direction="forward")


def auto_linear(
    *,
    latent_size: int = 8,
    width: int = 16,
    seismic_shape: tuple[int, int, int] = (5, 1000, 70),
    velocity_shape: tuple[int, int] = (70, 70),
    layout: int | None = None,
) -> GFIModel:
    """Auto-Linear: autoencoders trained first, then a linear map between their latents.

    Train it in two steps: `GFILoss` with reconstruction terms only, then freeze encoders and
    decoders and train ``model.translation``.

    Parameters
    ----------
    latent_size : int, default=8
        Height and width of the latent images.
    width : int, default=16
        Channels of the latent images; a translation has ``(width * latent_size**2)**2``
        weights.
    seismic_shape, velocity_shape, layout
        As in `latent_unet`.

    Returns
    -------
    GFIModel
        With ``direction="both"`` and a pair of linear maps as translation.

    Notes
    -----
    The published Auto-Linear has vision transformers as autoencoders; here they are the
    convolutional ones of the framework, so that only the translation differs.

    References
    ----------
    .. [1] Y. Feng et al., "Auto-linear phenomenon in subsurface imaging", ICML 2024.
       arXiv:2305.13314

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import auto_linear
    >>> model = auto_linear(width=2)
    >>> model.predict_seismic(torch.zeros(1, 1, 70, 70)).shape
    torch.Size([1, 5, 1000, 70])
    """
    parts = _autoencoders(latent_size, width, seismic_shape, velocity_shape, layout)
    size = (width, latent_size, latent_size)
    translation = (_LinearTranslation(size), _LinearTranslation(size))
    return GFIModel(parts[0], parts[1], translation, *parts[2:], direction="both")


class _InversionDecoder(nn.Module):
    """From one pixel to a map: transposed convolutions, a crop, and a tanh."""

    def __init__(self, width: int, out_size: tuple[int, int]) -> None:
        super().__init__()
        self.out_size = out_size
        channels = 16 * width
        layers: list[nn.Module] = [
            _deconv(channels, channels, 5, 1, 0),
            _conv(channels, channels, 3, 1, 1),
        ]
        for after in (8 * width, 4 * width, 2 * width, width):
            layers += [_deconv(channels, after, 4, 2, 1), _conv(after, after, 3, 1, 1)]
            channels = after
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(
            nn.Conv2d(channels, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Tanh()
        )

    def forward(self, latent: Tensor) -> Tensor:
        x = self.layers(latent)
        if x.shape[-2] < self.out_size[0] or x.shape[-1] < self.out_size[1]:
            x = F.interpolate(x, size=self.out_size, mode="bilinear")
        return self.last(_center(x, self.out_size))


class _LinearTranslation(nn.Module):
    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        n = size[0] * size[1] * size[2]
        self.linear = nn.Linear(n, n)

    def forward(self, latent: Tensor) -> Tensor:
        return self.linear(latent.flatten(1)).reshape(latent.shape)


_FNO_PADDING = 9  # cells at the end of both axes, since the fields are not periodic


class _Lift(nn.Module):
    """Velocity with the coordinates of its cells, to `width` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, width, 1)

    def forward(self, velocity: Tensor) -> Tensor:
        batch, _, rows, columns = velocity.shape
        y, x = (
            torch.linspace(0, 1, n, dtype=velocity.dtype, device=velocity.device)
            for n in (rows, columns)
        )
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(batch, 2, rows, columns)
        lifted = self.linear(torch.cat([velocity, grid], dim=1))
        return F.pad(lifted, (0, _FNO_PADDING, 0, _FNO_PADDING))


class _FourierLayer(nn.Module):
    """Keep low modes, mix channels, and return at another resolution; plus a 1x1 skip."""

    def __init__(self, width: int, modes: int, out_size: tuple[int, int], *, last: bool) -> None:
        super().__init__()
        self.modes, self.out_size, self.last = modes, out_size, last
        scale = 1 / width**2
        shape = (width, width, modes, modes)
        self.positive = nn.Parameter(scale * torch.rand(shape, dtype=torch.cfloat))
        self.negative = nn.Parameter(scale * torch.rand(shape, dtype=torch.cfloat))
        self.skip = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        rows = min(self.modes, spectrum.shape[-2] // 2, self.out_size[0] // 2)
        columns = min(self.modes, spectrum.shape[-1], self.out_size[1] // 2 + 1)
        kept = spectrum.new_zeros(*x.shape[:2], self.out_size[0], self.out_size[1] // 2 + 1)
        mix = "bixy,ioxy->boxy"
        low, high = slice(None, rows), slice(-rows, None)
        kept[:, :, low, :columns] = torch.einsum(
            mix, spectrum[:, :, low, :columns], self.positive[:, :, :rows, :columns]
        )
        kept[:, :, high, :columns] = torch.einsum(
            mix, spectrum[:, :, high, :columns], self.negative[:, :, :rows, :columns]
        )
        y = torch.fft.irfft2(kept, s=self.out_size)
        y = y + F.interpolate(self.skip(x), size=self.out_size, mode="nearest")
        return y if self.last else F.gelu(y)


class _Crop(nn.Module):
    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.size[0], : self.size[1]]


def _conv(
    before: int,
    after: int,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding),
        nn.BatchNorm2d(after),
        nn.LeakyReLU(0.2),
    )


def _deconv(before: int, after: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(before, after, kernel, stride, padding),
        nn.BatchNorm2d(after),
        nn.LeakyReLU(0.2),
    )


def _center(x: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
    return x[..., top : top + size[0], left : left + size[1]]
