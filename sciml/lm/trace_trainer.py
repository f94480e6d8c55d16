"""Train a policy by TRACE: groups of responses, a verifier, and itself with a hint as teacher.

References
----------
.. [1] Wang et al., "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
   arXiv:2605.10194, 2026.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sciml._check import check_choice, check_integer, check_interval, check_same_length

from .distillation import Distiller
from .divergences import Teacher
from .grpo import grpo_advantages
from .response_batch import DistillationBatch, pad_batch
from .span_annotation import (
    SpanAnnotation,
    SpanAnnotator,
    route_tokens,
    split_sentences,
    token_offsets,
)
from .trace import TraceLoss
from .vocabulary_rows import HiddenLogits, Logits, entropy, reduce_rows

__all__ = ["TraceBatch", "TraceTrainer", "append_hint"]

Verifier = Callable[[Any, Any], float]
Segmenter = Callable[[Any], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class TraceBatch(DistillationBatch):
    """Responses with what verifier and annotator said of them.

    Attributes
    ----------
    advantages : Tensor of shape (batch,)
    key_mask, error_mask : BoolTensor of shape (batch, n_response)
    hinted_prompts : tuple of LongTensor or None
        The teacher's prompt of each marked response.
    """

    advantages: Tensor
    key_mask: Tensor
    error_mask: Tensor
    hinted_prompts: tuple[Tensor | None, ...]

    def rows(self, chosen: slice) -> "TraceBatch":
        """Some of the responses, as padded as they were."""
        return replace(
            cast(TraceBatch, super().rows(chosen)),
            advantages=self.advantages[chosen],
            key_mask=self.key_mask[chosen],
            error_mask=self.error_mask[chosen],
            hinted_prompts=self.hinted_prompts[chosen],
        )


def append_hint(prompt: Any, diagnostic_type: str) -> str:
    """A prompt with the diagnostic type below it, in parentheses; prompts must be strings.

    (The paper's wording is not published.)

    Parameters
    ----------
    prompt : str
    diagnostic_type : str

    Returns
    -------
    str
    """
    if not isinstance(prompt, str):
        raise TypeError(
            f"hint must be given for prompts that are not strings, got {type(prompt).__name__}"
        )
    return f"{prompt}\n(Mind: {diagnostic_type}.)\n"


class TraceTrainer(Distiller):
    """Reinforcement learning from a verifier, with a hinted teacher on the tokens that decide.

    Each step draws groups of responses from the policy, rewards them, and takes one optimiser
    step on `TraceLoss`. While the divergence has a weight an annotator marks segments of each
    response, and a copy of the policy, renewed every `sync_every` steps, reads the same response
    after a prompt that also holds the annotator's diagnostic type. The copy sees neither the
    answer nor which tokens are marked. Later neither annotator nor copy are called: what remains
    is GRPO.

    One optimiser step a batch of responses: the policy that is updated is the one that drew them,
    all ratios are 1, and GRPO's clip does not bite. (`TraceLoss` takes ``old_logps`` for loops
    that reuse responses.) Generation, micro-batches, Accelerate, checkpoints and what may be
    replaced in a subclass are those of `Distiller`. A resumed run equals the uninterrupted one bit
    for bit if verifier and annotator are deterministic.

    Parameters
    ----------
    policy : torch.nn.Module
        Causal language model, trained in place.
    verifier : callable
        ``verifier(response, reference) -> float`` in [0, 1], or bool. Responses are strings if
        there is a tokenizer, else LongTensors; `exact_match` and `numeric_match` fit.
    annotator : SpanAnnotator or None, default=None
        None trains by GRPO alone. It is called only for responses of a kind that the loss has an
        action for, and a reward above 1/2 is a right response.
    loss : TraceLoss or None, default=None
        None is ``TraceLoss(temperature=temperature)``: the variant TRACE-FKL.
    hint : callable, default=append_hint
        ``hint(prompt, diagnostic_type) -> prompt`` of the teacher, str or token ids, from a
        prompt as it was given to ``fit``.
    segmenter : callable or None, default=None
        ``segmenter(response) -> ranges`` (start, end) of characters, or of tokens without a
        tokenizer. None is `split_sentences`, or each token by itself.
    group_size : int, default=8
        Responses a prompt (TRL's; the paper's is not published).
    scale_rewards : {"std", "none"}, default="std"
        See `grpo_advantages`.
    sync_every : int, default=10
        Steps between copies of the policy to the teacher (paper: 10).
    max_coverage : float in [0, 1], default=0.25
        Largest share of a response's tokens that is marked.
    tokenizer, max_new_tokens, optimizer, lr_schedule, max_grad_norm, accelerator, random_state
        As in `Distiller`.
    temperature : float, default=1.0
        At which responses are drawn, and by which the loss divides logits.
    learning_rate : float, default=1e-6
        TRL's for GRPO; the paper's is not published.

    Attributes
    ----------
    history_ : list of dict
        As in `Distiller`, with "reward" (mean), "policy_loss", "kl", "kl_weight" and "coverage"
        (share of tokens marked) of each step. Validation measures "val_entropy" of the policy on
        responses of its own, and what ``metric`` returns.

    References
    ----------
    .. [1] Wang et al., arXiv:2605.10194, 2026.

    Examples
    --------
    Reward responses whose first byte is even, and mark that byte:

    >>> from sciml.lm import SpanAnnotation, TraceTrainer, byte_language_model
    >>> policy = byte_language_model(hidden_size=16, num_layers=1, random_state=0)
    >>> trainer = TraceTrainer(
    ...     policy,
    ...     lambda response, reference: response[0] % 2 == reference,
    ...     annotator=lambda prompt, segments, correct, reference: SpanAnnotation(
    ...         (0,), "key" if correct else "error", "parity"
    ...     ),
    ...     hint=lambda prompt, diagnostic_type: [33, *prompt],
    ...     group_size=4,
    ...     max_new_tokens=4,
    ...     random_state=0,
    ... ).fit([[104, 105], [72]], [0, 0], n_steps=1, batch_size=8)
    >>> trainer.history_[0]["kl_weight"]
    0.5
    """

    def __init__(
        self,
        policy: nn.Module,
        verifier: Verifier,
        *,
        annotator: SpanAnnotator | None = None,
        loss: TraceLoss | None = None,
        hint: Callable[[Any, str], Any] = append_hint,
        segmenter: Segmenter | None = None,
        group_size: int = 8,
        scale_rewards: str = "std",
        sync_every: int = 10,
        max_coverage: float = 0.25,
        tokenizer: Any = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        optimizer: torch.optim.Optimizer | None = None,
        learning_rate: float = 1e-6,
        lr_schedule: Callable[[int], float] | None = None,
        max_grad_norm: float | None = 1.0,
        accelerator: Any = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        check_integer("group_size", group_size, 2)
        check_integer("sync_every", sync_every, 1)
        check_choice("scale_rewards", scale_rewards, ("std", "none"))
        check_interval("max_coverage", max_coverage, 0, 1)
        check_interval("temperature", temperature, 0, math.inf, closed="neither")
        if loss is None:
            loss = TraceLoss(temperature=temperature)
        elif loss.temperature != temperature:
            raise ValueError(
                f"loss must have the temperature of the responses, {temperature}, got "
                f"{loss.temperature}"
            )
        taught = annotator is not None and loss.kl_weight(0) > 0
        super().__init__(
            policy,
            # Without a divergence the teacher is never read.
            copy.deepcopy(policy).requires_grad_(False) if taught else policy,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sampling_temperature=temperature,
            average="sequence",
            optimizer=optimizer,
            learning_rate=learning_rate,
            lr_schedule=lr_schedule,
            max_grad_norm=max_grad_norm,
            accelerator=accelerator,
            random_state=random_state,
        )
        self.verifier = verifier
        self.annotator = annotator
        self.loss = loss
        self.hint = hint
        self.segmenter = segmenter
        self.group_size = group_size
        self.scale_rewards = scale_rewards
        self.sync_every = sync_every
        self.max_coverage = max_coverage

    def fit(  # type: ignore[override]
        self,
        prompts: Sequence[Any],
        references: Sequence[Any],
        *,
        n_steps: int = 1000,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        validation_prompts: Sequence[Any] | None = None,
        validation_every: int | None = None,
        metric: Callable[[Sequence[Any], list[Any]], Mapping[str, float]] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        resume_from: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ) -> "TraceTrainer":
        """Train the policy.

        Parameters
        ----------
        prompts : sequence of str, or of sequences of int
        references : sequence
            What verifier and annotator get, one a prompt.
        n_steps : int, default=1000
            Optimiser steps in all, those of the checkpoint included.
        batch_size : int, default=64
            Responses a step, over all processes: a multiple of `group_size` (times the number of
            processes).
        micro_batch_size, validation_prompts, validation_every, metric, checkpoint, \
checkpoint_every, resume_from, verbose
            As in `Distiller.fit`.

        Returns
        -------
        TraceTrainer
            Itself.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit, the checkpoint belongs to another run, or verifier or
            annotator return what they must not.
        FloatingPointError
            If the gradient's norm is not finite.
        """
        check_integer("batch_size", batch_size, 1)
        check_same_length(prompts=prompts, references=references)
        group = self.group_size * self.rank[1]
        if batch_size % group:
            raise ValueError(
                f"batch_size must be a multiple of group_size times processes, {group}, got "
                f"{batch_size}"
            )
        self._prompts, self._references = prompts, references
        if self.teacher is not self.student:
            self.teacher.to(next(self.student.parameters()).device)
        super().fit(
            prompts,
            n_steps=n_steps,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            validation_prompts=validation_prompts,
            validation_every=validation_every,
            metric=metric,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume_from=resume_from,
            verbose=verbose,
        )
        return self

    def draw_prompts(self, step: int, batch_size: int) -> np.ndarray:
        """Positions of a step's prompts, each `group_size` times, a group in one process."""
        drawn = super().draw_prompts(step, batch_size // self.group_size)
        n_processes = self.rank[1]
        index = np.empty(batch_size, dtype=np.int64)
        for rank in range(n_processes):
            index[rank::n_processes] = np.repeat(drawn[rank::n_processes], self.group_size)
        return index

    def on_step_start(self, step: int) -> None:
        """Copy the policy to the teacher where that is due."""
        due = step % self.sync_every == 0 and self.loss.kl_weight(step) > 0
        if due and self.teacher is not self.student:
            self.teacher.load_state_dict(self.student.state_dict())

    def teacher_logits(self, batch: DistillationBatch) -> Teacher:
        """What the hinted teacher says of the marked responses; None if there are none."""
        assert isinstance(batch, TraceBatch)
        marked = (batch.key_mask | batch.error_mask).any(1).nonzero().squeeze(1).cpu()
        if len(marked) == 0:
            return cast(Teacher, None)
        responses = self._responses(batch)
        prompts = [batch.hinted_prompts[i] for i in marked]
        part = pad_batch(
            [prompt for prompt in prompts if prompt is not None],
            [responses[i] for i in marked],
            index=batch.index[marked.numpy()],
            weights=np.ones(len(marked)),
            prefix=batch.prefix,
            step=batch.step,
            pad_token_id=self._pad_token_id(),
            device=batch.input_ids.device,
        )
        with torch.no_grad(), self._autocast():
            logits = self.response_logits(self.teacher, part)
        # Rows of the other responses are filled up, and never read.
        shape = batch.response_mask.shape
        if isinstance(logits, HiddenLogits):
            return logits._replace(hidden=_scatter_rows(logits.hidden, marked, shape))
        return _scatter_rows(logits, marked, shape)

    def compute_loss(
        self,
        batch: DistillationBatch,
        student_logits: Logits,
        teacher_logits: Teacher,
        num_items_in_batch: Tensor,
    ) -> Tensor:
        """`TraceLoss` of a micro-batch."""
        assert isinstance(batch, TraceBatch)
        loss, stats = self.loss(
            student_logits,
            teacher_logits,
            batch.labels,
            batch.advantages,
            step=batch.step,
            key_mask=batch.key_mask,
            error_mask=batch.error_mask,
            num_items_in_batch=num_items_in_batch,
        )
        for name in ("policy_loss", "kl"):
            self._sums[name] += float(stats[name])
        return cast(Tensor, loss)

    def token_measures(self, batch: DistillationBatch, student_logits: Logits) -> dict[str, Tensor]:
        """Entropy of the policy."""
        values = reduce_rows(entropy, student_logits, mask=batch.response_mask)
        return {"entropy": values.squeeze(-1)}

    # A step.

    def _gradients(
        self, step: int, batch_size: int, micro_batch_size: int | None
    ) -> dict[str, Any]:
        self._sums = dict.fromkeys(("reward", "policy_loss", "kl", "marked"), 0.0)
        entry = super()._gradients(step, batch_size, micro_batch_size)
        names = list(self._sums)
        totals = self.sum_over_processes(np.array([self._sums[name] for name in names]))
        sums = dict(zip(names, totals.tolist(), strict=True))
        entry |= {
            "reward": sums["reward"] / batch_size,
            "policy_loss": sums["policy_loss"],
            "kl": sums["kl"],
            "kl_weight": self.loss.kl_weight(step),
            "coverage": sums["marked"] / max(entry["n_tokens"], 1),
        }
        return entry

    def _batch(
        self, index: np.ndarray, weights: np.ndarray, prefix: str, step: int
    ) -> DistillationBatch:
        """Draw responses, reward and annotate them."""
        batch = super()._batch(index, weights, prefix, step)
        ids = self._responses(batch)
        responses = self.decode(ids)
        rewards = torch.tensor(
            [
                float(self.verifier(response, self._references[i]))
                for i, response in zip(index, responses, strict=True)
            ],
            dtype=torch.float64,
        )
        if not bool(((rewards >= 0) & (rewards <= 1)).all()):
            raise ValueError(f"verifier must return numbers in [0, 1], got {rewards.tolist()}")
        advantages = grpo_advantages(rewards, self.group_size, self.scale_rewards)
        key_mask = torch.zeros(batch.response_mask.shape, dtype=torch.bool)
        error_mask = torch.zeros_like(key_mask)
        hinted: list[Tensor | None] = [None] * len(index)
        for row, i in enumerate(index):
            correct = bool(rewards[row] > 0.5)
            action = self.loss.key_action if correct else self.loss.error_action
            if self.annotator is None or action is None or self.loss.kl_weight(step) == 0:
                continue
            masks, diagnostic_type = self._annotate(int(i), ids[row], responses[row], correct)
            if bool(torch.cat(masks).any()):
                n = len(ids[row])
                key_mask[row, :n], error_mask[row, :n] = masks
                prompt = self.hint(self._prompts[i], diagnostic_type)
                (hinted[row],) = self._token_ids("hinted prompts", [prompt])
        device = batch.input_ids.device
        self._sums["reward"] += float(rewards.sum())
        self._sums["marked"] += float((key_mask | error_mask).sum())
        return TraceBatch(
            **vars(batch),
            advantages=advantages.to(device, torch.float32),
            key_mask=key_mask.to(device),
            error_mask=error_mask.to(device),
            hinted_prompts=tuple(hinted),
        )

    def _annotate(
        self, i: int, ids: Tensor, response: Any, correct: bool
    ) -> tuple[tuple[Tensor, Tensor], str]:
        """Masks over a response's tokens, and the diagnostic type."""
        assert self.annotator is not None
        if self.tokenizer is None:
            offsets = [(t, t + 1) for t in range(len(ids))]
        else:
            offsets = token_offsets(self.tokenizer, ids.tolist())
        if self.segmenter is not None:
            ranges = list(self.segmenter(response))
        else:
            ranges = offsets if self.tokenizer is None else split_sentences(response)
        pieces = [response[start:end] for start, end in ranges]
        annotation = self.annotator(self._prompts[i], pieces, correct, self._references[i])
        if not isinstance(annotation, SpanAnnotation):
            raise TypeError(f"annotator must return a SpanAnnotation, got {annotation!r}")
        expected = "key" if correct else "error"
        if annotation.kind != expected:
            raise ValueError(
                f"annotator must return kind {expected!r} for a response that is "
                f"{'right' if correct else 'wrong'}, got {annotation.kind!r}"
            )
        if any(number >= len(ranges) for number in annotation.segments):
            raise ValueError(
                f"annotator must return segments below {len(ranges)}, got {annotation.segments}"
            )
        chosen = [ranges[number] for number in annotation.segments]
        masks = route_tokens(offsets, chosen, annotation.kind, self.max_coverage)
        return masks, annotation.diagnostic_type

    def _responses(self, batch: DistillationBatch) -> list[Tensor]:
        """Token ids of the responses, without padding."""
        rows = batch.input_ids[:, batch.n_prompt :]
        return [row[mask].cpu() for row, mask in zip(rows, batch.response_mask, strict=True)]

    def _trained(self) -> dict[str, Tensor]:
        """The teacher too: it is older than the policy."""
        tensors = super()._trained()
        if self.teacher is self.student:
            return tensors
        theirs = dict(self.teacher.named_parameters())
        return tensors | {
            f"buffer.teacher.{name}": theirs[name]
            for name, p in self.student.named_parameters()
            if p.requires_grad
        }


def _scatter_rows(values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Values of some rows of a batch among zeros for all others, and for later columns."""
    result = values.new_zeros(*shape, values.shape[-1])
    result[rows.to(values.device), : values.shape[1]] = values
    return result
