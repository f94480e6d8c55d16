"""Fine-tuning whose hidden states stay put when the model takes a step in a bad direction.

LfU adds to the loss of supervised fine-tuning the distance between the model's hidden states and
those of an auxiliary model, which is the same model after one undesirable step: a normalised step
*up* the loss in parameters ψ of its own, low-rank pairs or one vector per layer::

    ψ <- ψ + alpha g / |g|,   g = d loss / dψ
    consistency = mean over examples, tokens and layers of |stop_gradient(h) - h'|²
    loss = loss + weight * consistency.

The gradient of the consistency passes through the auxiliary states h' into the weights, which both
models share. It cannot draw h towards h'; it makes what the weights compute insensitive to ψ.

How it is computed: ψ starts where it changes nothing (B = 0 of a low-rank pair A B, or a vector 0),
so the auxiliary model before its step *is* the model. One pass, and one backward pass through it,
give the loss, h, the gradient of the weights and g; the second pass gives h'. A copy of the model
would need a third. Each graph is differentiated inside the call while its hooks are in place, so
that only one is alive at a time and gradient checkpointing recomputes what it should; the loss that
is returned hands the gradients on when its ``backward`` is called.

What the paper, as far as it is known to us, leaves open and is chosen here: |g| is the norm over
all of ψ; every real token counts (``positions``); h are the outputs of the decoder blocks;
A is drawn anew in every step; both passes share their dropout masks, else the consistency would
measure dropout. Defaults of `alpha`, `weight` and `rank` are ours.

References
----------
Nam, Kim, Jeong, "Learning from the Undesirable: Robust Adaptation of Language Models without
Forgetting", arXiv:2511.13052, AAAI 2026.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sciml._check import check_choice, check_integer, check_interval

from .reference_model import unwrap_model
from .token_reduction import IGNORE_INDEX

__all__ = ["LfURegularizer", "LfUTrainerMixin", "consistency_loss"]

Inputs = Mapping[str, Any]
ComputeLoss = Callable[[nn.Module, Inputs], Tensor]


def consistency_loss(
    hidden: Sequence[Tensor],
    aux_hidden: Sequence[Tensor],
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Compute the squared distance of hidden states, a mean over each example's tokens and layers.

    Parameters
    ----------
    hidden : sequence of n_layers Tensors of shape (batch, n_tokens, hidden_size)
        States to be close to; they receive no gradient.
    aux_hidden : sequence of n_layers Tensors of shape (batch, n_tokens, hidden_size)
        States of the auxiliary model.
    mask : Tensor of shape (batch, n_tokens), default=None
        True or nonzero where a token counts. None counts all.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over the examples; "none" gives one value an example, 0 for one without a token.

    Returns
    -------
    Tensor
        A scalar, or of shape (batch,). The square is summed over the hidden units. In float32 at
        least.

    Raises
    ------
    ValueError
        If there is no layer or shapes differ.

    References
    ----------
    Nam et al., arXiv:2511.13052.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import consistency_loss
    >>> hidden, aux_hidden = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    >>> consistency_loss([hidden], [aux_hidden])
    tensor(4.)
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if len(hidden) != len(aux_hidden) or len(hidden) == 0:
        raise ValueError(
            "hidden and aux_hidden must hold the same number of layers, at least 1, "
            f"got {len(hidden)} and {len(aux_hidden)}"
        )
    shape = hidden[0].shape
    for layer, (h, h_aux) in enumerate(zip(hidden, aux_hidden, strict=True)):
        if h.dim() != 3 or h.shape != h_aux.shape or h.shape[:2] != shape[:2]:
            raise ValueError(
                "hidden and aux_hidden must have shape (batch, n_tokens, hidden_size) and agree, "
                f"got {tuple(h.shape)} and {tuple(h_aux.shape)} in layer {layer}"
            )
    if mask is not None and mask.shape != shape[:2]:
        raise ValueError(f"mask must have shape {tuple(shape[:2])}, got {tuple(mask.shape)}")
    per_token = sum(
        _squared_distance(h.detach(), h_aux) for h, h_aux in zip(hidden, aux_hidden, strict=True)
    )
    assert isinstance(per_token, Tensor)
    counts = torch.ones_like(per_token) if mask is None else (mask != 0).to(per_token.dtype)
    per_token = torch.where(counts != 0, per_token, 0)
    per_example = per_token.sum(1) / counts.sum(1).clamp(min=1) / len(hidden)
    if reduction == "none":
        return per_example
    return per_example.mean() if reduction == "mean" else per_example.sum()


class LfURegularizer:
    """The loss of supervised fine-tuning plus the consistency under an undesirable step.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers, also under PEFT (its own adapters are part of the
        model; ψ is put beside them), or any module if `layers` names its blocks. Nothing is added
        to it between calls, and no parameter of it moves.
    perturbation : {"lora", "steering"}, default="lora"
        ψ: a low-rank pair at each target module, of which B = 0 moves and A is drawn anew each
        step; or a vector, 0 at first, added to the output of each block at every token.
    alpha : float, default=0.1
        Length of the undesirable step.
    weight : float, default=1.0
        Weight λ of the consistency.
    rank : int, default=8
        Rank of the pairs.
    target_modules : sequence of str or "all-linear", default=None
        Names of the modules in each block that get a pair: anything with `in_features` and
        `out_features`, quantised layers too. None means "q_proj" and "v_proj".
    layers : "all", sequence of int or sequence of Module, default="all"
        Blocks whose outputs are compared and which are perturbed.
    positions : {"all", "completion"}, default="all"
        Whether to compare at all tokens of the attention mask or at those with a label.
    random_state : int, default=0
        Seed of the A, together with the number of the step.

    Attributes
    ----------
    blocks : list of Module
        The blocks.
    targets : list of Module
        The modules with a pair; empty for "steering".

    Raises
    ------
    ValueError
        If an option is out of range, or no block or target module is found.

    Notes
    -----
    Two forward and two backward passes: about twice the time of plain fine-tuning, less where the
    output layer is large, since the second pass computes it for one token only. The gradient of
    the trainable weights is held twice for a moment. Gradient checkpointing works without
    reentrance (``use_reentrant=False``, the default of transformers 5). Not tried: FSDP and
    DeepSpeed's ZeRO-3, which shard weights and expect to be differentiated from the end; float16
    with loss scaling, as the inner gradients are not scaled (bfloat16 needs none).

    References
    ----------
    Nam et al., arXiv:2511.13052.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from sciml.lm import LfURegularizer
    >>> config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> regularizer = LfURegularizer(model, alpha=0.1, weight=1.0)
    >>> ids = torch.arange(10)[None]
    >>> loss, parts = regularizer(model, {"input_ids": ids, "labels": ids})
    >>> loss.backward()
    >>> bool(loss == parts["sft"] + parts["consistency"])
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        perturbation: Literal["lora", "steering"] = "lora",
        alpha: float = 0.1,
        weight: float = 1.0,
        rank: int = 8,
        target_modules: Sequence[str] | Literal["all-linear"] | None = None,
        layers: Sequence[int] | Sequence[nn.Module] | Literal["all"] = "all",
        positions: Literal["all", "completion"] = "all",
        random_state: int = 0,
    ) -> None:
        check_choice("perturbation", perturbation, ("lora", "steering"))
        check_interval("alpha", alpha, 0, math.inf, closed="left")
        check_interval("weight", weight, 0, math.inf, closed="left")
        check_integer("rank", rank, 1)
        check_choice("positions", positions, ("all", "completion"))
        check_integer("random_state", random_state, 0)
        self.perturbation = perturbation
        self.alpha = alpha
        self.weight = weight
        self.rank = rank
        self.positions = positions
        self.random_state = random_state
        self.blocks = _blocks(model, layers)
        self.targets = _targets(self.blocks, target_modules) if perturbation == "lora" else []
        self._n_calls = 0

    def __call__(
        self,
        model: nn.Module,
        inputs: Inputs,
        compute_loss: ComputeLoss | None = None,
        *,
        step: int | None = None,
        consistency_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the regularised loss and its parts.

        Parameters
        ----------
        model : torch.nn.Module
            The model, possibly wrapped for several devices.
        inputs : mapping of str to Tensor
            A batch, with "labels" for a model of transformers. Not changed.
        compute_loss : callable, default=None
            ``compute_loss(model, inputs)`` returns the loss of fine-tuning by running the model.
            None means ``model(**inputs).loss``.
        step : int, default=None
            Number of the step, which with `random_state` determines A; None counts the calls.
        consistency_scale : float or Tensor, default=1.0
            Factor of the consistency besides `weight`: this micro-batch's share of a step.

        Returns
        -------
        loss : Tensor
            A scalar. Its gradient, with respect to the parameters that require one, is formed
            already; ``backward`` may be called once, scaled or not.
        parts : dict of str to Tensor
            Detached: ``sft``, ``consistency``, ``gradient_norm`` (of g; where it is 0 there is no
            step and no consistency).

        Raises
        ------
        ValueError
            If the loss does not depend on ψ or on any trainable parameter.
        """
        if step is None:
            step = self._n_calls
        self._n_calls += 1
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        device = parameters[0].device
        random = _random_state(device)
        sft, hidden, psi, norm, gradients = self._ascend(
            model, inputs, compute_loss, step, parameters
        )
        consistency = torch.zeros_like(sft)
        if norm != 0:  # NaN goes on, to be seen
            consistency, of_consistency = self._consistency(
                model, inputs, compute_loss, psi, hidden, parameters, random
            )
            scale = self.weight * consistency_scale
            for i, gradient in enumerate(of_consistency):
                if gradient is not None:
                    gradient = gradient * scale
                    mine = gradients[i]
                    # Not in place: autograd may hand out one tensor for two parameters.
                    gradients[i] = gradient if mine is None else mine + gradient
        value = sft + self.weight * consistency_scale * consistency
        loss = _WithGradients.apply(value, gradients, *parameters)
        return loss, {"sft": sft, "consistency": consistency, "gradient_norm": norm}

    @contextmanager
    def undesirable(
        self,
        model: nn.Module,
        inputs: Inputs,
        compute_loss: ComputeLoss | None = None,
        *,
        step: int = 0,
    ) -> Iterator[list[Tensor]]:
        """Within this context `model` is the auxiliary model after its step on a batch.

        Parameters
        ----------
        model, inputs, compute_loss, step
            As for a call.

        Yields
        ------
        list of Tensor
            The ψ that moved from 0: the B of shape (out_features, rank), or the vectors of shape
            (hidden_size,).
        """
        _, _, psi, _, _ = self._ascend(model, inputs, compute_loss, step, [])
        with self._perturbed(psi, {}):
            yield [moved for moved, _ in psi.values()]

    def _ascend(
        self,
        model: nn.Module,
        inputs: Inputs,
        compute_loss: ComputeLoss | None,
        step: int,
        parameters: list[nn.Parameter],
    ) -> tuple[Tensor, list[Tensor], "Psi", Tensor, list[Tensor | None]]:
        """Loss, hidden states, ψ after its step, |g| and the gradient of the parameters."""
        collected: dict[int, Tensor] = {}
        psi = self._initial_psi(step)
        with torch.enable_grad(), self._perturbed(psi, collected):
            sft = (
                _default_loss(model, inputs)
                if compute_loss is None
                else compute_loss(model, inputs)
            )
            hidden = [collected[i].detach() for i in range(len(self.blocks))]
            moved = [p for p, _ in psi.values()]
            gradients = _gradients(sft, [*moved, *parameters])
        of_psi, of_parameters = gradients[: len(moved)], gradients[len(moved) :]
        known = [g for g in of_psi if g is not None]
        if not known:
            raise ValueError(
                "the loss must depend on the perturbation, but no gradient reached it: are the "
                "layers part of the model, and do its modules pass gradients to their inputs?"
            )
        first = known[0].device
        norm = torch.stack([g.norm().to(first) for g in known]).norm()
        scale = self.alpha / norm.clamp(min=1e-12)
        stepped = {
            i: (torch.zeros_like(p.detach()) if g is None else g * scale.to(g.device), fixed)
            for (i, (p, fixed)), g in zip(psi.items(), of_psi, strict=True)
        }
        return sft.detach(), hidden, stepped, norm, of_parameters

    def _consistency(
        self,
        model: nn.Module,
        inputs: Inputs,
        compute_loss: ComputeLoss | None,
        psi: "Psi",
        hidden: list[Tensor],
        parameters: list[nn.Parameter],
        random: list[Tensor],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The consistency with the auxiliary model and its gradient."""
        collected: dict[int, Tensor] = {}
        device = parameters[0].device
        after = _random_state(device)
        _set_random_state(device, random)  # the dropout masks of the first pass
        try:
            with torch.enable_grad(), self._perturbed(psi, collected):
                if _keeps_logits(model):
                    shown = {k: v for k, v in inputs.items() if k != "labels"}
                    model(**shown, logits_to_keep=1)
                elif compute_loss is None:
                    _default_loss(model, inputs)
                else:
                    compute_loss(model, inputs)
                aux_hidden = [collected[i] for i in range(len(self.blocks))]
                value = consistency_loss(hidden, aux_hidden, self._mask(inputs, hidden[0]))
                gradients = _gradients(value, parameters)
        finally:
            _set_random_state(device, after)
        return value.detach(), gradients

    def _initial_psi(self, step: int) -> "Psi":
        """B, 0 so far, and A of each target; vectors are made when a block shows their size."""
        seed = np.random.SeedSequence([self.random_state, step]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0] >> np.uint64(1)))
        psi: Psi = {}
        for i, module in enumerate(self.targets):
            n_in, n_out = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
            a = torch.empty(self.rank, n_in).uniform_(generator=generator)
            a = (2 * a - 1) / math.sqrt(n_in)  # PEFT's initialisation, kaiming_uniform(sqrt(5))
            b = _zeros((n_out, self.rank), next(module.parameters()))
            psi[i] = (b, a.to(b))
        return psi

    @contextmanager
    def _perturbed(self, psi: "Psi", collected: dict[int, Tensor]) -> Iterator[None]:
        """Hooks that add ψ and collect the outputs of the blocks, gone afterwards."""
        handles = []
        try:
            for i, module in enumerate(self.targets):
                b, a = psi[i]
                handles.append(module.register_forward_hook(_low_rank_hook(a, b)))
            vectors = psi if self.perturbation == "steering" else None
            for i, block in enumerate(self.blocks):
                handles.append(block.register_forward_hook(_block_hook(i, vectors, collected)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mask(self, inputs: Inputs, hidden: Tensor) -> Tensor | None:
        if self.positions == "completion":
            mask = inputs["labels"] != IGNORE_INDEX
        else:
            mask = inputs.get("attention_mask")
        return None if mask is None else mask.to(hidden.device)


class LfUTrainerMixin:
    """Mixin for `Trainer` and `SFTTrainer`: the consistency of LfU added to the trainer's loss.

    ``class MyTrainer(LfUTrainerMixin, SFTTrainer): pass``. Evaluation reports the plain loss.

    Parameters
    ----------
    *args, **kwargs
        Of the trainer.
    regularizer : callable, default=LfURegularizer
        Makes the regulariser from the model: ``partial(LfURegularizer, alpha=0.05)``.

    Notes
    -----
    With `num_items_in_batch` the consistency of a micro-batch is weighted by its share of the
    step's labels. A is drawn by the number of the optimiser's step, so a run that is resumed from
    a checkpoint goes on as if it had not stopped.

    References
    ----------
    Nam et al., arXiv:2511.13052.

    Examples
    --------
    >>> from transformers import Trainer
    >>> from sciml.lm import LfUTrainerMixin
    >>> class LfUTrainer(LfUTrainerMixin, Trainer):
    ...     pass
    """

    def __init__(
        self,
        *args: Any,
        regularizer: Callable[[nn.Module], LfURegularizer] = LfURegularizer,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.regularizer = regularizer(trainer.model)
        self._consistency: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch, scaled as the Trainer expects it; see `Trainer.compute_loss`."""
        trainer: Any = self
        plain = super().compute_loss  # type: ignore[misc]
        if not model.training:
            return plain(model, inputs, return_outputs, num_items_in_batch)
        outputs = None

        def compute_loss(model: nn.Module, inputs: Inputs) -> Tensor:
            nonlocal outputs
            # A copy: trainers write to their inputs.
            result = plain(model, dict(inputs), return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
            return loss

        scale: float | Tensor = 1.0
        if num_items_in_batch is not None:
            scale = (inputs["labels"] != IGNORE_INDEX).sum() / num_items_in_batch
            if trainer.args.average_tokens_across_devices:
                scale = scale * (trainer.accelerator.num_processes // trainer.get_tp_size())
        loss, parts = self.regularizer(
            model, inputs, compute_loss, step=trainer.state.global_step, consistency_scale=scale
        )
        self._consistency.append(parts["consistency"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log, with the mean consistency since the last time."""
        if self._consistency:
            logs["consistency"] = float(torch.stack(self._consistency).mean())
            self._consistency.clear()
        super().log(logs, *args)  # type: ignore[misc]


# What moves, B or a vector, and the A that does not; by the number of the target or block.
Psi = dict[int, tuple[Tensor, Tensor | None]]


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to the parameters are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of an LfU loss can be handed on once only")
        scaled = [None if g is None else g * upstream.to(g) for g in gradients]
        return None, None, *scaled


def _low_rank_hook(a: Tensor | None, b: Tensor) -> Callable[..., Tensor]:
    assert a is not None

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        return output + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).to(output.dtype)

    return hook


def _block_hook(
    index: int, vectors: Psi | None, collected: dict[int, Tensor]
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if vectors is not None:
            if index not in vectors:
                vectors[index] = (_zeros((first.shape[-1],), first), None)
            first = first + vectors[index][0].to(first.dtype)
        collected[index] = first
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return hook


def _gradients(value: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    # The Trainer calls under autocast, where a backward pass does not belong.
    with torch.autocast(value.device.type, enabled=False):
        return list(torch.autograd.grad(value, wanted, allow_unused=True))


def _squared_distance(h: Tensor, h_aux: Tensor) -> Tensor:
    difference = h_aux - h
    if difference.dtype != torch.float64:
        difference = difference.float()
    return difference.square().sum(-1)


def _default_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    if inputs.get("labels") is None:
        raise ValueError("inputs must hold labels, or compute_loss must be given")
    loss: Tensor = model(**inputs).loss
    return loss


def _keeps_logits(model: nn.Module) -> bool:
    """Whether the model can compute the logits of the last tokens alone."""
    inner: Any = unwrap_model(model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _blocks(model: nn.Module, layers: Any) -> list[nn.Module]:
    """Check `layers` and return the modules it names."""
    if not isinstance(layers, str) and all(isinstance(layer, nn.Module) for layer in layers):
        if len(layers) == 0:
            raise ValueError("layers must name at least one block, got none")
        inside = set(model.modules())
        if not all(layer in inside for layer in layers):
            raise ValueError("layers must be modules of the model, got one that is not")
        return list(layers)
    inner = unwrap_model(model)
    config = getattr(inner, "config", None)
    n_layers = getattr(config, "num_hidden_layers", None)
    found = [
        list(module)
        for module in inner.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not found:
        raise ValueError(
            "layers must be given as modules: no list of config.num_hidden_layers decoder blocks "
            f"was found in {type(inner).__name__}"
        )
    blocks = found[0]
    if isinstance(layers, str):
        check_choice("layers", layers, ("all",))
        return blocks
    for index in layers:
        check_integer("layers", index, -len(blocks), len(blocks) - 1)
    return [blocks[index] for index in sorted({index % len(blocks) for index in layers})]


def _targets(
    blocks: list[nn.Module], names: Sequence[str] | Literal["all-linear"] | None
) -> list[nn.Module]:
    """Modules that get a low-rank pair; of nested ones, as PEFT's, the outermost."""
    wanted = ("q_proj", "v_proj") if names is None else names
    if isinstance(wanted, str) and wanted != "all-linear":
        raise ValueError(
            f"target_modules must be a sequence of names or 'all-linear', got {wanted!r}"
        )
    targets: list[nn.Module] = []
    for block in blocks:
        inside: tuple[str, ...] = ()
        for name, module in block.named_modules():
            if any(name.startswith(f"{outer}.") for outer in inside):
                continue
            is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
            if is_linear and (wanted == "all-linear" or name.rpartition(".")[2] in wanted):
                targets.append(module)
                inside += (name,)
    if not targets:
        raise ValueError(
            f"target_modules must name linear maps of the blocks, found none for {wanted!r}"
        )
    return targets


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(shape, dtype=dtype, device=like.device, requires_grad=True)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
