"""Group-relative policy optimisation: rewards of several responses to one prompt, compared.

GRPO draws a group of responses to each prompt and reinforces a response by how much better than
its group it was rewarded [1]_. Names are TRL's, and so are the values where both can compute the
same thing.

References
----------
.. [1] Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language
   Models", arXiv:2402.03300, 2024.
.. [2] Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
   arXiv:2503.14476, 2025.
.. [3] Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective" (Dr. GRPO),
   arXiv:2503.20783, 2025.
"""

import torch
from torch import Tensor

from sciml._check import check_choice, check_finite, check_integer, check_interval

__all__ = ["LOSS_TYPES", "clipped_policy_loss", "grpo_advantages", "grpo_loss"]

LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo")


def grpo_advantages(
    rewards: Tensor, group_size: int, scale: str = "std", eps: float = 1e-4
) -> Tensor:
    """Rewards minus their group's mean, over the group's standard deviation.

    Parameters
    ----------
    rewards : Tensor of shape (n_prompts * group_size,)
        The responses to one prompt stand next to each other.
    group_size : int
        Responses a prompt, 2 or more: one alone has nothing to be compared with.
    scale : {"std", "none"}, default="std"
        "std" divides by the *sample* standard deviation (``n - 1``) plus `eps`, as TRL does: the
        rewards 1, 0, 0, 1 give 0.866, -0.866, -0.866, 0.866. (With the population's it would be
        1.) "none" only takes the mean away, as Dr. GRPO does.
    eps : float, default=1e-4
        TRL's.

    Returns
    -------
    Tensor of shape (n_prompts * group_size,)
        float32, or float64 for float64 rewards. Exactly 0 in a group of equal rewards.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or a reward is not finite.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import grpo_advantages
    >>> grpo_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]), 4)
    tensor([ 0.8659, -0.8659, -0.8659,  0.8659,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    check_integer("group_size", group_size, 2)
    check_choice("scale", scale, ("std", "none"))
    check_interval("eps", eps, 0, closed="left")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards must have shape (n_prompts * {group_size},), got {tuple(rewards.shape)}"
        )
    rewards = rewards.detach()
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    check_finite("rewards", groups)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "std":
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0).flatten()  # the mean of equal numbers may be rounded


def clipped_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
) -> Tensor:
    """Clipped policy-gradient loss of each token.

    ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` with ``r = exp(logps - old_logps)``.

    Parameters
    ----------
    logps, old_logps : Tensor of shape (batch, n_response)
        Log-probabilities of the response tokens under the policy and under the one that drew
        them (a constant).
    advantages : Tensor of shape (batch,) or (batch, n_response)
    epsilon : float, default=0.2
    epsilon_high : float or None, default=0.28
        DAPO's "clip higher" (TRL's default is None: `epsilon`).

    Returns
    -------
    Tensor of shape (batch, n_response)

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import clipped_policy_loss
    >>> logps = torch.tensor([[0.0, 1.0]])
    >>> clipped_policy_loss(logps, torch.zeros(1, 2), torch.tensor([1.0]))
    tensor([[-1.0000, -1.2800]])
    """
    check_interval("epsilon", epsilon, 0, 1)
    high = epsilon if epsilon_high is None else epsilon_high
    check_interval("epsilon_high", high, 0)
    if logps.dim() != 2 or old_logps.shape != logps.shape:
        raise ValueError(
            "logps and old_logps must have the same shape (batch, n_response), got "
            f"{tuple(logps.shape)} and {tuple(old_logps.shape)}"
        )
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        raise ValueError(
            f"advantages must have shape {tuple(logps.shape[:1])} or {tuple(logps.shape)}, got "
            f"{tuple(advantages.shape)}"
        )
    advantages = advantages.detach().to(logps.device)
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    ratio = torch.exp(logps - old_logps.detach())
    clipped = ratio.clamp(1 - epsilon, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def grpo_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logps: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
    loss_type: str = "dapo",
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    weights: Tensor | None = None,
    max_completion_length: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """GRPO's loss from the log-probabilities of response tokens.

    Parameters
    ----------
    logps : Tensor of shape (batch, n_response)
        Of the drawn tokens under the policy, with a graph (`token_logps`).
    advantages : Tensor of shape (batch,) or (batch, n_response)
        `grpo_advantages`.
    mask : BoolTensor of shape (batch, n_response)
        Response tokens; what stands elsewhere is not looked at.
    old_logps : Tensor of shape (batch, n_response), default=None
        Under the policy that drew them. None: this one drew them, so all ratios are 1.
    epsilon, epsilon_high
        As in `clipped_policy_loss`.
    loss_type : {"dapo", "grpo", "bnpo", "dr_grpo"}, default="dapo"
        What the sum over tokens is divided by, as in TRL: all tokens of the step ("dapo"), each
        response's own length and then the number of responses ("grpo"), all tokens of this batch
        ("bnpo"), or responses times `max_completion_length` ("dr_grpo").
    ref_logps : Tensor of shape (batch, n_response), default=None
        Under a reference policy, where `beta` is not 0.
    beta : float, default=0.0
        Weight of the k3 estimate of the reverse KL from the reference.
    weights : Tensor of shape (batch, n_response), default=None
        Constant factor on each token's policy term. They do not change what is divided by.
    max_completion_length : int or None, default=None
        For "dr_grpo".
    num_items_in_batch : int, Tensor or None, default=None
        What the whole optimiser step has, where this is one of its micro-batches: tokens for
        "dapo", responses for "grpo" and "dr_grpo".

    Returns
    -------
    Tensor
        Scalar. A mask without tokens gives 0 with a graph.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or a token's loss is not finite.

    See Also
    --------
    TraceLoss : GRPO with a divergence from a teacher on marked tokens.

    References
    ----------
    .. [1] Shao et al., arXiv:2402.03300, 2024.
    .. [2] Yu et al., arXiv:2503.14476, 2025.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import grpo_loss
    >>> logps = torch.full((2, 3), -1.0, requires_grad=True)
    >>> loss = grpo_loss(logps, torch.tensor([1.0, -1.0]), torch.ones(2, 3, dtype=torch.bool))
    >>> loss.backward()
    >>> logps.grad * 6
    tensor([[-1., -1., -1.],
            [ 1.,  1.,  1.]])
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_interval("beta", beta, 0, closed="left")
    if loss_type == "dr_grpo":
        check_integer("max_completion_length", max_completion_length, 1)
    if loss_type == "bnpo" and num_items_in_batch is not None:
        raise ValueError("num_items_in_batch must be None for loss_type 'bnpo', which is local")
    if mask.dtype != torch.bool or mask.shape != logps.shape:
        raise ValueError(
            f"mask must be a bool tensor of shape {tuple(logps.shape)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if old_logps is not None and old_logps.shape != logps.shape:
        raise ValueError(
            f"old_logps must have shape {tuple(logps.shape)}, got {tuple(old_logps.shape)}"
        )
    # Where the mask is off anything may stand, NaN too.
    logps = torch.where(mask, logps, 0)
    old_logps = logps.detach() if old_logps is None else torch.where(mask, old_logps, 0)
    each = clipped_policy_loss(
        logps, old_logps, advantages, epsilon=epsilon, epsilon_high=epsilon_high
    )
    if weights is not None:
        if weights.shape != logps.shape or weights.requires_grad:
            raise ValueError(
                f"weights must be constants of shape {tuple(logps.shape)}, got shape "
                f"{tuple(weights.shape)}"
            )
        each = each * weights
    if beta > 0:
        if ref_logps is None or ref_logps.shape != logps.shape:
            raise ValueError(
                f"ref_logps must have shape {tuple(logps.shape)} where beta is not 0, got "
                f"{None if ref_logps is None else tuple(ref_logps.shape)}"
            )
        gap = torch.where(mask, ref_logps.detach() - logps, 0)
        each = each + beta * (torch.expm1(gap) - gap)
    each = torch.where(mask, each, 0)
    check_finite("the loss of every token of logps, old_logps and advantages", each)
    n_responses = len(mask) if num_items_in_batch is None else num_items_in_batch
    if loss_type == "grpo":
        return (each.sum(1) / mask.sum(1).clamp(min=1)).sum() / _positive(n_responses)
    if loss_type == "dr_grpo":
        return each.sum() / (_positive(n_responses) * float(max_completion_length or 1))
    n_tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
    return each.sum() / _positive(n_tokens)


def _positive(n: int | Tensor) -> Tensor:
    return torch.as_tensor(n).clamp(min=1)
