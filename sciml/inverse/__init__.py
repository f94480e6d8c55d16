"""Learned priors and reconstruction for inverse problems."""

__all__: list[str] = []
