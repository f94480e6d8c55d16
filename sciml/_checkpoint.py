"""Checkpoints in one safetensors file, written atomically: tensors, optimiser state, metadata.

A checkpoint is either the old one or the new one, never half of either, and loading it runs no
code: there is no pickle in it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load_checkpoint", "load_optimizer", "optimizer_state", "save_checkpoint"]


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and JSON-serialisable metadata to `path`, replacing what is there.

    Parameters
    ----------
    path : path
        File to write. Its folder is created when missing.
    tensors : mapping of str to Tensor
        Tensors on any device.
    metadata : mapping
        Whatever `json.dumps` takes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    save_file(plain, part, metadata={"json": json.dumps(dict(metadata))})
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    tensors : dict of str to Tensor
        On the CPU.
    metadata : dict

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged or was not written by `save_checkpoint`.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    if "json" not in metadata:
        raise ValueError(f"{path} holds tensors but no metadata; it is no checkpoint of sciml")
    return tensors, json.loads(metadata["json"])


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors and JSON-serialisable values.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimiser whose state holds tensors and plain numbers.

    Returns
    -------
    tensors : dict of str to Tensor
        Named ``"optimizer.<parameter>.<key>"``.
    values : dict
        The parameter groups and the state that is not tensors.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                values["state"].setdefault(str(index), {})[key] = value
    return tensors, values


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` took out.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Optimiser over parameters of the same shapes in the same order.
    tensors : mapping of str to Tensor
        Names that do not begin with ``"optimizer."`` are ignored.
    values : mapping
        As `optimizer_state` returned.
    """
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entry) for index, entry in values["state"].items()
    }
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": list(values["param_groups"])})
