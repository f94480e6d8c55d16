"""Learned priors and reconstruction for inverse problems."""

from .lpn import FullyConnectedLPN, LearnedProximalNetwork, PatchLPN, ProximalOperator
from .lpn_denoiser import LPNDenoiser
from .lpn_prior import Inversion, LPNPrior, invert
from .lpn_training import TrainingHistory, project_after_step, train_lpn
from .pnp import ConvergenceCertificate, convergence_certificate, pnp_admm
from .proximal_matching import (
    ProximalMatchingLoss,
    ProximalMatchingSchedule,
    proximal_matching_loss,
)

__all__ = [
    "ConvergenceCertificate",
    "FullyConnectedLPN",
    "Inversion",
    "LPNDenoiser",
    "LPNPrior",
    "LearnedProximalNetwork",
    "PatchLPN",
    "ProximalMatchingLoss",
    "ProximalMatchingSchedule",
    "ProximalOperator",
    "TrainingHistory",
    "convergence_certificate",
    "invert",
    "pnp_admm",
    "project_after_step",
    "proximal_matching_loss",
    "train_lpn",
]
