"""Join what is made of the chunks of a data set, two by two, here or on a Dask cluster.

Merging is associative in distribution: any tree over the chunks gives a result as good as any
other. A balanced one lets each chunk go through few merges, and needs few parts at a time.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm.auto import tqdm

__all__ = ["chunks_of", "is_dask", "merge_chunks", "merge_dask"]

Make = Callable[[Any, int], Any]
Join = Callable[[Any, Any, int], Any]


def chunks_of(X: Any) -> Any:
    """Return X if it is a Dask array or comes in two-dimensional chunks, else None."""
    if is_dask(X):
        return X
    if isinstance(X, (list, tuple)):
        return X if X and all(getattr(chunk, "ndim", 0) == 2 for chunk in X) else None
    return X if isinstance(X, Iterator) else None


def is_dask(X: Any) -> bool:
    """Whether X is a Dask array."""
    return "dask" in sys.modules and hasattr(X, "to_delayed") and hasattr(X, "chunks")


def merge_chunks(
    chunks: Iterable[Any],
    make: Make,
    join: Join,
    rng: np.random.RandomState,
    *,
    verbose: int = 0,
) -> Any:
    """Make a part of each chunk, and join equal levels at once, so that few parts are held.

    Parameters
    ----------
    chunks : iterable
        Chunks, one at a time.
    make : callable
        ``make(chunk, seed)`` returns a part.
    join : callable
        ``join(part, part, seed)`` returns a part for both.
    rng : numpy.random.RandomState
        Draws the seeds.
    verbose : int, default=0
        With 1, show a progress bar over the chunks.

    Returns
    -------
    object
        Part for all chunks.

    Raises
    ------
    ValueError
        If there is no chunk.
    """
    stack: list[tuple[int, Any]] = []
    for chunk in tqdm(chunks, disable=not verbose, unit="chunk"):
        part, level = make(chunk, _seed(rng)), 0
        while stack and stack[-1][0] == level:
            part = join(stack.pop()[1], part, _seed(rng))
            level += 1
        stack.append((level, part))
    if not stack:
        raise ValueError("X must hold at least one chunk, got none")
    part = stack.pop()[1]
    while stack:
        part = join(stack.pop()[1], part, _seed(rng))
    return part


def merge_dask(array: Any, make: Make, join: Join, rng: np.random.RandomState) -> Any:
    """Do the same for the row blocks of a Dask array, on the client that is active."""
    from dask.base import compute
    from dask.delayed import delayed

    if len(array.chunks[1]) > 1:
        array = array.rechunk({1: -1})
    parts = [delayed(make)(block, _seed(rng)) for block in array.to_delayed()[:, 0]]
    while len(parts) > 1:
        parts = [
            delayed(join)(*parts[i : i + 2], _seed(rng)) if i + 1 < len(parts) else parts[i]
            for i in range(0, len(parts), 2)
        ]
    (part,) = compute(parts[0])
    return part


def _seed(rng: np.random.RandomState) -> int:
    return int(rng.randint(2**31))
