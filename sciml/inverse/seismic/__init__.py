"""Seismic imaging: surveys, the wave equation, OpenFWI data, metrics and figures."""

from .acoustic_wave import AcousticWavePhysics
from .autoencoder import (
    LATENT_SIZES,
    SeismicDecoder,
    SeismicEncoder,
    VelocityDecoder,
    VelocityEncoder,
)
from .figures import plot_gather, plot_velocity, plot_velocity_difference
from .generation import make_openfwi_like
from .gfi_loss import GFILoss, cycle_warmup_factor, masked_error
from .gfi_model import GFIModel, invertible_xnet, latent_unet
from .gfi_regressor import GFIRegressor
from .gfi_training import critic_loss, train_gfi
from .invertible_unet import InvertibleUNet, cayley
from .metrics import openfwi_ssim, seismic_metrics, velocity_metrics
from .openfwi import (
    OPENFWI_STATISTICS,
    OpenFWIDataset,
    SeismicStatistics,
    denormalize_velocity,
    normalize_velocity,
    open_openfwi,
    standardize_seismic,
)
from .refinement import Refinement, refine
from .seismic_baselines import (
    VelocityCritic,
    auto_linear,
    fno,
    inversion_net,
    velocity_gan,
    waveform_net,
)
from .survey import Survey, ricker
from .unet import UNetTranslation
from .velocity_maps import VELOCITY_KINDS, make_velocity_maps
from .xarray_dataset import seismic_dataset

__all__ = [
    "LATENT_SIZES",
    "OPENFWI_STATISTICS",
    "VELOCITY_KINDS",
    "AcousticWavePhysics",
    "GFILoss",
    "GFIModel",
    "GFIRegressor",
    "InvertibleUNet",
    "OpenFWIDataset",
    "Refinement",
    "SeismicDecoder",
    "SeismicEncoder",
    "SeismicStatistics",
    "Survey",
    "UNetTranslation",
    "VelocityCritic",
    "VelocityDecoder",
    "VelocityEncoder",
    "auto_linear",
    "cayley",
    "critic_loss",
    "cycle_warmup_factor",
    "denormalize_velocity",
    "fno",
    "inversion_net",
    "invertible_xnet",
    "latent_unet",
    "make_openfwi_like",
    "make_velocity_maps",
    "masked_error",
    "normalize_velocity",
    "open_openfwi",
    "openfwi_ssim",
    "plot_gather",
    "plot_velocity",
    "plot_velocity_difference",
    "refine",
    "ricker",
    "seismic_dataset",
    "seismic_metrics",
    "standardize_seismic",
    "train_gfi",
    "velocity_gan",
    "velocity_metrics",
    "waveform_net",
]
