"""Training without backpropagation: every layer learns from its own loss."""

__all__: list[str] = []
