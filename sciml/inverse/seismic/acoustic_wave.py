"""Acoustic wave equation as a deepinv physics: velocity in, shot gathers out.

    (1 / v^2) d^2 p / dt^2 = laplace(p) + s(t) delta(x - x_s)

deepwave [1]_ steps it with second order in time and fourth in space inside absorbing layers
and differentiates through it. With the default survey the output agrees with the solver that
made the OpenFWI data [2]_ (correlation above 0.9999); that solver absorbs with a 120-cell
sponge, this one with a 20-cell perfectly matched layer, hence the last digits differ.

References
----------
.. [1] A. Richardson, "Deepwave", 2018-. doi:10.5281/zenodo.3829886
.. [2] C. Deng et al., "OpenFWI", NeurIPS 2022. arXiv:2111.02926
"""

from typing import Any

import torch
from deepinv.physics import Physics
from torch import Tensor

from ..._check import check_finite, check_integer, check_interval
from .survey import Survey

__all__ = ["AcousticWavePhysics"]


class AcousticWavePhysics(Physics):
    """Record the pressure that the sources of a survey send through a velocity model.

    Parameters
    ----------
    survey : Survey, optional
        Geometry, sampling and wavelet; by default that of OpenFWI.
    noise_model : torch.nn.Module, optional
        Any deepinv noise model, applied by `forward` and not by `A`.
    pml_width : int, default=20
        Cells of the absorbing layer on each side.
    max_velocity : float, default=4500.0
        Fastest velocity in m/s that is expected. It shapes the absorbing layer, so that all
        models of a family meet the same one. Faster models are accepted while they are stable.

    Raises
    ------
    ImportError
        If deepwave is not installed.

    See Also
    --------
    Survey.stable_velocity : the velocity at which the time step becomes unstable.

    Notes
    -----
    A source of deepwave enters with the opposite sign and its samples are those before the
    step, so the wavelet is negated and one more sample is computed and the first dropped.

    On a busy machine deepwave's threads wait for each other: set ``OMP_NUM_THREADS=1`` and
    work on several models in several processes instead, as `make_openfwi_like` does.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import AcousticWavePhysics, Survey
    >>> survey = Survey.line(32, n_shots=2, dx=20.0, dt=2e-3, nt=200, peak_frequency=10.0)
    >>> physics = AcousticWavePhysics(survey)
    >>> velocity = torch.full((1, 1, 32, 32), 2000.0)
    >>> physics(velocity).shape
    torch.Size([1, 2, 200, 32])
    """

    def __init__(
        self,
        survey: Survey | None = None,
        *,
        noise_model: torch.nn.Module | None = None,
        pml_width: int = 20,
        max_velocity: float = 4500.0,
    ) -> None:
        try:
            import deepwave
        except ImportError as error:
            raise ImportError(
                "AcousticWavePhysics needs deepwave: pip install 'sciml-kit[seismic]'"
            ) from error
        if noise_model is None:
            super().__init__()
        else:
            super().__init__(noise_model=noise_model)
        check_integer("pml_width", pml_width, 1)
        check_interval("max_velocity", max_velocity, 0, closed="neither")
        self.survey = Survey() if survey is None else survey
        self.pml_width = pml_width
        self.max_velocity = max_velocity
        self._scalar = deepwave.scalar

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Shot gathers of velocity models, differentiable in the velocity.

        Parameters
        ----------
        x : Tensor of shape (batch, 1, nz, nx)
            Velocity in m/s.
        **kwargs
            Accepted because deepinv passes noise parameters on; there are none to use here.

        Returns
        -------
        Tensor of shape (batch, n_shots, nt, n_receivers)
            Pressure at the receivers.

        Raises
        ------
        ValueError
            If the velocity has another shape, is not finite or not positive, looks like km/s,
            or is too fast for the time step; or if the survey leaves the model.
        """
        survey = self.survey
        self._check_velocity(x)
        batch, shots = len(x), survey.n_shots
        velocity = x[:, 0].repeat_interleave(shots, dim=0)

        wavelet = torch.zeros(survey.nt + 1, dtype=x.dtype, device=x.device)
        wavelet[:-1] = -torch.as_tensor(survey.source_wavelet(), dtype=x.dtype, device=x.device)
        sources = torch.as_tensor(survey.source_cells(), device=x.device)
        receivers = torch.as_tensor(survey.receiver_cells(), device=x.device)

        pressure = self._scalar(
            velocity,
            survey.dx,
            survey.dt,
            source_amplitudes=wavelet.expand(batch * shots, 1, -1),
            source_locations=sources[:, None].repeat(batch, 1, 1),
            receiver_locations=receivers.expand(batch * shots, -1, -1),
            accuracy=4,
            pml_width=self.pml_width,
            pml_freq=survey.peak_frequency,
            max_vel=max(self.max_velocity, float(x.detach().max())),
            # sqrt(3)/2 is the scheme's own limit: never split a time step that is stable.
            courant_number=3**0.5 / 2,
        )[-1][..., 1:]
        return pressure.reshape(batch, shots, -1, survey.nt).transpose(2, 3)

    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Transposed Jacobian at `x` applied to `v`: the gradient of full-waveform inversion.

        Parameters
        ----------
        x : Tensor of shape (batch, 1, nz, nx)
            Velocity in m/s at which the Jacobian is taken.
        v : Tensor of shape (batch, n_shots, nt, n_receivers)
            Data residual.

        Returns
        -------
        Tensor of shape (batch, 1, nz, nx)
        """
        with torch.enable_grad():
            velocity = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.A(velocity), velocity, v)
        return gradient

    def _check_velocity(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"velocity must have shape (batch, 1, nz, nx), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"velocity must be a floating-point tensor, got {x.dtype}")
        check_finite("velocity", x)
        slowest, fastest = (float(end) for end in torch.aminmax(x.detach()))
        if slowest <= 0:
            raise ValueError(f"velocity must be positive, got a minimum of {slowest} m/s")
        if fastest < 100:
            raise ValueError(
                f"velocity must be in m/s, got a maximum of {fastest}, which looks like km/s"
            )
        limit = self.survey.stable_velocity()
        if max(fastest, self.max_velocity) > limit:
            raise ValueError(
                f"dt = {self.survey.dt} s must be at most "
                f"{self.survey.dt * limit / max(fastest, self.max_velocity):.2e} s for a velocity "
                f"of {max(fastest, self.max_velocity):.0f} m/s on cells of {self.survey.dx} m"
            )
        self.survey.check_grid((x.shape[2], x.shape[3]))
