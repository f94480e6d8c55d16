r"""Train a policy towards a target distribution: KL-regularised RL as Bayesian inference, f-DPG.

A reward r and a prior pi_0 (the language model before tuning) define the posterior

    p(x) = pi_0(x) exp(r(x) / beta) / Z,        Z = E_{pi_0}[exp(r / beta)],

and E_pi[r] - beta KL(pi || pi_0) = -beta KL(pi || p) + beta log Z: RL with a KL penalty is
variational inference of p [1]_. Without the penalty the optimum is a point mass. Once p is named,
other ways to reach it are open: forward KL (DPG [2]_, [3]_) and other f-divergences [4]_ from
samples of any proposal q, with baselines [5]_, or rejection sampling.

All functions take log-probabilities of whole sequences, of shape (..., n_samples): the last
dimension holds samples from q of one context; leading dimensions, if any, are contexts with a Z
each (conditional DPG [6]_). P = Z p is given by its logarithm, "target log-score". For training
only the gradients of the losses mean something; their values do not.

References
----------
.. [1] Korbak, Perez and Buckley, "RL with KL penalties is better viewed as Bayesian inference",
   Findings of EMNLP 2022, arXiv:2205.11275.
.. [2] Parshakova, Andreoli and Dymetman, "Distributional Reinforcement Learning for Energy-Based
   Sequential Models", arXiv:1912.08517.
.. [3] Khalifa, Elsahar and Dymetman, "A Distributional Approach to Controlled Text Generation",
   ICLR 2021, arXiv:2012.11635.
.. [4] Go, Korbak, Kruszewski, Rozen, Ryu and Dymetman, "Aligning Language Models with Preferences
   through f-divergence Minimization", ICML 2023, arXiv:2302.08215.
.. [5] Korbak, Elsahar, Kruszewski and Dymetman, "On Reinforcement Learning and Distribution
   Matching for Fine-Tuning Language Models with no Catastrophic Forgetting", NeurIPS 2022,
   arXiv:2206.00761.
.. [6] Korbak, Elsahar, Kruszewski and Dymetman, "Controlling Conditional Language Models without
   Catastrophic Forgetting", ICML 2022, arXiv:2112.00791.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .._check import check_choice, check_integer, check_interval

__all__ = [
    "Divergence",
    "RunningPartition",
    "best_of_n_kl",
    "effective_sample_size",
    "estimate_kl",
    "estimate_tv",
    "fdpg_loss",
    "fdpg_weights",
    "kl_rl_loss",
    "log_partition",
    "quasi_rejection_accept",
    "reinforce_loss",
    "target_log_score",
]

Divergence = Literal["kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2"]
DIVERGENCES = ("kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2")
REDUCTIONS = ("mean", "sum", "none")


def target_log_score(ref_logps: Tensor, reward: Tensor, beta: float = 1.0) -> Tensor:
    """Log of the unnormalised target, log P = log pi_0 + r / beta.

    Parameters
    ----------
    ref_logps : Tensor of shape (..., n_samples)
        Log-probabilities of the samples under the prior pi_0.
    reward : Tensor of shape (..., n_samples)
        Rewards. -inf forbids a sample: log b(x) of a constraint b in {0, 1} is a reward, and
        lambda . phi(x) of moment constraints is one (`fit_moment_coefficients`), with beta 1.
    beta : float, default=1.0
        Weight of the KL penalty; towards 0 the target concentrates on the best sequence, towards
        infinity it becomes the prior.

    Returns
    -------
    Tensor of shape (..., n_samples)

    Raises
    ------
    ValueError
        If `beta` is not positive, shapes disagree, or values are NaN or +inf.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import target_log_score
    >>> target_log_score(torch.tensor([-2.0, -1.0]), torch.tensor([1.0, -torch.inf]), beta=0.5)
    tensor([0., -inf])
    """
    check_interval("beta", beta, 0, math.inf, closed="neither")
    (ref_logps,) = _checked(ref_logps=ref_logps)
    reward = _like("reward", reward, ref_logps)
    return ref_logps + reward / beta


def log_partition(target_log_scores: Tensor, proposal_logps: Tensor) -> Tensor:
    """Log of the importance-sampling estimate of Z, the mean of P / q over samples from q.

    The estimate of Z is unbiased, its logarithm is not.

    Parameters
    ----------
    target_log_scores : Tensor of shape (..., n_samples)
        log P of samples from q; -inf where the target is zero.
    proposal_logps : Tensor of shape (..., n_samples)
        log q of the samples.

    Returns
    -------
    Tensor of shape (...)
        -inf if the target is zero on all samples.

    Raises
    ------
    ValueError
        If shapes disagree, log P is NaN or +inf, or log q is not finite.
    """
    (proposal_logps,) = _checked(proposal_logps=proposal_logps)
    return _log_mean_exp(
        _like("target_log_scores", target_log_scores, proposal_logps) - proposal_logps
    )


def fdpg_weights(
    policy_logps: Tensor,
    target_log_scores: Tensor,
    proposal_logps: Tensor,
    log_z: Tensor | float | None = None,
    *,
    divergence: Divergence = "kl",
    baseline: Literal["mean", "z"] | float | Tensor | None = None,
    self_normalize: bool = False,
    clip_ratio: float | None = None,
) -> Tensor:
    """Weight with which each sample's log-probability is pushed up, for a step of f-DPG.

    With t = pi(x) / p(x) the gradient of D_f(pi || p) = E_p[f(t)] is
    E_q[(pi / q) f'(t) grad log pi], so the weight is (pi / q) (-f'(t) - b) with a baseline b, which
    leaves the expected gradient as it is. `fdpg_loss` tells the arguments.

    Returns
    -------
    Tensor of shape (..., n_samples)
        Constants (no gradient).
    """
    check_choice("divergence", divergence, DIVERGENCES)
    (policy_logps, proposal_logps) = _checked(
        policy_logps=policy_logps.detach(), proposal_logps=proposal_logps.detach()
    )
    scores = _like("target_log_scores", target_log_scores.detach(), policy_logps)
    log_ratio = policy_logps - proposal_logps  # pi / q
    log_target = scores - proposal_logps  # P / q, then p / q
    if self_normalize:
        if log_z is not None:
            raise ValueError(f"log_z must be None with self_normalize=True, got {log_z!r}")
        log_z = _log_mean_exp(log_target)
        log_ratio = log_ratio - _log_mean_exp(log_ratio).unsqueeze(-1)
    elif log_z is None:
        raise ValueError("log_z must be given unless self_normalize=True, got None")
    log_z = _per_context("log_z", log_z, policy_logps)
    empty = log_z == -math.inf
    if bool(empty.all()):
        raise ValueError(
            "log_z must be finite for one context at least, got -inf: the target is zero on every "
            "sample, so that nothing tells where it lies"
        )
    if bool((empty.unsqueeze(-1) & (scores > -math.inf)).any()):
        raise ValueError("log_z must not be -inf where target_log_scores are finite")
    log_target = log_target - torch.where(empty, 0.0, log_z).unsqueeze(-1)
    # Contexts without a target are skipped: computed as if pi = p, weight 0 in the end.
    log_target = torch.where(empty.unsqueeze(-1), log_ratio, log_target)
    log_t = log_ratio - log_target
    if divergence in ("reverse_kl", "reverse_chi2") and bool((log_t == math.inf).any()):
        raise ValueError(
            f"target_log_scores must be finite for divergence={divergence!r}, which is infinite "
            "for a policy that gives samples outside the target's support, got -inf"
        )
    limit = math.inf
    if clip_ratio is not None:
        check_interval("clip_ratio", clip_ratio, 0, math.inf, closed="neither")
        limit = float(clip_ratio)
    ratio = log_ratio.exp().clamp(max=limit)
    if divergence == "kl":
        pseudo_reward, at_target = (-log_t).exp(), 1.0
    elif divergence == "reverse_kl":
        pseudo_reward, at_target = -(log_t + 1), -1.0
    elif divergence == "tv":
        pseudo_reward, at_target = -0.5 * log_t.sign(), 0.0
    elif divergence == "js":
        pseudo_reward, at_target = softplus(-log_t) - math.log(2), 0.0
    elif divergence == "chi2":
        pseudo_reward, at_target = (-log_t).exp().clamp(max=limit).square() - 1, 0.0
    else:
        pseudo_reward, at_target = -2 * (log_t.exp().clamp(max=limit) - 1), 0.0
    b = _baseline(baseline, pseudo_reward, at_target)
    if divergence == "kl":  # (pi / q) / t is p / q, which need not pass through pi
        weights = log_target.exp().clamp(max=limit)
        if b is not None:
            weights = weights - ratio * b
    else:
        weights = ratio * (pseudo_reward if b is None else pseudo_reward - b)
    weights = torch.where(empty.unsqueeze(-1), 0.0, weights)
    if not bool(weights.isfinite().all()):
        raise ValueError(
            "importance weights must be finite, got an overflow: the policy or the target is too "
            "far from the proposal; set clip_ratio, or take a nearer proposal"
        )
    return weights


def fdpg_loss(
    policy_logps: Tensor,
    target_log_scores: Tensor,
    proposal_logps: Tensor,
    log_z: Tensor | float | None = None,
    *,
    divergence: Divergence = "kl",
    baseline: Literal["mean", "z"] | float | Tensor | None = None,
    self_normalize: bool = False,
    clip_ratio: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Loss whose gradient is an unbiased estimate of that of an f-divergence from the target.

    Parameters
    ----------
    policy_logps : Tensor of shape (..., n_samples)
        log pi of samples drawn from the proposal, with gradient.
    target_log_scores : Tensor of shape (..., n_samples)
        log P, see `target_log_score`; -inf where the target is zero.
    proposal_logps : Tensor of shape (..., n_samples)
        log q. On-policy these are the policy's own, ``policy_logps.detach()``.
    log_z : Tensor of shape (...), or float
        Log of the normaliser of each context, see `log_partition` and `RunningPartition`. Contexts
        where it is -inf are skipped. None with `self_normalize`.
    divergence : {"kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2"}, default="kl"
        "kl" is KL(p || pi), that is DPG; "reverse_kl" KL(pi || p), that is KL-regularised RL up to
        beta; "tv" total variation; "js" twice Jensen-Shannon; "chi2" chi2(p || pi);
        "reverse_chi2" chi2(pi || p). The reverse ones are infinite, hence refused, where the target
        is zero.
    baseline : {"mean", "z"}, float, Tensor or None, default=None
        What is subtracted from the pseudo-reward -f'(t). "z": its value at pi = p, so that all
        weights vanish there (but for "tv", whose pseudo-reward jumps); with "kl" the weight is
        then P / (Z q) - pi / q [2]_. "mean": the mean over the *other* samples of the context,
        which keeps the gradient unbiased. A number (or a tensor that broadcasts): for instance the
        mean of earlier batches. None: as [3]_ and most papers have it, weight P / (Z q) for "kl".
    self_normalize : bool, default=False
        Replace Z and the normaliser of pi / q by this batch's: the divergence is then that of the
        two distributions on the samples, and the weights of "kl" are n w_j / sum(w), w = P / q.
        Biased, less variance. With q = pi_0 this is reward-weighted regression.
    clip_ratio : float, default=None
        Largest pi / q and p / q, and for the chi2 divergences p / pi or pi / p. Biased.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over samples and contexts, skipped ones included.

    Returns
    -------
    Tensor
        ``-(weights * policy_logps)``, reduced; its gradient is what counts.

    Raises
    ------
    ValueError
        If log pi or log q is not finite (a sample that q cannot draw), log P is NaN or +inf, every
        log Z is -inf, a reverse divergence meets a zero of the target, or weights overflow.

    Notes
    -----
    The official GDC code omits 1/Z in "kl", which the learning rate absorbs; here it is kept, so
    that gradients are those of the divergence.

    References
    ----------
    .. [1] Go et al., arXiv:2302.08215 (f-DPG).
    .. [2] Korbak et al., arXiv:2206.00761 (baseline of the forward KL).
    .. [3] Khalifa et al., arXiv:2012.11635 (DPG with a proposal).

    Examples
    --------
    Three equally likely sequences, of which the target wants the last twice as often as the others:

    >>> import math, torch
    >>> from sciml.lm import fdpg_loss
    >>> logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    >>> logps = logits.log_softmax(0)
    >>> target = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).log()
    >>> fdpg_loss(logps, target, logps.detach(), math.log(4.0), baseline="z").backward()
    >>> logits.grad  # pi - p, the gradient of the forward KL
    tensor([ 0.0833,  0.0833, -0.1667], dtype=torch.float64)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    weights = fdpg_weights(
        policy_logps,
        target_log_scores,
        proposal_logps,
        log_z,
        divergence=divergence,
        baseline=baseline,
        self_normalize=self_normalize,
        clip_ratio=clip_ratio,
    )
    return _reduce(-weights * policy_logps.to(weights.dtype), reduction)


def reinforce_loss(
    policy_logps: Tensor,
    reward: Tensor,
    *,
    baseline: Literal["mean"] | float | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Loss whose gradient is the policy gradient of the expected reward, negated.

    On its own it drives the policy to a point mass on the best sequence, however good the reward
    and the exploration: use `kl_rl_loss` or `fdpg_loss`.

    Parameters
    ----------
    policy_logps : Tensor of shape (..., n_samples)
        log pi of samples drawn from the policy itself, with gradient.
    reward : Tensor of shape (..., n_samples)
        Finite rewards; constants.
    baseline : {"mean"}, float, Tensor or None, default=None
        Subtracted from the rewards. "mean": the mean reward of the context's other samples.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over samples and contexts.

    Returns
    -------
    Tensor
        ``-((reward - baseline) * policy_logps)``, reduced.

    Raises
    ------
    ValueError
        If shapes disagree or values are not finite.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    (logps,) = _checked(policy_logps=policy_logps)
    advantage = _like("reward", reward.detach(), logps)
    if not bool(advantage.isfinite().all()):
        raise ValueError("reward must be finite, got -inf: forbid sequences by fdpg_loss instead")
    b = _baseline(baseline, advantage, None)
    return _reduce(-(advantage if b is None else advantage - b) * logps, reduction)


def kl_rl_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    reward: Tensor,
    beta: float,
    *,
    baseline: Literal["mean"] | float | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Loss whose gradient is that of E_pi[r] - beta KL(pi || pi_0), negated; samples on-policy.

    REINFORCE on r - beta (log pi - log pi_0); the derivative of that reward itself has mean zero.
    Equal to beta times `fdpg_loss` with ``divergence="reverse_kl"`` up to a constant baseline.

    Parameters
    ----------
    policy_logps : Tensor of shape (..., n_samples)
        log pi of samples drawn from the policy itself, with gradient.
    ref_logps : Tensor of shape (..., n_samples)
        log pi_0 of the samples.
    reward : Tensor of shape (..., n_samples)
        Finite rewards of whole sequences.
    beta : float
        Weight of the penalty, above 0.
    baseline : {"mean"}, float, Tensor or None, default=None
        Subtracted. "mean": the mean of the context's other samples.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over samples and contexts.

    Returns
    -------
    Tensor
        The loss; its gradient is what counts.

    Raises
    ------
    ValueError
        If `beta` is not positive, shapes disagree or values are not finite.

    References
    ----------
    .. [1] Korbak, Perez and Buckley, arXiv:2205.11275.
    """
    check_interval("beta", beta, 0, math.inf, closed="neither")
    logps, ref_logps = _checked(policy_logps=policy_logps.detach(), ref_logps=ref_logps.detach())
    penalised = _like("reward", reward.detach(), logps) - beta * (logps - ref_logps)
    return reinforce_loss(policy_logps, penalised, baseline=baseline, reduction=reduction)


def estimate_kl(
    target_log_scores: Tensor,
    policy_logps: Tensor,
    proposal_logps: Tensor,
    log_z: Tensor | float | None = None,
) -> Tensor:
    """Importance-sampling estimate of KL(p || pi) from samples of a proposal.

    -log Z + (1/Z) mean[(P / q) (log P - log pi)], with 0 where P is 0.

    Parameters
    ----------
    target_log_scores, policy_logps, proposal_logps : Tensor of shape (..., n_samples)
        log P, log pi and log q of samples from q.
    log_z : Tensor of shape (...), float or None, default=None
        Log-normaliser. None: estimated from these samples, which makes the weights sum to one.

    Returns
    -------
    Tensor of shape (...)
        In nats; may come out below zero by sampling error. Differentiable in `policy_logps`.

    Raises
    ------
    ValueError
        If log pi or log q is not finite, log P is NaN or +inf, or Z is zero.
    """
    policy_logps, proposal_logps = _checked(
        policy_logps=policy_logps, proposal_logps=proposal_logps
    )
    scores = _like("target_log_scores", target_log_scores, policy_logps)
    weights, log_z = _normalised_weights(scores, proposal_logps, log_z)
    gap = torch.where(scores > -math.inf, scores - policy_logps, 0.0)
    return (weights * gap).mean(-1) - log_z


def estimate_tv(
    target_log_scores: Tensor,
    policy_logps: Tensor,
    proposal_logps: Tensor,
    log_z: Tensor | float | None = None,
) -> Tensor:
    """Importance-sampling estimate of the total variation distance of target and policy.

    Half the mean of ``|pi / q - P / (Z q)|`` over samples from q.

    Parameters
    ----------
    target_log_scores, policy_logps, proposal_logps, log_z
        As for `estimate_kl`.

    Returns
    -------
    Tensor of shape (...)
        Between 0 and 1 up to sampling error.

    Raises
    ------
    ValueError
        As `estimate_kl`.
    """
    policy_logps, proposal_logps = _checked(
        policy_logps=policy_logps, proposal_logps=proposal_logps
    )
    scores = _like("target_log_scores", target_log_scores, policy_logps)
    weights, _ = _normalised_weights(scores, proposal_logps, log_z)
    return 0.5 * ((policy_logps - proposal_logps).exp() - weights).abs().mean(-1)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Number of equally weighted samples that a weighted sample is worth, (sum w)^2 / sum w^2.

    Parameters
    ----------
    log_weights : Tensor of shape (..., n_samples)
        For instance log P - log q; any constant may be added; -inf is weight zero.

    Returns
    -------
    Tensor of shape (...)
        Between 1 and n_samples; 0 if all weights are zero.

    Raises
    ------
    ValueError
        If values are NaN or +inf.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import effective_sample_size
    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0]).log())
    tensor(2.)
    """
    logw = _floating("log_weights", log_weights)
    if bool((logw.isnan() | (logw == math.inf)).any()):
        raise ValueError("log_weights must be finite or -inf, got NaN or +inf")
    logw = logw - logw.amax(-1, keepdim=True).clamp(min=torch.finfo(logw.dtype).min)
    return (2 * logw.logsumexp(-1) - (2 * logw).logsumexp(-1)).exp().nan_to_num(0.0)


def best_of_n_kl(n: int) -> float:
    """KL of the best of n samples from the model they were drawn from, log n - (n - 1) / n.

    Exact for rewards without ties, an upper bound with them; independent of model and reward.

    Parameters
    ----------
    n : int
        Number of samples, 1 or more.

    Returns
    -------
    float
        In nats.

    Examples
    --------
    >>> from sciml.lm import best_of_n_kl
    >>> round(best_of_n_kl(16), 4)
    1.8351
    """
    check_integer("n", n, 1)
    return math.log(n) - (n - 1) / n


def quasi_rejection_accept(
    target_log_scores: Tensor,
    proposal_logps: Tensor,
    log_bound: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Accept samples with probability min(1, P / (c q)): exact samples of p where P <= c q.

    The share accepted is E_q[min(1, P / (c q))]; a larger c brings the accepted samples nearer to p
    and accepts fewer (quasi-rejection sampling [1]_).

    Parameters
    ----------
    target_log_scores, proposal_logps : Tensor of shape (..., n_samples)
        log P and log q of samples from q.
    log_bound : float
        log c.
    generator : torch.Generator, default=None
        Draws the decisions. None: torch's global one.

    Returns
    -------
    BoolTensor of shape (..., n_samples)
        Which to keep.

    Raises
    ------
    ValueError
        As `log_partition`.

    References
    ----------
    .. [1] Eikema et al., "An approximate sampler for energy-based models with divergence
       diagnostics", TMLR 2022.
    """
    check_interval("log_bound", log_bound, -math.inf, math.inf, closed="neither")
    (proposal_logps,) = _checked(proposal_logps=proposal_logps)
    scores = _like("target_log_scores", target_log_scores, proposal_logps)
    uniform = torch.rand(
        scores.shape, dtype=scores.dtype, device=scores.device, generator=generator
    )
    return uniform < (scores - proposal_logps - log_bound).exp()


class RunningPartition:
    """Running mean of estimates of Z, in log space, one for each context.

    Z <- (Z_new + n Z) / (n + 1): each batch's mean of P / q is an unbiased estimate whatever the
    proposal was, so that estimates of all batches may be averaged.

    Parameters
    ----------
    max_z : float, default=None
        Largest value returned: a cap for contexts whose estimate one lucky sample has blown up.

    Examples
    --------
    >>> import math
    >>> from sciml.lm import RunningPartition
    >>> partition = RunningPartition()
    >>> partition.update(math.log(1.0)), round(math.exp(partition.update(math.log(3.0))), 12)
    (0.0, 2.0)
    """

    def __init__(self, max_z: float | None = None) -> None:
        if max_z is not None:
            check_interval("max_z", max_z, 0, math.inf, closed="neither")
        self.max_z = max_z
        self._log_sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, log_z: float | Tensor, context: int | str = 0) -> float:
        """Add an estimate, as `log_partition` gives it, and return log Z.

        Parameters
        ----------
        log_z : float or scalar Tensor
            Log of the estimate; -inf (an estimate of zero) counts.
        context : int or str, default=0
            Whose Z it is.

        Returns
        -------
        float
        """
        value, key = float(log_z), str(context)
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"log_z must be finite or -inf, got {value}")
        old = self._log_sums.get(key, -math.inf)
        high = max(old, value)
        self._log_sums[key] = (
            high + math.log(math.exp(old - high) + math.exp(value - high))
            if high > -math.inf
            else high
        )
        self._counts[key] = self._counts.get(key, 0) + 1
        return self.log_z(context)

    def log_z(self, context: int | str = 0) -> float:
        """Log of the mean estimate of a context.

        Raises
        ------
        ValueError
            If there is none yet.
        """
        key = str(context)
        if key not in self._counts:
            raise ValueError(f"context must have been updated, got {context!r}")
        value = self._log_sums[key] - math.log(self._counts[key])
        return value if self.max_z is None else min(value, math.log(self.max_z))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which JSON can hold."""
        return {"log_sums": dict(self._log_sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._log_sums = {str(k): float(v) for k, v in state["log_sums"].items()}
        self._counts = {str(k): int(v) for k, v in state["counts"].items()}


def _floating(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(
            f"{name} must have shape (..., n_samples) with a sample, got {tuple(value.shape)}"
        )
    return value if value.dtype == torch.float64 else value.float()


def _checked(**logps: Tensor) -> tuple[Tensor, ...]:
    """Return log-probabilities of one shape, finite, in float32 or more."""
    tensors = {name: _floating(name, value) for name, value in logps.items()}
    first, *_ = tensors.items()
    for name, value in tensors.items():
        if value.shape != first[1].shape:
            raise ValueError(
                f"{name} must have the shape {tuple(first[1].shape)} of {first[0]}, "
                f"got {tuple(value.shape)}"
            )
        if not bool(value.isfinite().all()):
            extra = (
                ": a sample of probability zero cannot come from the proposal, and a proposal that "
                "does not cover the target makes every estimate biased"
                if name == "proposal_logps"
                else ""
            )
            raise ValueError(f"{name} must be finite, got NaN or infinity{extra}")
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else None
    return tuple(t if dtype is None else t.to(dtype) for t in tensors.values())


def _like(name: str, value: Any, other: Tensor) -> Tensor:
    """Return scores or rewards of the shape of log-probabilities; -inf is allowed."""
    value = _floating(name, value) if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(value).__name__}")
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have shape {tuple(other.shape)} as the log-probabilities, "
            f"got {tuple(value.shape)}"
        )
    if bool((value.isnan() | (value == math.inf)).any()):
        raise ValueError(f"{name} must be finite or -inf, got NaN or +inf")
    return value.to(device=other.device)


def _per_context(name: str, value: Tensor | float, samples: Tensor) -> Tensor:
    """Return one number per context, of shape samples.shape[:-1]."""
    shape = samples.shape[:-1]
    tensor = torch.as_tensor(value, dtype=samples.dtype, device=samples.device).detach()
    if tensor.dim() > 0 and tensor.shape != shape:
        raise ValueError(
            f"{name} must be a number or have shape {tuple(shape)}, one for each context, "
            f"got {tuple(tensor.shape)}"
        )
    if bool((tensor.isnan() | (tensor == math.inf)).any()):
        raise ValueError(f"{name} must be finite or -inf, got NaN or +inf")
    return tensor.expand(shape)


def _normalised_weights(
    scores: Tensor, proposal_logps: Tensor, log_z: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """Return p / q and log Z."""
    log_weights = scores - proposal_logps
    log_z = _log_mean_exp(log_weights) if log_z is None else _per_context("log_z", log_z, scores)
    if bool((log_z == -math.inf).any()):
        raise ValueError(
            "target_log_scores must be finite for one sample of each context, got -inf for all"
            if bool((scores == -math.inf).all(-1).any())
            else "log_z must be finite, got -inf"
        )
    return (log_weights - log_z.unsqueeze(-1)).exp(), log_z


def _log_mean_exp(x: Tensor) -> Tensor:
    return x.logsumexp(-1) - math.log(x.shape[-1])


def _baseline(
    baseline: Any, pseudo_reward: Tensor, at_target: float | None
) -> Tensor | float | None:
    """Return what to subtract; `at_target` is None where "z" has no meaning."""
    if baseline is None:
        return None
    if isinstance(baseline, str):
        check_choice("baseline", baseline, ("mean",) if at_target is None else ("mean", "z"))
        if baseline == "z":
            return at_target
        n = pseudo_reward.shape[-1]
        if n < 2:
            raise ValueError('baseline="mean" needs two samples of a context or more, got 1')
        # Without the sample itself, on which its baseline must not depend.
        return (pseudo_reward.sum(-1, keepdim=True) - pseudo_reward) / (n - 1)
    if isinstance(baseline, Tensor):
        if not bool(baseline.isfinite().all()):
            raise ValueError("baseline must be finite, got NaN or infinity")
        return baseline.detach().to(pseudo_reward)
    check_interval("baseline", baseline, -math.inf, math.inf, closed="neither")
    return float(baseline)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
