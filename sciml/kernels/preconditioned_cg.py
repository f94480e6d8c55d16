"""Conjugate gradients for kernel least squares that never stores the n x m kernel matrix.

Falkon [1]_ solves ``(Z'WZ + alpha I) theta = Z'W y`` for Nyström features ``z = L^{-1} S k`` by
conjugate gradients. A product with ``Z'WZ`` is two passes over tiles of kernel values and two
triangular solves, O(n m + m^2). The preconditioner is the Cholesky factor of the same system
with the sum over all rows replaced by a sum over the landmarks, which brings the number of
iterations from the order of ``sqrt(n/alpha)`` to that of ``log n``.

References
----------
.. [1] A. Rudi, L. Carratino, L. Rosasco, "FALKON: An optimal large scale kernel method", NeurIPS
   2017. arXiv:1705.10958
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sciml.kernels.arrays import Array, cast_like, to_double, to_numpy

__all__ = ["KernelTiles", "Solution", "preconditioned_cg"]

Matrix = NDArray[np.float64]


class Solution(NamedTuple):
    """Where conjugate gradients ended: solution, iterations, largest relative residual."""

    x: Matrix
    n_iter: int
    residual: float


def preconditioned_cg(
    apply: Callable[[Matrix], Matrix],
    target: Matrix,
    precondition: Callable[[Matrix], Matrix],
    *,
    tol: float = 1e-6,
    max_iter: int = 100,
    verbose: int = 0,
) -> Solution:
    """Solve ``A x = target`` for several right sides at once, A symmetric positive definite.

    Parameters
    ----------
    apply : callable
        ``apply(v)`` returns ``A v`` for v of shape (m, k).
    target : ndarray of shape (m, k)
        Right sides, each of which has its own step lengths.
    precondition : callable
        ``precondition(v)`` returns an approximation of ``A^{-1} v``, symmetric positive definite.
    tol : float, default=1e-6
        Relative residual, of the worst right side, to stop at.
    max_iter : int, default=100
        Iterations at most.
    verbose : int, default=0
        With 1, show a progress bar.

    Returns
    -------
    Solution
        ``(x, n_iter, residual)``; the caller decides what a residual above `tol` means. The
        residual is the one that the recurrence updates.
    """
    x = np.zeros_like(target)
    residual = target.copy()
    z = precondition(residual)
    direction = z.copy()
    energy = (residual * z).sum(0)
    scale = np.maximum(np.linalg.norm(target, axis=0), np.finfo(float).tiny)
    worst = float((np.linalg.norm(residual, axis=0) / scale).max())
    n_iter = 0
    with tqdm(total=max_iter, disable=not verbose, unit="iteration") as bar:
        while worst > tol and n_iter < max_iter:
            image = apply(direction)
            curvature = (direction * image).sum(0)
            # A right side that is solved already has a direction of length zero.
            step = np.divide(energy, curvature, out=np.zeros_like(energy), where=curvature > 0)
            x += step * direction
            residual -= step * image
            z = precondition(residual)
            before, energy = energy, (residual * z).sum(0)
            ratio = np.divide(energy, before, out=np.zeros_like(energy), where=before > 0)
            direction = z + ratio * direction
            worst = float((np.linalg.norm(residual, axis=0) / scale).max())
            n_iter += 1
            bar.set_postfix(residual=f"{worst:.1e}", refresh=False)
            bar.update()
    return Solution(x, n_iter, worst)


class KernelTiles:
    """Products with the n x m kernel matrix between rows and landmarks, in tiles of rows.

    Parameters
    ----------
    kernel : callable
        ``kernel(start, stop, out)`` writes, or returns if `out` is None, the kernel values of
        the rows in between with all landmarks, an array of shape (stop - start, m).
    n_rows : int
        Number of rows.
    n_landmarks : int
        Number of landmarks.
    cache_bytes : float
        Tiles are kept for the next product while they fit in this; the others are computed
        anew, in one buffer.
    scale : ndarray of shape (n,) or None
        Row i of the kernel matrix is multiplied by ``scale[i]``: square roots of weights.
    height : int, default=2048
        Rows of a tile.
    """

    def __init__(
        self,
        kernel: Callable[[int, int, Array | None], Array],
        n_rows: int,
        n_landmarks: int,
        *,
        cache_bytes: float,
        scale: Matrix | None = None,
        height: int = 2048,
    ) -> None:
        self.kernel, self.scale = kernel, scale
        self.n_rows, self.n_landmarks, self.height = n_rows, n_landmarks, height
        self.left = cache_bytes
        self.kept: dict[int, Array] = {}
        self.buffer: Array | None = None

    def __iter__(self) -> Iterator[tuple[int, Array]]:
        """Yield the first row and the (scaled) kernel values of each tile."""
        for start in range(0, self.n_rows, self.height):
            stop = min(start + self.height, self.n_rows)
            tile = self.kept.get(start)
            if tile is None:
                if self.buffer is None:
                    tile = self.kernel(start, stop, None)
                else:
                    tile = self.kernel(start, stop, self.buffer[: stop - start])
                if self.scale is not None:
                    tile *= cast_like(self.scale[start:stop], tile)[:, None]
                size = tile.shape[0] * tile.shape[1] * tile.itemsize
                if size <= self.left and self.buffer is None:
                    self.kept[start] = tile
                    self.left -= size
                elif self.buffer is None and stop - start == self.height:
                    self.buffer = tile
            yield start, tile

    def moment(self, targets: Callable[[int, Array], Array]) -> Matrix:
        """Compute ``C' Y``, in float64, from ``targets(start, tile)``, the rows of Y."""
        total: Array = 0.0
        for start, C in self:
            total = total + to_double(C.T @ targets(start, C))
        return to_numpy(total)

    def gram(self, V: Matrix) -> Matrix:
        """Compute ``C' C V``, in float64, for V of shape (m, k)."""
        total: Array = 0.0
        v: Array = None
        for _, C in self:
            v = cast_like(V, C) if v is None else v
            total = total + to_double(C.T @ (C @ v))
        return to_numpy(total)
