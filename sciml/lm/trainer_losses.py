"""Objectives in `transformers.Trainer` and TRL's `SFTTrainer`, scaled as these expect it.

A Trainer wants a loss that was divided by the number of tokens of all micro-batches of an optimiser
step (`num_items_in_batch`) and multiplied by the number of processes, since DDP averages their
gradients. What returns the mean over a micro-batch instead gives gradients that are
`gradient_accumulation_steps` times too large, silently.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .reference_model import reference, unwrap_model
from .vocabulary_rows import HiddenLogits, Logits

__all__ = ["ReferenceLossMixin", "as_compute_loss_func", "hidden_logits"]


def as_compute_loss_func(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A token loss as the `compute_loss_func` of `transformers.Trainer`.

    Parameters
    ----------
    loss : callable
        ``loss(logits, labels, num_items_in_batch=..., **options)``, as the objectives of this
        package that need no reference. It shifts the labels itself.
    **options
        Given to the loss in each call.

    Returns
    -------
    callable
        ``f(outputs, labels, num_items_in_batch=None)``. The Trainer multiplies by the number of
        processes itself.

    Examples
    --------
    >>> from sciml.lm import as_compute_loss_func, reduce_tokens, token_logps
    >>> def nll(logits, labels, *, num_items_in_batch=None):
    ...     logps, mask = token_logps(logits, labels)
    ...     return -reduce_tokens(logps, mask, num_items_in_batch=num_items_in_batch)
    >>> compute_loss_func = as_compute_loss_func(nll)
    """

    def compute_loss_func(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError("the batch has no labels, which the loss needs")
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        return loss(logits, labels, num_items_in_batch=num_items_in_batch, **options)

    return compute_loss_func


def hidden_logits(model: nn.Module, **inputs: Any) -> HiddenLogits:
    """Run a causal language model without its output layer, for losses that take `HiddenLogits`.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers, possibly under PEFT or DDP. It is called as
        usual, with the output layer on one position only, and the decoder's result is picked up
        on the way, so that wrappers see a normal forward pass.
    **inputs
        What the model is called with: `input_ids`, `attention_mask`, ... without labels.

    Returns
    -------
    HiddenLogits
        Hidden states of shape (batch, n_tokens, hidden_size) with the output layer.

    Raises
    ------
    ValueError
        If logits are more than a linear layer of the hidden states (soft-capped or scaled logits,
        an adapter on the output layer, learned prompts), or if labels are among the inputs. Call
        the model and use its logits then.

    Notes
    -----
    Under FSDP or DeepSpeed ZeRO-3 the output layer is not whole outside the forward pass: use the
    logits there.
    """
    if "labels" in inputs:
        raise ValueError("labels must not be among the inputs: the loss is computed elsewhere")
    inner: Any = unwrap_model(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        raise ValueError(
            "the output layer must be a plain torch.nn.Linear, got "
            f"{type(head).__name__} in {type(inner).__name__}; use the model's logits"
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(inner.config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"{type(inner).__name__} changes its logits after the output layer ({name} = "
                f"{getattr(inner.config, name)}); use the model's logits"
            )
    captured: list[Tensor] = []
    handle = inner.get_decoder().register_forward_hook(
        lambda module, arguments, output: captured.append(output[0])
    )
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    (hidden,) = captured
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if ids is not None and tuple(ids.shape[:2]) != tuple(hidden.shape[:2]):
        raise ValueError(
            f"the model gave hidden states of {tuple(hidden.shape[:2])} positions for inputs of "
            f"{tuple(ids.shape[:2])} (learned prompts?); use the model's logits"
        )
    return HiddenLogits(hidden, head.weight, head.bias)


class ReferenceLossMixin:
    """Mixin for `Trainer` and `SFTTrainer`: a loss of the model's and a reference's logits.

    Write it before the trainer, ``class MyTrainer(ReferenceLossMixin, Trainer): pass``. Each step
    runs the reference without gradients (the model with its adapters off, or `ref_model`), then
    the model, then the objective.

    Parameters
    ----------
    *args, **kwargs
        Of the trainer.
    objective : callable
        ``objective(logits, labels, ref_logits=..., num_items_in_batch=...)`` returns the loss,
        or the loss and a dict of scalars, whose means are logged.
    ref_model : torch.nn.Module, optional
        Needed unless the model has PEFT adapters.
    from_hidden_states : bool, default=False
        Give the objective `HiddenLogits` instead of logits, so that no array of size (batch,
        n_tokens, vocabulary) is built; see `hidden_logits` for the models this fits. Evaluation
        always uses logits, as metrics may ask for them.

    Notes
    -----
    `loss_is_scaled_for_ga` is True: the objective divides by `num_items_in_batch`. Where the
    Trainer has no such number, the mean over the micro-batch is divided by the number of
    accumulation steps.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        objective: Callable[..., Any],
        ref_model: nn.Module | None = None,
        from_hidden_states: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.objective = objective
        self.from_hidden_states = from_hidden_states
        self.ref_model = None if ref_model is None else ref_model.to(trainer.args.device)
        self._logged_parts: dict[str, list[Tensor]] = {}
        # Fail now rather than after the data were prepared.
        with reference(trainer.model, self.ref_model):
            pass

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
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if hasattr(getattr(unwrap_model(model), "config", None), "use_cache"):
            inputs["use_cache"] = False
        hidden = self.from_hidden_states and not return_outputs
        with reference(model, self.ref_model) as frozen:
            ref_logits: Logits = (
                hidden_logits(frozen, **inputs) if hidden else frozen(**inputs).logits
            )
        outputs = None
        if hidden:
            logits: Logits = hidden_logits(model, **inputs)
        else:
            outputs = model(**inputs)
            logits = outputs.logits
        result = self.objective(
            logits, labels, ref_logits=ref_logits, num_items_in_batch=num_items_in_batch
        )
        loss, parts = result if isinstance(result, tuple) else (result, {})
        if model.training:
            for name, value in parts.items():
                self._logged_parts.setdefault(name, []).append(value.detach())
            if num_items_in_batch is None:
                loss = loss / trainer.current_gradient_accumulation_steps
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log, with the means of the objective's parts since the last time."""
        for name, values in self._logged_parts.items():
            logs[name] = float(torch.stack(values).mean())
        self._logged_parts.clear()
        super().log(logs, *args)  # type: ignore[misc]
