"""Add one node per class to a graph and link every labelled node to the node of its class.

Class nodes carry the labels into the graph: a layer is trained to place each labelled node nearer
to its own class node than to the others. They have ids N, ..., N + C - 1, fixed random features,
and no label of their own.

References
----------
Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, arXiv:2403.11004.
"""

import copy
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.transforms import BaseTransform

from sciml._check import check_choice, check_integer, check_shape

__all__ = ["AddClassNodes", "add_class_nodes"]

DIRECTIONS = ("bidirectional", "to_class")


def class_edges(nodes: Tensor, labels: Tensor, num_nodes: int, direction: str) -> Tensor:
    """Return the edges between `nodes` and the class nodes of their `labels`.

    First all edges node -> class node, then, if bidirectional, all edges class node -> node.
    """
    to_class = torch.stack([nodes, num_nodes + labels])
    return torch.cat([to_class, to_class.flip(0)], 1) if direction == "bidirectional" else to_class


def append_labels(
    x: Tensor, nodes: Tensor, labels: Tensor, num_classes: int, *, class_nodes: bool
) -> Tensor:
    """Append `num_classes` columns: one-hot for `nodes`, uniform elsewhere.

    With `class_nodes`, the last `num_classes` rows of `x` are class nodes and get their own class.
    """
    columns = x.new_full((len(x), num_classes), 1 / num_classes)
    columns[nodes] = torch.nn.functional.one_hot(labels, num_classes).to(x.dtype)
    if class_nodes:
        columns[len(x) - num_classes :] = torch.eye(num_classes, dtype=x.dtype, device=x.device)
    return torch.cat([x, columns], 1)


def draw_class_features(num_classes: int, num_features: int, seed: int) -> Tensor:
    """Draw the fixed N(0, 1) features of the class nodes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_classes, num_features, generator=generator)


def draw_wrong_labels(labels: Tensor, num_classes: int, num_negatives: int, seed: int) -> Tensor:
    """Draw `num_negatives` distinct wrong classes for every label, shape (num_negatives, n)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(labels), num_classes, generator=generator).to(labels.device)
    # Its own class comes last in the permutation of each node, so it is never drawn.
    order.scatter_(1, labels[:, None], 2.0)
    return order.argsort(dim=1)[:, :num_negatives].T.contiguous()


def add_class_nodes(
    data: Data,
    y: Tensor | None = None,
    mask: Tensor | str = "train_mask",
    direction: str = "bidirectional",
    x_class: Tensor | None = None,
    *,
    num_classes: int | None = None,
    class_edge_attr: float | None = None,
    random_state: int | np.random.RandomState | None = None,
) -> Data:
    """Return a copy of a graph with one more node per class, linked to the labelled nodes.

    Parameters
    ----------
    data : torch_geometric.data.Data
        Graph of N nodes with ``x`` and ``edge_index``. It is not modified.
    y : LongTensor of shape (N,), optional
        Classes 0, ..., C - 1; read only where `mask` holds. None means ``data.y``.
    mask : BoolTensor of shape (N,) or str, default="train_mask"
        Nodes to link to their class node, or the name of that attribute of `data`.
    direction : {"bidirectional", "to_class"}, default="bidirectional"
        Edges both ways, as in the published experiments, or from the nodes to the class nodes only.
    x_class : Tensor of shape (C, n_features), optional
        Features of the class nodes. None draws them from N(0, 1).
    num_classes : int, optional
        C. None means the largest class in `y`, plus one.
    class_edge_attr : float, optional
        Value of every edge feature of the new edges; needed when `data` has ``edge_attr``.
    random_state : int, RandomState or None, default=None
        Draws `x_class`.

    Returns
    -------
    torch_geometric.data.Data
        Graph of N + C nodes. The new nodes have label -1 and are outside of all masks; the new
        edges stand after the old ones. ``edge_type`` is 0 for old edges, 1 + c for edges to class
        node c and 1 + C + c for edges from it; ``edge_weight``, if any, is 1 on new edges. Other
        attributes of nodes and edges are filled with zeros.

    Raises
    ------
    ValueError
        If an argument does not fit the graph, or `mask` holds for no node.

    References
    ----------
    Park et al., "Forward Learning of Graph Neural Networks", arXiv:2403.11004, section 3.

    Examples
    --------
    >>> import torch
    >>> from torch_geometric.data import Data
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> mask = torch.tensor([True, False, True])
    >>> data = Data(x=torch.ones(3, 4), edge_index=edge_index, y=torch.tensor([0, 1, 1]))
    >>> with_classes = add_class_nodes(data, mask=mask, random_state=0)
    >>> with_classes.num_nodes
    5
    >>> with_classes.edge_index[:, 4:]
    tensor([[0, 2, 3, 4],
            [3, 4, 0, 2]])
    """
    check_choice("direction", direction, DIRECTIONS)
    num_nodes = int(data.num_nodes)
    y = data.y if y is None else y
    if not isinstance(y, Tensor):
        raise ValueError(f"y must be a Tensor of classes, or data.y must hold it, got {y!r}")
    check_shape("y", y, (num_nodes,))
    if isinstance(mask, str):
        if not isinstance(data.get(mask), Tensor):
            raise ValueError(f"mask names {mask!r}, which data does not have")
    chosen: Tensor = data[mask] if isinstance(mask, str) else mask
    check_shape("mask", chosen, (num_nodes,))
    nodes = chosen.nonzero().flatten()
    if not len(nodes):
        raise ValueError("mask must hold for at least one node, got none")
    labels = y[nodes]
    if num_classes is None:
        num_classes = int(y.max()) + 1
    check_integer("num_classes", num_classes, 1)
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"y must be in 0, ..., {num_classes - 1} where mask holds, got values from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    if x_class is None:
        seed = check_random_state(random_state).randint(2**31 - 1)
        x_class = draw_class_features(num_classes, data.num_features, seed)
    check_shape("x_class", x_class, (num_classes, data.num_features))
    if data.edge_attr is not None and class_edge_attr is None:
        raise ValueError("data has edge_attr: class_edge_attr must give its value on class edges")

    new_edges = class_edges(nodes, labels, num_nodes, direction)
    kinds = 1 + torch.cat([labels, num_classes + labels])[: new_edges.shape[1]]
    out = copy.copy(data)
    for key, value in data.to_dict().items():
        if not isinstance(value, Tensor) or key in ("edge_index", "x", "y"):
            continue
        if data.is_node_attr(key):
            out[key] = _extend(value, num_classes, 0)
        elif data.is_edge_attr(key):
            fill = {"edge_weight": 1.0, "edge_attr": class_edge_attr}.get(key, 0)
            out[key] = _extend(value, new_edges.shape[1], fill)
    out.x = torch.cat([data.x, x_class.to(data.x)])
    out.y = _extend(y, num_classes, -1)
    out.edge_index = torch.cat([data.edge_index, new_edges], 1)
    out.edge_type = torch.cat([kinds.new_zeros(data.num_edges), kinds])
    if data.get("num_nodes") is not None and "num_nodes" in data.to_dict():
        out.num_nodes = num_nodes + num_classes
    return out


def _extend(value: Tensor, rows: int, fill: Any) -> Tensor:
    return torch.cat([value, value.new_full((rows, *value.shape[1:]), fill)])


@functional_transform("add_class_nodes")
class AddClassNodes(BaseTransform):
    """Add one node per class, linked to the labelled nodes of that class, to a graph.

    A PyG transform (functional name ``add_class_nodes``) around `add_class_nodes`.

    Parameters
    ----------
    mask : str, default="train_mask"
        Attribute that says which nodes are linked to their class node.
    direction : {"bidirectional", "to_class"}, default="bidirectional"
        Edges both ways or from the nodes to the class nodes only.
    x_class : Tensor of shape (C, n_features), optional
        Features of the class nodes. None draws them from N(0, 1).
    num_classes : int, optional
        C. None means the largest class in ``y``, plus one.
    class_edge_attr : float, optional
        Value of every edge feature of the new edges; needed when a graph has ``edge_attr``.
    random_state : int, RandomState or None, default=None
        Draws `x_class`; an integer gives every graph the same class features.

    See Also
    --------
    add_class_nodes : The same as a function, which says what becomes of each attribute.

    References
    ----------
    Park et al., "Forward Learning of Graph Neural Networks", arXiv:2403.11004, section 3.

    Examples
    --------
    >>> from torch_geometric.datasets import KarateClub
    >>> data = KarateClub()[0]
    >>> AddClassNodes(random_state=0)(data)
    Data(x=[38, 34], edge_index=[2, 164], y=[38], train_mask=[38], edge_type=[164])
    """

    def __init__(
        self,
        mask: str = "train_mask",
        direction: str = "bidirectional",
        x_class: Tensor | None = None,
        num_classes: int | None = None,
        class_edge_attr: float | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.mask = mask
        self.direction = direction
        self.x_class = x_class
        self.num_classes = num_classes
        self.class_edge_attr = class_edge_attr
        self.random_state = random_state

    def forward(self, data: Data) -> Data:
        """Return a graph with class nodes; see `add_class_nodes`."""
        return add_class_nodes(
            data,
            mask=self.mask,
            direction=self.direction,
            x_class=self.x_class,
            num_classes=self.num_classes,
            class_edge_attr=self.class_edge_attr,
            random_state=self.random_state,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mask={self.mask!r}, direction={self.direction!r})"
