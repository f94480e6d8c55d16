"""Language models: objectives, distillation and scaling laws on Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .calibration import (
    aurc,
    eaurc,
    expected_calibration_error,
    negative_log_likelihood,
)
from .chipo import chi2_optimal_policy, chipo_inverse_link, chipo_link, chipo_loss
from .distribution_matching import (
    RunningPartition,
    best_of_n_kl,
    effective_sample_size,
    estimate_kl,
    estimate_tv,
    fdpg_loss,
    fdpg_weights,
    kl_rl_loss,
    log_partition,
    quasi_rejection_accept,
    reinforce_loss,
    target_log_score,
)
from .divergences import (
    TopKLogProbs,
    generalized_jsd,
    mixed_kl,
    sampled_reverse_kl,
    sampled_reverse_kl_from_logps,
    token_kl,
    top_k_log_probs,
)
from .length_curriculum import EntropyGatedLengthCurriculum
from .moment_constraints import (
    fit_moment_coefficients,
)
from .scaling_laws import Chinchilla, DataConstrained, SoftQ
from .token_reduction import (
    next_token_labels,
    reduce_tokens,
    sequence_logps,
    supervised_labels,
    token_logps,
    token_weights,
)
from .vocabulary_rows import (
    HiddenLogits,
    combine,
    entropy,
    forward_kl,
    label_logp,
    log_sum_exp,
    reduce_rows,
    reverse_kl,
    softmax_pullback,
    sum_rows,
    tempered,
)

if TYPE_CHECKING:
    from .chipo_trainer import ChiPOConfig, ChiPOTrainer

__all__ = [
    "ChiPOConfig",
    "ChiPOTrainer",
    "Chinchilla",
    "DataConstrained",
    "EntropyGatedLengthCurriculum",
    "HiddenLogits",
    "RunningPartition",
    "SoftQ",
    "TopKLogProbs",
    "aurc",
    "best_of_n_kl",
    "chi2_optimal_policy",
    "chipo_inverse_link",
    "chipo_link",
    "chipo_loss",
    "combine",
    "eaurc",
    "effective_sample_size",
    "entropy",
    "estimate_kl",
    "estimate_tv",
    "expected_calibration_error",
    "fdpg_loss",
    "fdpg_weights",
    "fit_moment_coefficients",
    "forward_kl",
    "generalized_jsd",
    "kl_rl_loss",
    "label_logp",
    "log_partition",
    "log_sum_exp",
    "mixed_kl",
    "negative_log_likelihood",
    "next_token_labels",
    "quasi_rejection_accept",
    "reduce_rows",
    "reduce_tokens",
    "reinforce_loss",
    "reverse_kl",
    "sampled_reverse_kl",
    "sampled_reverse_kl_from_logps",
    "sequence_logps",
    "softmax_pullback",
    "sum_rows",
    "supervised_labels",
    "target_log_score",
    "tempered",
    "token_kl",
    "token_logps",
    "token_weights",
    "top_k_log_probs",
]

# Trainers of the extra `trl`, whose import takes seconds: loaded when first named.
_LAZY = {"ChiPOConfig": "chipo_trainer", "ChiPOTrainer": "chipo_trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
