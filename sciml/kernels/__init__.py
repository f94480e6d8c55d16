"""Kernels of infinitely wide networks, kernel machines and Nyström approximation."""

from sciml.kernels.certificates import certified_radius
from sciml.kernels.decaying_ntk import DecayingMachine, decaying_ntk, decaying_ntk_descent
from sciml.kernels.generalization import GeneralizationBound, generalization_bound
from sciml.kernels.interval_bounds import ibp_bounds, ibp_certified_radius
from sciml.kernels.kernel_machine import KernelMachineClassifier, KernelMachineRegressor
from sciml.kernels.ntk import NNGP, NTK, ntk
from sciml.kernels.ntk_network import (
    NTKNetwork,
    NTKTraining,
    train_ntk_network,
)
from sciml.kernels.pairwise import kernel_diag, kernel_matmul, pairwise_kernel

__all__ = [
    "NNGP",
    "NTK",
    "DecayingMachine",
    "GeneralizationBound",
    "KernelMachineClassifier",
    "KernelMachineRegressor",
    "NTKNetwork",
    "NTKTraining",
    "certified_radius",
    "decaying_ntk",
    "decaying_ntk_descent",
    "generalization_bound",
    "ibp_bounds",
    "ibp_certified_radius",
    "kernel_diag",
    "kernel_matmul",
    "ntk",
    "pairwise_kernel",
    "train_ntk_network",
]
