"""Train a language model by χPO with TRL: DPO's trainer, another loss and its rewards.

References
----------
A. Huang et al., "Correcting the Mythos of KL-Regularization: Direct Alignment without
Overoptimization via Chi-Squared Preference Optimization", arXiv:2407.13399, ICLR 2025.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

from sciml._check import check_interval
from sciml.lm.chipo import chipo_loss

__all__ = ["ChiPOConfig", "ChiPOTrainer"]

# Options of DPOConfig that change DPO's loss, and the values with which they do not.
_DPO_ONLY = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "ld_alpha": None,
}


@dataclass
class ChiPOConfig(DPOConfig):
    """Arguments of TRL's `DPOConfig` and the four of the χPO loss.

    `beta`, `label_smoothing` and everything about data, optimiser and reference are `DPOConfig`'s.
    Options that change DPO's loss (`loss_type`, `f_divergence_type`, `use_weighting`, `ld_alpha`)
    must keep their defaults.

    Parameters
    ----------
    r_max : float or None, default=None
        Bound of the true reward's magnitude; margins are clipped to ±2 r_max.
    max_log_ratio : float, default=20.0
        Log-ratio beyond which the χ² term of the link is constant.
    chi_weight, kl_weight : float, default=1.0
        Weights of z and log z in the link; ``chi_weight=0`` is DPO.

    Raises
    ------
    ValueError
        If an option is out of its range or is one of DPO's alone.

    References
    ----------
    Huang et al., arXiv:2407.13399.

    Examples
    --------
    >>> from sciml.lm import ChiPOConfig
    >>> config = ChiPOConfig("output", beta=0.05, r_max=2.0, bf16=False, report_to="none")
    >>> config.r_max, config.chi_weight
    (2.0, 1.0)
    """

    r_max: float | None = field(
        default=None, metadata={"help": "Bound of the true reward; None clips no margin."}
    )
    max_log_ratio: float = field(
        default=20.0, metadata={"help": "Log-ratio beyond which the chi-squared term is constant."}
    )
    chi_weight: float = field(default=1.0, metadata={"help": "Weight of z in the link; 0 is DPO."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of log z in the link."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self)
        nothing = torch.zeros(1)
        chipo_loss(nothing, nothing, nothing, nothing, **_options(self))  # raises for bad options


class ChiPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with the χPO loss, see `chipo_loss`.

    Takes what `DPOTrainer` takes: model, `ref_model` (or a PEFT model, or a model loaded by name),
    data, tokenizer, PEFT configuration, precomputed reference log-probabilities. `args` is a
    `ChiPOConfig`; a plain `DPOConfig` means χPO's default options. Metrics have TRL's names; the
    ``rewards/`` are χPO's implicit rewards ``beta phi(z)``, which are beta, not 0, at the start.

    Raises
    ------
    ValueError
        If `args` sets an option that changes DPO's loss.

    Notes
    -----
    `DPOTrainer` has no hook between log-probabilities and loss. Its own `compute_loss` runs, for
    all passes and metrics but the rewards; its loss is formed, O(batch), and not used.

    References
    ----------
    Huang et al., arXiv:2407.13399.

    Examples
    --------
    >>> from sciml.lm import ChiPOConfig, ChiPOTrainer
    >>> def train(model, tokenizer, pairs):  # pairs: a Dataset of prompt, chosen, rejected
    ...     args = ChiPOConfig("output", beta=0.05, num_train_epochs=1)
    ...     return ChiPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
    """

    _tag_names = ["trl", "chipo"]  # noqa: RUF012 -- TRL's own form, never changed
    _name = "ChiPO"
    _paper = {  # noqa: RUF012 -- TRL's own form, never changed
        "title": "Correcting the Mythos of KL-Regularization: Direct Alignment without "
        "Overoptimization via Chi-Squared Preference Optimization",
        "id": "2407.13399",
        "citation": """\
@inproceedings{huang2025correcting,
    title     = {{Correcting the Mythos of KL-Regularization: Direct Alignment without
                 Overoptimization via Chi-Squared Preference Optimization}},
    author    = {Audrey Huang and Wenhao Zhan and Tengyang Xie and Jason D. Lee and Wen Sun and
                 Akshay Krishnamurthy and Dylan J. Foster},
    year      = 2025,
    booktitle = {The Thirteenth International Conference on Learning Representations},
}""",
    }

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean χPO loss of a batch, chosen rows first, as `Trainer` asks for it."""
        _check_config(self.args)
        precomputed = self.precompute_ref_logps
        if not precomputed:
            reference = self.ref_model or self.model  # compute_ref_log_probs disables adapters
            names = ("ref_chosen_logps", "ref_rejected_logps")
            log_probs = self.compute_ref_log_probs(reference, inputs)
            inputs = inputs | dict(zip(names, log_probs, strict=True))
        passes = []

        def recorded(**model_inputs: Any) -> Any:
            passes.append(model(**model_inputs))
            return passes[-1]

        self.precompute_ref_logps = True  # they are in the inputs now
        try:
            result = super().compute_loss(recorded, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = precomputed

        n_positions = inputs["completion_mask"].shape[1] - 1  # prompt learning prepends others
        logps = passes[0].log_probs[:, -n_positions:].sum(dim=1)
        chosen_logps, rejected_logps = logps.chunk(2)
        loss, chosen_rewards, rejected_rewards = chipo_loss(
            chosen_logps,
            rejected_logps,
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            return_rewards=True,
            **_options(self.args),
        )
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * passes[0].aux_loss
        self._log_rewards(chosen_rewards, rejected_rewards)
        return (loss, result[1]) if return_outputs else loss

    def _log_rewards(self, chosen: Tensor, rejected: Tensor) -> None:
        rewards = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
        }
        training = self.model is not None and self.model.training
        metrics = self._metrics["train" if training else "eval"]
        for name, values in rewards.items():
            metrics[name][-1] = self.accelerator.gather(values).mean().item()


def _options(args: Any) -> dict[str, Any]:
    names = ("r_max", "max_log_ratio", "chi_weight", "kl_weight")
    return {name: getattr(args, name, getattr(ChiPOConfig, name)) for name in names}


def _check_config(args: Any) -> None:
    for name, value in _DPO_ONLY.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name} must keep its default {value!r} with the χPO loss, "
                f"got {getattr(args, name)!r}"
            )
    check_interval("beta", args.beta, 0, float("inf"), closed="neither")
    check_interval("label_smoothing", args.label_smoothing, 0, 0.5, closed="left")
