"""Kernels of infinitely wide networks, kernel machines and Nyström approximation."""

from sciml.kernels.ntk import NNGP, NTK, ntk
from sciml.kernels.pairwise import kernel_diag, kernel_matmul, pairwise_kernel

__all__ = ["NNGP", "NTK", "kernel_diag", "kernel_matmul", "ntk", "pairwise_kernel"]
