"""χPO: link and inverse, the optimal policy, the loss against those of DPO and TRL."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import lambertw
from torch.nn import functional

from sciml.lm import chi2_optimal_policy, chipo_inverse_link, chipo_link, chipo_loss

F64 = torch.float64


def pairs(n=6, seed=0):
    """Log-probabilities (chosen, rejected, ref chosen, ref rejected) of n pairs."""
    generator = torch.Generator().manual_seed(seed)
    policy = -10 + torch.randn(2, n, dtype=F64, generator=generator)
    ref = -10 + torch.randn(2, n, dtype=F64, generator=generator)
    return *policy, *ref


def test_link_of_known_ratios():
    ratio = torch.tensor([0.5, 1.0, 4.0], dtype=F64)
    torch.testing.assert_close(chipo_link(ratio.log()), ratio + ratio.log())
    weighted = chipo_link(ratio.log(), chi_weight=0.25, kl_weight=3.0)
    torch.testing.assert_close(weighted, 0.25 * ratio + 3 * ratio.log())


def test_link_grows_linearly_beyond_the_largest_log_ratio():
    log_ratio = torch.tensor([100.0, 101.0], requires_grad=True)
    value = chipo_link(log_ratio)
    torch.testing.assert_close(value[0], torch.tensor(math.exp(20) + 100), rtol=1e-6, atol=0)
    value.sum().backward()
    assert log_ratio.grad.tolist() == [1.0, 1.0]


@given(st.floats(1e-6, 1e3))
def test_inverse_link_undoes_the_link(ratio):
    z = torch.tensor([ratio], dtype=F64)
    torch.testing.assert_close(chipo_inverse_link(chipo_link(z.log())), z, rtol=1e-12, atol=0)


def test_inverse_link_is_lambert_w_of_the_exponential():
    u = torch.linspace(-700, 700, 1001, dtype=F64)
    expected = lambertw(np.exp(u.numpy())).real
    np.testing.assert_allclose(chipo_inverse_link(u).numpy(), expected, rtol=1e-13)


def test_inverse_link_beyond_the_range_of_exp():
    u = torch.tensor([1e3, 1e6, 1e12], dtype=F64)
    z = chipo_inverse_link(u)
    torch.testing.assert_close(z + z.log(), u, rtol=1e-14, atol=0)


def test_inverse_link_has_first_and_second_derivatives():
    u = torch.tensor([-3.0, 0.0, 1.0, 5.0, 60.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(chipo_inverse_link, u)
    assert torch.autograd.gradgradcheck(chipo_inverse_link, u)


def objective(policy, ref, rewards, beta):
    """The regularised reward which the optimal policy maximises, from its definition."""
    ratio = policy / ref
    chi2 = (ref * (ratio - 1) ** 2).sum(-1) / 2
    kl = torch.xlogy(policy, ratio).sum(-1)
    return (policy * rewards).sum(-1) - beta * (chi2 + kl)


@pytest.mark.parametrize("beta", [0.02, 0.1, 1.0, 30.0])
def test_optimal_policy_beats_ten_thousand_others(beta):
    generator = torch.Generator().manual_seed(1)
    ref = torch.rand(5, dtype=F64, generator=generator).softmax(-1)
    rewards = torch.randn(5, dtype=F64, generator=generator)
    best = chi2_optimal_policy(ref.log(), rewards, beta)
    torch.testing.assert_close(best.sum(), torch.tensor(1.0, dtype=F64))
    assert (best > 0).all()
    far = torch.distributions.Dirichlet(torch.ones(5, dtype=F64))
    torch.manual_seed(0)
    others = far.sample((5000,))
    near = 0.99 * best + 0.01 * far.sample((5000,))  # neighbours are the hard ones
    others = torch.cat([others, near])
    assert objective(best, ref, rewards, beta) > objective(others, ref, rewards, beta).max()


def test_optimal_policy_satisfies_its_equation():
    """R - beta phi(π / π_ref) is the same number for every action."""
    generator = torch.Generator().manual_seed(2)
    ref_logps = (3 * torch.randn(20, 7, dtype=F64, generator=generator)).log_softmax(-1)
    rewards = 5 * torch.randn(20, 7, dtype=F64, generator=generator)
    policy = chi2_optimal_policy(ref_logps, rewards, 0.7)
    normalizer = rewards - 0.7 * chipo_link(policy.log() - ref_logps, max_log_ratio=700.0)
    torch.testing.assert_close(normalizer, normalizer[:, :1].expand(20, 7), rtol=0, atol=1e-11)


def test_optimal_policy_at_the_ends_of_beta():
    ref_logps = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64).log()
    rewards = torch.tensor([[0.0, 1.0, 0.5]], dtype=F64)
    torch.testing.assert_close(chi2_optimal_policy(ref_logps, rewards, 1e9), ref_logps.exp())
    greedy = chi2_optimal_policy(ref_logps, rewards, 1e-6)
    torch.testing.assert_close(greedy, torch.tensor([[0.0, 1.0, 0.0]], dtype=F64))


def test_large_beta_acts_like_twice_beta_to_first_order():
    """π / π_ref = 1 + (r - E r) / (2 beta): the slope of the link at 1 is 2."""
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    rewards = torch.tensor([0.0, 1.0, 0.5], dtype=F64)
    beta = 1e4
    slope = (chi2_optimal_policy(ref.log(), rewards, beta) / ref - 1) * 2 * beta
    torch.testing.assert_close(slope, rewards - (ref * rewards).sum(), rtol=0, atol=1e-3)


def test_optimal_policy_differentiates():
    rewards = torch.tensor([0.3, -1.0, 2.0], dtype=F64, requires_grad=True)
    logits = torch.tensor([0.1, 0.7, -0.4], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r, z: chi2_optimal_policy(z.log_softmax(-1), r, 0.4), (rewards, logits)
    )


def test_actions_outside_the_reference_stay_outside():
    ref_logps = torch.tensor([0.5, 0.5, 0.0]).log()
    policy = chi2_optimal_policy(ref_logps, torch.tensor([0.0, 1.0, 100.0]), 0.5)
    assert policy[2] == 0
    torch.testing.assert_close(policy.sum(), torch.tensor(1.0))


@given(st.integers(0, 10_000))
def test_coverage_is_one_plus_twice_chi2_and_kl_is_below_twice_chi2(seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 6, dtype=F64, generator=generator).softmax(-1)
    chi2 = (q * (p / q - 1) ** 2).sum() / 2
    torch.testing.assert_close((p * p / q).sum(), 1 + 2 * chi2)
    assert (p * (p / q).log()).sum() <= 2 * chi2 + 1e-12


def test_without_the_chi2_term_it_is_the_sigmoid_loss_of_dpo():
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    expected = -functional.logsigmoid(margin)
    ours = chipo_loss(*pairs(), beta=0.3, chi_weight=0.0, reduction="none")
    torch.testing.assert_close(ours, expected)


def test_margin_is_that_of_two_divergences_of_trl():
    """Scores t - 1 (alpha divergence with coefficient 2) plus log t (reverse KL): constants go."""
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    alpha, reverse = [], []
    for logratio in (chosen - ref_chosen, rejected - ref_rejected):
        alpha.append((logratio.exp() - 1) / (2.0 - 1.0))
        reverse.append(logratio)
    margin = (alpha[0] - alpha[1]) + (reverse[0] - reverse[1])
    _, chosen_rewards, rejected_rewards = chipo_loss(*pairs(), beta=0.3, return_rewards=True)
    torch.testing.assert_close(chosen_rewards - rejected_rewards, 0.3 * margin)


def test_at_the_reference_the_loss_is_log_2_and_rewards_are_beta():
    chosen, rejected, _, _ = pairs()
    loss, *rewards = chipo_loss(chosen, rejected, chosen, rejected, beta=0.2, return_rewards=True)
    torch.testing.assert_close(loss, torch.tensor(math.log(2), dtype=F64))
    for reward in rewards:
        torch.testing.assert_close(reward, torch.full_like(chosen, 0.2))


def test_gradient_is_the_closed_form():
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    chosen.requires_grad_()
    loss, r_chosen, r_rejected = chipo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=0.4, reduction="sum", return_rewards=True
    )
    loss.backward()
    ratio = (chosen.detach() - ref_chosen).exp()
    expected = -torch.sigmoid(-(r_chosen - r_rejected)) * 0.4 * (ratio + 1)
    torch.testing.assert_close(chosen.grad, expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"r_max": 3.0}])
def test_gradcheck(options):
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    assert torch.autograd.gradcheck(
        lambda a, b: chipo_loss(a, b, ref_chosen, ref_rejected, beta=0.4, **options),
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


def test_clipped_pairs_have_no_gradient_and_the_loss_of_the_bound():
    chosen = torch.tensor([-8.0, -10.0], dtype=F64, requires_grad=True)
    ref = torch.tensor([-10.0, -10.0], dtype=F64)
    loss = chipo_loss(chosen, ref, ref, ref, beta=1.0, r_max=0.5, reduction="none")
    torch.testing.assert_close(loss[0].item(), math.log1p(math.exp(-1)))  # 2 r_max = 1
    loss.sum().backward()
    assert chosen.grad[0] == 0
    assert chosen.grad[1] == -1.0  # -sigmoid(0) * beta * (1 + 1)


def test_swapping_the_pair_turns_the_margin():
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    _, a, b = chipo_loss(*pairs(), return_rewards=True)
    _, c, d = chipo_loss(rejected, chosen, ref_rejected, ref_chosen, return_rewards=True)
    assert torch.equal(a - b, -(c - d))


def test_label_smoothing_mixes_both_orders():
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    right = chipo_loss(*pairs())
    wrong = chipo_loss(rejected, chosen, ref_rejected, ref_chosen)
    smoothed = chipo_loss(*pairs(), label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * right + 0.2 * wrong)


def test_reductions_agree_and_references_get_no_gradient():
    tensors = [t.requires_grad_() for t in pairs()]
    each = chipo_loss(*tensors, reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(chipo_loss(*tensors, reduction="sum"), each.sum())
    torch.testing.assert_close(chipo_loss(*tensors), each.mean())
    each.sum().backward()
    assert tensors[0].grad is not None
    assert tensors[2].grad is None
    assert tensors[3].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32_and_long_ratios_do_not_overflow(dtype):
    chosen = torch.tensor([-50.0, -2000.0], dtype=dtype, requires_grad=True)
    ref = torch.tensor([-1000.0, -50.0], dtype=dtype)
    loss = chipo_loss(chosen, ref, ref, ref)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.isfinite()
    assert chosen.grad.isfinite().all()


def with_nan():
    chosen, *rest = pairs()
    return chosen.index_fill(0, torch.tensor([1]), math.nan), *rest


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (pairs(), {"beta": 0.0}, "beta must be in"),
        (pairs(), {"beta": -1.0}, "beta must be in"),
        (pairs(), {"r_max": 0.0}, "r_max must be"),
        (pairs(), {"r_max": -1.0}, "r_max must be"),
        (pairs(), {"chi_weight": -1.0}, "chi_weight must be"),
        (pairs(), {"chi_weight": 0.0, "kl_weight": 0.0}, "must not both be 0"),
        (pairs(), {"max_log_ratio": 0.0}, "max_log_ratio must be"),
        (pairs(), {"label_smoothing": 0.5}, "label_smoothing must be"),
        (pairs(), {"reduction": "batchmean"}, "reduction must be one of"),
        ((*pairs()[:3], pairs(5)[3]), {}, r"ref_rejected_logps must .*\(5,\).*\(6,\)"),
        ([t[None] for t in pairs()], {}, r"chosen_logps must have shape \(batch,\)"),
        (with_nan(), {}, "chosen_logps must be finite"),
    ],
)
def test_bad_input(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        chipo_loss(*tensors, **options)


def test_positive_log_probabilities_are_suspicious():
    chosen, *rest = pairs()
    with pytest.warns(UserWarning, match="chosen_logps holds positive values"):
        chipo_loss(chosen + 20, *rest)


def test_validation_can_be_left_out():
    assert chipo_loss(*with_nan(), validate=False).isnan()


def test_bad_policy_input():
    ref_logps, rewards = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=r"same shape.*\(2,\) and \(3,\)"):
        chi2_optimal_policy(ref_logps, torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="beta must be in"):
        chi2_optimal_policy(ref_logps, rewards, 0.0)
    with pytest.raises(ValueError, match="ref_logps must be log-probabilities"):
        chi2_optimal_policy(ref_logps + 1, rewards, 1.0)
    with pytest.raises(ValueError, match="rewards must be finite"):
        chi2_optimal_policy(ref_logps, rewards * math.nan, 1.0)
    with pytest.raises(ValueError, match="u must be finite"):
        chipo_inverse_link(rewards * math.nan)
