"""Fine-tune a causal language model towards the target distribution that a scorer defines.

The losses and estimates are those of `distribution_matching`; here they are applied to models of
transformers, as KL-adaptive DPG: completions are drawn from a proposal q, scored, and weighted so
that the policy descends an f-divergence from p(x) = pi_0(x) exp(r(x) / beta) / Z. The proposal is
an earlier state of the policy, replaced when the policy has come nearer to the target.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._check import check_choice, check_integer, check_interval
from .._checkpoint import load_checkpoint, load_optimizer, optimizer_state, save_checkpoint
from .distribution_matching import (
    DIVERGENCES,
    Divergence,
    RunningPartition,
    effective_sample_size,
    estimate_kl,
    estimate_tv,
    fdpg_weights,
    log_partition,
    target_log_score,
)
from .reference_model import reference, unwrap_model
from .response_batch import fingerprint, sample_responses
from .token_reduction import IGNORE_INDEX, sequence_logps

__all__ = ["DistributionMatcher", "best_of_n"]

Scorer = Callable[..., Any]
Prompt = str | Sequence[int] | Tensor


class DistributionMatcher:
    """Trainer that moves a causal language model to pi_0(x) exp(r(x) / beta) / Z.

    Each step draws completions from the proposal q, scores them, and takes an Adam step on
    `fdpg_loss`. Every `q_update_interval` steps fresh completions from q decide whether the policy
    is nearer to the target than q; if so q becomes the policy (KL-adaptive DPG [1]_). With prompts
    each prompt has a target and a Z of its own (CDPG [2]_). ``divergence="reverse_kl"``,
    ``criterion="always"`` and ``q_update_interval=1`` is KL-regularised RL [3]_.

    Parameters
    ----------
    model : nn.Module
        Policy: a causal language model with transformers' ``generate``, on its device. Only
        parameters that require a gradient are trained. A PEFT model is its own prior.
    scorer : callable
        Rewards of whole completions: ``scorer(completions)``, or ``scorer(prompts, completions)``
        when `fit` gets prompts, on lists of equal length. Completions are texts if there is a
        tokenizer, else LongTensors that include the end-of-sequence token. It returns numbers;
        -inf forbids a completion (log b(x) of a constraint b).
    ref_model : nn.Module, default=None
        Prior pi_0, frozen. None: `model` with its adapters switched off.
    tokenizer : transformers tokenizer, default=None
        Encodes prompts, decodes completions.
    beta : float, default=1.0
        Divides the reward; 1 for constraints and fitted moments.
    divergence : str, default="kl"
        As in `fdpg_loss`.
    baseline : {"z", "mean"}, float or None, default="z"
        As in `fdpg_loss`; "z" is the one of [4]_, the first papers have none.
    clip_ratio : float, default=None
        As in `fdpg_loss`.
    criterion : {"kl", "tv", "always", "never"}, default="kl"
        What decides that q is replaced: estimates of KL(p || .) or of the total variation, or
        always, or never.
    q_update_interval : int, default=16
        Steps between decisions.

    Attributes
    ----------
    history_ : list of dict
        One a step, of the completions drawn for it: ``reward`` (mean over q's completions that are
        not forbidden), ``log_z``, ``ess`` (effective sample size of P / q as a share of the
        samples), ``kl_target`` and ``kl_ref`` (estimates of KL(p || pi) and KL(pi || pi_0)), all
        means over the step's contexts, ``n_skipped`` (contexts without a target) and
        ``proposal_updated``.
    partition_ : RunningPartition
        Z of each context.
    n_steps_ : int
        Steps taken.

    Notes
    -----
    Policy, proposal and prior run without dropout, sampling is at temperature 1 without top-k and
    penalties, and a sequence that reaches `max_new_tokens` ends there: these are the distributions
    the losses speak of. q starts as the policy, that is as pi_0 in the usual case. The current
    batch's estimate of Z enters the running mean before it is used, as a context may be met for the
    first time; the gradient is biased by that to the order of one over the samples of a context.
    Memory: one more copy of the trainable parameters for q.

    References
    ----------
    .. [1] Khalifa, Elsahar and Dymetman, ICLR 2021, arXiv:2012.11635, Algorithm 1.
    .. [2] Korbak, Elsahar, Kruszewski and Dymetman, ICML 2022, arXiv:2112.00791.
    .. [3] Korbak, Perez and Buckley, Findings of EMNLP 2022, arXiv:2205.11275.
    .. [4] Korbak, Elsahar, Kruszewski and Dymetman, NeurIPS 2022, arXiv:2206.00761.

    Examples
    --------
    Bytes that are even numbers, seven times as often as before:

    >>> import copy, math
    >>> from sciml.lm import DistributionMatcher, byte_language_model
    >>> prior = byte_language_model(hidden_size=16, num_layers=1)
    >>> def scorer(completions):
    ...     return [math.log(7) * float(ids[0] % 2 == 0) for ids in completions]
    >>> matcher = DistributionMatcher(copy.deepcopy(prior), scorer, ref_model=prior)
    >>> matcher = matcher.fit(
    ...     n_steps=2, n_samples=8, max_new_tokens=2, learning_rate=1e-2, random_state=0
    ... )
    >>> matcher.n_steps_
    2
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        *,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        beta: float = 1.0,
        divergence: Divergence = "kl",
        baseline: Literal["mean", "z"] | float | None = "z",
        clip_ratio: float | None = None,
        criterion: Literal["kl", "tv", "always", "never"] = "kl",
        q_update_interval: int = 16,
    ) -> None:
        if not callable(scorer):
            raise TypeError(f"scorer must be callable, got {type(scorer).__name__}")
        check_interval("beta", beta, 0, math.inf, closed="neither")
        check_choice("divergence", divergence, DIVERGENCES)
        if isinstance(baseline, str):
            check_choice("baseline", baseline, ("mean", "z"))
        check_choice("criterion", criterion, ("kl", "tv", "always", "never"))
        check_integer("q_update_interval", q_update_interval, 1)
        if ref_model is model:
            raise ValueError("ref_model must be a copy of model, got model itself")
        self.model = model
        self.scorer = scorer
        self.ref_model = ref_model
        self.tokenizer = tokenizer
        self.beta = beta
        self.divergence: Divergence = divergence
        self.baseline: Literal["mean", "z"] | float | None = baseline
        self.clip_ratio = clip_ratio
        self.criterion = criterion
        self.q_update_interval = q_update_interval

    def fit(
        self,
        prompts: Sequence[Prompt] | None = None,
        *,
        n_steps: int = 1024,
        n_samples: int = 256,
        n_contexts: int = 16,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        learning_rate: float = 1.41e-5,
        warmup_steps: int = 12,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 50,
        resume_from: str | os.PathLike[str] | None = None,
        random_state: int | None = None,
        verbose: bool = False,
    ) -> "DistributionMatcher":
        """Train the policy, in place.

        Parameters
        ----------
        prompts : sequence of str or of token ids, default=None
            Contexts. None: completions of the beginning-of-sequence token.
        n_steps : int, default=1024
            Optimiser steps (disco's default).
        n_samples : int, default=256
            Completions a context and step (GDC: batches of 256).
        n_contexts : int, default=16
            Prompts a step, drawn without replacement; all of them if there are fewer.
        max_new_tokens : int, default=64
            Longest completion.
        batch_size : int, default=64
            Sequences a pass of the model.
        learning_rate : float, default=1.41e-5
            Of Adam, reached linearly in `warmup_steps`, then constant (GDC, for GPT-2).
        warmup_steps : int, default=12
            See `learning_rate`; 0 starts at the full rate.
        checkpoint : path, default=None
            File to write trained parameters, proposal, optimiser and random state to, every
            `checkpoint_every` steps, at the end and on interruption.
        checkpoint_every : int, default=50
            Steps between checkpoints.
        resume_from : path, default=None
            Checkpoint to go on from, to `n_steps` in all. The result equals that of the
            uninterrupted run.
        random_state : int or None, default=None
            Seed of completions and of the order of prompts.
        verbose : bool, default=False
            Whether to show a progress bar.

        Returns
        -------
        DistributionMatcher

        Raises
        ------
        ValueError
            If an argument is out of range, no prior is to be had, rewards are NaN or +inf, or the
            checkpoint belongs to other settings.
        """
        for name, value in (
            ("n_steps", n_steps), ("n_samples", n_samples), ("n_contexts", n_contexts),
            ("max_new_tokens", max_new_tokens), ("batch_size", batch_size),
            ("checkpoint_every", checkpoint_every),
        ):  # fmt: skip
            check_integer(name, value, 1)
        check_integer("warmup_steps", warmup_steps, 0)
        check_interval("learning_rate", learning_rate, 0, math.inf, closed="neither")
        with reference(self.model, self.ref_model):
            pass  # a missing prior is refused before anything is drawn
        contexts = encode_prompts(prompts, self.model, self.tokenizer)
        run = _Run(self, prompts, contexts, n_samples, max_new_tokens, batch_size)
        settings = {
            "contexts": fingerprint(contexts), "beta": self.beta, "divergence": self.divergence,
            "baseline": self.baseline, "clip_ratio": self.clip_ratio, "criterion": self.criterion,
            "q_update_interval": self.q_update_interval, "n_samples": n_samples,
            "n_contexts": n_contexts, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
            "learning_rate": learning_rate, "warmup_steps": warmup_steps,
        }  # fmt: skip
        settings = json.loads(json.dumps(settings, default=float))
        optimizer = torch.optim.Adam(run.parameters, lr=learning_rate)
        generator = torch.Generator().manual_seed(
            int(check_random_state(random_state).randint(2**31 - 1))
        )
        self.history_: list[dict[str, Any]] = []
        self.partition_ = RunningPartition()
        if resume_from is not None:
            _load(resume_from, self, run, optimizer, generator, settings)

        def save() -> None:
            if checkpoint is not None:
                _save(checkpoint, self, run, optimizer, generator, settings)

        training = self.model.training
        self.model.eval()
        start = len(self.history_)
        progress = tqdm(total=n_steps, initial=start, disable=not verbose)
        try:
            for step in range(start, n_steps):
                rate = min(1.0, (step + 1) / (warmup_steps + 1))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate
                before = generator.get_state(), self.partition_.state_dict(), run.proposal_state
                try:
                    entry = self._step(run, optimizer, generator, step, n_contexts)
                except BaseException:  # an interrupted step is repeated as it was
                    generator.set_state(before[0])
                    self.partition_.load_state_dict(before[1])
                    run.proposal_state = before[2]
                    raise
                self.history_.append(entry)
                run.consistent = True
                progress.update()
                shown = ("reward", "kl_target", "kl_ref", "ess")
                progress.set_postfix({k: f"{entry[k]:.3g}" for k in shown}, refresh=False)
                if (step + 1) % checkpoint_every == 0 and step + 1 < n_steps:
                    save()
            save()
        except KeyboardInterrupt:
            if run.consistent:
                save()
            raise
        finally:
            progress.close()
            self.model.train(training)
        return self

    @property
    def n_steps_(self) -> int:
        """Steps taken."""
        return len(self.history_)

    def _step(
        self,
        run: "_Run",
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        step: int,
        n_contexts: int,
    ) -> dict[str, Any]:
        updated = False
        # The first step's proposal is the policy: there is nothing to decide.
        if step > 0 and step % self.q_update_interval == 0:
            updated = self._update_proposal(run, generator, n_contexts)
        drawn = run.draw(run.choose(n_contexts, generator), generator)
        log_z = run.update_partition(self.partition_, drawn)
        policy_logps = run.policy_logps(drawn)
        scored = log_z > -math.inf
        entry: dict[str, Any] = run.summary(drawn, policy_logps, log_z)
        entry |= {"n_skipped": int((~scored).sum()), "proposal_updated": updated}
        if bool(scored.any()):
            weights = fdpg_weights(
                policy_logps,
                drawn.scores,
                drawn.proposal_logps,
                log_z,
                divergence=self.divergence,
                baseline=self.baseline,
                clip_ratio=self.clip_ratio,
            )
            optimizer.zero_grad()
            run.backward(drawn, weights)
            run.consistent = False
            optimizer.step()
            optimizer.zero_grad()
            run.proposal_is_policy = False
        else:
            warnings.warn(
                f"step {step} was skipped: the target is zero on all completions drawn so far; the "
                "prior never meets the constraint",
                RuntimeWarning,
                stacklevel=3,
            )
        return entry

    def _update_proposal(self, run: "_Run", generator: torch.Generator, n_contexts: int) -> bool:
        if self.criterion == "never":
            return False
        if self.criterion in ("kl", "tv"):
            drawn = run.draw(run.choose(n_contexts, generator), generator)
            log_z = run.update_partition(self.partition_, drawn)
            scored = log_z > -math.inf
            if not bool(scored.any()):
                return False
            estimate = estimate_kl if self.criterion == "kl" else estimate_tv
            scores, q = drawn.scores[scored], drawn.proposal_logps[scored]
            pi, z = run.policy_logps(drawn)[scored], log_z[scored]
            if not estimate(scores, pi, q, z).mean() < estimate(scores, q, q, z).mean():
                return False
        run.replace_proposal()
        return True


def best_of_n(
    model: nn.Module,
    scorer: Scorer,
    n: int,
    prompts: Sequence[Prompt] | None = None,
    *,
    n_results: int = 1,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    random_state: int | None = None,
) -> tuple[list[Any], Tensor]:
    """Draw n completions for each result and keep the best-scored: no training, n times the cost.

    Its KL from the model is `best_of_n_kl` (n), to compare it with a trained policy.

    Parameters
    ----------
    model : nn.Module
        Causal language model with transformers' ``generate``.
    scorer : callable
        As for `DistributionMatcher`.
    n : int
        Completions to choose from.
    prompts : sequence of str or of token ids, default=None
        Contexts. None: completions of the beginning-of-sequence token.
    n_results : int, default=1
        Results a prompt.
    tokenizer : transformers tokenizer, default=None
        Encodes prompts, decodes completions.
    max_new_tokens : int, default=64
        Longest completion.
    batch_size : int, default=64
        Sequences a pass of the model.
    random_state : int or None, default=None
        Seed of the completions.

    Returns
    -------
    completions : list of str or LongTensor
        ``n_results`` a prompt, those of the first prompt first.
    rewards : Tensor of shape (n_prompts, n_results)
        Their rewards. Of equal rewards the first drawn is taken.

    Raises
    ------
    ValueError
        If an argument is out of range or rewards are NaN or +inf.

    Examples
    --------
    >>> from sciml.lm import best_of_n, byte_language_model
    >>> model = byte_language_model(hidden_size=16, num_layers=1)
    >>> longest, rewards = best_of_n(
    ...     model, lambda completions: [len(ids) for ids in completions], n=4, max_new_tokens=5,
    ...     random_state=0
    ... )
    >>> len(longest), tuple(rewards.shape)
    (1, (1, 1))
    """
    for name, value in (
        ("n", n), ("n_results", n_results), ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):  # fmt: skip
        check_integer(name, value, 1)
    contexts = encode_prompts(prompts, model, tokenizer)
    generator = torch.Generator().manual_seed(
        int(check_random_state(random_state).randint(2**31 - 1))
    )
    per_context = n * n_results
    rows = [i for i in range(len(contexts)) for _ in range(per_context)]
    responses = _sample(model, [contexts[i] for i in rows], max_new_tokens, batch_size, generator)
    rewards = _score(scorer, prompts, rows, responses, tokenizer)
    shaped = rewards.reshape(len(contexts), n_results, n)
    best = shaped.argmax(-1)
    chosen = (torch.arange(len(contexts) * n_results) * n + best.flatten()).tolist()
    completions = _decode([responses[i] for i in chosen], tokenizer)
    return completions, shaped.gather(-1, best.unsqueeze(-1)).squeeze(-1)


class _Drawn(NamedTuple):
    """Completions of some contexts, with what their distributions say of them."""

    contexts: list[int]
    input_ids: Tensor  # (n_contexts * n_samples, n_tokens), padded on the right
    attention_mask: Tensor
    labels: Tensor  # -100 on prompts and padding
    rewards: Tensor  # this and all below (n_contexts, n_samples)
    scores: Tensor
    ref_logps: Tensor
    proposal_logps: Tensor


class _Run:
    """What one call of `fit` works with: parameters, proposal, contexts."""

    def __init__(
        self,
        matcher: DistributionMatcher,
        prompts: Sequence[Prompt] | None,
        contexts: list[Tensor],
        n_samples: int,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self.matcher = matcher
        self.model = matcher.model
        self.prompts = prompts
        self.contexts = contexts
        self.n_samples = n_samples
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model must have parameters that require a gradient, got none")
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.proposal = [p.detach().clone() for p in self.parameters]
        self.proposal_is_policy = True
        self.consistent = True  # False from the optimiser's step to the end of ours

    def choose(self, n_contexts: int, generator: torch.Generator) -> list[int]:
        order = torch.randperm(len(self.contexts), generator=generator)
        return sorted(order[:n_contexts].tolist())

    def draw(self, contexts: list[int], generator: torch.Generator) -> _Drawn:
        rows = [i for i in contexts for _ in range(self.n_samples)]
        with self.as_proposal():
            responses = _sample(
                self.model,
                [self.contexts[i] for i in rows],
                self.max_new_tokens,
                self.batch_size,
                generator,
            )
            batch = _pad([self.contexts[i] for i in rows], responses, self.model)
            proposal_logps = self._logps(self.model, *batch)
        rewards = _score(self.matcher.scorer, self.prompts, rows, responses, self.matcher.tokenizer)
        with reference(self.model, self.matcher.ref_model) as frozen:
            ref_logps = self._logps(frozen, *batch)
        shape = (len(contexts), self.n_samples)
        rewards, ref_logps = rewards.to(ref_logps).reshape(shape), ref_logps.reshape(shape)
        return _Drawn(
            contexts,
            *batch,
            rewards,
            target_log_score(ref_logps, rewards, self.matcher.beta),
            ref_logps,
            proposal_logps.reshape(shape),
        )

    def update_partition(self, partition: RunningPartition, drawn: _Drawn) -> Tensor:
        new = log_partition(drawn.scores, drawn.proposal_logps)
        values = [partition.update(z, i) for z, i in zip(new, drawn.contexts, strict=True)]
        return torch.tensor(values).to(drawn.scores)

    def policy_logps(self, drawn: _Drawn) -> Tensor:
        if self.proposal_is_policy:
            return drawn.proposal_logps
        logps = self._logps(self.model, drawn.input_ids, drawn.attention_mask, drawn.labels)
        return logps.reshape(drawn.scores.shape)

    def backward(self, drawn: _Drawn, weights: Tensor) -> None:
        """Add the gradient of -mean(weights * log pi), some sequences at a time."""
        flat = weights.flatten() / weights.numel()
        for rows in torch.arange(len(flat), device=flat.device).split(self.batch_size):
            if not bool(flat[rows].any()):
                continue
            batch = (x[rows] for x in (drawn.input_ids, drawn.attention_mask, drawn.labels))
            (-(flat[rows] * self._forward(self.model, *batch)).sum()).backward()

    def summary(self, drawn: _Drawn, policy_logps: Tensor, log_z: Tensor) -> dict[str, Any]:
        scored = log_z > -math.inf
        allowed = drawn.rewards > -math.inf
        log_weights = drawn.scores - drawn.proposal_logps
        ess = effective_sample_size(log_weights) / self.n_samples
        ratio = (policy_logps - drawn.proposal_logps).exp()
        kl = torch.tensor(math.nan)
        if bool(scored.any()):
            kl = estimate_kl(
                drawn.scores[scored],
                policy_logps[scored],
                drawn.proposal_logps[scored],
                log_z[scored],
            ).mean()
        return {
            "reward": float(drawn.rewards[allowed].mean()) if bool(allowed.any()) else math.nan,
            "log_z": float(log_z[scored].mean()) if bool(scored.any()) else -math.inf,
            "ess": float(ess.mean()),
            "kl_target": float(kl),
            "kl_ref": float((ratio * (policy_logps - drawn.ref_logps)).mean()),
        }

    def replace_proposal(self) -> None:
        self.proposal = [p.detach().clone() for p in self.parameters]
        self.proposal_is_policy = True

    @property
    def proposal_state(self) -> tuple[list[Tensor], bool]:
        return self.proposal, self.proposal_is_policy

    @proposal_state.setter
    def proposal_state(self, state: tuple[list[Tensor], bool]) -> None:
        self.proposal, self.proposal_is_policy = state

    @contextmanager
    def as_proposal(self) -> Iterator[None]:
        """The model with the parameters of the proposal, without a copy."""
        own = [p.data for p in self.parameters]
        try:
            for parameter, kept in zip(self.parameters, self.proposal, strict=True):
                parameter.data = kept
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    def _forward(self, model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return sequence_logps(model(input_ids=ids, attention_mask=mask).logits, labels)

    @torch.no_grad()
    def _logps(self, model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        parts = zip(*(x.split(self.batch_size) for x in (ids, mask, labels)), strict=True)
        return torch.cat([self._forward(model, *part) for part in parts])


def encode_prompts(
    prompts: Sequence[Prompt] | None, model: nn.Module, tokenizer: Any
) -> list[Tensor]:
    """Return prompts as token ids; without any, the beginning-of-sequence token is the one."""
    if prompts is None:
        bos = _special(model, "bos_token_id") or _special(tokenizer, "bos_token_id")
        if not bos:
            raise ValueError(
                "prompts must be given for a model without a beginning-of-sequence token, got None"
            )
        return [torch.tensor(bos[:1])]
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a list with one prompt or more, got {prompts!r}")
    contexts = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("tokenizer must be given for prompts that are texts, got None")
            prompt = tokenizer(prompt)["input_ids"]
        ids = torch.as_tensor(prompt).long().cpu()
        if ids.dim() != 1 or len(ids) == 0:
            raise ValueError(
                f"prompts[{i}] must be a text or token ids of shape (n_tokens,), got shape "
                f"{tuple(ids.shape)}"
            )
        contexts.append(ids)
    return contexts


def _special(owner: Any, name: str) -> list[int]:
    """Special token ids of a model or tokenizer, as a list."""
    if isinstance(owner, nn.Module):
        inner: Any = unwrap_model(owner)
        for config in (getattr(inner, "generation_config", None), getattr(inner, "config", None)):
            if getattr(config, name, None) is not None:
                value = getattr(config, name)
                return list(value) if isinstance(value, (list, tuple)) else [int(value)]
        return []
    value = getattr(owner, name, None)
    return [] if value is None else [int(value)]


def _sample(
    model: nn.Module,
    prompts: list[Tensor],
    max_new_tokens: int,
    batch_size: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Draw a completion of each prompt, those of equal length together."""
    eos = _special(model, "eos_token_id")
    pad = (_special(model, "pad_token_id") or eos or [0])[0]
    lengths = sorted({len(prompt) for prompt in prompts})
    responses: list[Tensor | None] = [None] * len(prompts)
    for length in lengths:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            seed = int(torch.randint(2**31 - 1, (), generator=generator))
            drawn = sample_responses(
                model,
                [prompts[i] for i in chunk],
                max_new_tokens=max_new_tokens,
                eos_token_ids=eos,
                pad_token_id=pad,
                seed=seed,
            )
            for i, response in zip(chunk, drawn, strict=True):
                responses[i] = response
    return cast(list[Tensor], responses)


def _pad(
    prompts: list[Tensor], responses: list[Tensor], model: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels of prompts and completions, padded on the right."""
    device = next(model.parameters()).device
    pad = nn.utils.rnn.pad_sequence
    rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    ids = pad(rows, batch_first=True)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    labels = [
        torch.cat([torch.full_like(prompt, IGNORE_INDEX), response])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    padded = pad(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return ids.to(device), mask.to(device), padded.to(device)


def _decode(responses: list[Tensor], tokenizer: Any) -> list[Any]:
    if tokenizer is None:
        return list(responses)
    return list(tokenizer.batch_decode(responses, skip_special_tokens=True))


def _score(
    scorer: Scorer,
    prompts: Sequence[Prompt] | None,
    rows: list[int],
    responses: list[Tensor],
    tokenizer: Any,
) -> Tensor:
    completions = _decode(responses, tokenizer)
    if prompts is None:
        result = scorer(completions)
    else:
        result = scorer([prompts[i] for i in rows], completions)
    rewards = torch.as_tensor(result, dtype=torch.float64).detach().cpu()
    if rewards.shape != (len(rows),):
        raise ValueError(
            f"scorer must return a number for each of {len(rows)} completions, got shape "
            f"{tuple(rewards.shape)}"
        )
    if bool((rewards.isnan() | (rewards == math.inf)).any()):
        raise ValueError("scorer must return finite numbers or -inf, got NaN or +inf")
    return rewards


def _save(
    path: str | os.PathLike[str],
    matcher: DistributionMatcher,
    run: _Run,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    settings: dict[str, Any],
) -> None:
    tensors, values = optimizer_state(optimizer)
    for name, parameter, kept in zip(run.names, run.parameters, run.proposal, strict=True):
        tensors[f"policy.{name}"] = parameter.data
        tensors[f"proposal.{name}"] = kept
    tensors["generator"] = generator.get_state()
    metadata = {
        "settings": settings,
        "optimizer": values,
        "partition": matcher.partition_.state_dict(),
        "history": matcher.history_,
        "proposal_is_policy": run.proposal_is_policy,
    }
    save_checkpoint(path, tensors, metadata)


def _load(
    path: str | os.PathLike[str],
    matcher: DistributionMatcher,
    run: _Run,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    settings: dict[str, Any],
) -> None:
    tensors, metadata = load_checkpoint(path)
    found = metadata.get("settings")
    if found != settings:
        wrong = [k for k, v in settings.items() if not found or found.get(k) != v]
        raise ValueError(
            f"resume_from must be a checkpoint of the same settings, got {os.fspath(path)!r}, "
            f"which differs in {', '.join(wrong)}"
        )
    stored = sorted(name[7:] for name in tensors if name.startswith("policy."))
    if stored != sorted(run.names) or any(
        tensors[f"policy.{name}"].shape != p.shape
        for name, p in zip(run.names, run.parameters, strict=True)
    ):
        raise ValueError(
            "model must have the trainable parameters of the checkpoint, got others: "
            f"{len(run.names)} here, {len(stored)} there"
        )
    with torch.no_grad():
        for name, parameter, kept in zip(run.names, run.parameters, run.proposal, strict=True):
            parameter.copy_(tensors[f"policy.{name}"])
            kept.copy_(tensors[f"proposal.{name}"])
    load_optimizer(optimizer, tensors, metadata["optimizer"])
    generator.set_state(tensors["generator"])
    matcher.partition_.load_state_dict(metadata["partition"])
    matcher.history_ = list(metadata["history"])
    run.proposal_is_policy = bool(metadata["proposal_is_policy"])
