"""Seismic imaging: surveys, the wave equation, OpenFWI data, metrics and figures."""

from .acoustic_wave import AcousticWavePhysics
from .figures import plot_gather, plot_velocity, plot_velocity_difference
from .generation import make_openfwi_like
from .metrics import openfwi_ssim, velocity_metrics
from .openfwi import (
    OPENFWI_STATISTICS,
    OpenFWIDataset,
    SeismicStatistics,
    denormalize_velocity,
    normalize_velocity,
    open_openfwi,
    seismic_dataset,
    standardize_seismic,
)
from .survey import Survey, ricker
from .velocity_maps import VELOCITY_KINDS, make_velocity_maps

__all__ = [
    "OPENFWI_STATISTICS",
    "VELOCITY_KINDS",
    "AcousticWavePhysics",
    "OpenFWIDataset",
    "SeismicStatistics",
    "Survey",
    "denormalize_velocity",
    "make_openfwi_like",
    "make_velocity_maps",
    "normalize_velocity",
    "open_openfwi",
    "openfwi_ssim",
    "plot_gather",
    "plot_velocity",
    "plot_velocity_difference",
    "ricker",
    "seismic_dataset",
    "standardize_seismic",
    "velocity_metrics",
]
