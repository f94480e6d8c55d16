"""Small things that NumPy, torch and CuPy name differently.

Code that works on the arrays of any of the three keeps its results where its input lives.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

__all__ = [
    "Array",
    "array_library",
    "array_namespace",
    "cast_like",
    "concatenate",
    "copy_rows",
    "empty",
    "take",
    "take_block",
    "to_double",
    "to_numpy",
]

Positions = np.ndarray[Any, np.dtype[np.int64]]
Array = Any  # numpy.ndarray, torch.Tensor or cupy.ndarray


def array_library(array: Array) -> str:
    """Return "torch", "cupy" or "numpy": the library that `array` belongs to."""
    library = type(array).__module__.partition(".")[0]
    return library if library in ("torch", "cupy") else "numpy"


def array_namespace(array: Array) -> ModuleType:
    """Return the module of the library that `array` belongs to."""
    return import_module(array_library(array))


def to_numpy(array: Array) -> np.ndarray[Any, np.dtype[Any]]:
    """Copy `array` to the host as a NumPy array; NumPy arrays are returned as they are."""
    library = array_library(array)
    if library == "torch":
        return array.detach().cpu().numpy()
    if library == "cupy":
        return array.get()
    return np.asarray(array)


def to_double(array: Array) -> Array:
    """Return `array` in float64 if it is in float32, else as it is (positions stay integers)."""
    if not str(array.dtype).endswith("float32"):
        return array
    return array.double() if array_library(array) == "torch" else array.astype(np.float64)


def cast_like(values: Array, like: Array) -> Array:
    """Return `values` in the library, dtype and on the device of `like`."""
    library = array_library(like)
    if library == "torch":
        import torch

        return torch.as_tensor(values, dtype=like.dtype, device=like.device)
    if library == "cupy":
        import cupy

        return cupy.asarray(values, dtype=like.dtype)
    return np.asarray(to_numpy(values), dtype=like.dtype)


def empty(shape: tuple[int, ...], like: Array) -> Array:
    """Return an uninitialised array in the library, dtype and on the device of `like`."""
    if array_library(like) == "torch":
        return like.new_empty(shape)
    return array_namespace(like).empty(shape, dtype=like.dtype)


def concatenate(parts: Sequence[Array], axis: int = 0) -> Array:
    """Join arrays of one library."""
    return array_namespace(parts[0]).concatenate(parts, axis)


def take(rows: Array, at: Positions) -> Array:
    """Return the rows at some positions."""
    return rows[_positions(at, rows)]


def take_block(matrix: Array, rows: Positions, columns: Positions) -> Array:
    """Return the entries of some rows in some columns, shape ``(len(rows), len(columns))``."""
    return matrix[_positions(rows, matrix)[:, None], _positions(columns, matrix)]


def copy_rows(rows: Array) -> Array:
    """Copy rows, so that they do not keep the array alive which they were taken from."""
    library = array_library(rows)
    if library == "torch":
        return rows.clone()
    # The copy of a memory map by its own method would again be a memory map.
    return rows.copy() if library == "cupy" else np.array(rows, copy=True)


def _positions(at: Positions, like: Array) -> Array:
    library = array_library(like)
    if library == "torch":
        import torch

        return torch.as_tensor(at, device=like.device)
    if library == "cupy":
        import cupy

        return cupy.asarray(at)
    return at
