"""Kernels of infinitely wide networks, kernel machines and Nyström approximation."""

from sciml.kernels.certificates import certified_radius
from sciml.kernels.decaying_ntk import DecayingMachine, decaying_ntk, decaying_ntk_descent
from sciml.kernels.generalization import GeneralizationBound, generalization_bound
from sciml.kernels.gradient_flow import kernel_gradient_descent, kernel_gradient_flow
from sciml.kernels.ink_estimate import INKEstimate, ink_estimate
from sciml.kernels.interval_bounds import ibp_bounds, ibp_certified_radius
from sciml.kernels.kernel_machine import KernelMachineClassifier, KernelMachineRegressor
from sciml.kernels.ntk import NNGP, NTK, ntk
from sciml.kernels.ntk_network import (
    NTKNetwork,
    NTKTraining,
    train_ntk_network,
)
from sciml.kernels.nystroem import RidgeLeverageNystroem, merge
from sciml.kernels.nystroem_ridge import NystroemRidge, NystroemRidgeClassifier
from sciml.kernels.pairwise import kernel_diag, kernel_matmul, pairwise_kernel
from sciml.kernels.ridge_leverage import effective_dimension, ridge_leverage_scores

__all__ = [
    "NNGP",
    "NTK",
    "DecayingMachine",
    "GeneralizationBound",
    "INKEstimate",
    "KernelMachineClassifier",
    "KernelMachineRegressor",
    "NTKNetwork",
    "NTKTraining",
    "NystroemRidge",
    "NystroemRidgeClassifier",
    "RidgeLeverageNystroem",
    "certified_radius",
    "decaying_ntk",
    "decaying_ntk_descent",
    "effective_dimension",
    "generalization_bound",
    "ibp_bounds",
    "ibp_certified_radius",
    "ink_estimate",
    "kernel_diag",
    "kernel_gradient_descent",
    "kernel_gradient_flow",
    "kernel_matmul",
    "merge",
    "ntk",
    "pairwise_kernel",
    "ridge_leverage_scores",
    "train_ntk_network",
]
