"""The form of seismic data in the library: an xarray Dataset with coordinates and units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .survey import Survey

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["seismic_dataset"]


def seismic_dataset(
    seismic: Any, velocity: Any, survey: Survey | None = None, *, first_sample: int = 0
) -> xr.Dataset:
    """Wrap recordings and velocity models into a Dataset with coordinates and units.

    Parameters
    ----------
    seismic : array of shape (n_samples, n_shots, nt, n_receivers)
        Recorded pressure.
    velocity : array of shape (n_samples, nz, nx)
        Velocity in m/s.
    survey : Survey, optional
        Geometry of the recordings; by default that of OpenFWI.
    first_sample : int, default=0
        Value of the first ``sample`` coordinate.

    Returns
    -------
    xarray.Dataset
        With ``units`` on every coordinate and ``depth`` positive downwards.

    Raises
    ------
    ValueError
        If the shapes do not fit the survey.
    """
    import xarray as xr

    survey = Survey() if survey is None else survey
    expected = (survey.n_shots, survey.nt, survey.n_receivers)
    if tuple(seismic.shape[1:]) != expected:
        raise ValueError(
            f"seismic must have shape (n_samples, {', '.join(map(str, expected))}) for this "
            f"survey, got {tuple(seismic.shape)}"
        )
    if velocity.ndim != 3 or len(velocity) != len(seismic):
        raise ValueError(
            f"velocity must have shape ({len(seismic)}, nz, nx), got {tuple(velocity.shape)}"
        )
    survey.check_grid((velocity.shape[1], velocity.shape[2]))
    metres = {"units": "m"}
    return xr.Dataset(
        {
            "seismic": (
                ("sample", "shot", "time", "receiver"),
                seismic,
                {"long_name": "pressure at the receivers", "units": "1"},
            ),
            "velocity": (
                ("sample", "depth", "x"),
                velocity,
                {"long_name": "acoustic wave speed", "units": "m s-1"},
            ),
        },
        coords={
            "sample": np.arange(first_sample, first_sample + len(seismic)),
            "source_x": ("shot", np.asarray(survey.source_x), metres),
            "time": ("time", survey.time, {"units": "s"}),
            "receiver_x": ("receiver", np.asarray(survey.receiver_x), metres),
            "depth": (
                "depth",
                np.arange(velocity.shape[1]) * survey.dx,
                {**metres, "positive": "down"},
            ),
            "x": ("x", np.arange(velocity.shape[2]) * survey.dx, metres),
        },
        attrs={
            "title": "Acoustic shot gathers and velocity models",
            "dx_m": survey.dx,
            "dt_s": survey.dt,
            "peak_frequency_hz": survey.peak_frequency,
            "source_depth_m": survey.source_depth,
            "receiver_depth_m": survey.receiver_depth,
        },
    )
