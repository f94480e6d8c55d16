"""Velocity models like those of OpenFWI: flat and curved layers, faults, and random textures.

The generator of OpenFWI [1]_ is not public. The families here follow its published pictures and
words: velocities of 1500 to 4500 m/s; in the A families they grow with depth, in the B families
they are drawn layer by layer; faults displace layers. Layer counts, amplitudes and throws are
choices of this library.

References
----------
.. [1] C. Deng et al., "OpenFWI: Large-scale multi-structural benchmark datasets for full
   waveform inversion", NeurIPS 2022. arXiv:2111.02926
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from sklearn.utils import check_random_state

from ..._check import check_choice, check_integer, check_interval

__all__ = ["VELOCITY_KINDS", "make_velocity_maps"]

VELOCITY_KINDS = (
    "flat_vel_a",
    "flat_vel_b",
    "curve_vel_a",
    "curve_vel_b",
    "flat_fault_a",
    "flat_fault_b",
    "curve_fault_a",
    "curve_fault_b",
    "style_a",
    "style_b",
)


def make_velocity_maps(
    kind: str = "flat_vel_a",
    n_samples: int = 100,
    *,
    shape: tuple[int, int] = (70, 70),
    velocity_range: tuple[float, float] = (1500.0, 4500.0),
    random_state: int | np.random.RandomState | None = None,
    first_sample: int = 0,
) -> NDArray[np.float32]:
    """Generate random velocity models of one family.

    Parameters
    ----------
    kind : str, default="flat_vel_a"
        One of `VELOCITY_KINDS`:

        * ``flat_vel_*``: two to seven flat layers;
        * ``curve_vel_*``: layers between sine-shaped interfaces;
        * ``flat_fault_*``, ``curve_fault_*``: the same, cut by one fault (a) or two (b);
        * ``style_*``: random fields with a power-law spectrum, a stand-in for the
          style-transferred photographs of OpenFWI and not the real thing.

        In the a families velocity grows with depth, in the b families it is random per layer
        (for ``style``: b is rougher and sheared).
    n_samples : int, default=100
        Number of models.
    shape : (int, int), default=(70, 70)
        Cells along depth and x, at least 8 each.
    velocity_range : (float, float), default=(1500.0, 4500.0)
        Slowest and fastest velocity in m/s.
    random_state : int, RandomState instance or None, default=None
        Seed. Sample ``i`` depends on the seed and on ``first_sample + i`` alone, so models can
        be made in any order and in parallel and come out bit-identical.
    first_sample : int, default=0
        Index of the first model within the family.

    Returns
    -------
    ndarray of shape (n_samples, nz, nx), float32
        Velocity in m/s.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> from sciml.inverse.seismic import make_velocity_maps
    >>> velocity = make_velocity_maps("curve_vel_a", 3, random_state=0)
    >>> velocity.shape, velocity.dtype
    ((3, 70, 70), dtype('float32'))
    """
    check_choice("kind", kind, VELOCITY_KINDS)
    check_integer("n_samples", n_samples, 1)
    check_integer("first_sample", first_sample, 0)
    for name, length in zip(("shape[0]", "shape[1]"), shape, strict=True):
        check_integer(name, length, 8)
    low, high = velocity_range
    check_interval("velocity_range[0]", low, 0, closed="neither")
    check_interval("velocity_range[1]", high, low, closed="neither")
    seed = base_seed(random_state)
    maps = np.empty((n_samples, *shape), dtype=np.float32)
    for i in range(n_samples):
        rng = np.random.default_rng([seed, VELOCITY_KINDS.index(kind), first_sample + i])
        maps[i] = low + (high - low) * _draw(kind, shape, rng)
    return maps


def base_seed(random_state: int | np.random.RandomState | None) -> int:
    """Return the integer that seeds every sample of a call.

    Parameters
    ----------
    random_state : int, RandomState instance or None
        An integer is returned as it is.

    Returns
    -------
    int
    """
    if isinstance(random_state, (int, np.integer)):
        check_integer("random_state", random_state, 0)
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31))


def _draw(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """One model with values in [0, 1]."""
    family, _, level = kind.rpartition("_")
    harder = level == "b"
    if family == "style":
        return _texture(shape, rng, rough=harder)
    unit = _layers(shape, rng, curved=family.startswith("curve"), increasing=not harder)
    if family.endswith("fault"):
        for _ in range(2 if harder else 1):
            unit = _displace(unit, rng)
    return unit


def _layers(
    shape: tuple[int, int], rng: np.random.Generator, *, curved: bool, increasing: bool
) -> NDArray[np.float64]:
    nz, nx = shape
    n_layers = int(rng.integers(2, 8))
    thinnest = max(1, min(4, nz // (n_layers + 1)))
    # Interfaces with at least `thinnest` cells between them: shrink, sort, spread.
    free = nz - n_layers * thinnest
    depth = np.sort(rng.uniform(0, free, n_layers - 1)) + thinnest * np.arange(1, n_layers)
    velocity = rng.uniform(0, 1, n_layers)
    if increasing:
        velocity.sort()
    x = np.linspace(0, 1, nx)
    wave = np.zeros((n_layers - 1, nx))
    if curved:
        # One shape for the section, its amplitude drifting from interface to interface.
        frequency, phase = rng.uniform(0.5, 2.0), rng.uniform(0, 2 * np.pi)
        amplitude = rng.uniform(2, 8) * nz / 70 * rng.uniform(0.6, 1.0, (n_layers - 1, 1))
        wave = amplitude * np.sin(2 * np.pi * frequency * x + phase)
    interface = np.sort(depth[:, None] + wave, axis=0)  # sorted, so that they never cross
    layer = (np.arange(nz)[None, :, None] >= interface[:, None, :]).sum(axis=0)
    return velocity[layer]


def _displace(unit: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Shift what lies to the right of a dipping line downwards by the throw of a fault."""
    nz, nx = unit.shape
    position = rng.uniform(0.2, 0.8) * nx
    dip = np.deg2rad(rng.uniform(45, 80)) * rng.choice([-1, 1])
    throw = rng.uniform(3, 15) * nz / 70 * rng.choice([-1, 1])
    z, x = np.meshgrid(np.arange(nz), np.arange(nx), indexing="ij")
    hanging = x > position + (z - nz / 2) / np.tan(dip)
    moved = map_coordinates(unit, [z - throw, x], order=0, mode="nearest")
    return np.where(hanging, moved, unit)


def _texture(
    shape: tuple[int, int], rng: np.random.Generator, *, rough: bool
) -> NDArray[np.float64]:
    nz, nx = shape
    wavenumber = np.hypot(np.fft.fftfreq(nz)[:, None], np.fft.rfftfreq(nx)[None, :])
    wavenumber[0, 0] = np.inf
    decay = rng.uniform(2.0, 2.5) if rough else rng.uniform(2.5, 3.0)
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) * wavenumber ** (-decay / 2)
    field = np.fft.irfft2(spectrum, shape)
    if rough:
        z, x = np.meshgrid(np.arange(nz), np.arange(nx), indexing="ij")
        shear = rng.uniform(-0.8, 0.8)
        field = map_coordinates(field, [z + shear * x, x], order=1, mode="grid-wrap")
    field = gaussian_filter(field, 0.7 if rough else rng.uniform(2, 3))
    low, high = field.min(), field.max()
    return (field - low) / (high - low)
