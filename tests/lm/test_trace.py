import math

import pytest
import torch

from sciml.lm import (
    HiddenLogits,
    TraceLoss,
    anneal_weight,
    grpo_loss,
    pointwise_clipped_kl,
    token_kl,
    token_logps,
    top_k_log_probs,
)

BATCH, LENGTH, VOCABULARY = 3, 10, 7
LABELS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCABULARY
LABELS[1, 8:] = -100
LABELS[2, 5:] = -100
MASK = LABELS >= 0
KEY = torch.zeros_like(MASK)
KEY[0, 2:4] = True
ERROR = torch.zeros_like(MASK)
ERROR[1, 5] = True
ADVANTAGES = torch.tensor([0.8, -0.5, 0.0], dtype=torch.float64)


def draw(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def logits():
    student = draw(BATCH, LENGTH, VOCABULARY).requires_grad_()
    return student, draw(BATCH, LENGTH, VOCABULARY, seed=1)


def slow_clipped_kl(student, teacher, direction, clip):
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    return (first.exp() * (first - second)).clamp(max=clip).sum(-1)


def slow_trace_loss(student, teacher, step, old_logps=None, clip=0.05, error_action="reverse"):
    """One response and one token at a time."""
    weight = anneal_weight(step)
    total = 0
    for row in range(BATCH):
        length = int(MASK[row].sum())
        each = 0
        for t in range(length):
            logp = student[row, t].log_softmax(-1)[LABELS[row, t]]
            old = logp.detach() if old_logps is None else old_logps[row, t]
            ratio, advantage = (logp - old).exp(), ADVANTAGES[row]
            policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            action = "forward" if KEY[row, t] else error_action if ERROR[row, t] else None
            if action is None:
                each = each + policy
            else:
                kl = slow_clipped_kl(student[row, t], teacher[row, t], action, clip)
                each = each + (1 - weight / 0.5) * policy + weight * kl
        total = total + each / length
    return total / BATCH


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("clip", [1e-3, 0.05, math.inf])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_clipped_kl_and_its_gradient(direction, clip, temperature):
    student, teacher = logits()
    weights = torch.rand(BATCH, LENGTH, dtype=torch.float64) * MASK
    each = slow_clipped_kl(student / temperature, teacher / temperature, direction, clip)
    expected = (each * weights).sum() / weights.sum()
    (gradient,) = torch.autograd.grad(expected, student)
    options = {"direction": direction, "clip": clip, "temperature": temperature}
    loss = pointwise_clipped_kl(student, teacher, mask=weights, **options)
    (ours,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-12)
    values = pointwise_clipped_kl(student, teacher, reduction="none", chunk_size=4, **options)
    torch.testing.assert_close(values, each, rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad((values * weights).sum() / weights.sum(), student)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_clipped_kl_from_hidden_states_and_from_the_whole_top_k(direction):
    hidden, weight = draw(BATCH, LENGTH, 4), draw(VOCABULARY, 4, seed=2)
    teacher = draw(BATCH, LENGTH, VOCABULARY, seed=1)
    hidden.requires_grad_()
    weight.requires_grad_()
    options = {"direction": direction, "mask": KEY}
    expected = pointwise_clipped_kl(hidden @ weight.T, teacher, **options)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    for theirs in (teacher, top_k_log_probs(teacher, VOCABULARY)):
        loss = pointwise_clipped_kl(HiddenLogits(hidden, weight), theirs, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), gradients)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_without_a_term_above_the_clip_it_is_the_kl(direction):
    student = draw(5, VOCABULARY).requires_grad_()
    near = student.detach() + draw(5, VOCABULARY, seed=3, scale=0.02)
    loss = pointwise_clipped_kl(student, near, direction=direction)
    expected = token_kl(student, near, direction=direction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    )
    assert loss > 0


def test_a_sure_teacher_is_clipped_away():
    student = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64).log().requires_grad_()
    for teacher in ([1.0, 0.0, 0.0], [1 - 2e-13, 1e-13, 1e-13]):
        log_teacher = torch.tensor([teacher], dtype=torch.float64).log()
        loss = pointwise_clipped_kl(student, log_teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == pytest.approx(0.05, abs=1e-10)
        assert gradient.abs().max() < 1e-11
    # Probabilities of 0 that are divided by: clipped here, an error without a clip.
    student = torch.tensor([[0.0, 0.5, 0.5]]).log()
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    forward = pointwise_clipped_kl(student, teacher)
    assert forward.item() == pytest.approx(0.05)
    assert pointwise_clipped_kl(student, teacher, direction="reverse").item() == pytest.approx(0.05)
    for direction in ("forward", "reverse"):
        with pytest.raises(ValueError, match="finite"):
            pointwise_clipped_kl(student, teacher, direction=direction, clip=math.inf)


def test_a_clipped_pull_leaves_the_push_to_the_other_tokens():
    student = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.97, 0.03]], dtype=torch.float64).log()
    push = {}
    for clip in (0.05, math.inf):
        loss = pointwise_clipped_kl(student, teacher, clip=clip)
        push[clip] = -torch.autograd.grad(loss, student)[0][0, 0].item()
    assert push[math.inf] == pytest.approx(0.97 - 0.7)
    assert push[0.05] == pytest.approx(-0.7 * 0.03)  # away from the teacher's token


def test_forward_pulls_at_tokens_that_are_never_drawn_and_reverse_does_not():
    # p = 1e-6 where the teacher has q = 0.5.
    student = torch.tensor([[1e-6, 1 - 1e-6]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    p, q = student.detach().exp(), teacher.exp()
    gradients = {}
    for direction in ("forward", "reverse"):
        loss = pointwise_clipped_kl(student, teacher, direction=direction, clip=math.inf)
        (gradients[direction],) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradients["forward"], p - q)
    ratio = p.log() - q.log()
    torch.testing.assert_close(gradients["reverse"], p * (ratio - (p * ratio).sum()))
    assert abs(gradients["forward"][0, 0]) == pytest.approx(0.5, abs=1e-5)
    assert abs(gradients["reverse"][0, 0]) < 2e-5


def test_schedule():
    steps = (0, 9, 10, 25, 39, 40, 1000)
    expected = (0.5, 0.5, 0.5, 0.25, 0.5 / 30, 0, 0)
    assert [anneal_weight(step) for step in steps] == pytest.approx(expected, abs=1e-15)
    assert anneal_weight(40) == 0
    on_span = [1 - TraceLoss().kl_weight(step) / 0.5 for step in (0, 9, 10, 25, 39, 40)]
    assert on_span == pytest.approx([0, 0, 0, 0.5, 1 - 1 / 30, 1], abs=1e-15)
    # What the teacher can tell in all is bounded.
    assert sum(anneal_weight(step) ** 2 for step in range(100)) == pytest.approx(5.126, abs=1e-3)
    assert [anneal_weight(step, warmup=2, decay=0) for step in range(4)] == [0.5, 0.5, 0, 0]
    assert [anneal_weight(step, w0=1.0, warmup=0, decay=2) for step in range(3)] == [1, 0.5, 0]


@pytest.mark.parametrize("step", [0, 10, 25, 39, 40])
@pytest.mark.parametrize("error_action", [None, "reverse"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_loss_equals_a_loop_over_tokens(step, error_action, on_policy):
    student, teacher = logits()
    old_logps = None if on_policy else draw(BATCH, LENGTH, seed=4, scale=0.3) - 2
    expected = slow_trace_loss(student, teacher, step, old_logps, error_action=error_action)
    (gradient,) = torch.autograd.grad(expected, student)
    loss, stats = TraceLoss(error_action=error_action)(
        student,
        teacher,
        LABELS,
        ADVANTAGES,
        step=step,
        key_mask=KEY,
        error_mask=ERROR,
        old_logps=old_logps,
    )
    (ours,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-12)
    weight = anneal_weight(step)
    assert stats["kl_weight"].item() == pytest.approx(weight)
    n_marked = 3 if error_action else 2
    assert stats["coverage"].item() == pytest.approx(n_marked / 23 if weight else 0)
    total = stats["policy_loss"] + weight * stats["kl"]
    torch.testing.assert_close(total, loss.detach())


@pytest.mark.parametrize("step", [0, 40])
def test_nothing_marked_or_annealed_away_is_grpo_exactly_without_a_teacher(step):
    student, _ = logits()
    old_logps = draw(BATCH, LENGTH, seed=4, scale=0.3) - 2
    logps, mask = token_logps(student, LABELS, shift=False)
    plain = grpo_loss(logps, ADVANTAGES, mask, old_logps=old_logps, loss_type="grpo")
    (gradient,) = torch.autograd.grad(plain, student)
    marks = {"key_mask": KEY, "error_mask": ERROR} if step == 40 else {}
    loss, stats = TraceLoss(error_action="reverse")(
        student, None, LABELS, ADVANTAGES, step=step, old_logps=old_logps, **marks
    )
    assert torch.equal(loss, plain)
    assert torch.equal(torch.autograd.grad(loss, student)[0], gradient)
    assert stats["coverage"] == 0


def test_everything_marked_is_the_weighted_mean_kl():
    student, teacher = logits()
    loss, _ = TraceLoss(kl_clip=math.inf)(
        student, teacher, LABELS, ADVANTAGES, step=0, key_mask=MASK
    )
    each = token_kl(student, teacher, mask=MASK, reduction="none")
    expected = 0.5 * (each.sum(1) / MASK.sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    )


def test_a_span_contributes_its_share_of_the_response():
    student, teacher = draw(1, 100, VOCABULARY), draw(1, 100, VOCABULARY, seed=1)
    span = torch.zeros(1, 100, dtype=torch.bool)
    span[0, 10:15] = True
    labels = torch.zeros(1, 100, dtype=torch.long)
    _, stats = TraceLoss()(student, teacher, labels, torch.zeros(1), step=0, key_mask=span)
    mean = pointwise_clipped_kl(student, teacher, mask=span)
    assert stats["kl"].item() == pytest.approx(5 / 100 * mean.item())


def test_micro_batches_add_up():
    student, teacher = logits()

    def loss(rows, n):
        return TraceLoss(error_action="reverse")(
            student[rows],
            teacher[rows],
            LABELS[rows],
            ADVANTAGES[rows],
            step=12,
            key_mask=KEY[rows],
            error_mask=ERROR[rows],
            num_items_in_batch=n,
        )[0]

    parts = loss(slice(0, 1), 3) + loss(slice(1, 3), torch.tensor(3.0))
    torch.testing.assert_close(parts, loss(slice(None), None))


def test_equal_rewards_leave_the_divergence_alone_and_a_weight_of_zero_grpo():
    student, teacher = logits()
    zeros = torch.zeros(BATCH)
    loss, stats = TraceLoss()(student, teacher, LABELS, zeros, step=0, key_mask=KEY)
    (gradient,) = torch.autograd.grad(loss, student)
    assert stats["policy_loss"] == 0
    assert gradient[~KEY].abs().max() == 0
    assert gradient[KEY].abs().max() > 0
    loss, _ = TraceLoss(w0=0.0)(student, None, LABELS, ADVANTAGES, step=0, key_mask=KEY)
    plain, _ = TraceLoss()(student, None, LABELS, ADVANTAGES, step=0)
    assert loss.item() == plain.item()
    nothing, _ = TraceLoss()(student, None, LABELS, zeros, step=0)
    nothing.backward()
    assert nothing.item() == 0
    assert (student.grad == 0).all()


def test_rows_without_a_mark_are_never_read_of_the_teacher():
    student, teacher = logits()
    holes = teacher.masked_fill(~KEY[..., None], torch.nan)
    whole, broken = (
        TraceLoss()(student, t, LABELS, ADVANTAGES, step=0, key_mask=KEY)[0]
        for t in (teacher, holes)
    )
    assert whole.item() == broken.item()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"error_mask": KEY}, ValueError, "overlap"),
        ({"key_mask": torch.ones_like(MASK)}, ValueError, "key_mask.*response"),
        ({"key_mask": KEY[:, :5]}, ValueError, "key_mask"),
        ({"key_mask": KEY.long()}, ValueError, "key_mask"),
        ({"teacher_logits": None}, ValueError, "teacher_logits"),
        ({"teacher_logits": draw(BATCH, LENGTH, 8)}, ValueError, "vocabulary"),
        ({"teacher_logits": draw(BATCH, 9, VOCABULARY)}, ValueError, "teacher_logits"),
        ({"advantages": torch.zeros(BATCH + 1)}, ValueError, "advantages"),
        ({"advantages": torch.full((BATCH,), torch.nan)}, ValueError, "advantages"),
        ({"labels": LABELS[:, :5]}, ValueError, "labels"),
        ({"labels": LABELS + VOCABULARY}, IndexError, "labels"),
        ({"step": -1}, ValueError, "step"),
        ({"old_logps": torch.zeros(BATCH)}, ValueError, "old_logps"),
    ],
)
def test_bad_input(change, error, match):
    student, teacher = logits()
    arguments = {
        "teacher_logits": teacher,
        "labels": LABELS,
        "advantages": ADVANTAGES,
        "step": 0,
        "key_mask": KEY,
    } | change
    with pytest.raises(error, match=match):
        TraceLoss(error_action="reverse")(student, **arguments)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"w0": -1.0}, "w0"),
        ({"decay": -1}, "decay"),
        ({"key_action": "both"}, "key_action"),
        ({"error_action": "both"}, "error_action"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        TraceLoss(**options)
    if "kl_clip" in options:
        with pytest.raises(ValueError, match="clip"):
            pointwise_clipped_kl(torch.zeros(1, 2), torch.zeros(1, 2), clip=0.0)


def test_a_nan_among_the_logits_is_an_error():
    student, teacher = logits()
    with pytest.raises(ValueError, match="finite"):
        pointwise_clipped_kl(student, teacher * torch.nan)
