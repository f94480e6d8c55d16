"""Losses of the GFI framework: supervised, masked, cycle, reconstruction and perceptual terms.

References
----------
.. [1] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..._check import check_interval
from .gfi_model import GFIModel

__all__ = ["GFILoss", "cycle_warmup_factor", "masked_error"]


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute plus mean square error of the samples that a mask keeps.

    Per-sample means are summed over the kept samples and divided by their number **plus one**,
    as published: a full batch of B gives B / (B + 1) of the plain mean, an empty mask gives 0.

    Parameters
    ----------
    prediction, target : Tensor of shape (batch, ...)
        Equal shapes.
    mask : Tensor of shape (batch,), optional
        1 for samples that count, 0 for the others; by default all count.

    Returns
    -------
    Tensor
        Scalar.

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import masked_error
    >>> masked_error(torch.zeros(3, 2), torch.full((3, 2), 2.0))  # (2 + 4) * 3 / 4
    tensor(4.5000)
    """
    if prediction.shape != target.shape:
        raise ValueError(
            "prediction and target must have the same shape, got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    error = (prediction - target).flatten(1)
    sample = error.abs().mean(dim=1) + error.square().mean(dim=1)
    if mask is None:
        return sample.sum() / (len(sample) + 1)
    if mask.shape != sample.shape:
        raise ValueError(f"mask must have shape ({len(sample)},), got {tuple(mask.shape)}")
    mask = mask.to(sample.dtype)
    return (mask * sample).sum() / (mask.sum() + 1)


def cycle_warmup_factor(epoch: int, warmup: int) -> float:
    """Weight of the cycle terms: from 0 in epoch 0 linearly to 1 in epoch `warmup`.

    Parameters
    ----------
    epoch : int
        Epoch, counted from 0.
    warmup : int
        Epochs to reach the full weight; 0 or less for the full weight from the start.

    Returns
    -------
    float

    Examples
    --------
    >>> from sciml.inverse.seismic import cycle_warmup_factor
    >>> [cycle_warmup_factor(epoch, 100) for epoch in (0, 50, 200)]
    [0.0, 0.5, 1.0]
    """
    return 1.0 if warmup <= 0 else min(1.0, epoch / warmup)


class GFILoss(nn.Module):
    """Weighted sum of the training terms of a `GFIModel`.

    Parameters
    ----------
    velocity_weight, seismic_weight : float, default=1.0
        Weights of the supervised errors of predicted velocity and predicted seismic data. A
        term that the model's direction does not have is left out. Published: 1 and 1 for the
        Latent U-Net, 1 and 10 for the Invertible X-Net.
    cycle_velocity_weight, cycle_seismic_weight : float, default=0.0
        Weights of the errors after going there and back. They need no labels, so they count
        for masked samples too. Published with warm-up: 0 and 1.
    cycle_warmup : int, default=0
        Epochs over which the cycle terms fade in; published: 100.
    reconstruction_weight : float, default=0.0
        Weight of the mean square errors of the two autoencoders.
    perceptual : callable, optional
        Maps a batch of velocity maps or of gathers to features, on which the same error is
        taken. The published one is the third ReLU of the third block of an ImageNet VGG-16,
        whose weights must be downloaded; hence none by default.
    perceptual_velocity_weight, perceptual_seismic_weight : float, default=0.1
        Weights of the perceptual errors. Published: 0.1 for the Latent U-Net, 0.1 and 0.3 for
        the X-Net.

    Raises
    ------
    ValueError
        If a weight is negative, or a cycle term is asked of a model with one direction.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import GFILoss, inversion_net
    >>> model = inversion_net(width=2, seismic_shape=(2, 100, 16), velocity_shape=(16, 16))
    >>> total, terms = GFILoss()(model, torch.randn(4, 2, 100, 16), torch.zeros(4, 1, 16, 16))
    >>> sorted(terms)
    ['velocity']
    """

    velocity_weight: float
    seismic_weight: float
    cycle_velocity_weight: float
    cycle_seismic_weight: float
    reconstruction_weight: float
    perceptual_velocity_weight: float
    perceptual_seismic_weight: float

    def __init__(
        self,
        *,
        velocity_weight: float = 1.0,
        seismic_weight: float = 1.0,
        cycle_velocity_weight: float = 0.0,
        cycle_seismic_weight: float = 0.0,
        cycle_warmup: int = 0,
        reconstruction_weight: float = 0.0,
        perceptual: Callable[[Tensor], Tensor] | None = None,
        perceptual_velocity_weight: float = 0.1,
        perceptual_seismic_weight: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("velocity_weight", velocity_weight),
            ("seismic_weight", seismic_weight),
            ("cycle_velocity_weight", cycle_velocity_weight),
            ("cycle_seismic_weight", cycle_seismic_weight),
            ("reconstruction_weight", reconstruction_weight),
            ("perceptual_velocity_weight", perceptual_velocity_weight),
            ("perceptual_seismic_weight", perceptual_seismic_weight),
        ):
            check_interval(name, value, 0)
            setattr(self, name, value)
        self.cycle_warmup = cycle_warmup
        self.perceptual = perceptual

    def forward(
        self,
        model: GFIModel,
        seismic: Tensor,
        velocity: Tensor,
        mask: Tensor | None = None,
        epoch: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Parameters
        ----------
        model : GFIModel
            Model to train.
        seismic : Tensor of shape (batch, n_shots, nt, n_receivers)
            Standardised recordings.
        velocity : Tensor of shape (batch, 1, nz, nx)
            Normalised velocity.
        mask : Tensor of shape (batch,), optional
            1 for labelled samples.
        epoch : int, default=0
            For the warm-up of the cycle terms.

        Returns
        -------
        total : Tensor
            Scalar with gradient.
        terms : dict of str to Tensor
            The weighted terms, detached.
        """
        terms: dict[str, Tensor] = {}
        predicted_v = predicted_p = None
        if model.direction != "forward":
            predicted_v = model.predict_velocity(seismic)
            terms["velocity"] = self.velocity_weight * masked_error(predicted_v, velocity, mask)
        if model.direction != "inverse":
            predicted_p = model.predict_seismic(velocity)
            terms["seismic"] = self.seismic_weight * masked_error(predicted_p, seismic, mask)
        if self.perceptual is not None:
            if predicted_v is not None:
                terms["perceptual_velocity"] = self.perceptual_velocity_weight * masked_error(
                    self.perceptual(predicted_v), self.perceptual(velocity), mask
                )
            if predicted_p is not None:
                terms["perceptual_seismic"] = self.perceptual_seismic_weight * masked_error(
                    self.perceptual(predicted_p), self.perceptual(seismic), mask
                )
        if self.cycle_velocity_weight or self.cycle_seismic_weight:
            if predicted_v is None or predicted_p is None:
                raise ValueError(
                    f"cycle weights need a model with direction='both', got {model.direction!r}"
                )
            factor = cycle_warmup_factor(epoch, self.cycle_warmup)
            if self.cycle_velocity_weight:
                terms["cycle_velocity"] = (
                    factor
                    * self.cycle_velocity_weight
                    * masked_error(model.predict_velocity(predicted_p), velocity)
                )
            if self.cycle_seismic_weight:
                terms["cycle_seismic"] = (
                    factor
                    * self.cycle_seismic_weight
                    * masked_error(model.predict_seismic(predicted_v), seismic)
                )
        if self.reconstruction_weight:
            terms["reconstruction"] = self.reconstruction_weight * (
                (model.reconstruct_velocity(velocity) - velocity).square().mean()
                + (model.reconstruct_seismic(seismic) - seismic).square().mean()
            )
        total = sum(terms.values(), seismic.new_zeros(()))
        return total, {name: term.detach() for name, term in terms.items()}
