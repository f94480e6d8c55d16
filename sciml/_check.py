"""Argument checks: one function a kind, each error naming argument, value and expectation."""

import sys
from collections.abc import Collection, Sized
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = [
    "check_choice",
    "check_finite",
    "check_integer",
    "check_interval",
    "check_same_length",
    "check_shape",
    "check_square",
]


def check_interval(
    name: str, value: Any, low: float = -np.inf, high: float = np.inf, closed: str = "both"
) -> None:
    """Raise unless `value` is a real number in the interval.

    Parameters
    ----------
    name : str
        Argument name, for the message.
    value : object
        What came.
    low, high : float
        Ends of the interval.
    closed : {"both", "left", "right", "neither"}
        Which ends belong to it.

    Raises
    ------
    TypeError
        If `value` is not a real number.
    ValueError
        If it is NaN or outside the interval.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {_type(value)}")
    left_closed, right_closed = closed in ("both", "left"), closed in ("both", "right")
    number = float(value)
    above = number >= low if left_closed else number > low
    below = number <= high if right_closed else number < high
    if not (above and below):
        interval = f"{'[' if left_closed else '('}{low}, {high}{']' if right_closed else ')'}"
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def check_integer(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> None:
    """Raise unless `value` is an integer with ``low <= value <= high``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {_type(value)}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        options = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {options}, got {value!r}")


def check_finite(name: str, array: Any) -> None:
    """Raise ValueError when an array (NumPy, torch, CuPy) holds NaN or infinity.

    A sum is finite only if all its terms are, and needs no array of flags; where it is not, which
    overflow may cause too, the entries are looked at one by one.
    """
    library = type(array).__module__.partition(".")[0]
    xp = sys.modules[library] if library in ("torch", "cupy") else np
    dtype = str(getattr(array, "dtype", "")).removeprefix("torch.")
    if dtype.startswith(("float", "bfloat", "complex")):
        values = array.detach() if library == "torch" else array
        with np.errstate(over="ignore", invalid="ignore"):
            if bool(xp.isfinite(values.sum())):
                return
    if not bool(xp.isfinite(array).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity among its values")


def check_shape(name: str, array: Any, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `array.shape` matches `shape`, where None fits any length."""
    got = tuple(array.shape)
    fits = len(got) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, got, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {got}")


def check_square(name: str, array: Any) -> None:
    """Raise ValueError unless `array` is a square matrix."""
    if len(array.shape) != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(array.shape)}")


def check_same_length(**arrays: Sized) -> None:
    """Raise ValueError unless all arrays have the same first dimension."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise ValueError(f"{', '.join(arrays)} must have the same length, but {listed}")


def _type(value: Any) -> str:
    return type(value).__name__
