"""Training without backpropagation: every layer learns from its own loss."""

from sciml.layerwise.backprop import BackpropClassifier
from sciml.layerwise.backward_memory import BackwardMemoryMonitor
from sciml.layerwise.cascaded_forward import CascadedForwardClassifier, direct_feedback_losses
from sciml.layerwise.cascaded_heads import ridge_weights
from sciml.layerwise.compare_trainers import compare_trainers
from sciml.layerwise.energy import EnergyMonitor, trapezoid_energy
from sciml.layerwise.forward_forward import ForwardForwardClassifier, embed_label, wrong_labels
from sciml.layerwise.local_losses import goodness_loss, rms_normalize, straight_through_relu
from sciml.layerwise.local_training import train_locally
from sciml.layerwise.mono_forward import MonoForwardClassifier, MonoForwardStage
from sciml.layerwise.sparsemax import sparsemax, sparsemax_loss

__all__ = [
    "BackpropClassifier",
    "BackwardMemoryMonitor",
    "CascadedForwardClassifier",
    "EnergyMonitor",
    "ForwardForwardClassifier",
    "MonoForwardClassifier",
    "MonoForwardStage",
    "compare_trainers",
    "direct_feedback_losses",
    "embed_label",
    "goodness_loss",
    "ridge_weights",
    "rms_normalize",
    "sparsemax",
    "sparsemax_loss",
    "straight_through_relu",
    "train_locally",
    "trapezoid_energy",
    "wrong_labels",
]
