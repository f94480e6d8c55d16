"""Sparse matrices: edges of which some rows are multiplied, and features whose zeros stay zeros.

Bags of words are sparse, and so is their average over neighbours, but the class nodes have dense
features and would fill every row they reach. With D the few dense rows of x,

    A x W = S W + A[:, D] (x[D] W),      S = A x without the rows D: sparse.
"""

import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["FactoredRows", "SparseRows", "entries_of_rows", "factor_product", "row_starts"]

# Sparse products were faster than dense ones below this share of non-zeros.
MAX_DENSITY = 0.12


def csr_tensor(matrix: sparse.csr_matrix) -> Tensor:
    """Return a SciPy matrix as a torch CSR tensor."""
    return _csr(
        torch.as_tensor(matrix.indptr).long(),
        torch.as_tensor(matrix.indices).long(),
        torch.as_tensor(matrix.data),
        matrix.shape,
    )


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, size=shape, check_invariants=False)


class SparseRows:
    """Sparse matrix with one entry per edge, in the row of its target.

    Parameters
    ----------
    edge_index : LongTensor of shape (2, n_edges)
        Sources (columns) and targets (rows).
    values : Tensor of shape (n_edges,)
    n_rows : int
    """

    def __init__(self, edge_index: Tensor, values: Tensor, n_rows: int) -> None:
        order = torch.argsort(edge_index[1] * n_rows + edge_index[0])
        self.columns = edge_index[0][order]
        self.values = values[order]
        self.starts = row_starts(edge_index[1], n_rows)

    def matmul(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the product with `x`, or only the given rows of it."""
        starts, columns, values = self.starts, self.columns, self.values
        if rows is not None:
            entries, counts = entries_of_rows(starts, rows)
            starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            columns, values = columns[entries], values[entries]
        return _csr(starts, columns, values.to(x.dtype), (len(starts) - 1, len(x))) @ x

    def scipy(self) -> sparse.csr_matrix:
        """Return the matrix for SciPy."""
        parts = (self.values.numpy(), self.columns.numpy(), self.starts.numpy())
        return sparse.csr_matrix(parts, shape=(len(self.starts) - 1,) * 2)


def row_starts(targets: Tensor, n_rows: int) -> Tensor:
    """Return where the entries of each row start once they are sorted by row."""
    counts = torch.bincount(targets, minlength=n_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def entries_of_rows(starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of all entries of `rows`, row after row, and their number in each row."""
    first, counts = starts[rows], starts[rows + 1] - starts[rows]
    ends = counts.cumsum(0)
    within = torch.arange(int(counts.sum()), device=rows.device)
    return within + (first - (ends - counts)).repeat_interleave(counts), counts


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
