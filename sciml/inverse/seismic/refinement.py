"""Full-waveform inversion that starts from a network's answer.

A network is fast and roughly right; the wave equation knows exactly how wrong it still is. A
few steps of descent on the data misfit, with the gradient through the wave equation, finish
what the network began, with a learned denoiser as prior if there is one [2]_. Data are fitted
from low frequencies to high [1]_: at full bandwidth a start that is half a wavelength off is
drawn to the wrong cycle.

References
----------
.. [1] C. Bunks, F. M. Saleck, S. Zaleski, G. Chavent, "Multiscale seismic waveform inversion",
   Geophysics 60, 1995.
.. [2] S. V. Venkatakrishnan, C. A. Bouman, B. Wohlberg, "Plug-and-play priors for model based
   reconstruction", GlobalSIP 2013.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..._check import check_finite, check_integer, check_interval
from .acoustic_wave import AcousticWavePhysics
from .openfwi import denormalize_velocity, normalize_velocity

__all__ = ["Refinement", "refine"]


class Refinement(NamedTuple):
    """Result of `refine`: the velocity, and the relative misfit of the full data.

    ``misfit`` has a row before the first stage and one after each.
    """

    velocity: Tensor
    misfit: Tensor


def refine(
    velocity: Tensor,
    seismic: Tensor,
    physics: AcousticWavePhysics,
    n_iter: int = 20,
    *,
    cutoffs: Sequence[float | None] | None = None,
    prior: nn.Module | None = None,
    prior_weight: float = 0.1,
    learning_rate: float = 0.02,
    low: float = 1500.0,
    high: float = 4500.0,
    verbose: int = 0,
) -> Refinement:
    """Fit velocity models to recorded data by gradient descent through the wave equation.

    Adam minimises ``||A(v) - y||^2 / ||y||^2`` of each sample over velocity normalised to
    [-1, 1], clipped to the range after every step, in stages of growing bandwidth. With a prior,
    each step ends in ``v <- (1 - prior_weight) v + prior_weight prior(v)``: plug-and-play,
    relaxed.

    Parameters
    ----------
    velocity : Tensor of shape (batch, 1, nz, nx)
        Starting models in m/s, such as a network's prediction.
    seismic : Tensor of shape (batch, n_shots, nt, n_receivers)
        Recorded data, not standardised.
    physics : AcousticWavePhysics
        Wave equation of the survey that recorded the data.
    n_iter : int, default=20
        Steps in each stage. Each costs two simulations, forth and back.
    cutoffs : sequence of float or None, optional
        Width in Hz of the Gaussian low-pass filter of each stage; None for the full data. By
        default 0.3 and 0.5 times the survey's peak frequency, and the full data.
    prior : torch.nn.Module, optional
        Denoiser of normalised velocity maps, such as a learned proximal network trained on
        them; called as ``prior(x)``.
    prior_weight : float, default=0.1
        Share of the prior in each step.
    learning_rate : float, default=0.02
        Of Adam, in units of the normalised velocity: 0.02 moves at most 30 m/s a step.
    low, high : float, default=1500.0, 4500.0
        Range of velocities in m/s.
    verbose : int, default=0
        With 1, show a progress bar.

    Returns
    -------
    Refinement
        ``velocity``, and ``misfit`` of shape (n_stages + 1, batch): of the full data, at the start
        and after each stage. Without a prior a sample whose misfit did not fall keeps its start.

    Raises
    ------
    ValueError
        If shapes do not fit the survey, values are not finite, or an argument is out of range.

    References
    ----------
    .. [1] C. Bunks et al., "Multiscale seismic waveform inversion", Geophysics 60, 1995.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import AcousticWavePhysics, Survey, refine
    >>> survey = Survey.line(16, n_shots=2, dx=20.0, dt=2e-3, nt=150, peak_frequency=10.0)
    >>> physics = AcousticWavePhysics(survey)
    >>> true = torch.full((1, 1, 16, 16), 2000.0)
    >>> true[..., 8:, :] = 2600.0
    >>> result = refine(torch.full_like(true, 2000.0), physics.A(true), physics, 3)
    >>> bool(result.misfit[-1] < result.misfit[0])
    True
    """
    check_integer("n_iter", n_iter, 1)
    check_interval("prior_weight", prior_weight, 0, 1)
    check_interval("learning_rate", learning_rate, 0, closed="neither")
    check_interval("high", high, low, closed="neither")
    check_finite("seismic", seismic)
    survey = physics.survey
    expected = (len(velocity), survey.n_shots, survey.nt, survey.n_receivers)
    if tuple(seismic.shape) != expected:
        raise ValueError(f"seismic must have shape {expected}, got {tuple(seismic.shape)}")
    energy = seismic.flatten(1).square().sum(dim=1)
    if not bool((energy > 0).all()):
        raise ValueError("seismic must not be zero everywhere in any sample")

    peak = survey.peak_frequency
    stages = (0.3 * peak, 0.5 * peak, None) if cutoffs is None else tuple(cutoffs)
    if not stages:
        raise ValueError("cutoffs must name at least one stage, got none")
    for cutoff in stages:
        if cutoff is not None:
            check_interval("cutoffs", cutoff, 0, closed="neither")

    start = normalize_velocity(velocity.detach(), low, high).clamp(-1, 1)
    x = start.clone()
    misfits = [_misfit(x, seismic, physics, None, low, high).detach()]
    with tqdm(total=len(stages) * n_iter, disable=not verbose, unit="step") as progress:
        for cutoff in stages:
            x.requires_grad_()
            optimizer = torch.optim.Adam([x], lr=learning_rate)
            for _ in range(n_iter):
                with torch.enable_grad():
                    misfit = _misfit(x, seismic, physics, cutoff, low, high)
                    (x.grad,) = torch.autograd.grad(misfit.sum(), x)
                optimizer.step()
                with torch.no_grad():
                    if prior is not None:
                        x.lerp_(prior(x), prior_weight)
                    x.clamp_(-1, 1)
                progress.update()
            x = x.detach()
            misfits.append(_misfit(x, seismic, physics, None, low, high))
    if prior is None:
        # Adam's steps have a size of their own, which a start that fits already is spared.
        worse = misfits[-1] > misfits[0]
        x = torch.where(worse[:, None, None, None], start, x)
        misfits[-1] = torch.where(worse, misfits[0], misfits[-1])
    return Refinement(denormalize_velocity(x, low, high), torch.stack(misfits))


def _misfit(
    x: Tensor,
    seismic: Tensor,
    physics: AcousticWavePhysics,
    cutoff: float | None,
    low: float,
    high: float,
) -> Tensor:
    """Relative square error of each sample in the band below `cutoff`."""
    residual = physics.A(denormalize_velocity(x, low, high)) - seismic
    dt = physics.survey.dt
    energy = _low_pass(seismic, cutoff, dt).flatten(1).square().sum(dim=1)
    return _low_pass(residual, cutoff, dt).flatten(1).square().sum(dim=1) / energy


def _low_pass(seismic: Tensor, cutoff: float | None, dt: float) -> Tensor:
    if cutoff is None:
        return seismic
    nt = seismic.shape[2]
    frequency = torch.fft.rfftfreq(nt, dt, dtype=seismic.dtype, device=seismic.device)
    weight = torch.exp(-0.5 * (frequency / cutoff) ** 2)[:, None]
    return torch.fft.irfft(torch.fft.rfft(seismic, dim=2) * weight, n=nt, dim=2)
