import pytest
import torch
from trl import GRPOTrainer

from sciml.lm import clipped_policy_loss, grpo_advantages, grpo_loss

MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5])


def draw(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(4, 5, generator=generator, dtype=dtype)
    # Ratios on both sides of both ends of the clip.
    old_logps = logps + 0.5 * torch.randn(4, 5, generator=generator, dtype=dtype)
    advantages = torch.tensor([1.0, -0.7, 0.3, -1.2], dtype=dtype)
    return logps.requires_grad_(), old_logps, advantages


class TRLLoss(GRPOTrainer):
    """TRL's loss on given log-probabilities: the trainer without its construction."""

    def __init__(self, loss_type, beta, max_completion_length=7):
        from collections import defaultdict
        from types import SimpleNamespace

        self.loss_type, self.beta = loss_type, beta
        self.epsilon_low, self.epsilon_high = 0.2, 0.28
        self.importance_sampling_level, self.top_entropy_quantile = "token", 1.0
        self.off_policy_mask_threshold, self.use_vllm = None, False
        self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.max_completion_length = max_completion_length
        self.current_gradient_accumulation_steps = 1
        self.args = SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        )
        self.model = torch.nn.Linear(1, 1)
        self.accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        )
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}

    def loss(self, logps, old_logps, advantages, ref_logps):
        self._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
            logps,
            torch.zeros_like(logps),
            None,
        )
        ids = torch.zeros(len(logps), logps.shape[1], dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": MASK.long(),
            "advantages": advantages,
            "old_per_token_logps": old_logps,
            "ref_per_token_logps": ref_logps,
            "num_items_in_batch": MASK.sum(),
        }
        return self._compute_loss(self.model, inputs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_are_trls(loss_type, beta):
    logps, old_logps, advantages = draw()
    ref_logps = draw(1)[0].detach()
    theirs = TRLLoss(loss_type, beta).loss(logps, old_logps, advantages, ref_logps)
    (expected,) = torch.autograd.grad(theirs, logps)
    ours = grpo_loss(
        logps,
        advantages,
        MASK,
        old_logps=old_logps,
        loss_type=loss_type,
        ref_logps=ref_logps,
        beta=beta,
        max_completion_length=7 if loss_type == "dr_grpo" else None,
    )
    (gradient,) = torch.autograd.grad(ours, logps)
    assert abs(ours.item() - theirs.item()) < 1e-12
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert gradient[~MASK].abs().max() == 0
    assert (gradient[MASK] == 0).any() == (beta == 0)  # the clip is active


def test_advantages_are_trls_with_the_sample_standard_deviation():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    advantages = grpo_advantages(rewards, 4)
    expected = 0.5 / (1 / 3**0.5 + 1e-4)
    signs = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
    torch.testing.assert_close(advantages[:4], expected * signs)
    assert abs(advantages[0] - 0.866) < 1e-3
    assert (advantages[4:] == 0).all()
    unscaled = grpo_advantages(rewards, 4, scale="none")
    assert unscaled.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert grpo_advantages(rewards.float(), 4).dtype == torch.float32
    assert grpo_advantages((rewards > 0.5), 4).dtype == torch.float32


def test_clip_holds_the_ratio_where_it_pays_to_leave():
    logps = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    loss = clipped_policy_loss(logps, torch.zeros(1, 4, dtype=torch.float64), advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    ratio = logps.detach().exp().numpy()
    assert loss.tolist()[0] == pytest.approx([-1.28, -ratio[0, 1], ratio[0, 2], 0.8])
    assert gradient.tolist()[0] == pytest.approx([0, -ratio[0, 1], ratio[0, 2], 0])
    symmetric = clipped_policy_loss(
        logps, torch.zeros(1, 4, dtype=torch.float64), advantages, epsilon_high=None
    )
    assert symmetric[0, 0].item() == pytest.approx(-1.2)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_add_up(loss_type):
    logps, old_logps, advantages = draw()
    length = 7 if loss_type == "dr_grpo" else None
    options = {"loss_type": loss_type, "max_completion_length": length}
    whole = grpo_loss(logps, advantages, MASK, old_logps=old_logps, **options)
    items = int(MASK.sum()) if loss_type == "dapo" else len(MASK)
    parts = [
        grpo_loss(
            logps[rows],
            advantages[rows],
            MASK[rows],
            old_logps=old_logps[rows],
            num_items_in_batch=items,
            **options,
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-14)


def test_without_old_logps_it_is_the_policy_gradient():
    logps, _, advantages = draw()
    weights = torch.rand(4, 5, dtype=torch.float64)
    loss = grpo_loss(logps, advantages, MASK, weights=weights)
    (gradient,) = torch.autograd.grad(loss, logps)
    expected = -advantages[:, None] * weights * MASK / MASK.sum()
    assert loss.item() == pytest.approx(expected.sum().item())
    torch.testing.assert_close(gradient, expected)


def test_outside_the_mask_anything_may_stand_and_an_empty_mask_gives_zero():
    logps, old_logps, advantages = draw()
    bad = logps.detach().masked_fill(~MASK, torch.nan).requires_grad_()
    loss = grpo_loss(bad, advantages, MASK, old_logps=old_logps.masked_fill(~MASK, torch.inf))
    clean = grpo_loss(logps, advantages, MASK, old_logps=old_logps)
    assert loss.item() == clean.item()
    (gradient,) = torch.autograd.grad(loss, bad)
    assert gradient.isfinite().all()
    empty = grpo_loss(logps, advantages, torch.zeros_like(MASK))
    empty.backward()
    assert empty.item() == 0
    assert (logps.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"loss_type": "ppo"}, ValueError, "loss_type"),
        ({"loss_type": "dr_grpo"}, TypeError, "max_completion_length"),
        ({"loss_type": "bnpo", "num_items_in_batch": 4}, ValueError, "num_items_in_batch"),
        ({"mask": MASK.long()}, ValueError, "mask"),
        ({"mask": MASK[:, :4]}, ValueError, "mask"),
        ({"old_logps": torch.zeros(4, 4)}, ValueError, "old_logps"),
        ({"advantages": torch.zeros(3)}, ValueError, "advantages"),
        ({"advantages": torch.full((4,), torch.nan)}, ValueError, "advantages"),
        ({"weights": torch.ones(4)}, ValueError, "weights"),
        ({"beta": 0.1}, ValueError, "ref_logps"),
        ({"epsilon": -0.1}, ValueError, "epsilon"),
        ({"epsilon_high": -0.1}, ValueError, "epsilon_high"),
    ],
)
def test_bad_input(change, error, match):
    logps, old_logps, advantages = draw()
    arguments = {"advantages": advantages, "mask": MASK, "old_logps": old_logps} | change
    with pytest.raises(error, match=match):
        grpo_loss(logps, **arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.ones(4), 1), "group_size"),
        ((torch.ones(5), 2), "rewards"),
        ((torch.ones(2, 2), 2), "rewards"),
        ((torch.tensor([1.0, torch.nan]), 2), "rewards"),
        ((torch.ones(4), 2, "batch"), "scale"),
    ],
)
def test_bad_groups(arguments, match):
    with pytest.raises(ValueError, match=match):
        grpo_advantages(*arguments)
