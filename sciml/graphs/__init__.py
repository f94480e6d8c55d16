"""Graph neural networks trained layer by layer."""

from sciml.graphs.class_nodes import AddClassNodes, add_class_nodes
from sciml.graphs.forward_forward import ff_loss, goodness
from sciml.graphs.forward_gnn import ForwardGNNClassifier
from sciml.graphs.link_prediction import ForwardGNNLinkPredictor
from sciml.graphs.smooth_features import SmoothFeatures
from sciml.graphs.stages import GraphStage, unit_rows

__all__ = [
    "AddClassNodes",
    "ForwardGNNClassifier",
    "ForwardGNNLinkPredictor",
    "GraphStage",
    "SmoothFeatures",
    "add_class_nodes",
    "ff_loss",
    "goodness",
    "unit_rows",
]
