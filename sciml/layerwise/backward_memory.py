"""Count the bytes that autograd keeps between a forward and its backward pass."""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

__all__ = ["BackwardMemoryMonitor"]


class BackwardMemoryMonitor:
    """Measure the most bytes that were saved for backward passes at one time.

    Counts tensors that autograd saves in the forward passes of this thread while the monitor is
    entered, until their graph is freed; a tensor saved by several operations counts once.
    Parameters do not count, since they occupy memory anyway. Unlike the figures of an allocator
    the number is the same on every device and in every run.

    Attributes
    ----------
    peak_bytes : int
        The most bytes at one time.
    total_bytes : int
        Bytes saved altogether.

    References
    ----------
    Spyra, "Beyond Backpropagation", arXiv:2509.19063, which compares the memory of such trainers
    by the whole device's.

    Examples
    --------
    >>> import torch
    >>> from sciml.layerwise import BackwardMemoryMonitor
    >>> x = torch.ones(10, requires_grad=True)
    >>> with BackwardMemoryMonitor() as memory:
    ...     y = (2 * x).exp()  # saves its output, 10 numbers of 4 bytes
    >>> memory.peak_bytes
    40
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.total_bytes = 0
        self._current = 0
        self._count: dict[tuple[int, int, int], int] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def __enter__(self) -> Self:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._hooks is not None  # for mypy: __enter__ has set it
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> "_Saved":
        return _Saved(self, tensor)

    def _add(self, key: tuple[int, int, int], size: int) -> None:
        self._count[key] = self._count.get(key, 0) + 1
        if self._count[key] == 1:
            self.total_bytes += size
            self._current += size
            self.peak_bytes = max(self.peak_bytes, self._current)

    def _remove(self, key: tuple[int, int, int], size: int) -> None:
        self._count[key] -= 1
        if not self._count[key]:
            del self._count[key]
            self._current -= size


class _Saved:
    """A saved tensor, which is counted as long as this object lives: until its graph is freed."""

    __slots__ = ("key", "monitor", "size", "tensor")

    def __init__(self, monitor: BackwardMemoryMonitor, tensor: Tensor) -> None:
        # Detached, because a node that holds its own output would never be freed.
        self.tensor = tensor.detach()
        self.monitor = monitor
        base = tensor._base if tensor._base is not None else tensor
        parameter = base.is_leaf and base.requires_grad
        storage = tensor.untyped_storage()
        # A view saves no more than itself, an expanded tensor no more than its storage.
        self.size = 0 if parameter else min(tensor.nbytes, storage.nbytes())
        self.key = (storage.data_ptr(), int(tensor.storage_offset()), self.size)
        monitor._add(self.key, self.size)

    def __del__(self) -> None:
        self.monitor._remove(self.key, self.size)


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor
