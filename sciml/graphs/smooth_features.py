"""Average the features of every node over its neighbourhood, several times, before training.

With few labels, most nodes are several links away from any training node, and a network that
learns layer by layer sees one more link per layer. Smoothed features, A^k x with the normalised
adjacency A of a GCN, let the first layer see k + 1 links away, without any parameter.

References
----------
Wu et al., "Simplifying Graph Convolutional Networks", ICML 2019, arXiv:1902.07153.
"""

import torch
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.transforms import BaseTransform

from sciml._check import check_integer
from sciml.graphs.checks import check_graph
from sciml.graphs.sparse_matrices import SparseRows

__all__ = ["SmoothFeatures"]


@functional_transform("smooth_features")
class SmoothFeatures(BaseTransform):
    """Multiply the node features k times by the normalised adjacency matrix of a GCN.

    A PyG transform (functional name ``smooth_features``): ``data.x`` becomes

        (D^-1/2 (A + I) D^-1/2)^k x.

    Parameters
    ----------
    k : int, default=2
        Number of multiplications; 0 changes nothing.

    See Also
    --------
    torch_geometric.nn.SGConv : The same, followed by a linear layer.
    torch_geometric.transforms.SIGN : Keeps every power, without self-loops.

    References
    ----------
    Wu et al., "Simplifying Graph Convolutional Networks", ICML 2019, arXiv:1902.07153.

    Examples
    --------
    >>> import torch
    >>> from torch_geometric.data import Data
    >>> edge_index = torch.tensor([[0, 1], [1, 0]])
    >>> data = Data(x=torch.tensor([[1.0], [0.0]]), edge_index=edge_index)
    >>> SmoothFeatures(1)(data).x
    tensor([[0.5000],
            [0.5000]])
    """

    def __init__(self, k: int = 2) -> None:
        check_integer("k", k, 0)
        self.k = k

    def forward(self, data: Data) -> Data:
        """Return the graph with smoothed features.

        Parameters
        ----------
        data : torch_geometric.data.Data
            Graph with ``x``, ``edge_index`` and perhaps ``edge_weight``.

        Returns
        -------
        torch_geometric.data.Data
            With another ``x``.

        Raises
        ------
        TypeError, ValueError
            If the graph lacks something, or its features are not finite.
        """
        check_graph(data, warn_directed=False)
        edge_index, weight = gcn_norm(
            data.edge_index, data.get("edge_weight"), len(data.x), dtype=data.x.dtype
        )
        matrix = SparseRows(edge_index, weight, len(data.x))
        x = data.x
        with torch.no_grad():
            for _ in range(self.k):
                x = matrix.matmul(x)
        data.x = x
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}(k={self.k})"
