"""Kernels of infinitely wide networks, kernel machines and Nyström approximation."""

__all__: list[str] = []
