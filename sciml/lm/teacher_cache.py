"""A teacher's responses and their most probable tokens, kept on disk.

A teacher that writes its responses once need not run in training: what a divergence asks of it,
its distribution at every response token, is cut to the k most probable tokens and the mass of the
others, and read back from memory-mapped files.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sciml._checkpoint import save_checkpoint

from .divergences import TopKLogProbs

__all__ = ["TeacherCache"]


class TeacherCache:
    """Responses and top-k log-probabilities in a folder of safetensors files, one a batch."""

    def __init__(self, folder: Path, description: dict[str, Any], n_prompts: int) -> None:
        self.folder, self.description, self.n_prompts = folder, description, n_prompts
        self.batch_size = int(description["batch_size"])

    def _path(self, shard: int) -> Path:
        return self.folder / f"teacher-{shard:05d}.safetensors"

    def has(self, shard: int) -> bool:
        """Whether the file is there; raise if it belongs to something else."""
        if not self._path(shard).exists():
            return False
        stored = self._metadata(shard)
        differ = sorted(k for k in self.description if stored.get(k) != self.description[k])
        if differ:
            raise ValueError(
                f"teacher_cache {os.fspath(self.folder)!r} was made with other "
                f"{', '.join(differ)}: use another folder or delete it"
            )
        return True

    def _metadata(self, shard: int) -> dict[str, Any]:
        with safe_open(self._path(shard), framework="pt") as file:
            return json.loads((file.metadata() or {}).get("json", "{}"))

    def write(
        self, shard: int, responses: Sequence[Tensor], top: TopKLogProbs, mask: Tensor
    ) -> None:
        """Write one batch: responses, and log-probabilities where the mask is set."""
        tensors = {
            "response_ids": torch.cat(list(responses)),
            "lengths": torch.tensor([len(r) for r in responses]),
            "log_probs": top.log_probs[mask].float(),
            "indices": top.indices[mask].to(torch.int32),
            "log_tail": top.log_tail[mask].float(),
        }
        save_checkpoint(self._path(shard), tensors, self.description)

    def open(self) -> None:
        """Map all files into memory; rows are read when needed."""
        n_shards = math.ceil(self.n_prompts / self.batch_size)
        self._files = [safe_open(self._path(i), framework="pt") for i in range(n_shards)]
        lengths = [file.get_tensor("lengths") for file in self._files]
        self._bounds = [torch.cat([torch.zeros(1).long(), n.cumsum(0)]).tolist() for n in lengths]

    def _read(self, name: str, index: int) -> Tensor:
        shard, row = divmod(index, self.batch_size)
        start, stop = self._bounds[shard][row : row + 2]
        return cast(Tensor, self._files[shard].get_slice(name)[start:stop])

    def __getitem__(self, index: int) -> Tensor:
        return self._read("response_ids", index)

    def log_probs(self, index: np.ndarray, n_response: int, device: torch.device) -> TopKLogProbs:
        """Rows of some prompts, cut or padded to a length."""

        def rows(name: str) -> Tensor:
            parts = [self._read(name, int(i))[:n_response] for i in index]
            padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
            missing = n_response - padded.shape[1]
            return nn.functional.pad(padded, (0, 0, 0, missing)).to(device)

        return TopKLogProbs(
            rows("log_probs"),
            rows("indices").long(),
            rows("log_tail"),
            float(self.description["temperature"]),
        )
