"""Training without backpropagation: every layer learns from its own loss."""

from sciml.layerwise.local_training import train_locally

__all__ = ["train_locally"]
