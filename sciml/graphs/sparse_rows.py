"""Sparse matrices of edges, of which some rows at a time can be multiplied."""

import warnings

import torch
from scipy import sparse
from torch import Tensor

__all__ = ["SparseRows", "csr_tensor", "entries_of_rows", "row_starts"]


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
