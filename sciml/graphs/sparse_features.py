"""Multiply aggregated sparse features by weights without filling the zeros in.

Bags of words are sparse, and so is their average over neighbours, but the class nodes have dense
features and would fill every row they reach. With D the few dense rows of x,

    A x W = S W + A[:, D] (x[D] W),      S = A x without the rows D: sparse.
"""

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.autograd.function import once_differentiable

from sciml.graphs.sparse_rows import csr_tensor

__all__ = ["FactoredRows", "factor_product"]

# Sparse products were faster than dense ones below this share of non-zeros.
MAX_DENSITY = 0.12


class FactoredRows:
    """A matrix S + U V with S sparse, U of few columns, which multiplies weights from the left.

    Parameters
    ----------
    s : scipy.sparse.csr_matrix of shape (n, n_features)
    u : Tensor of shape (n, k)
    v : Tensor of shape (k, n_features)
    """

    def __init__(self, s: sparse.csr_matrix, u: Tensor, v: Tensor) -> None:
        self.s, self.u, self.v = s, u, v
        self._pair: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.u)

    def __getitem__(self, rows: Tensor) -> "FactoredRows":
        return FactoredRows(self.s[rows.numpy()], self.u[rows], self.v)

    def times(self, weight: Tensor) -> Tensor:
        """Return the product with a weight of shape (n_features, n_channels)."""
        if self._pair is None:
            self._pair = csr_tensor(self.s), csr_tensor(self.s.T.tocsr())
        return _SparseProduct.apply(weight, *self._pair) + self.u @ (self.v @ weight)


class _SparseProduct(torch.autograd.Function):
    """Constant sparse matrix times weight; the transpose is kept, so that both ways are fast."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, s: Tensor, s_transposed: Tensor) -> Tensor:
        ctx.s_transposed = s_transposed
        return s @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.s_transposed @ grad, None, None


def factor_product(a: sparse.csr_matrix, x: Tensor) -> FactoredRows | None:
    """Return the product A x in factored form, or None where a dense product would be faster.

    Parameters
    ----------
    a : scipy.sparse.csr_matrix of shape (n, m)
    x : Tensor of shape (m, n_features)
        On the CPU.
    """
    filled = (x != 0).sum(1)
    dense = (filled > MAX_DENSITY * x.shape[1]).nonzero().flatten()
    if x.device.type != "cpu" or len(dense) > 0.1 * x.shape[1] or not x.shape[1]:
        return None
    kept = x.clone()
    kept[dense] = 0
    s = sparse.csr_matrix(a @ sparse.csr_matrix(kept.numpy()))
    if s.nnz > MAX_DENSITY * np.prod(s.shape):
        return None
    u = torch.as_tensor(a[:, dense.numpy()].toarray()).to(x.dtype)
    return FactoredRows(s, u, x[dense])
