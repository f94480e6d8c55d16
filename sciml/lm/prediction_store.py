"""Keep the last prediction of every training sample, in memory or in files larger than memory.

A checkpoint of a model that learns from its earlier predictions has to hold these too. In memory
they are part of the state dict. In files that would copy gigabytes, so every row has two places
there: what a state dict refers to is not written over until the next state dict is taken, and a run
that was killed resumes from the very rows it had at its checkpoint.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .._check import check_integer

__all__ = ["PredictionStore", "gather_rows"]

_NEVER = 255  # place of a row that was not written yet
_NUMPY = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int32: np.int32,
    torch.int64: np.int64,
}


class PredictionStore(nn.Module):
    """Table with a row per training sample (or token) and one or more fields a row.

    It stays on its device and in its dtypes when a module that holds it is moved or cast.

    Parameters
    ----------
    n_rows : int
        Number of rows.
    fields : mapping of str to (int, torch.dtype)
        Width and dtype of each field.
    device : str or torch.device, default="cpu"
        Where the table lies. Files can be read from the CPU alone.
    path : path, default=None
        Folder for the table, one .npy file a field of twice its size, mapped into memory; made
        when missing. A folder left by an earlier run is used again: `load_state_dict` finds the
        rows of that run's last state dict, a new run writes over them. None: in memory.

    Raises
    ------
    ValueError
        If `path` holds a table of another shape or dtype.
    """

    def __init__(
        self,
        n_rows: int,
        fields: Mapping[str, tuple[int, torch.dtype]],
        *,
        device: str | torch.device = "cpu",
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_integer("n_rows", n_rows, 1)
        self.n_rows = n_rows
        self.path = None if path is None else Path(path)
        self.device = torch.device(device)
        for name, (width, dtype) in fields.items():
            check_integer(f"width of {name}", width, 1)
            if dtype not in _NUMPY:
                raise ValueError(f"dtype must be one of {list(_NUMPY)}, got {dtype}")
        self._fields = dict(fields)
        slot = torch.full((n_rows,), _NEVER, dtype=torch.uint8, device=self.device)
        self.register_buffer("slot", slot)
        if self.path is None:
            for name, (width, dtype) in fields.items():
                table = torch.zeros(1, n_rows, width, dtype=dtype, device=self.device)
                self.register_buffer(name, table)
            return
        if self.device.type != "cpu":
            raise ValueError(f"device must be 'cpu' for a table in files, got {str(device)!r}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: _open(self.path / f"{name}.npy", (2, n_rows, width), _NUMPY[dtype])
            for name, (width, dtype) in fields.items()
        }
        # Counts the state dicts taken of these files: only the newest can be gone back to.
        self._generation_file = _open(self.path / "generation.npy", (1,), np.int64)
        self.register_buffer("generation", torch.tensor(int(self._generation_file[0])))
        self._kept = slot.clone()
        self._written = False
        self._fresh = True

    def _apply(self, fn: Any, recurse: bool = True) -> "PredictionStore":
        return self

    def extra_repr(self) -> str:
        """Describe the table."""
        fields = ", ".join(f"{name}={width}" for name, (width, _) in self._fields.items())
        return f"{self.n_rows} rows, {fields}" + ("" if self.path is None else f", {self.path}")

    def read(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Read rows.

        Parameters
        ----------
        index : LongTensor of shape (n,)
            Rows, on any device.

        Returns
        -------
        fields : dict of str to Tensor of shape (n, width)
            On the device of `index`.
        seen : BoolTensor of shape (n,)
            Whether the row was ever written; if not, its fields mean nothing.
        """
        rows = index.to(self.device)
        slot = cast(Tensor, self.slot)[rows]
        seen = slot != _NEVER
        place = torch.where(seen, slot, 0).long()
        fields = {name: self._table(name)[place, rows].to(index.device) for name in self._fields}
        return fields, seen.to(index.device)

    @torch.no_grad()
    def write(self, index: Tensor, **fields: Tensor) -> None:
        """Write rows.

        Parameters
        ----------
        index : LongTensor of shape (n,)
            Rows, each at most once.
        **fields : Tensor of shape (n, width)
            All the fields.
        """
        rows, slot = index.to(self.device), cast(Tensor, self.slot)
        if self.path is None:
            place = torch.zeros_like(rows)
        else:
            if self._fresh:  # what earlier state dicts refer to is written over from now on
                self._count()
                self._fresh = False
            place = torch.where(self._kept[rows] == 0, 1, 0)
            self._written = True
        for name, values in fields.items():
            table = self._table(name)
            table[place, rows] = values.to(device=self.device, dtype=table.dtype)
        slot[rows] = place.to(torch.uint8)

    def _table(self, name: str) -> Tensor:
        """Return the table of a field, of shape (places, n_rows, width)."""
        if self.path is None:
            return cast(Tensor, getattr(self, name))
        return torch.from_numpy(self._files[name])

    def _count(self) -> None:
        generation = cast(Tensor, self.generation)
        self._generation_file[0] += 1
        self._generation_file.flush()
        generation.fill_(int(self._generation_file[0]))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.path is not None and self._written:
            for file in self._files.values():
                file.flush()
            self._count()
            self._kept = cast(Tensor, self.slot).clone()
            self._written = False
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.path is not None:  # views of buffers that go on changing
            for name in ("slot", "generation"):
                destination[prefix + name] = destination[prefix + name].clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.path is not None and prefix + "generation" in state_dict:
            wanted, found = int(state_dict[prefix + "generation"]), int(self._generation_file[0])
            if wanted != found:
                raise ValueError(
                    f"path must hold the predictions of this checkpoint, but {self.path} was "
                    f"written over since (state {found}, the checkpoint's is {wanted}); only the "
                    "newest state dict of a table in files can be loaded"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.path is not None:
            self._kept = cast(Tensor, self.slot).clone()
            self._written = self._fresh = False


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenate tensors of all processes along the first dimension, in the order of the ranks.

    Without torch.distributed, or with one process, they are returned as they are. The first
    dimension may differ between processes.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensors
    world_size = distributed.get_world_size()
    if world_size == 1:
        return tensors
    n = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.zeros_like(n) for _ in range(world_size)]
    distributed.all_gather(counts, n)
    sizes = [int(count) for count in counts]
    result = []
    for tensor in tensors:
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        result.append(torch.cat([part[:k] for part, k in zip(parts, sizes, strict=True)]))
    return tuple(result)


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap[Any, Any]:
    if not path.exists():
        return np.lib.format.open_memmap(path, mode="w+", shape=shape, dtype=dtype)
    try:
        file = np.lib.format.open_memmap(path, mode="r+")
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no .npy file: {error}") from error
    if file.shape != shape or file.dtype != dtype:
        raise ValueError(
            f"{path} must hold {np.dtype(dtype)} of shape {shape} for these settings, got "
            f"{file.dtype} of shape {file.shape}; give another path"
        )
    return file
