"""Find the largest certified radius of many samples, all bisections in lockstep."""

from collections.abc import Callable
from typing import Any

import numpy as np

from sciml._check import check_interval

__all__ = ["largest_certified_radii"]


def largest_certified_radii(
    certified: Callable[[Any, Any], Any],
    wanted: Any,
    *,
    scale: float,
    max_radius: float | None,
    tol: float,
) -> Any:
    """Bracket the largest certified radius of every sample by doubling, then bisect.

    Parameters
    ----------
    certified : callable
        ``certified(rows, radii)`` takes the indices of samples and a radius for each, and returns
        a boolean array. What is certified at a radius must be certified at all smaller ones.
    wanted : ndarray of shape (n,), dtype bool
        Samples to treat; the others get radius 0.
    scale : float
        Size of the data: the first radius is ``scale / 32``.
    max_radius : float or None
        Largest radius to try; None means ``2**20 * scale``.
    tol : float
        Relative width of the bracket at which bisection ends, in (0, 1).

    Returns
    -------
    ndarray of shape (n,), dtype float64
        Lower ends of the brackets, so each has itself been certified (or is 0).

    Raises
    ------
    TypeError, ValueError
        If `max_radius` or `tol` is not a number in its range.
    """
    check_interval("tol", tol, 0, 1, closed="neither")
    if max_radius is not None:
        check_interval("max_radius", max_radius, 0, np.inf, closed="neither")
    limit = 2.0**20 * scale if max_radius is None else float(max_radius)
    low = np.zeros(len(wanted))
    high = np.full(len(wanted), min(scale / 32, limit))
    rows = np.flatnonzero(wanted)
    rows = rows[certified(rows, low[rows])]  # ties are not
    bracketed = []
    while len(rows):
        passed = certified(rows, high[rows])
        bracketed.append(rows[~passed])
        rows = rows[passed]
        low[rows] = high[rows]
        rows = rows[high[rows] < limit]
        high[rows] = np.minimum(2 * high[rows], limit)
    rows = np.concatenate(bracketed) if bracketed else rows
    while True:
        rows = rows[high[rows] - low[rows] > tol * high[rows]]
        if not len(rows):
            return low
        middle = (low[rows] + high[rows]) / 2
        passed = certified(rows, middle)
        low[rows[passed]] = middle[passed]
        high[rows[~passed]] = middle[~passed]
