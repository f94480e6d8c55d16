"""Kernels of infinitely wide networks, kernel machines and Nyström approximation."""

from sciml.kernels.interval_bounds import ibp_bounds, ibp_certified_radius
from sciml.kernels.ntk import NNGP, NTK, ntk
from sciml.kernels.ntk_network import (
    DecayingMachine,
    NTKNetwork,
    NTKTraining,
    decaying_ntk,
    decaying_ntk_descent,
    train_ntk_network,
)
from sciml.kernels.pairwise import kernel_diag, kernel_matmul, pairwise_kernel

__all__ = [
    "NNGP",
    "NTK",
    "DecayingMachine",
    "NTKNetwork",
    "NTKTraining",
    "decaying_ntk",
    "decaying_ntk_descent",
    "ibp_bounds",
    "ibp_certified_radius",
    "kernel_diag",
    "kernel_matmul",
    "ntk",
    "pairwise_kernel",
    "train_ntk_network",
]
