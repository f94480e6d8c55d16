"""Distil a causal language model into a smaller one: whose prefixes, and which divergence.

Two choices make the usual recipes. *Prefixes* are written by the teacher (or given as text), or
drawn from the student as it is now; the *objective* compares the two next-token distributions
after each prefix. Forward KL on teacher prefixes is fine-tuning on soft labels, reverse KL on the
student's is on-policy distillation, the other two cells are offline reinforcement learning and
DAgger [1]_. Drawing prefixes carries no gradient.

References
----------
.. [1] Zhao et al., "Decoupling KL and Trajectories: A Unified Perspective for SFT, DAgger,
   Offline RL, and OPD in LLM Distillation", arXiv:2605.16826, 2026.
.. [2] Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
   Mistakes", ICLR 2024, arXiv:2306.13649.
"""

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn
from tqdm.auto import tqdm

from sciml._check import check_choice, check_integer, check_interval, check_same_length
from sciml._checkpoint import load_checkpoint, load_optimizer, optimizer_state, save_checkpoint

from .divergences import (
    Teacher,
    generalized_jsd,
    mixed_kl,
    sampled_reverse_kl,
    token_kl,
    top_k_log_probs,
)
from .length_curriculum import EntropyGatedLengthCurriculum
from .response_batch import (
    DistillationBatch,
    fingerprint,
    pad_batch,
    sample_responses,
    seeded,
)
from .teacher_cache import TeacherCache
from .token_reduction import token_logps
from .trainer_losses import hidden_logits
from .vocabulary_rows import (
    Logits,
    combine,
    entropy,
    forward_kl,
    reduce_rows,
    reverse_kl,
)

__all__ = ["Distiller", "PromptWeighting"]

Objective = Callable[..., Tensor]
OBJECTIVES: dict[str, Objective] = {
    "forward_kl": partial(token_kl, direction="forward"),
    "reverse_kl": partial(token_kl, direction="reverse"),
    "mixed_kl": mixed_kl,
    "generalized_jsd": generalized_jsd,
}


class PromptWeighting(Protocol):
    """What ``Distiller(weighting=...)`` takes: weights of the prompts that change in training."""

    def weights(self, distiller: "Distiller", step: int) -> np.ndarray:
        """Weights of shape (n_prompts,) for an optimiser step; called before each one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State serialisable as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...


class Distiller:
    """Train a student on the next-token distributions of a teacher, on either's prefixes.

    The 2 x 2 of the paper is `prefix` times `objective`. Models are causal language models of
    transformers (or anything with their ``forward``, ``generate``, ``config``) over one
    vocabulary, on one device. Only torch and transformers are needed; Accelerate is used where
    an ``Accelerator`` is given.

    Losses read hidden states and output layer, so that (batch, time, vocabulary) logits never
    exist. A model with more than a linear output layer (a soft cap, a scale, an adapter on it) is
    read by its logits instead (see `hidden_logits`).

    All randomness follows from `random_state` and the step's number: a resumed run equals the
    uninterrupted one bit for bit, and torch's global random state is left alone.

    Generation is ``model.generate`` with its cache, in batches. A server such as vLLM is not
    built in: override `generate`, which has prompts, cap and seed, to use one.

    To distil in another way, subclass and override one of the small methods: `draw_prompts`,
    `generate` (who answers), `teacher_logits` (a teacher that sees more, or reads other tokens),
    `check_models`, `compute_loss` (other losses on a batch), `token_measures`, `on_step_start`
    (synchronising a teacher), `state_dict`.

    Parameters
    ----------
    student, teacher : torch.nn.Module
        Causal language models. The student is trained in place (parameters that require a
        gradient only, so PEFT models work); the teacher is frozen.
    tokenizer : object or None, default=None
        Tokenizer of transformers. Prompts may then be strings, and responses given to `metric`
        are strings. None takes sequences of token ids.
    prefix : {"student", "teacher"} or float in [0, 1], default="student"
        Who writes the responses; a number is the fraction of steps with the student's (TRL's
        ``lmbda``). For the teacher each prompt is answered once, before training, unless
        responses are given to ``fit``.
    objective : str or callable, default="reverse_kl"
        "forward_kl", "reverse_kl", "mixed_kl" (0.2 reverse), "generalized_jsd" (beta 0.5),
        "sampled_reverse_kl" (drawn tokens only; student prefixes), or a callable
        ``objective(student_logits, teacher_logits, *, mask, temperature, num_items_in_batch)``
        such as ``partial(mixed_kl, reverse_weight=0.5)``. An objective with a method ``at(step)``
        is asked for the one in force (`TwoStageKL`).
    max_new_tokens : int, default=128
        Cap on responses (the paper's short setting). A curriculum replaces it.
    temperature : float, default=1.0
        Of the objective. The paper has 1.
    sampling_temperature : float, default=1.0
        Of the responses; 0 is greedy.
    average : {"token", "sequence"}, default="token"
        Mean over all response tokens of a batch (the paper's), or over responses of their mean.
    curriculum : EntropyGatedLengthCurriculum or None, default=None
        Raises the cap in training; needs ``validation_prompts`` in ``fit``. It has a state: give
        each run a new one, as with `weighting`.
    weighting : PromptWeighting or None, default=None
        Weights of prompts, for example `PassRateWeighting`; needs ``average="sequence"``. Prompts
        of weight 0 are neither answered nor read, but count in the mean.
    optimizer : torch.optim.Optimizer or None, default=None
        None is AdamW without weight decay.
    learning_rate : float, default=5e-7
        Of the default optimizer (the paper's, for models of 0.6 billion parameters; small models
        want 1e-4 to 1e-3).
    lr_schedule : callable or None, default=None
        ``lr_schedule(step)`` is a factor on the learning rates, ``step`` from 0.
    max_grad_norm : float or None, default=1.0
    accelerator : accelerate.Accelerator or None, default=None
        Devices, mixed precision and data-parallel processes. Each process takes its share of
        every batch; checkpoints are written by the first. FSDP and DeepSpeed are not supported.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    history_ : list of dict
        One entry a step: "step" (from 1), "loss", "n_tokens" (trained on), "generated_tokens"
        (by the student, since the start), "max_new_tokens", "prefix", "grad_norm"; and where
        validated "val_entropy", "val_forward_kl", "val_reverse_kl" (on fresh responses of the
        student), "val_length", "val_nll" (of given validation responses) and what `metric`
        returned as "val_<name>". An entry of step 0 with these comes first.
    n_generated_tokens_ : int
        Tokens that the student has written for training.
    prompt_ids_ : list of LongTensor
        The prompts of ``fit``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    .. [1] Zhao et al., arXiv:2605.16826, 2026.
    .. [2] Agarwal et al., arXiv:2306.13649, 2024.

    Examples
    --------
    >>> from sciml.lm import Distiller, byte_language_model
    >>> teacher = byte_language_model(hidden_size=32, num_layers=2, random_state=0)
    >>> student = byte_language_model(hidden_size=16, num_layers=1, random_state=1)
    >>> distiller = Distiller(
    ...     student, teacher, objective="forward_kl", max_new_tokens=4, learning_rate=1e-2,
    ...     random_state=0,
    ... )
    >>> distiller = distiller.fit([[104, 105], [72]], n_steps=3, batch_size=2)
    >>> [entry["n_tokens"] for entry in distiller.history_]
    [8, 8, 8]
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        tokenizer: Any = None,
        prefix: str | float = "student",
        objective: str | Objective = "reverse_kl",
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        sampling_temperature: float = 1.0,
        average: str = "token",
        curriculum: EntropyGatedLengthCurriculum | None = None,
        weighting: PromptWeighting | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        learning_rate: float = 5e-7,
        lr_schedule: Callable[[int], float] | None = None,
        max_grad_norm: float | None = 1.0,
        accelerator: Any = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        if isinstance(prefix, str):
            check_choice("prefix", prefix, ("student", "teacher"))
        else:
            check_interval("prefix", prefix, 0, 1)
        if isinstance(objective, str):
            check_choice("objective", objective, (*OBJECTIVES, "sampled_reverse_kl"))
        elif not callable(objective) and not hasattr(objective, "at"):
            raise TypeError(f"objective must be a name or callable, got {objective!r}")
        if objective == "sampled_reverse_kl" and prefix != "student":
            raise ValueError(
                "objective 'sampled_reverse_kl' needs tokens that the student drew, so prefix "
                f"must be 'student', got {prefix!r}"
            )
        if objective == "sampled_reverse_kl" and temperature != sampling_temperature:
            raise ValueError(
                "objective 'sampled_reverse_kl' needs temperature and sampling_temperature to be "
                f"equal, got {temperature} and {sampling_temperature}"
            )
        check_integer("max_new_tokens", max_new_tokens, 1)
        check_interval("temperature", temperature, 0, math.inf, closed="neither")
        check_interval("sampling_temperature", sampling_temperature, 0, math.inf, closed="left")
        check_choice("average", average, ("token", "sequence"))
        check_interval("learning_rate", learning_rate, 0, math.inf, closed="left")
        if max_grad_norm is not None:
            check_interval("max_grad_norm", max_grad_norm, 0, math.inf, closed="neither")
        if weighting is not None and average != "sequence":
            raise ValueError(
                f"weighting is of whole responses: average must be 'sequence', got {average!r}"
            )
        if not any(p.requires_grad for p in student.parameters()):
            raise ValueError("student must have a parameter that requires a gradient, got none")
        self.student = student
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.objective = objective
        self.max_new_tokens = max_new_tokens
        self.temperature = float(temperature)
        self.sampling_temperature = float(sampling_temperature)
        self.average = average
        self.curriculum = curriculum
        self.weighting = weighting
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule
        self.max_grad_norm = max_grad_norm
        self.accelerator = accelerator
        self.random_state = random_state

    @property
    def cap(self) -> int:
        """The cap on responses in force, in tokens."""
        return self.max_new_tokens if self.curriculum is None else self.curriculum.cap

    def fit(
        self,
        prompts: Sequence[Any],
        *,
        responses: Sequence[Any] | None = None,
        n_steps: int = 1000,
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        teacher_cache: str | os.PathLike[str] | None = None,
        teacher_top_k: int = 64,
        validation_prompts: Sequence[Any] | None = None,
        validation_responses: Sequence[Any] | None = None,
        validation_every: int | None = None,
        metric: Callable[[Sequence[Any], list[Any]], Mapping[str, float]] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        resume_from: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ) -> "Distiller":
        """Train the student.

        Parameters
        ----------
        prompts : sequence of str, or of sequences of int
            Each step takes the next `batch_size` of a shuffled epoch.
        responses : sequence of str, or of sequences of int, default=None
            Texts to use as the teacher's responses, one a prompt; they are cut at the cap. None
            lets the teacher answer. Where they should teach to stop they must end with the
            end-of-sequence token, which is not added.
        n_steps : int, default=1000
            Optimiser steps in all, those of the checkpoint included (paper: 1000).
        batch_size : int, default=32
            Prompts a step, over all processes (paper: 32).
        micro_batch_size : int or None, default=None
            Prompts in a forward and backward pass; None takes all.
        teacher_cache : path or None, default=None
            Folder for the teacher's responses and their `teacher_top_k` most probable tokens with
            the mass of the rest (`TopKLogProbs` says what is lost). It is filled before training,
            interruptibly, and reused by runs with the same prompts and options; training on
            teacher prefixes then reads it and runs no teacher. None runs the teacher on each
            batch, with its whole distribution.
        teacher_top_k : int, default=64
            Tokens kept in `teacher_cache`: 8 bytes each, for every response token.
        validation_prompts : sequence, default=None
            Held-out prompts for validation and the curriculum.
        validation_responses : sequence, default=None
            Texts whose negative log-likelihood under the student is validated.
        validation_every : int or None, default=None
            Steps between validations; one more follows the last step. None validates at the ends.
        metric : callable or None, default=None
            ``metric(validation_prompts, responses) -> dict of float``, on the student's responses
            (strings with a tokenizer, else LongTensors).
        checkpoint : path or None, default=None
            File to write trained weights, optimiser state and history to, every
            `checkpoint_every` steps, at the end and on interruption. It appears whole or not at
            all.
        checkpoint_every : int, default=100
        resume_from : path or None, default=None
            Checkpoint to go on from; a file that does not exist yet starts anew, so that the same
            command both starts and resumes a run.
        verbose : bool, default=False
            Whether to show progress bars.

        Returns
        -------
        Distiller
            Itself.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit, or the checkpoint belongs to another run.
        FloatingPointError
            If the gradient's norm is not finite.
        """
        for name, value in (
            ("n_steps", n_steps),
            ("batch_size", batch_size),
            ("checkpoint_every", checkpoint_every),
            ("micro_batch_size", batch_size if micro_batch_size is None else micro_batch_size),
            ("validation_every", n_steps if validation_every is None else validation_every),
            ("teacher_top_k", teacher_top_k),
        ):
            check_integer(name, value, 1)
        self.prompt_ids_ = self._token_ids("prompts", prompts)
        given = None if responses is None else self._token_ids("responses", responses)
        if given is not None:
            check_same_length(prompts=self.prompt_ids_, responses=given)
        self._validation_prompts = validation_prompts
        held_out = (
            None
            if validation_prompts is None
            else self._token_ids("validation_prompts", validation_prompts)
        )
        held_out_responses = None
        if validation_responses is not None:
            if held_out is None:
                raise ValueError("validation_responses need validation_prompts, got None")
            held_out_responses = self._token_ids("validation_responses", validation_responses)
            check_same_length(validation_prompts=held_out, validation_responses=held_out_responses)
        if self.curriculum is not None and held_out is None:
            raise ValueError(
                "curriculum needs validation_prompts to measure the student's entropy, got None"
            )
        if metric is not None and held_out is None:
            raise ValueError("metric needs validation_prompts, got None")

        self._prepare()
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.history_: list[dict[str, Any]] = []
        self.n_generated_tokens_ = 0
        step = 0
        if resume_from is not None and Path(resume_from).exists():
            step = self._load(resume_from)
        self._teacher_responses: list[Tensor] | TeacherCache | None = given
        if self.prefix != "student" and (teacher_cache is not None or given is None):
            self._teacher_responses = self._answer(
                given, batch_size, teacher_cache, teacher_top_k, verbose
            )

        def validate() -> dict[str, float]:
            return self._validate(held_out, held_out_responses, batch_size, metric)

        self.teacher.eval()
        if not self.history_ and held_out is not None:
            first = {"step": 0, "max_new_tokens": self.cap, **validate()}
            self.history_.append(first)
            if self.curriculum is not None:
                self.curriculum.begin(max(first["val_entropy"], 0.0))
        bar = tqdm(total=n_steps, initial=step, disable=not (verbose and self._is_main))
        done = (step, self.n_generated_tokens_, self.state_dict())
        whole = True  # whether weights and optimiser are those of the last step done
        try:
            while step < n_steps:
                self.on_step_start(step)
                entry = self._gradients(step, batch_size, micro_batch_size)
                whole = False
                self._update(step, entry)
                step += 1
                last = step == n_steps
                ends_stage = self.curriculum is not None and step % self.curriculum.stage_steps == 0
                due = validation_every is not None and step % validation_every == 0
                if held_out is not None and (last or due or ends_stage):
                    entry |= validate()
                    if self.curriculum is not None and ends_stage:
                        self.curriculum.step(max(entry["val_entropy"], 0.0))
                self.history_.append(entry)
                done = (step, self.n_generated_tokens_, self.state_dict())
                whole = True
                bar.update()
                shown = ("loss", "val_entropy", "val_reverse_kl")
                bar.set_postfix({k: f"{entry[k]:.4g}" for k in shown if k in entry}, refresh=False)
                if checkpoint is not None and (last or step % checkpoint_every == 0):
                    self._save(checkpoint, *done)
        except KeyboardInterrupt:
            # In the midst of an update the checkpoint before it is the one to go on from.
            if checkpoint is not None and whole and len(self.history_) > 0:
                self._save(checkpoint, *done)
            raise
        finally:
            bar.close()
            self.student.eval()
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
        return self

    # What a subclass may replace.

    def check_models(self) -> None:
        """Raise ValueError unless the teacher's tokens are the student's."""
        ours, theirs = (
            cast(Any, model).get_output_embeddings().weight.shape[0]
            for model in (self.student, self.teacher)
        )
        if ours != theirs:
            raise ValueError(
                f"teacher must have the student's vocabulary of {ours} tokens, got {theirs}"
            )

    def draw_prompts(self, step: int, batch_size: int) -> np.ndarray:
        """Positions of a step's prompts, here the next ones of shuffled epochs."""
        n = len(self.prompt_ids_)
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        result = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(positions // n):
            order = np.random.default_rng(self.seed_of("order", int(epoch))).permutation(n)
            here = positions // n == epoch
            result[here] = order[positions[here] % n]
        return result

    def on_step_start(self, step: int) -> None:
        """Do something before an optimiser step; here nothing."""

    def generate(
        self, model: nn.Module, prompts: Sequence[Tensor], *, max_new_tokens: int, seed: int
    ) -> list[Tensor]:
        """Responses of a model to prompts, in one batch, padded on the left.

        Parameters
        ----------
        model : torch.nn.Module
        prompts : sequence of LongTensor
        max_new_tokens : int
        seed : int
            Determines the draw.

        Returns
        -------
        list of LongTensor
            Of 1 to `max_new_tokens` tokens each, with the end-of-sequence token where there was
            one.
        """
        return sample_responses(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=self.sampling_temperature,
            eos_token_ids=self._eos_token_ids(),
            pad_token_id=self._pad_token_id(),
            seed=seed,
        )

    def teacher_logits(self, batch: DistillationBatch) -> Teacher:
        """What the teacher says at the response tokens, of leading shape (batch, n_response)."""
        if batch.prefix == "teacher" and isinstance(self._teacher_responses, TeacherCache):
            n_response = batch.response_mask.shape[1]
            return self._teacher_responses.log_probs(
                batch.index, n_response, batch.input_ids.device
            )
        with torch.no_grad(), self._autocast():
            return self.response_logits(self.teacher, batch)

    def compute_loss(
        self,
        batch: DistillationBatch,
        student_logits: Logits,
        teacher_logits: Teacher,
        num_items_in_batch: Tensor,
    ) -> Tensor:
        """Loss of a micro-batch, a sum divided by the number of items of the whole step.

        Parameters
        ----------
        batch : DistillationBatch
        student_logits, teacher_logits : Logits
            At the response tokens, of leading shape (batch, n_response).
        num_items_in_batch : Tensor, a scalar
            Response tokens of the step, or prompts for ``average="sequence"``.

        Returns
        -------
        Tensor
            Scalar with a graph.
        """
        weights = batch.weights[:, None] * batch.response_mask
        if self.average == "sequence":
            weights = weights / batch.response_mask.sum(1, keepdim=True).clamp(min=1)
        objective = self.objective
        if hasattr(objective, "at"):
            objective = objective.at(batch.step)
        if objective == "sampled_reverse_kl":
            each = sampled_reverse_kl(
                student_logits,
                cast(Logits, teacher_logits),
                batch.labels,
                shift=False,
                temperature=self.temperature,
                reduction="none",
            )
            return (each * weights).sum() / num_items_in_batch
        if isinstance(objective, str):
            objective = OBJECTIVES[objective]
        return objective(
            student_logits,
            teacher_logits,
            mask=weights,
            temperature=self.temperature,
            num_items_in_batch=num_items_in_batch,
        )

    def token_measures(self, batch: DistillationBatch, student_logits: Logits) -> dict[str, Tensor]:
        """What validation averages over the tokens of the student's responses.

        Parameters
        ----------
        batch : DistillationBatch
            Held-out prompts with the student's responses.
        student_logits : Logits
            At the response tokens.

        Returns
        -------
        dict of str to Tensor of shape (batch, n_response)
            "entropy" must be among them where a curriculum is used.
        """
        teacher_logits = self.response_logits(self.teacher, batch)
        reduction = combine((entropy, []), (forward_kl, [0]), (reverse_kl, [0]))
        values = reduce_rows(reduction, student_logits, teacher_logits, mask=batch.response_mask)
        return dict(zip(("entropy", "forward_kl", "reverse_kl"), values.unbind(-1), strict=True))

    def response_logits(self, model: nn.Module, batch: DistillationBatch) -> Logits:
        """Logits of a model at the response tokens, as hidden states where that is the same."""
        rows = slice(batch.n_prompt - 1, batch.input_ids.shape[1] - 1)
        inputs = self._inputs(model, batch)
        called = self._wrapped if model is self.student else model
        if self._has_plain_head.get(id(model), True):
            try:
                result = hidden_logits(called, **inputs)
            except ValueError:
                # More than a linear layer makes the logits: they must be formed.
                self._has_plain_head[id(model)] = False
            else:
                return result._replace(hidden=result.hidden[:, rows])
        return cast(Tensor, called(**inputs).logits)[:, rows]

    def state_dict(self) -> dict[str, Any]:
        """State beyond weights and optimiser, serialisable as JSON, for the checkpoint."""
        return {
            "curriculum": None if self.curriculum is None else self.curriculum.state_dict(),
            "weighting": None if self.weighting is None else self.weighting.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, part in (("curriculum", self.curriculum), ("weighting", self.weighting)):
            if (state[name] is None) != (part is None):
                raise ValueError(
                    f"{name} must be {'None' if state[name] is None else 'given'}, as in the "
                    f"checkpoint, got {part!r}"
                )
            if part is not None:
                part.load_state_dict(state[name])

    # A step.

    def _gradients(
        self, step: int, batch_size: int, micro_batch_size: int | None
    ) -> dict[str, Any]:
        """Responses, losses and gradients of one step."""
        weights = None if self.weighting is None else self.weighting.weights(self, step)
        index = self.draw_prompts(step, batch_size)
        prefix = self._prefix_at(step)
        n_drawn = len(index)
        if weights is not None:
            if len(weights) != len(self.prompt_ids_):
                raise ValueError(
                    f"weighting must give {len(self.prompt_ids_)} weights, got {len(weights)}"
                )
            index = index[weights[index] > 0]
        rank, n_processes = self.rank
        index = index[rank::n_processes]
        chosen = np.ones(len(index)) if weights is None else weights[index]
        batch = self._batch(index, chosen, prefix, step) if len(index) else None
        n_tokens = 0 if batch is None else int(batch.response_mask.sum())
        if prefix == "student":
            self.n_generated_tokens_ += int(self.sum_over_processes(n_tokens))
        n_tokens = int(self.sum_over_processes(n_tokens))
        n_items = n_tokens if self.average == "token" else n_drawn
        entry: dict[str, Any] = {
            "step": step + 1,
            "loss": 0.0,
            "n_tokens": n_tokens,
            "generated_tokens": self.n_generated_tokens_,
            "max_new_tokens": self.cap,
            "prefix": prefix,
            "grad_norm": 0.0,
        }
        if n_tokens == 0:
            return entry
        self._optimizer.zero_grad()
        self.student.train()
        total = 0.0
        # A process without a prompt takes part in the exchange of gradients with weight 0.
        if batch is None:
            index = self.draw_prompts(step, batch_size)[:1]
            batch = self._batch(index, np.zeros(1), prefix, step)
        size = micro_batch_size or len(batch.index)
        starts = range(0, len(batch.index), size)
        for start in starts:
            part = batch.rows(slice(start, start + size))
            with (
                self._no_sync(start != starts[-1]),
                seeded(self.seed_of("dropout", step, rank, start), part.input_ids.device),
            ):
                theirs = self.teacher_logits(part)
                with self._autocast():
                    ours = self.response_logits(self.student, part)
                items = torch.tensor(float(n_items), device=part.input_ids.device)
                loss = self.compute_loss(part, ours, theirs, items)
                # Data-parallel processes average their gradients.
                self._backward(loss * n_processes)
            total += float(loss.detach())
        entry["loss"] = float(self.sum_over_processes(total))
        return entry

    def _update(self, step: int, entry: dict[str, Any]) -> None:
        """Clip and step, unless no token carried weight."""
        if entry["n_tokens"] == 0:
            return
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        if self.accelerator is None:
            norm = nn.utils.clip_grad_norm_(parameters, limit)
        else:
            norm = self.accelerator.clip_grad_norm_(parameters, limit)
        entry["grad_norm"] = float(norm)
        if not math.isfinite(entry["grad_norm"]):
            raise FloatingPointError(
                f"the gradient's norm is {entry['grad_norm']} at step {step}: lower the learning "
                "rate"
            )
        factor = 1.0 if self.lr_schedule is None else float(self.lr_schedule(step))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()

    def _batch(
        self, index: np.ndarray, weights: np.ndarray, prefix: str, step: int
    ) -> DistillationBatch:
        prompts = [self.prompt_ids_[i] for i in index]
        if prefix == "student":
            responses = self.generate(
                self.student,
                prompts,
                max_new_tokens=self.cap,
                seed=self.seed_of("rollout", step, self.rank[0]),
            )
        else:
            assert self._teacher_responses is not None
            responses = [self._teacher_responses[int(i)][: self.cap] for i in index]
        return self._collate(index, weights, prompts, responses, prefix, step)

    def _collate(
        self,
        index: np.ndarray,
        weights: np.ndarray,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        prefix: str,
        step: int,
    ) -> DistillationBatch:
        return pad_batch(
            prompts,
            responses,
            index=index,
            weights=weights,
            prefix=prefix,
            step=step,
            pad_token_id=self._pad_token_id(),
            device=self._device,
        )

    def _prefix_at(self, step: int) -> str:
        if isinstance(self.prefix, str):
            return self.prefix
        draw = np.random.default_rng(self.seed_of("prefix", step)).random()
        return "student" if draw < self.prefix else "teacher"

    def seed_of(self, purpose: str, *numbers: int) -> int:
        """A seed of its own for every purpose and numbers, from `random_state` alone."""
        words = [self._seed, int.from_bytes(purpose.encode(), "little"), *numbers]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    # Before training.

    def _prepare(self) -> None:
        optimizer = self.optimizer
        if optimizer is None:
            trained = [p for p in self.student.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        self._has_plain_head: dict[int, bool] = {}
        self._wrapped = self.student
        self._optimizer: Any = optimizer
        if self.accelerator is not None:
            self.teacher.to(self.accelerator.device)
            self.student.to(self.accelerator.device)
            self._wrapped, self._optimizer = self.accelerator.prepare(self.student, optimizer)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._device = next(self.student.parameters()).device
        teacher_device = next(self.teacher.parameters()).device
        if teacher_device != self._device:
            raise ValueError(
                f"teacher must be on the student's device {self._device}, got {teacher_device}"
            )
        self.check_models()

    def _answer(
        self,
        given: list[Tensor] | None,
        batch_size: int,
        folder: str | os.PathLike[str] | None,
        top_k: int,
        verbose: bool,
    ) -> "list[Tensor] | TeacherCache":
        """The teacher's responses to all prompts, or given ones, with a cache if a folder is."""
        longest = self.max_new_tokens if self.curriculum is None else self.curriculum.lengths[-1]
        if (
            folder is not None
            and top_k > cast(Any, self.teacher).get_output_embeddings().weight.shape[0]
        ):
            raise ValueError(f"teacher_top_k must be at most the vocabulary's size, got {top_k}")
        n = len(self.prompt_ids_)
        description = {
            "prompts": fingerprint(self.prompt_ids_),
            "responses": None if given is None else fingerprint(given),
            "teacher": sum(p.numel() for p in self.teacher.parameters()),
            "max_new_tokens": longest,
            "temperature": self.temperature,
            "sampling_temperature": None if given is not None else self.sampling_temperature,
            "seed": None if given is not None else self._seed,
            "top_k": top_k,
            "batch_size": batch_size,
        }
        cache = None if folder is None else TeacherCache(Path(folder), description, n)
        responses: list[Tensor] = []
        starts = range(0, n, batch_size)
        bar = tqdm(starts, desc="teacher", disable=not (verbose and self._is_main))
        for shard, start in enumerate(bar):
            if cache is not None and (cache.has(shard) or not self._is_main):
                continue
            index = np.arange(start, min(start + batch_size, n))
            prompts = [self.prompt_ids_[i] for i in index]
            if given is None:
                part = self.generate(
                    self.teacher,
                    prompts,
                    max_new_tokens=longest,
                    seed=self.seed_of("teacher", shard),
                )
            else:
                part = [given[i][:longest] for i in index]
            responses += part
            if cache is not None:
                batch = self._collate(index, np.ones(len(index)), prompts, part, "given", 0)
                logits = self.teacher_logits(batch)
                top = top_k_log_probs(cast(Logits, logits), top_k, temperature=self.temperature)
                cache.write(shard, part, top, batch.response_mask)
        if cache is None:
            return responses
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        cache.open()
        return cache

    def _validate(
        self,
        prompts: list[Tensor] | None,
        responses: list[Tensor] | None,
        batch_size: int,
        metric: Callable[[Sequence[Any], list[Any]], Mapping[str, float]] | None,
    ) -> dict[str, float]:
        """Means over tokens on the same prompts, seeds and cap every time."""
        assert prompts is not None
        self.student.eval()
        sums: dict[str, float] = {}
        n_tokens, nll, n_given = 0, 0.0, 0
        answers: list[Tensor] = []
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            index, ones = np.arange(len(some)), np.ones(len(some))
            seed = self.seed_of("validation", start)
            part = self.generate(self.student, some, max_new_tokens=self.cap, seed=seed)
            answers += part
            with torch.no_grad(), self._autocast():
                batch = self._collate(index, ones, some, part, "held out", 0)
                ours = self.response_logits(self.student, batch)
                for name, values in self.token_measures(batch, ours).items():
                    total = values.double()[batch.response_mask].sum()
                    sums[name] = sums.get(name, 0.0) + float(total)
                n_tokens += int(batch.response_mask.sum())
                if responses is not None:
                    given = [r[: self.cap] for r in responses[start : start + batch_size]]
                    batch = self._collate(index, ones, some, given, "held out", 0)
                    logits = self.response_logits(self.student, batch)
                    logps, mask = token_logps(logits, batch.labels, shift=False)
                    nll -= float(logps.double().sum())
                    n_given += int(mask.sum())
        result = {f"val_{name}": total / n_tokens for name, total in sums.items()}
        result["val_length"] = n_tokens / len(prompts)
        if responses is not None:
            result["val_nll"] = nll / n_given
        if metric is not None:
            assert self._validation_prompts is not None
            scores = metric(self._validation_prompts, self.decode(answers))
            result |= {f"val_{name}": float(value) for name, value in scores.items()}
        return result

    # Tokens.

    def decode(self, responses: Sequence[Tensor]) -> list[Any]:
        """Responses as strings without special tokens, or as they are without a tokenizer."""
        if self.tokenizer is None:
            return list(responses)
        return [
            self.tokenizer.decode(response.tolist(), skip_special_tokens=True)
            for response in responses
        ]

    def _token_ids(self, name: str, texts: Sequence[Any]) -> list[Tensor]:
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"{name} must be a sequence of one text or more, got {texts!r}")
        result = []
        for i, text in enumerate(texts):
            if isinstance(text, str):
                if self.tokenizer is None:
                    raise TypeError(f"{name} must be token ids without a tokenizer, got {text!r}")
                text = self.tokenizer(text, add_special_tokens=name.endswith("prompts"))[
                    "input_ids"
                ]
            ids = torch.as_tensor(text).detach().cpu()
            if ids.dim() != 1 or ids.numel() == 0 or ids.is_floating_point():
                raise ValueError(
                    f"{name} must be sequences of one token id or more, got {text!r} at {i}"
                )
            result.append(ids.long())
        return result

    def _eos_token_ids(self) -> list[int]:
        for source in (
            self.tokenizer,
            getattr(self.student, "generation_config", None),
            getattr(self.student, "config", None),
        ):
            eos = getattr(source, "eos_token_id", None)
            if eos is not None:
                return [int(eos)] if isinstance(eos, int) else [int(i) for i in eos]
        return []

    def _pad_token_id(self) -> int:
        for source in (self.tokenizer, getattr(self.student, "config", None)):
            pad = getattr(source, "pad_token_id", None)
            if pad is not None and pad >= 0:
                return int(pad)
        return (self._eos_token_ids() or [0])[0]

    # The models.

    def _inputs(self, model: nn.Module, batch: DistillationBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
        }
        decoder = cast(Any, model).get_decoder()
        if "position_ids" in inspect.signature(decoder.forward).parameters:
            inputs["position_ids"] = batch.position_ids
        return inputs

    def _autocast(self) -> Any:
        # Accelerate casts in the forward of what it prepared; the output layer is outside.
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def _no_sync(self, more: bool) -> Any:
        if self.accelerator is None or not more:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self._wrapped)

    def _backward(self, loss: Tensor) -> None:
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def sum_over_processes(self, value: np.ndarray | float) -> np.ndarray:
        """Sum over processes, in float64."""
        value = np.asarray(value, dtype=np.float64)
        if self.rank[1] == 1:
            return value
        tensor = torch.from_numpy(value).to(self._device)
        return cast(Tensor, self.accelerator.reduce(tensor, "sum")).cpu().numpy()

    @property
    def rank(self) -> tuple[int, int]:
        """Index of this process, and the number of processes."""
        if self.accelerator is None:
            return 0, 1
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def _is_main(self) -> bool:
        return self.rank[0] == 0

    # Checkpoints.

    def _save(
        self, path: str | os.PathLike[str], step: int, n_generated: int, state: dict[str, Any]
    ) -> None:
        if not self._is_main:
            return
        tensors = self._trained()
        moments, values = optimizer_state(self._optimizer)
        metadata = {
            "step": step,
            "seed": self._seed,
            "prompts": fingerprint(self.prompt_ids_),
            "history": self.history_,
            "generated_tokens": n_generated,
            "rates": self._rates,
            "optimizer": values,
            "state": state,
        }
        save_checkpoint(path, tensors | moments, metadata)

    def _trained(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the student: what is trained, and its buffers."""
        tensors: dict[str, Tensor] = {
            f"student.{name}": p for name, p in self.student.named_parameters() if p.requires_grad
        }
        return tensors | {f"buffer.{name}": b for name, b in self.student.named_buffers()}

    def _load(self, path: str | os.PathLike[str]) -> int:
        tensors, metadata = load_checkpoint(path)
        if "seed" not in metadata or "prompts" not in metadata:
            raise ValueError(f"resume_from must be written by Distiller, got {os.fspath(path)!r}")
        if metadata["prompts"] != fingerprint(self.prompt_ids_):
            raise ValueError("prompts must be those of the checkpoint, got others")
        wanted = self._trained()
        stored = {n: t for n, t in tensors.items() if n.startswith(("student.", "buffer."))}
        shapes = [{n: tuple(t.shape) for n, t in group.items()} for group in (wanted, stored)]
        if shapes[0] != shapes[1]:
            differ = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
            raise ValueError(
                f"student must have the checkpoint's parameters, differs in {differ[:4]}"
            )
        with torch.no_grad():
            for name, tensor in stored.items():
                wanted[name].copy_(tensor)
        load_optimizer(self._optimizer, tensors, metadata["optimizer"])
        self._rates = metadata["rates"]
        self._seed = metadata["seed"]
        self.history_ = metadata["history"]
        self.n_generated_tokens_ = metadata["generated_tokens"]
        self.load_state_dict(metadata["state"])
        return int(metadata["step"])
