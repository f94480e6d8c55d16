"""Preference optimisation with the χ² link: DPO's loss, made pessimistic about rare responses.

DPO's implicit reward is ``beta log z``, z = π(a|x) / π_ref(a|x) being the ratio of the policy to
the reference. It follows from regularising with KL, which grows so slowly that with little data or
a small beta the policy moves onto responses which the data hardly covers. χPO regularises with
χ² + KL instead, and only the link changes::

    phi(z) = z + log z,    margin = beta (phi(z_chosen) - phi(z_rejected)),
    loss = -log sigmoid(clip(margin, -2 r_max, 2 r_max)).

Its optimum over all policies, ``π = π_ref W(exp((r - Z) / beta))`` with Lambert's W, grows linearly
in the reward where KL's grows exponentially, and stays positive wherever the reference is.

Where the code departs from the paper's Algorithm 1: the ratio in ``phi`` is
``exp(min(log z, 20))``, as the exponential of a difference of sequence log-probabilities overflows
otherwise (the term ``log z`` keeps its gradient), and no margin is clipped unless `r_max` is given.

References
----------
A. Huang, W. Zhan, T. Xie, J. D. Lee, W. Sun, A. Krishnamurthy, D. J. Foster, "Correcting the Mythos
of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared Preference
Optimization", arXiv:2407.13399, ICLR 2025.
"""

import warnings
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from sciml._check import check_choice, check_finite, check_interval
from sciml.lm.token_reduction import Reduction

__all__ = ["chi2_optimal_policy", "chipo_inverse_link", "chipo_link", "chipo_loss"]

_NEWTON_STEPS = 50  # quadratic convergence: fewer than ten are needed away from extreme rewards


def chipo_link(
    log_ratio: Tensor,
    *,
    max_log_ratio: float = 20.0,
    chi_weight: float = 1.0,
    kl_weight: float = 1.0,
) -> Tensor:
    """Compute ``chi_weight z + kl_weight log z`` from the log of a density ratio z.

    Parameters
    ----------
    log_ratio : Tensor
        log π(a|x) - log π_ref(a|x), any shape. Computed in float32 at least.
    max_log_ratio : float, default=20.0
        Above it the term z no longer grows (exp would overflow near 88 in float32).
    chi_weight, kl_weight : float, default=1.0
        Weights of z, which comes from χ², and of log z, which comes from KL. (0, 1) is DPO.

    Returns
    -------
    Tensor of the shape of `log_ratio`
        The implicit reward divided by beta.

    Raises
    ------
    ValueError
        If a weight is negative, both are 0, or `max_log_ratio` is not positive.

    References
    ----------
    Huang et al., arXiv:2407.13399, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import chipo_link
    >>> chipo_link(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 3.7183])
    """
    check_interval("chi_weight", chi_weight, 0, float("inf"), closed="left")
    check_interval("kl_weight", kl_weight, 0, float("inf"), closed="left")
    check_interval("max_log_ratio", max_log_ratio, 0, float("inf"), closed="neither")
    if chi_weight == kl_weight == 0:
        raise ValueError("chi_weight and kl_weight must not both be 0: the loss would be constant")
    log_ratio = _at_least_float32(log_ratio)
    if chi_weight == 0:
        return kl_weight * log_ratio
    return chi_weight * log_ratio.clamp(max=max_log_ratio).exp() + kl_weight * log_ratio


def chipo_inverse_link(u: Tensor) -> Tensor:
    """Solve ``z + log z = u`` for the density ratio z, which is Lambert's W of exp(u).

    Parameters
    ----------
    u : Tensor
        Any shape. About u comes back for large u, about exp(u) for very negative u; u of 700 and
        more does not overflow, as the equation is solved in log z.

    Returns
    -------
    Tensor of the shape of `u`
        The ratio z >= 0 (a ratio, whereas `chipo_link` takes its logarithm), twice differentiable.

    Raises
    ------
    ValueError
        If `u` holds NaN or infinity.

    References
    ----------
    Huang et al., arXiv:2407.13399.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import chipo_inverse_link
    >>> chipo_inverse_link(torch.tensor([1.0, 1000.0]))
    tensor([  1.0000, 993.0994])
    """
    check_finite("u", u)
    ratio: Tensor = _InverseLink.apply(_at_least_float32(u))
    return ratio


def chi2_optimal_policy(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Compute the policy of the largest reward minus beta (χ² + KL) over finitely many actions.

    It maximises ``E_π[r] - beta D_χ²(π || π_ref) - beta KL(π || π_ref)`` with
    ``D_χ²(P || Q) = E_Q[(dP/dQ - 1)²] / 2``: ``π = π_ref W(exp((r - Z) / beta))``, where Newton's
    method finds the normaliser Z from below, on the convex side, so that it cannot overshoot.

    Parameters
    ----------
    ref_logps : Tensor of shape (..., n_actions)
        Log-probabilities of the reference, normalised over the last axis; -inf excludes an action.
    rewards : Tensor of shape (..., n_actions)
        Reward of each action.
    beta : float
        Strength of the regularisation, positive.

    Returns
    -------
    Tensor of shape (..., n_actions)
        Probabilities, differentiable in `rewards` and `ref_logps`.

    Raises
    ------
    ValueError
        If shapes differ, `beta` is not positive, `ref_logps` is not normalised or a reward is not
        finite.

    References
    ----------
    Huang et al., arXiv:2407.13399.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import chi2_optimal_policy
    >>> ref_logps = torch.tensor([0.5, 0.25, 0.25]).log()
    >>> chi2_optimal_policy(ref_logps, torch.tensor([0.0, 1.0, 0.0]), beta=1.0)
    tensor([0.4342, 0.3487, 0.2171])
    """
    check_interval("beta", beta, 0, float("inf"), closed="neither")
    if ref_logps.shape != rewards.shape or rewards.ndim == 0:
        raise ValueError(
            "ref_logps and rewards must have the same shape (..., n_actions), got "
            f"{tuple(ref_logps.shape)} and {tuple(rewards.shape)}"
        )
    check_finite("rewards", rewards)
    ref_logps, rewards = _at_least_float32(ref_logps), _at_least_float32(rewards)
    total = ref_logps.logsumexp(-1)
    if not bool((total.abs() < 1e-3).all()):
        raise ValueError(
            "ref_logps must be log-probabilities whose exponentials sum to 1 over the last axis, "
            f"got sums from {total.exp().min():.6g} to {total.exp().max():.6g}"
        )

    def excess(normalizer: Tensor) -> tuple[Tensor, Tensor]:
        ratio = chipo_inverse_link((rewards - normalizer) / beta)
        mass = ref * ratio
        slope = -(mass / (1 + ratio)).sum(-1, keepdim=True) / beta
        return mass.sum(-1, keepdim=True) - 1, slope

    ref = ref_logps.exp()
    with torch.no_grad():
        # Two lower bounds of the normaliser: Jensen's inequality (W is convex in its exponent), and
        # that no action can have a probability above 1.
        jensen = (ref * rewards).sum(-1, keepdim=True) - beta
        single = rewards - beta * ((-ref_logps).exp() - ref_logps)
        normalizer = torch.maximum(jensen, single.amax(-1, keepdim=True))
        for _ in range(_NEWTON_STEPS):
            value, slope = excess(normalizer)
            updated = normalizer - value / slope
            if bool((updated <= normalizer).all()):
                break
            normalizer = updated
    # One step more, with the graph: the gradient of the implicit function.
    value, slope = excess(normalizer)
    normalizer = normalizer - value / slope.detach()
    policy = ref * chipo_inverse_link((rewards - normalizer) / beta)
    return policy / policy.sum(-1, keepdim=True)


@overload
def chipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = ...,
    r_max: float | None = ...,
    max_log_ratio: float = ...,
    chi_weight: float = ...,
    kl_weight: float = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[False] = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def chipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = ...,
    r_max: float | None = ...,
    max_log_ratio: float = ...,
    chi_weight: float = ...,
    kl_weight: float = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[True],
    validate: bool = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


def chipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    r_max: float | None = None,
    max_log_ratio: float = 20.0,
    chi_weight: float = 1.0,
    kl_weight: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_rewards: bool = False,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute the χPO loss of preference pairs from log-probabilities of whole responses.

    Parameters
    ----------
    chosen_logps, rejected_logps : Tensor of shape (batch,)
        Log-probabilities of the responses under the policy: sums over the tokens of the response,
        neither averages nor with the prompt. Any floating dtype; computed in float32 at least.
    ref_chosen_logps, ref_rejected_logps : Tensor of shape (batch,)
        The same under the reference. They receive no gradient.
    beta : float, default=0.1
        Strength of the regularisation (TRL's default; the paper tried 0.05 and 0.005). The same
        beta holds the policy back far more than in DPO; near the reference it acts like 2 beta.
    r_max : float or None, default=None
        Bound of the true reward's magnitude. Margins are clipped to ±2 r_max, and pairs beyond have
        zero gradient. None clips nothing.
    max_log_ratio : float, default=20.0
        Log-ratio beyond which the χ² term of the link is constant.
    chi_weight, kl_weight : float, default=1.0
        Weights of z and log z in the link; ``chi_weight=0`` is DPO's sigmoid loss.
    label_smoothing : float in [0, 0.5), default=0.0
        Assumed probability that a pair's labels are swapped.
    reduction : {"mean", "sum", "none"}, default="mean"
        What to return over the pairs.
    return_rewards : bool, default=False
        Whether to return the implicit rewards ``beta phi(z)`` as well.
    validate : bool, default=True
        Whether to look for NaN, infinity and positive log-probabilities (waits for the device).

    Returns
    -------
    Tensor or (Tensor, Tensor, Tensor)
        The loss; with `return_rewards` also the detached rewards of chosen and rejected responses,
        each of shape (batch,).

    Raises
    ------
    ValueError
        If shapes differ, an option is out of its range, or a log-probability is not finite.

    Warns
    -----
    UserWarning
        If a log-probability is positive: these are then no log-probabilities.

    References
    ----------
    Huang et al., arXiv:2407.13399, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import chipo_loss
    >>> chosen, rejected = torch.tensor([-9.0, -12.0]), torch.tensor([-11.0, -12.0])
    >>> ref = torch.tensor([-10.0, -12.0])
    >>> chipo_loss(chosen, rejected, ref, ref, beta=0.5)
    tensor(0.4004)
    """
    check_interval("beta", beta, 0, float("inf"), closed="neither")
    check_interval("label_smoothing", label_smoothing, 0, 0.5, closed="left")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if r_max is not None:
        check_interval("r_max", r_max, 0, float("inf"), closed="right")
        if r_max == 0:
            raise ValueError("r_max must be positive or None, got 0")
    named = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    for name, logps in named.items():
        if logps.shape != chosen_logps.shape or logps.ndim != 1:
            raise ValueError(
                f"{name} must have shape (batch,) like chosen_logps, got {tuple(logps.shape)} "
                f"where chosen_logps has {tuple(chosen_logps.shape)}"
            )
        if validate:
            _check_logps(name, logps)

    ratios = [
        _at_least_float32(logps) - _at_least_float32(ref.detach())
        for logps, ref in ((chosen_logps, ref_chosen_logps), (rejected_logps, ref_rejected_logps))
    ]
    chosen_rewards, rejected_rewards = (
        beta
        * chipo_link(ratio, max_log_ratio=max_log_ratio, chi_weight=chi_weight, kl_weight=kl_weight)
        for ratio in ratios
    )
    margin = chosen_rewards - rejected_rewards
    if r_max is not None:
        margin = margin.clamp(-2 * r_max, 2 * r_max)
    loss = -functional.logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * functional.logsigmoid(-margin)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return (loss, chosen_rewards.detach(), rejected_rewards.detach()) if return_rewards else loss


class _InverseLink(torch.autograd.Function):
    """Newton's method for t + exp(t) = u, t = log z; dz/du = z / (1 + z)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        # Both starts lie above the root of a convex increasing function: monotone convergence.
        t = torch.where(u > 1, u.clamp(min=1).log(), u)
        for _ in range(8):
            ratio = t.exp()
            t = t - (t + ratio - u) / (1 + ratio)
        ratio = t.exp()
        ctx.save_for_backward(ratio)
        return ratio

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (ratio,) = ctx.saved_tensors
        return gradients[0] * ratio / (1 + ratio)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_logps(name: str, logps: Tensor) -> None:
    check_finite(name, logps)
    if bool((logps > 1e-3).any()):
        warnings.warn(
            f"{name} holds positive values (largest {logps.max().item():.3g}): are these sums of "
            "log-probabilities, not logits?",
            stacklevel=3,
        )
