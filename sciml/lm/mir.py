"""Masked-input regularisation: predict the next token from an input with holes as well.

On a corpus that is read many times, a language model is trained on the clean input and, with the
same weights, on a copy in which some tokens are masked. The targets stay what they were.

Xu et al., "Data-Constrained Language Model Pretraining: Improved Regularization and Scaling
Laws", 2026, arXiv:2606.06888.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._check import check_choice, check_integer, check_interval
from .reference_model import unwrap_model
from .token_reduction import (
    IGNORE_INDEX,
    Reduction,
    reduce_tokens,
    supervised_labels,
    token_weights,
)
from .trainer_losses import hidden_logits
from .vocabulary_rows import Logits, label_logp, reduce_rows, sum_rows

__all__ = ["MIRTrainerMixin", "mask_inputs", "mir_loss", "split_weight_decay"]


def mask_inputs(
    input_ids: Tensor,
    mask_token_id: int,
    *,
    mask_ratio: tuple[float, float] = (0.0, 0.5),
    keep_prefix: int = 8,
    n_masked: int | None = None,
    attention_mask: Tensor | None = None,
    special_tokens_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Input with tokens replaced by the mask token, each sequence at a rate of its own.

    For each sequence a rate r is drawn uniformly from `mask_ratio`, then every position after the
    prefix is masked with probability r.

    Parameters
    ----------
    input_ids : LongTensor of shape (batch, n_tokens)
    mask_token_id : int
        A token that is no target and is never generated; usually a row added to the embedding.
    mask_ratio : (float, float), default=(0.0, 0.5)
        Ends of the interval of rates (the paper's).
    keep_prefix : int, default=8
        Positions at the start that are never masked (the paper's).
    n_masked : int, optional
        Mask exactly this many positions of each sequence instead; `mask_ratio` is not used then.
    attention_mask : Tensor of shape (batch, n_tokens), optional
        Positions that are 0 here (padding) are never masked.
    special_tokens_mask : Tensor of shape (batch, n_tokens), optional
        Positions that are not 0 here are never masked.
    generator : torch.Generator, optional
        On the device of `input_ids`.

    Returns
    -------
    masked_ids : LongTensor of shape (batch, n_tokens)
        A new tensor.
    mask : BoolTensor of shape (batch, n_tokens)
        Where it was masked.

    Raises
    ------
    ValueError
        If a ratio is outside [0, 1] or they are in the wrong order, if sequences are no longer
        than the prefix, or if fewer than `n_masked` positions of a sequence may be masked.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import mask_inputs
    >>> ids = torch.arange(24).reshape(2, 12)
    >>> masked, mask = mask_inputs(ids, 99, mask_ratio=(1.0, 1.0))
    >>> masked[0]
    tensor([ 0,  1,  2,  3,  4,  5,  6,  7, 99, 99, 99, 99])
    """
    low, high = mask_ratio
    check_interval("mask_ratio[0]", low, 0, 1)
    check_interval("mask_ratio[1]", high, 0, 1)
    if low > high:
        raise ValueError(f"mask_ratio must be (low, high) with low <= high, got {mask_ratio}")
    check_integer("keep_prefix", keep_prefix, 0)
    check_integer("mask_token_id", mask_token_id, 0)
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids must have shape (batch, n_tokens), got {tuple(input_ids.shape)}"
        )
    batch, n_tokens = input_ids.shape
    if n_tokens <= keep_prefix:
        raise ValueError(
            f"input_ids must have more than keep_prefix = {keep_prefix} positions, got {n_tokens}"
        )
    allowed = torch.ones_like(input_ids, dtype=torch.bool)
    allowed[:, :keep_prefix] = False
    for name, kept, where in (
        ("attention_mask", attention_mask, True),
        ("special_tokens_mask", special_tokens_mask, False),
    ):
        if kept is not None:
            if kept.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape {tuple(input_ids.shape)} of input_ids, "
                    f"got {tuple(kept.shape)}"
                )
            allowed &= kept.bool() if where else ~kept.bool()

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=input_ids.device)

    if n_masked is None:
        rate = low + (high - low) * draw(batch, 1)
        mask = allowed & (draw(batch, n_tokens) < rate)
    else:
        check_integer("n_masked", n_masked, 0, n_tokens)
        fewest = int(allowed.sum(1).min()) if batch else n_masked
        if fewest < n_masked:
            raise ValueError(
                f"n_masked must be at most the number of positions that may be masked, which is "
                f"{fewest} in one sequence, got {n_masked}"
            )
        order = draw(batch, n_tokens).masked_fill(~allowed, 2.0).argsort(1)
        mask = torch.zeros_like(allowed).scatter(1, order[:, :n_masked], True)
    return input_ids.masked_fill(mask, mask_token_id), mask


def mir_loss(
    logits: Logits,
    masked_logits: Logits,
    labels: Tensor,
    *,
    weight: float = 0.4,
    ntp_weight: float = 1.0,
    loss_on: Literal["all", "masked"] = "all",
    mask: Tensor | None = None,
    shift: bool = True,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_parts: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """Next-token loss on the clean input plus a weighted one on the masked input.

    ``ntp_weight * CE(logits, labels) + weight * CE(masked_logits, labels)``, not divided by the sum
    of the weights, as in the paper.

    Parameters
    ----------
    logits, masked_logits : Tensor of shape (batch, n_tokens, vocabulary_size) or HiddenLogits
        What the model says of the clean and of the masked input.
    labels : LongTensor of shape (batch, n_tokens)
        The same for both; -100 where nothing is to be predicted.
    weight, ntp_weight : float, default=0.4 and 1.0
        Weights of the masked and of the clean term (the paper's).
    loss_on : {"all", "masked"}, default="all"
        Whether the masked term counts every label, as the published runs do, or only labels that
        were masked in the input.
    mask : BoolTensor of shape (batch, n_tokens), optional
        What `mask_inputs` returned; needed for ``loss_on="masked"``.
    shift : bool, default=True
        Whether row t predicts label t + 1.
    reduction : {"mean", "sum", "none"}, default="mean"
        "mean" of the masked term under ``loss_on="masked"`` is over masked labels, and 0 without
        one. "none" gives the weighted sum per token.
    num_items_in_batch : int or Tensor, optional
        Divides the sums instead, see `reduce_tokens`.
    return_parts : bool, default=False
        Also return a dict with the detached terms "ntp" and "aux".
    chunk_size : int, optional
        Rows a chunk, see `reduce_rows`.

    Returns
    -------
    Tensor, or (Tensor, dict of str to Tensor)

    Raises
    ------
    ValueError
        If a weight is negative, or the mask is missing where it is needed.

    References
    ----------
    Xu et al., 2026, arXiv:2606.06888.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import mir_loss
    >>> logits, labels = torch.zeros(1, 10, 5), torch.zeros(1, 10, dtype=torch.long)
    >>> round(float(mir_loss(logits, logits, labels) / torch.tensor(5.0).log()), 3)
    1.4
    """
    check_interval("weight", weight, 0)
    check_interval("ntp_weight", ntp_weight, 0)
    check_choice("loss_on", loss_on, ("all", "masked"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if loss_on == "masked" and mask is None:
        raise ValueError('mask must be given for loss_on="masked": what mask_inputs returned')
    terms = {
        "ntp": _cross_entropy(
            logits, labels, None, shift, reduction, num_items_in_batch, chunk_size
        )
    }
    hidden_labels = mask if loss_on == "masked" else None
    terms["aux"] = _cross_entropy(
        masked_logits, labels, hidden_labels, shift, reduction, num_items_in_batch, chunk_size
    )
    loss = ntp_weight * terms["ntp"] + weight * terms["aux"]
    if return_parts:
        return loss, {name: term.detach() for name, term in terms.items()}
    return loss


def _cross_entropy(
    logits: Logits,
    labels: Tensor,
    only: Tensor | None,
    shift: bool,
    reduction: Reduction,
    num_items_in_batch: int | Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    if only is not None:
        if only.shape != labels.shape:
            raise ValueError(
                f"mask must have the shape {tuple(labels.shape)} of labels, got {tuple(only.shape)}"
            )
        labels = labels.masked_fill(~only, IGNORE_INDEX)
    labels, counted = supervised_labels(logits, labels, shift=shift)
    if reduction == "none":
        logps = reduce_rows(label_logp, logits, labels, mask=counted, chunk_size=chunk_size)
        return -reduce_tokens(logps.squeeze(-1), counted, "none")
    weights = token_weights(counted, reduction, num_items_in_batch)
    total, _ = sum_rows(
        label_logp, logits, labels, weights=-weights, mask=counted, chunk_size=chunk_size
    )
    return total


class MIRTrainerMixin:
    """Mixin for `transformers.Trainer` and TRL's `SFTTrainer`: adds the masked-input loss.

    Write it before the trainer: ``class MIRTrainer(MIRTrainerMixin, Trainer): pass``. Evaluation
    uses clean inputs only. The gradient of the masked term is formed at once, before the clean
    forward pass, so that the activations of the two are never in memory together.

    Parameters
    ----------
    *args, **kwargs
        Of the trainer.
    mask_token_id : int
        See `mask_inputs`. The embedding needs a row for it:
        ``model.resize_token_embeddings(n + 1)``.
    mir_weight : float, default=0.4
        Weight of the masked term.
    mask_ratio : (float, float), default=(0.0, 0.5)
        Interval of masking rates.
    keep_prefix : int, default=8
        Positions never masked.
    from_hidden_states : bool, default=False
        Compute both losses from hidden states, without the array of all logits; see
        `hidden_logits`.

    Raises
    ------
    ValueError
        If `mask_token_id` is no row of the embedding.

    Notes
    -----
    A mask is drawn from the seed of the training arguments, the optimiser step and the place of
    the micro-batch in it, so that a resumed run draws what an uninterrupted one would have.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        mask_token_id: int,
        mir_weight: float = 0.4,
        mask_ratio: tuple[float, float] = (0.0, 0.5),
        keep_prefix: int = 8,
        from_hidden_states: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        check_interval("mir_weight", mir_weight, 0)
        inner: Any = unwrap_model(trainer.model)
        n_rows = inner.get_input_embeddings().num_embeddings
        if not 0 <= mask_token_id < n_rows:
            raise ValueError(
                f"mask_token_id must be a row of the embedding, in [0, {n_rows}), got "
                f"{mask_token_id}; model.resize_token_embeddings adds one"
            )
        self.mask_token_id = mask_token_id
        self.mir_weight = mir_weight
        self.mask_ratio = mask_ratio
        self.keep_prefix = keep_prefix
        self.from_hidden_states = from_hidden_states
        self._micro_batch = (-1, -1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch, scaled as the Trainer expects it; see `Trainer.compute_loss`."""
        trainer: Any = self
        if "labels" not in inputs:
            raise ValueError(f"the batch must have labels, got {sorted(inputs)}")
        labels = inputs["labels"]
        if bool((labels == self.mask_token_id).any()):
            raise ValueError(f"labels must not hold the mask token {self.mask_token_id}")
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        inputs["use_cache"] = False
        scale = 1.0
        if model.training and num_items_in_batch is None:
            scale = 1.0 / trainer.current_gradient_accumulation_steps
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            scale *= trainer.accelerator.num_processes // trainer.get_tp_size()

        def term(ids: Tensor, hidden: bool) -> tuple[Tensor, Any]:
            call = {**inputs, "input_ids": ids}
            outputs = None if hidden else model(**call)
            logits: Logits = hidden_logits(model, **call) if outputs is None else outputs.logits
            loss = _cross_entropy(logits, labels, None, True, "mean", num_items_in_batch, None)
            return loss * scale, outputs

        hidden = self.from_hidden_states and not return_outputs
        extra: float | Tensor = 0.0
        if model.training and self.mir_weight > 0:
            masked_ids, _ = mask_inputs(
                inputs["input_ids"],
                self.mask_token_id,
                mask_ratio=self.mask_ratio,
                keep_prefix=self.keep_prefix,
                attention_mask=inputs.get("attention_mask"),
                generator=self._generator(inputs["input_ids"].device),
            )
            masked_loss = self.mir_weight * term(masked_ids, hidden)[0]
            trainer.accelerator.backward(masked_loss)
            extra = masked_loss.detach()
        loss, outputs = term(inputs["input_ids"], hidden)
        loss = loss + extra
        return (loss, outputs) if return_outputs else loss

    def _generator(self, device: torch.device) -> torch.Generator:
        trainer: Any = self
        step, place = self._micro_batch
        now = trainer.state.global_step
        self._micro_batch = (now, place + 1 if now == step else 0)
        rank = trainer.args.process_index
        seed = (trainer.args.seed, now, self._micro_batch[1], rank)
        (state,) = np.random.SeedSequence(seed).generate_state(1)
        return torch.Generator(device).manual_seed(int(state))


def split_weight_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that decay the weights of linear layers only.

    The paper's recipe: strong decay (0.4 to 3.2) on linear weights, the output layer among them;
    none on embeddings, gains and biases. A weight shared by embedding and output layer counts as
    an embedding.

    Parameters
    ----------
    model : torch.nn.Module
    weight_decay : float
        At least 0.

    Returns
    -------
    list of dict
        For `torch.optim.AdamW`.

    Examples
    --------
    >>> from torch import nn, optim
    >>> from sciml.lm import split_weight_decay
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    >>> [len(group["params"]) for group in split_weight_decay(model, 1.6)]
    [1, 2]
    >>> optimizer = optim.AdamW(split_weight_decay(model, 1.6), lr=1e-3, betas=(0.9, 0.95))
    """
    check_interval("weight_decay", weight_decay, 0)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in linear], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in linear], "weight_decay": 0.0},
    ]
