"""Prompts and responses: drawing responses from a model, and padding both into a batch."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .reference_model import unwrap_model
from .token_reduction import IGNORE_INDEX

__all__ = [
    "DistillationBatch",
    "fingerprint",
    "pad_batch",
    "pad_left",
    "sample_responses",
    "seeded",
]


@dataclass(frozen=True)
class DistillationBatch:
    """Prompts with a response each, padded: prompts on the left, responses on the right.

    Attributes
    ----------
    index : ndarray of int of shape (batch,)
        Positions of the prompts in the list given to ``fit``.
    input_ids, attention_mask, position_ids : LongTensor of shape (batch, n_prompt + n_response)
    response_mask : BoolTensor of shape (batch, n_response)
        Tokens of the responses; the end-of-sequence token counts, padding does not.
    weights : Tensor of shape (batch,)
        Weight of each prompt in the loss.
    prefix : {"student", "teacher"}
        Who wrote the responses.
    step : int
        Optimiser steps done before this one.
    """

    index: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_mask: Tensor
    weights: Tensor
    prefix: str
    step: int

    @property
    def n_prompt(self) -> int:
        """Columns of the prompts."""
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def labels(self) -> Tensor:
        """The response tokens, of shape (batch, n_response), -100 where there is none."""
        responses = self.input_ids[:, self.n_prompt :]
        return responses.masked_fill(~self.response_mask, IGNORE_INDEX)

    def rows(self, chosen: slice) -> "DistillationBatch":
        """Some of the prompts, as padded as they were."""
        tensors = ("input_ids", "attention_mask", "position_ids", "response_mask", "weights")
        return replace(
            self, index=self.index[chosen], **{n: getattr(self, n)[chosen] for n in tensors}
        )


def sample_responses(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    seed: int,
) -> list[Tensor]:
    """Responses of a causal language model, drawn in one batch from its own distribution.

    The model's own generation settings (top-k, penalties) are put aside, since they would draw
    from another distribution than the one that a loss differentiates.

    Parameters
    ----------
    model : torch.nn.Module
        With the ``generate`` of transformers; it runs in evaluation mode.
    prompts : sequence of LongTensor
    max_new_tokens : int
    temperature : float, default=1.0
        0 takes the most probable token.
    eos_token_ids : sequence of int, default=()
        A response ends with the first of them; none lets every response run to the cap.
    pad_token_id : int, default=0
    seed : int
        Determines the draw; torch's global generators are left as they were.

    Returns
    -------
    list of LongTensor
        On the CPU, of 1 to `max_new_tokens` tokens each.
    """
    from transformers import GenerationConfig

    inner = cast(Any, unwrap_model(model))  # PEFT's generate takes its settings elsewhere
    device = next(model.parameters()).device
    eos = list(eos_token_ids)
    n_prompt = max(len(prompt) for prompt in prompts)
    input_ids, attention_mask = pad_left(prompts, n_prompt, pad_token_id)
    drawn = temperature > 0
    config = GenerationConfig(
        do_sample=drawn,
        temperature=temperature if drawn else 1.0,
        top_k=0 if drawn else None,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=eos or None,
    )
    was_training, own = model.training, inner.generation_config
    model.eval()
    try:
        inner.generation_config = config
        with torch.no_grad(), seeded(seed, device):
            output = inner.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
            )
    finally:
        inner.generation_config = own
        model.train(was_training)
    responses = []
    for row in output[:, n_prompt:].cpu():
        ends = torch.isin(row, torch.tensor(eos)).nonzero() if eos else row[:0]
        responses.append(row[: int(ends[0]) + 1] if len(ends) else row)
    return responses


def pad_batch(
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    index: np.ndarray,
    weights: np.ndarray,
    prefix: str,
    step: int,
    pad_token_id: int,
    device: torch.device,
) -> DistillationBatch:
    """Pad prompts on the left and responses on the right, and say where what is."""
    left, left_mask = pad_left(prompts, max(len(p) for p in prompts), pad_token_id)
    right = nn.utils.rnn.pad_sequence(list(responses), batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(r) for r in responses])
    right_mask = torch.arange(right.shape[1]) < lengths[:, None]
    attention_mask = torch.cat([left_mask, right_mask.long()], dim=1)
    return DistillationBatch(
        index=index,
        input_ids=torch.cat([left, right], dim=1).to(device),
        attention_mask=attention_mask.to(device),
        # Positions count from the first token of the prompt, whatever the padding.
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0).to(device),
        response_mask=right_mask.to(device),
        weights=torch.as_tensor(weights, dtype=torch.float32, device=device),
        prefix=prefix,
        step=step,
    )


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, which `generate` and dropout draw from, and put them back."""
    cuda = device.type == "cuda"
    devices = [device if device.index is not None else torch.cuda.current_device()] if cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(devices[0]):
                torch.cuda.manual_seed(seed)
        yield


def pad_left(sequences: Sequence[Tensor], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of sequences, padded on the left to a length."""
    ids = torch.full((len(sequences), length), pad)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = sequence
        mask[row, length - len(sequence) :] = 1
    return ids, mask


def fingerprint(sequences: Sequence[Tensor]) -> str:
    """Hash of token ids, by which files know what they belong to."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().tobytes())
    return digest.hexdigest()
