"""Language models: objectives, distillation and scaling laws on Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .answer_checkers import exact_match, numeric_match
from .byte_language_model import (
    byte_language_model,
    decode_bytes,
    encode_bytes,
    english_text,
    perplexity,
    train_byte_language_model,
)
from .calibration import (
    aurc,
    eaurc,
    expected_calibration_error,
    negative_log_likelihood,
)
from .chipo import chi2_optimal_policy, chipo_inverse_link, chipo_link, chipo_loss
from .cross_tokenizer import (
    CrossTokenizerDistillationLoss,
    hybrid_kl_loss,
    projected_kl_loss,
)
from .distillation import Distiller, PromptWeighting
from .distribution_matcher import (
    DistributionMatcher,
    best_of_n,
)
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
    adaptive_kl,
    generalized_jsd,
    mixed_kl,
    sampled_reverse_kl,
    sampled_reverse_kl_from_logps,
    token_kl,
    top_k_log_probs,
)
from .eksft import EKSFTMask, EKSFTTrainerMixin, eksft_loss, eksft_mask
from .grpo import clipped_policy_loss, grpo_advantages, grpo_loss
from .length_curriculum import EntropyGatedLengthCurriculum
from .lfu import LfURegularizer, LfUTrainerMixin, consistency_loss
from .mask_the_target import (
    TargetMaskedKL,
    TargetMaskedKLTrainerMixin,
    target_masked_kl,
)
from .mir import MIRTrainerMixin, mask_inputs, mir_loss, split_weight_decay
from .moment_constraints import (
    fit_moment_coefficients,
)
from .paced import (
    GradientSNR,
    PassRateEstimator,
    PassRateWeighting,
    TwoStageKL,
    beta_kernel_weights,
    gradient_snr,
    hard_filter_weights,
    paced_loss,
    plot_gradient_snr,
    weighting_efficiency,
)
from .prediction_store import (
    PredictionStore,
)
from .pskd import (
    ProgressiveSelfKDLoss,
    ProgressiveSelfKDTokenLoss,
    linear_alpha,
    pskd_loss,
    pskd_token_loss,
    top_k_predictions,
)
from .pskd_classifier import (
    PSKDClassifier,
)
from .reference_model import (
    precompute_reference_logps,
    reference,
    unwrap_model,
)
from .response_batch import DistillationBatch
from .scaling_laws import Chinchilla, DataConstrained, SoftQ
from .smollm2 import (
    load_smollm2,
    smollm2_cache,
)
from .span_alignment import AlignedTexts, align_offsets, align_spans, align_texts
from .span_annotation import (
    LanguageModelAnnotator,
    RuleAnnotator,
    SpanAnnotation,
    SpanAnnotator,
    route_tokens,
    split_sentences,
    token_offsets,
)
from .teacher_combination import combine_teachers, teacher_scores
from .token_bytes import token_bytes
from .token_projection import TokenProjection, build_token_projection, coverage_report
from .token_reduction import (
    next_token_labels,
    reduce_tokens,
    sequence_logps,
    supervised_labels,
    token_logps,
    token_weights,
)
from .trace import TraceLoss, anneal_weight, pointwise_clipped_kl
from .trace_trainer import TraceBatch, TraceTrainer, append_hint
from .trainer_losses import (
    ReferenceLossMixin,
    as_compute_loss_func,
    hidden_logits,
)
from .uld import hybrid_uld_loss, uld_loss
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
    "AlignedTexts",
    "ChiPOConfig",
    "ChiPOTrainer",
    "Chinchilla",
    "CrossTokenizerDistillationLoss",
    "DataConstrained",
    "DistillationBatch",
    "Distiller",
    "DistributionMatcher",
    "EKSFTMask",
    "EKSFTTrainerMixin",
    "EntropyGatedLengthCurriculum",
    "GradientSNR",
    "HiddenLogits",
    "LanguageModelAnnotator",
    "LfURegularizer",
    "LfUTrainerMixin",
    "MIRTrainerMixin",
    "PSKDClassifier",
    "PassRateEstimator",
    "PassRateWeighting",
    "PredictionStore",
    "ProgressiveSelfKDLoss",
    "ProgressiveSelfKDTokenLoss",
    "PromptWeighting",
    "ReferenceLossMixin",
    "RuleAnnotator",
    "RunningPartition",
    "SoftQ",
    "SpanAnnotation",
    "SpanAnnotator",
    "TargetMaskedKL",
    "TargetMaskedKLTrainerMixin",
    "TokenProjection",
    "TopKLogProbs",
    "TraceBatch",
    "TraceLoss",
    "TraceTrainer",
    "TwoStageKL",
    "adaptive_kl",
    "align_offsets",
    "align_spans",
    "align_texts",
    "anneal_weight",
    "append_hint",
    "as_compute_loss_func",
    "aurc",
    "best_of_n",
    "best_of_n_kl",
    "beta_kernel_weights",
    "build_token_projection",
    "byte_language_model",
    "chi2_optimal_policy",
    "chipo_inverse_link",
    "chipo_link",
    "chipo_loss",
    "clipped_policy_loss",
    "combine",
    "combine_teachers",
    "consistency_loss",
    "coverage_report",
    "decode_bytes",
    "eaurc",
    "effective_sample_size",
    "eksft_loss",
    "eksft_mask",
    "encode_bytes",
    "english_text",
    "entropy",
    "estimate_kl",
    "estimate_tv",
    "exact_match",
    "expected_calibration_error",
    "fdpg_loss",
    "fdpg_weights",
    "fit_moment_coefficients",
    "forward_kl",
    "generalized_jsd",
    "gradient_snr",
    "grpo_advantages",
    "grpo_loss",
    "hard_filter_weights",
    "hidden_logits",
    "hybrid_kl_loss",
    "hybrid_uld_loss",
    "kl_rl_loss",
    "label_logp",
    "linear_alpha",
    "load_smollm2",
    "log_partition",
    "log_sum_exp",
    "mask_inputs",
    "mir_loss",
    "mixed_kl",
    "negative_log_likelihood",
    "next_token_labels",
    "numeric_match",
    "paced_loss",
    "perplexity",
    "plot_gradient_snr",
    "pointwise_clipped_kl",
    "precompute_reference_logps",
    "projected_kl_loss",
    "pskd_loss",
    "pskd_token_loss",
    "quasi_rejection_accept",
    "reduce_rows",
    "reduce_tokens",
    "reference",
    "reinforce_loss",
    "reverse_kl",
    "route_tokens",
    "sampled_reverse_kl",
    "sampled_reverse_kl_from_logps",
    "sequence_logps",
    "smollm2_cache",
    "softmax_pullback",
    "split_sentences",
    "split_weight_decay",
    "sum_rows",
    "supervised_labels",
    "target_log_score",
    "target_masked_kl",
    "teacher_scores",
    "tempered",
    "token_bytes",
    "token_kl",
    "token_logps",
    "token_offsets",
    "token_weights",
    "top_k_log_probs",
    "top_k_predictions",
    "train_byte_language_model",
    "uld_loss",
    "unwrap_model",
    "weighting_efficiency",
]

# Trainers of the extra `trl`, whose import takes seconds: loaded when first named.
_LAZY = {"ChiPOConfig": "chipo_trainer", "ChiPOTrainer": "chipo_trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
