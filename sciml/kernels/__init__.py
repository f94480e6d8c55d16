"""Kernels of infinitely wide networks, kernel machines and Nyström approximation."""

from sciml.kernels.pairwise import kernel_diag, kernel_matmul, pairwise_kernel

__all__ = ["kernel_diag", "kernel_matmul", "pairwise_kernel"]
