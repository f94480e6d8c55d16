"""Figures of velocity models and shot gathers, with axes in metres and seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..._check import check_finite, check_interval
from .survey import Survey

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_gather", "plot_velocity", "plot_velocity_difference"]


def plot_velocity(
    velocity: Any,
    ax: Axes | None = None,
    *,
    dx: float = 10.0,
    low: float = 1500.0,
    high: float = 4500.0,
) -> Axes:
    """Draw a velocity model, depth downwards.

    Parameters
    ----------
    velocity : array or DataArray of shape (nz, nx)
        Velocity in m/s. The coordinates of a DataArray are used for the axes.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default the current axes.
    dx : float, default=10.0
        Side of a grid cell in m, for arrays without coordinates.
    low, high : float, default=1500.0, 4500.0
        Ends of the colour scale in m/s.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If the array is not two-dimensional or not finite.

    Examples
    --------
    >>> from sciml.inverse.seismic import make_velocity_maps, plot_velocity
    >>> ax = plot_velocity(make_velocity_maps("curve_vel_a", 1, random_state=0)[0])
    >>> ax.get_ylabel()
    'depth (m)'
    """
    return _draw_map(velocity, ax, dx, low, high, "viridis", "velocity (m/s)")


def plot_velocity_difference(
    prediction: Any,
    target: Any,
    ax: Axes | None = None,
    *,
    dx: float = 10.0,
    limit: float | None = None,
) -> Axes:
    """Draw prediction minus target on a scale that is symmetric about zero.

    Parameters
    ----------
    prediction, target : array or DataArray of shape (nz, nx)
        Velocity in m/s.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default the current axes.
    dx : float, default=10.0
        Side of a grid cell in m, for arrays without coordinates.
    limit : float, optional
        End of the colour scale in m/s; by default the largest difference.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If the shapes differ, or an array is not two-dimensional or not finite.
    """
    if np.shape(prediction) != np.shape(target):
        raise ValueError(
            f"prediction and target must have the same shape, got {np.shape(prediction)} "
            f"and {np.shape(target)}"
        )
    difference = prediction - target
    if limit is None:
        limit = float(np.abs(np.asarray(difference)).max()) or 1.0
    check_interval("limit", limit, 0, closed="neither")
    return _draw_map(difference, ax, dx, -limit, limit, "RdBu_r", "velocity difference (m/s)")


def plot_gather(
    gather: Any,
    ax: Axes | None = None,
    *,
    survey: Survey | None = None,
    limit: float | None = None,
) -> Axes:
    """Draw a shot gather, time downwards.

    Parameters
    ----------
    gather : array or DataArray of shape (nt, n_receivers)
        Pressure of one shot. The coordinates ``time`` and ``receiver_x`` of a DataArray are
        used for the axes.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default the current axes.
    survey : Survey, optional
        Sampling and receivers of an array without coordinates; by default those of OpenFWI.
    limit : float, optional
        End of the symmetric colour scale; by default the 99th percentile of ``|gather|``,
        since the direct wave would hide the reflections.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If the gather is not two-dimensional, not finite, or does not fit the survey.
    """
    values = _finite_image("gather", gather)
    if hasattr(gather, "coords"):
        time, receivers = np.asarray(gather["time"]), np.asarray(gather["receiver_x"])
    else:
        survey = Survey() if survey is None else survey
        time, receivers = survey.time, np.asarray(survey.receiver_x)
        if values.shape != (len(time), len(receivers)):
            raise ValueError(
                f"gather must have shape ({len(time)}, {len(receivers)}) for this survey, "
                f"got {values.shape}"
            )
    if limit is None:
        limit = float(np.percentile(np.abs(values), 99)) or 1.0
    check_interval("limit", limit, 0, closed="neither")
    ax = _axes(ax)
    extent = (float(receivers[0]), float(receivers[-1]), float(time[-1]), float(time[0]))
    ax.imshow(values, cmap="gray", vmin=-limit, vmax=limit, extent=extent, aspect="auto")
    ax.set(xlabel="receiver x (m)", ylabel="time (s)")
    return ax


def _draw_map(
    values: Any,
    ax: Axes | None,
    dx: float,
    low: float,
    high: float,
    cmap: str,
    label: str,
) -> Axes:
    image = _finite_image("velocity", values)
    check_interval("dx", dx, 0, closed="neither")
    if hasattr(values, "coords"):
        depth, x = np.asarray(values["depth"]), np.asarray(values["x"])
        dx = float(x[1] - x[0])
    else:
        depth, x = (np.arange(n) * dx for n in image.shape)
    ax = _axes(ax)
    # Cells are centred on their coordinates.
    extent = (x[0] - dx / 2, x[-1] + dx / 2, depth[-1] + dx / 2, depth[0] - dx / 2)
    drawn = ax.imshow(image, cmap=cmap, vmin=low, vmax=high, extent=extent)
    ax.set(xlabel="x (m)", ylabel="depth (m)")
    ax.figure.colorbar(drawn, ax=ax, label=label, shrink=0.8)
    return ax


def _finite_image(name: str, values: Any) -> np.ndarray[Any, np.dtype[Any]]:
    image = np.asarray(values)
    if image.ndim != 2:
        raise ValueError(f"{name} must be two-dimensional, got shape {image.shape}")
    check_finite(name, image)
    return image


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()
