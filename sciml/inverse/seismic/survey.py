"""Acquisition geometry of a two-dimensional acoustic survey: who shoots, who listens, for how long.

All lengths are metres, all times seconds, all velocities metres a second. The grid has depth
first and x second; the cell with index 0 lies at 0 m on either axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..._check import check_finite, check_integer, check_interval

__all__ = ["Survey", "ricker"]


def ricker(peak_frequency: float, dt: float) -> NDArray[np.float64]:
    """Ricker wavelet, as short as it can be without a visible jump at its ends.

    Its length is the odd number of samples next below ``2.2 / (peak_frequency * dt)``, with the
    peak in the middle: 147 samples at 15 Hz and 1 ms, as in the OpenFWI data.

    Parameters
    ----------
    peak_frequency : float
        Frequency of the spectrum's maximum, in Hz.
    dt : float
        Time step in s.

    Returns
    -------
    ndarray of shape (n_samples,)
        The wavelet, with value 1 at its centre.

    Examples
    --------
    >>> from sciml.inverse.seismic import ricker
    >>> wavelet = ricker(15.0, 1e-3)
    >>> wavelet.shape, int(wavelet.argmax())
    ((147,), 73)
    """
    check_interval("peak_frequency", peak_frequency, 0, closed="neither")
    check_interval("dt", dt, 0, closed="neither")
    half = int(2.2 / (peak_frequency * dt)) // 2
    argument = (np.pi * peak_frequency * dt * np.arange(-half, half + 1)) ** 2
    return (1 - 2 * argument) * np.exp(-argument)


@dataclass(frozen=True)
class Survey:
    """Sources, receivers, sampling and wavelet of an acoustic experiment.

    The defaults are those of OpenFWI [1]_: five sources and seventy receivers 10 m below the
    top of a 70 x 70 model with 10 m cells, one second of recording, a 15 Hz Ricker wavelet.

    Parameters
    ----------
    source_x : sequence of float, default=(0, 170, 340, 520, 690)
        Positions of the sources in m, one shot each. They must lie on grid cells.
    receiver_x : sequence of float, default=(0, 10, ..., 690)
        Positions of the receivers in m, the same for every shot, on grid cells.
    source_depth, receiver_depth : float, default=10.0
        Depths in m, on grid cells.
    dx : float, default=10.0
        Side of a grid cell in m.
    dt : float, default=0.001
        Time step of the recording and of the simulation in s.
    nt : int, default=1000
        Number of recorded samples.
    peak_frequency : float, default=15.0
        Peak frequency in Hz of the Ricker wavelet that is used when `wavelet` is empty.
    wavelet : sequence of float, default=()
        Source time function sampled at `dt`, padded with zeros or cut to `nt` samples.

    Raises
    ------
    ValueError
        If a number is out of range, an array is empty or not finite, or a position is off the
        grid.

    References
    ----------
    .. [1] C. Deng et al., "OpenFWI: Large-scale multi-structural benchmark datasets for full
       waveform inversion", NeurIPS 2022. arXiv:2111.02926

    Examples
    --------
    >>> from sciml.inverse.seismic import Survey
    >>> survey = Survey()
    >>> survey.n_shots, survey.nt, survey.n_receivers
    (5, 1000, 70)
    >>> Survey.line(32, n_shots=3, dx=20.0, dt=2e-3, nt=500, peak_frequency=10.0).source_x
    (0.0, 320.0, 620.0)
    """

    source_x: Sequence[float] = (0.0, 170.0, 340.0, 520.0, 690.0)
    receiver_x: Sequence[float] = field(default_factory=lambda: tuple(np.arange(0.0, 700.0, 10.0)))
    source_depth: float = 10.0
    receiver_depth: float = 10.0
    dx: float = 10.0
    dt: float = 1e-3
    nt: int = 1000
    peak_frequency: float = 15.0
    wavelet: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_interval("dx", self.dx, 0, closed="neither")
        check_interval("dt", self.dt, 0, closed="neither")
        check_interval("peak_frequency", self.peak_frequency, 0, closed="neither")
        check_integer("nt", self.nt, 1)
        check_interval("source_depth", self.source_depth, 0)
        check_interval("receiver_depth", self.receiver_depth, 0)
        for name in ("source_x", "receiver_x", "wavelet"):
            values = np.asarray(getattr(self, name), dtype=float)
            if values.ndim != 1 or (values.size == 0 and name != "wavelet"):
                raise ValueError(f"{name} must be a non-empty sequence, got shape {values.shape}")
            check_finite(name, values)
            # Tuples compare and print plainly; arrays would make the dataclass ambiguous.
            object.__setattr__(self, name, tuple(values.tolist()))
        for name in ("source_x", "receiver_x", "source_depth", "receiver_depth"):
            self._cells(name)

    @classmethod
    def line(
        cls,
        nx: int,
        *,
        n_shots: int = 5,
        dx: float = 10.0,
        dt: float = 1e-3,
        nt: int = 1000,
        peak_frequency: float = 15.0,
    ) -> "Survey":
        """Survey with evenly spread shots and a receiver in each of `nx` columns.

        Parameters
        ----------
        nx : int
            Columns of the velocity model.
        n_shots : int, default=5
            Number of sources, spread from the first column to the last.
        dx, dt, nt, peak_frequency
            As in the class; sources and receivers lie one cell deep.

        Returns
        -------
        Survey
        """
        check_integer("nx", nx, 1)
        check_integer("n_shots", n_shots, 1)
        shots = np.round(np.linspace(0, nx - 1, n_shots)) * dx
        return cls(tuple(shots), tuple(np.arange(nx) * dx), dx, dx, dx, dt, nt, peak_frequency)

    @property
    def n_shots(self) -> int:
        """Number of sources."""
        return len(self.source_x)

    @property
    def n_receivers(self) -> int:
        """Number of receivers."""
        return len(self.receiver_x)

    @property
    def time(self) -> NDArray[np.float64]:
        """Times of the recorded samples in s, of shape (nt,)."""
        return np.arange(self.nt, dtype=np.float64) * self.dt

    def source_wavelet(self) -> NDArray[np.float64]:
        """Source time function of shape (nt,)."""
        pulse = np.asarray(self.wavelet) if self.wavelet else ricker(self.peak_frequency, self.dt)
        wavelet = np.zeros(self.nt)
        wavelet[: len(pulse)] = pulse[: self.nt]
        return wavelet

    def source_cells(self) -> NDArray[np.int64]:
        """Grid indices (depth, x) of the sources, of shape (n_shots, 2)."""
        return self._locations("source")

    def receiver_cells(self) -> NDArray[np.int64]:
        """Grid indices (depth, x) of the receivers, of shape (n_receivers, 2)."""
        return self._locations("receiver")

    def stable_velocity(self) -> float:
        """Fastest velocity in m/s at which the time step `dt` is stable.

        The scheme of second order in time and fourth in space is stable for
        ``v dt / dx <= sqrt(3 / 8)`` in two dimensions.
        """
        return float(np.sqrt(3 / 8) * self.dx / self.dt)

    def check_grid(self, shape: tuple[int, int]) -> None:
        """Raise ValueError unless every source and receiver lies inside a model.

        Parameters
        ----------
        shape : (int, int)
            Cells of the model along depth and x.
        """
        for name in ("source_x", "receiver_x", "source_depth", "receiver_depth"):
            length = shape[0] if name.endswith("depth") else shape[1]
            cells = self._cells(name)
            if cells.min() < 0 or cells.max() >= length:
                raise ValueError(
                    f"{name} must lie in the model, [0, {(length - 1) * self.dx}] m for shape "
                    f"{tuple(shape)} and dx = {self.dx} m, got {getattr(self, name)}"
                )

    def _locations(self, kind: str) -> NDArray[np.int64]:
        x = self._cells(f"{kind}_x")
        return np.stack([np.full_like(x, self._cells(f"{kind}_depth")[0]), x], axis=1)

    def _cells(self, name: str) -> NDArray[np.int64]:
        position = np.atleast_1d(np.asarray(getattr(self, name), dtype=float)) / self.dx
        cells = np.rint(position)
        if np.abs(position - cells).max() > 1e-6:
            raise ValueError(
                f"{name} must lie on grid cells, multiples of dx = {self.dx} m, "
                f"got {getattr(self, name)}"
            )
        return cells.astype(np.int64)
