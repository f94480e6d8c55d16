"""Turn stages trained by local losses into a `BasicGNN`, to be fine-tuned by backpropagation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from sciml.graphs.stages import GraphStage, unit_rows

__all__ = ["to_basic_gnn"]


class UnitRowsConv(nn.Module):
    """Scale the rows of the input to norm 1, then convolve."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the convolution of the scaled features."""
        extra = {"edge_weight": edge_weight, "edge_attr": edge_attr}
        given = {key: value for key, value in extra.items() if value is not None}
        return self.conv(unit_rows(x), edge_index, **given)

    def reset_parameters(self) -> None:
        """Draw new initial parameters."""
        self.conv.reset_parameters()


class StagesGNN(BasicGNN):
    """A `BasicGNN` of given stages and a linear output layer."""

    supports_edge_weight = False
    supports_edge_attr = False

    def __init__(
        self, stages: Sequence[GraphStage], in_channels: int, width: int, num_classes: int
    ) -> None:
        # The convolutions are there already; BasicGNN asks for them one by one.
        self._given = iter([UnitRowsConv(stage.conv) for stage in stages])
        super().__init__(in_channels, width, len(stages), num_classes, act=None, jk="last")
        del self._given
        self.supports_edge_weight = all(stage.takes_edge_weight for stage in stages)
        self.supports_edge_attr = all(stage.takes_edge_attr for stage in stages)
        self.norms = nn.ModuleList(nn.Sequential(*stage.after) for stage in stages)

    def init_conv(self, in_channels: Any, out_channels: int, **kwargs: Any) -> nn.Module:
        """Return the next of the given convolutions."""
        return next(self._given)


def to_basic_gnn(
    stages: Sequence[GraphStage], in_channels: int, class_embedding: Tensor, temperature: float
) -> BasicGNN:
    """Return a `BasicGNN` whose output layer holds the class embeddings of the last stage.

    Parameters
    ----------
    stages : sequence of GraphStage
        Copied by the caller, as they become part of the result.
    in_channels : int
    class_embedding : Tensor of shape (n_classes, n_channels)
    temperature : float

    Returns
    -------
    BasicGNN
    """
    num_classes, width = class_embedding.shape
    gnn = StagesGNN(stages, in_channels, width, num_classes)
    with torch.no_grad():
        gnn.lin.weight.copy_(class_embedding / temperature)
        gnn.lin.bias.zero_()
    gnn.to(class_embedding)
    return gnn
