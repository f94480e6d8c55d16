"""One framework for forward and inverse problems: encode, translate, decode.

With encoders E, decoders D and translations T between the latent images of velocity v and
seismic data p, the GFI framework [1]_ writes

    p^ = D_p(T_vp(E_v(v)))   (forward)      v^ = D_v(T_pv(E_p(p)))   (inverse)

and prior work as choices of the five parts. `GFIModel` composes them; `latent_unet` and
`invertible_xnet` are the paper's own choices, `seismic_baselines` has those of others.

References
----------
.. [1] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
"""

from typing import Any

from deepinv.models import Reconstructor
from torch import Tensor, nn

from ..._check import check_choice
from .autoencoder import SeismicDecoder, SeismicEncoder, VelocityDecoder, VelocityEncoder
from .invertible_unet import InvertibleUNet
from .unet import UNetTranslation

__all__ = ["GFIModel", "invertible_xnet", "latent_unet"]


class GFIModel(Reconstructor):
    """Encoders, translations and decoders of the GFI framework, composed.

    Parameters
    ----------
    encoder_v, encoder_p : torch.nn.Module or None
        Encoders of velocity maps and of seismic data.
    translation : torch.nn.Module or tuple of two
        For ``direction="inverse"`` the map from seismic to velocity latents, for "forward" the
        opposite. For "both", either a module whose `forward` goes from velocity to seismic
        latents and whose `inverse` goes back, or the pair (velocity to seismic, seismic to
        velocity).
    decoder_v, decoder_p : torch.nn.Module or None
        Decoders to velocity maps and to seismic data.
    direction : {"inverse", "forward", "both"}, default="inverse"
        What the model is for. Parts that a direction does not use may be None; if they are
        given, the `reconstruct_*` methods can use them.

    Raises
    ------
    ValueError
        If a part that the direction needs is missing, or a method is called that the model has
        no parts for.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import (GFIModel, SeismicEncoder, UNetTranslation,
    ...                                    VelocityDecoder)
    >>> model = GFIModel(None, SeismicEncoder(16, 3, width=8), UNetTranslation(8),
    ...                  VelocityDecoder(16, (32, 32), width=8), None)
    >>> model(torch.zeros(2, 3, 500, 32)).shape
    torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        encoder_v: nn.Module | None,
        encoder_p: nn.Module | None,
        translation: nn.Module | tuple[nn.Module, nn.Module],
        decoder_v: nn.Module | None,
        decoder_p: nn.Module | None,
        *,
        direction: str = "inverse",
    ) -> None:
        super().__init__()
        check_choice("direction", direction, ("inverse", "forward", "both"))
        needed = {
            "inverse": {"encoder_p": encoder_p, "decoder_v": decoder_v},
            "forward": {"encoder_v": encoder_v, "decoder_p": decoder_p},
        }
        for one_way, parts in needed.items():
            for name, part in parts.items():
                if direction in (one_way, "both") and part is None:
                    raise ValueError(f"{name} must be a module for direction={direction!r}")
        if isinstance(translation, tuple):
            if direction != "both" or len(translation) != 2:
                raise ValueError(
                    "translation must be one module, or for direction='both' a pair, got "
                    f"{len(translation)} modules for direction={direction!r}"
                )
            translation = nn.ModuleList(translation)
        elif direction == "both" and not hasattr(translation, "inverse"):
            raise ValueError(
                "translation must have an inverse or be a pair for direction='both', got "
                f"{type(translation).__name__}"
            )
        self.direction = direction
        self.encoder_v = encoder_v
        self.encoder_p = encoder_p
        self.translation = translation
        self.decoder_v = decoder_v
        self.decoder_p = decoder_p

    def forward(self, y: Tensor, physics: Any = None) -> Tensor:
        """Predict velocity from seismic data; for ``direction="forward"``, the opposite.

        Parameters
        ----------
        y : Tensor
            Seismic data of shape (batch, n_shots, nt, n_receivers), or for
            ``direction="forward"`` velocity of shape (batch, 1, nz, nx).
        physics : object, optional
            Accepted because a deepinv reconstructor is called with it. The physics is in the
            weights.

        Returns
        -------
        Tensor
        """
        return self.predict_seismic(y) if self.direction == "forward" else self.predict_velocity(y)

    def predict_velocity(self, seismic: Tensor) -> Tensor:
        """Solve the inverse problem: shot gathers to velocity map."""
        if self.direction == "forward":
            raise ValueError("a model with direction='forward' cannot predict velocity")
        return self._part("decoder_v")(self._to_velocity(self._part("encoder_p")(seismic)))

    def predict_seismic(self, velocity: Tensor) -> Tensor:
        """Solve the forward problem: velocity map to shot gathers."""
        if self.direction == "inverse":
            raise ValueError("a model with direction='inverse' cannot predict seismic data")
        return self._part("decoder_p")(self._to_seismic(self._part("encoder_v")(velocity)))

    def reconstruct_velocity(self, velocity: Tensor) -> Tensor:
        """Encode and decode a velocity map, with no translation between."""
        return self._part("decoder_v")(self._part("encoder_v")(velocity))

    def reconstruct_seismic(self, seismic: Tensor) -> Tensor:
        """Encode and decode shot gathers, with no translation between."""
        return self._part("decoder_p")(self._part("encoder_p")(seismic))

    def _to_velocity(self, latent: Tensor) -> Tensor:
        if self.direction == "inverse":
            return self.translation(latent)
        if isinstance(self.translation, nn.ModuleList):
            return self.translation[1](latent)
        return self.translation.inverse(latent)  # type: ignore[operator]

    def _to_seismic(self, latent: Tensor) -> Tensor:
        if isinstance(self.translation, nn.ModuleList):
            return self.translation[0](latent)
        return self.translation(latent)

    def _part(self, name: str) -> nn.Module:
        part = getattr(self, name)
        if part is None:
            raise ValueError(f"this model has no {name}")
        return part


def latent_unet(
    direction: str = "inverse",
    *,
    latent_size: int = 70,
    repeats: int = 2,
    skip: bool = True,
    width: int = 128,
    seismic_shape: tuple[int, int, int] = (5, 1000, 70),
    velocity_shape: tuple[int, int] = (70, 70),
    layout: int | None = None,
    legacy_alignment: bool = False,
) -> GFIModel:
    """Latent U-Net: a U-Net between latent images, for one direction.

    Parameters
    ----------
    direction : {"inverse", "forward"}, default="inverse"
        Seismic to velocity, or velocity to seismic.
    latent_size : int, default=70
        Height and width of the latent images.
    repeats : int, default=2
        Double convolutions a level: 2 for the published large model (34,960,726 parameters at
        latent 70), 1 for the small (18,137,686).
    skip : bool, default=True
        Whether the U-Net has skip connections.
    width : int, default=128
        Channels of the latent images.
    seismic_shape : (int, int, int), default=(5, 1000, 70)
        Shots, time samples, receivers.
    velocity_shape : (int, int), default=(70, 70)
        Cells along depth and x.
    layout : {8, 16, 32, 64, 70}, optional
        Published layer table of encoders and decoders; by default that of `latent_size`.
    legacy_alignment : bool, default=False
        Whether skips are taken after pooling and strides of two skip receivers, as published.
        See `UNetTranslation` and `SeismicDecoder`.

    Returns
    -------
    GFIModel
        With all four encoders and decoders, as published; a direction trains two of them
        unless reconstruction losses are on.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> from sciml.inverse.seismic import latent_unet
    >>> sum(p.numel() for p in latent_unet(repeats=1).parameters())
    18137686
    """
    check_choice("direction", direction, ("inverse", "forward"))
    translation = UNetTranslation(width, 2, repeats, skip=skip, legacy_alignment=legacy_alignment)
    parts = _autoencoders(
        latent_size, width, seismic_shape, velocity_shape, layout, legacy_alignment
    )
    return GFIModel(parts[0], parts[1], translation, *parts[2:], direction=direction)


def invertible_xnet(
    *,
    latent_size: int = 64,
    architecture: tuple[int, ...] = (4, 4, 4, 4),
    width: int = 128,
    seismic_shape: tuple[int, int, int] = (5, 1000, 70),
    velocity_shape: tuple[int, int] = (70, 70),
    layout: int | None = None,
    legacy_alignment: bool = False,
    memory_efficient: bool = False,
) -> GFIModel:
    """Invertible X-Net: one invertible U-Net that translates both ways.

    Parameters
    ----------
    latent_size : int, default=64
        Height and width of the latent images. The published 70 is not divisible by 8: the
        translation is then padded and cropped and no bijection, which `InvertibleUNet.inverse`
        warns of.
    architecture : tuple of int, default=(4, 4, 4, 4)
        Couplings a level.
    width, seismic_shape, velocity_shape, layout
        As in `latent_unet`.
    legacy_alignment : bool, default=False
        Whether strides of two skip receivers, as published. See `SeismicDecoder`.
    memory_efficient : bool, default=False
        Whether the backward pass recomputes by inversion instead of storing.

    Returns
    -------
    GFIModel
        With ``direction="both"``.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> from sciml.inverse.seismic import invertible_xnet
    >>> sum(p.numel() for p in invertible_xnet(latent_size=70).parameters())
    26067030
    """
    translation = InvertibleUNet(
        width,
        architecture,
        padding="crop" if latent_size % 2 ** (len(architecture) - 1) else "error",
        memory_efficient=memory_efficient,
    )
    parts = _autoencoders(
        latent_size, width, seismic_shape, velocity_shape, layout, legacy_alignment
    )
    return GFIModel(parts[0], parts[1], translation, *parts[2:], direction="both")


def _autoencoders(
    latent_size: int,
    width: int,
    seismic_shape: tuple[int, int, int],
    velocity_shape: tuple[int, int],
    layout: int | None,
    legacy_alignment: bool = False,
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    return (
        VelocityEncoder(latent_size, width=width, layout=layout),
        SeismicEncoder(
            latent_size,
            seismic_shape[0],
            width=width,
            layout=layout,
            legacy_alignment=legacy_alignment,
        ),
        VelocityDecoder(latent_size, velocity_shape, width=width, layout=layout),
        SeismicDecoder(
            latent_size,
            seismic_shape,
            width=width,
            layout=layout,
            legacy_alignment=legacy_alignment,
        ),
    )
