"""Full-waveform inversion that starts from a network's answer.

A network is fast and roughly right; the wave equation knows exactly how wrong it still is. A
few steps of descent on the data misfit, with the gradient through the wave equation, finish
what the network began, with a learned denoiser as prior if there is one [1]_.

References
----------
.. [1] S. V. Venkatakrishnan, C. A. Bouman, B. Wohlberg, "Plug-and-play priors for model based
   reconstruction", GlobalSIP 2013.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..._check import check_finite, check_integer, check_interval
from .acoustic_wave import AcousticWavePhysics
from .openfwi import denormalize_velocity, normalize_velocity

__all__ = ["Refinement", "refine"]


class Refinement(NamedTuple):
    """Result of `refine`: the velocity, and the relative data misfit before each step and after."""

    velocity: Tensor
    misfit: Tensor


def refine(
    velocity: Tensor,
    seismic: Tensor,
    physics: AcousticWavePhysics,
    n_iter: int = 20,
    *,
    prior: nn.Module | None = None,
    prior_weight: float = 0.1,
    learning_rate: float = 0.02,
    low: float = 1500.0,
    high: float = 4500.0,
    verbose: int = 0,
) -> Refinement:
    """Fit velocity models to recorded data by gradient descent through the wave equation.

    Adam minimises ``||A(v) - y||^2 / ||y||^2`` of each sample over velocity normalised to
    [-1, 1], clipped to the range after every step. With a prior, each step ends in
    ``v <- (1 - prior_weight) v + prior_weight prior(v)``: plug-and-play, relaxed.

    Parameters
    ----------
    velocity : Tensor of shape (batch, 1, nz, nx)
        Starting models in m/s, such as a network's prediction.
    seismic : Tensor of shape (batch, n_shots, nt, n_receivers)
        Recorded data, not standardised.
    physics : AcousticWavePhysics
        Wave equation of the survey that recorded the data.
    n_iter : int, default=20
        Steps. Each costs two simulations, forth and back.
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
        ``velocity``, for each sample the model with the least misfit met on the way (with a
        prior: the last), and ``misfit`` of shape (n_iter + 1, batch).

    Raises
    ------
    ValueError
        If shapes do not fit the survey, values are not finite, or an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import AcousticWavePhysics, Survey, refine
    >>> survey = Survey.line(16, n_shots=2, dx=20.0, dt=2e-3, nt=150, peak_frequency=10.0)
    >>> physics = AcousticWavePhysics(survey)
    >>> true = torch.full((1, 1, 16, 16), 2000.0)
    >>> true[..., 8:, :] = 2600.0
    >>> result = refine(torch.full_like(true, 2000.0), physics.A(true), physics, 5)
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

    x = normalize_velocity(velocity.detach(), low, high).clamp(-1, 1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=learning_rate)
    best, best_misfit = x.detach().clone(), torch.full_like(energy, torch.inf)
    misfits = []
    for step in tqdm(range(n_iter + 1), disable=not verbose, unit="step"):
        with torch.enable_grad():
            residual = physics.A(denormalize_velocity(x, low, high)) - seismic
            misfit = residual.flatten(1).square().sum(dim=1) / energy
            (x.grad,) = torch.autograd.grad(misfit.sum(), x)
        misfits.append(misfit.detach())
        better = (misfit.detach() < best_misfit)[:, None, None, None]
        best = torch.where(better, x.detach(), best)
        best_misfit = torch.minimum(best_misfit, misfit.detach())
        if step == n_iter:
            break
        optimizer.step()
        with torch.no_grad():
            if prior is not None:
                x.lerp_(prior(x), prior_weight)
            x.clamp_(-1, 1)
    result = best if prior is None else x.detach()
    return Refinement(denormalize_velocity(result, low, high), torch.stack(misfits))
