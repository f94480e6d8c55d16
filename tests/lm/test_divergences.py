import itertools
import math
from functools import partial

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.lm import (
    HiddenLogits,
    adaptive_kl,
    generalized_jsd,
    mixed_kl,
    sampled_reverse_kl,
    sampled_reverse_kl_from_logps,
    token_kl,
    top_k_log_probs,
)

LOSSES = {
    "forward": partial(token_kl, direction="forward"),
    "reverse": partial(token_kl, direction="reverse"),
    "mixed": partial(mixed_kl, reverse_weight=0.3),
    "jsd": partial(generalized_jsd, beta=0.3, reduction="mean"),
}


def draw(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def oracle(name, student, teacher, temperature=1.0):
    """Divergence a token, from probabilities as the definitions read, by autograd."""
    q = (student / temperature).softmax(-1)
    p = (teacher / temperature).softmax(-1)
    forward = (p * (p.log() - q.log())).sum(-1)
    reverse = (q * (q.log() - p.log())).sum(-1)
    if name == "forward":
        return forward
    if name == "reverse":
        return reverse
    if name == "mixed":
        return 0.3 * reverse + 0.7 * forward
    m = 0.3 * p + 0.7 * q
    return 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors, retain_graph=True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_values_and_gradients_equal_the_definitions(name, temperature, chunk_size):
    student, teacher = draw(2, 5, 7).requires_grad_(), draw(2, 5, 7, seed=1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    options = {"mask": mask, "temperature": temperature, "chunk_size": chunk_size}
    each = oracle(name, student, teacher, temperature)
    want = each[mask].mean()
    got = LOSSES[name](student, teacher, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(got, student), gradients(want, student))
    rows = LOSSES[name](student, teacher, **options | {"reduction": "none"})
    torch.testing.assert_close(rows, each * mask)
    upstream = draw(2, 5, seed=2)
    torch.testing.assert_close(
        gradients((rows * upstream).sum(), student),
        gradients((each * mask * upstream).sum(), student),
    )
    total = LOSSES[name](student, teacher, **options | {"reduction": "sum"})
    torch.testing.assert_close(total, each[mask].sum())
    counted = LOSSES[name](student, teacher, **options, num_items_in_batch=11)
    torch.testing.assert_close(counted, each[mask].sum() / 11)


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_states_give_what_logits_give(name):
    hidden, weight, bias = draw(2, 3, 4), draw(6, 4, seed=1), draw(6, seed=2)
    teacher = HiddenLogits(draw(2, 3, 5, seed=3), draw(6, 5, seed=4))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    tensors = [t.requires_grad_() for t in (hidden, weight, bias)]
    got = LOSSES[name](HiddenLogits(*tensors), teacher, mask=mask, chunk_size=2)
    dense = F.linear(hidden, weight, bias), F.linear(teacher.hidden, teacher.weight)
    want = oracle(name, *dense)[mask].mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, *tensors), gradients(want, *tensors))


def test_forward_kl_is_torchs_and_cross_entropy_minus_entropy():
    student, teacher = draw(4, 9), draw(4, 9, seed=1)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    got = token_kl(student, teacher, reduction="none")
    torch.testing.assert_close(
        got, F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    )
    p = log_p.exp()
    torch.testing.assert_close(got, -(p * log_q).sum(-1) + (p * log_p).sum(-1))


def test_gradients_on_logits_are_the_closed_forms():
    student, teacher = draw(3, 8).requires_grad_(), draw(3, 8, seed=1)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    (forward,) = gradients(token_kl(student, teacher, reduction="sum"), student)
    assert (forward - (q - p)).abs().max() < 1e-12
    kl = (q * (q / p).log()).sum(-1, keepdim=True)
    (reverse,) = gradients(
        token_kl(student, teacher, direction="reverse", reduction="sum"), student
    )
    assert (reverse - q * ((q / p).log() - kl)).abs().max() < 1e-12


@given(
    hnp.arrays(np.float64, (2, 3, 6), elements=st.floats(-20, 20)),
    st.floats(-50, 50),
    st.sampled_from(sorted(LOSSES)),
)
@settings(max_examples=60, deadline=None)
def test_divergences_are_positive_unless_logits_agree_up_to_a_constant(arrays, constant, name):
    student, teacher = torch.from_numpy(arrays)
    value = LOSSES[name](student, teacher, reduction="none")
    assert (value >= -1e-12).all()
    assert (LOSSES[name](student, student + constant, reduction="none").abs() < 1e-12).all()
    gap = (student.softmax(-1) - teacher.softmax(-1)).abs().max(-1).values
    assert (value[gap > 1e-3] > 0).all()
    # The Jensen-Shannon divergence is at most the entropy of (beta, 1 - beta).
    if name == "jsd":
        assert (value <= -0.3 * math.log(0.3) - 0.7 * math.log(0.7) + 1e-12).all()


def test_adaptive_kl_weighs_the_directions_by_the_gaps_in_head_and_tail():
    student, teacher = draw(3, 8).requires_grad_(), draw(3, 8, seed=1)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    want = torch.zeros(3, dtype=torch.float64)
    weights = []
    for row in range(3):
        order = sorted(range(8), key=lambda v: -p[row, v])
        head, mass = [], 0.0
        while mass < 0.5:
            head.append(order[len(head)])
            mass += float(p[row, head[-1]])
        gap = (p[row] - q[row]).abs()
        weights.append(float(gap[head].sum() / gap.sum()))
    weights = torch.tensor(weights, dtype=torch.float64)
    forward, reverse = oracle("forward", student, teacher), oracle("reverse", student, teacher)
    want = weights * forward + (1 - weights) * reverse
    got = adaptive_kl(student, teacher, reduction="none")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got.sum(), student), gradients(want.sum(), student))
    assert adaptive_kl(teacher, teacher).abs() < 1e-12


@given(st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_mixed_kl_is_linear_between_the_two_directions(weight):
    student, teacher = draw(4, 6).requires_grad_(), draw(4, 6, seed=1)
    forward, reverse = (token_kl(student, teacher, direction=d) for d in ("forward", "reverse"))
    got = mixed_kl(student, teacher, reverse_weight=weight)
    want = weight * reverse + (1 - weight) * forward
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, student), gradients(want, student))


@pytest.mark.parametrize("beta", [0, 0.0, 0.1, 0.5, 0.9, 1, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_generalized_jsd_equals_trl(beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    trl = GKDTrainer.generalized_jsd_loss
    student, teacher = draw(2, 6, 50, dtype=torch.float32), draw(2, 6, 50, seed=1).float()
    student.requires_grad_()
    labels = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = -100
    common = {"beta": beta, "temperature": temperature}
    for ours, theirs in (
        ({"mask": labels != -100}, {"labels": labels}),
        ({}, {}),
        ({"reduction": "sum"}, {"reduction": "sum"}),
        (
            {"mask": labels != -100, "num_items_in_batch": 5},
            {"labels": labels, "num_items_in_batch": 5},
        ),
    ):
        got = generalized_jsd(student, teacher, **common, **ours)
        want = trl(student, teacher, **common, **theirs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradients(got, student), gradients(want, student), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("name", LOSSES)
def test_weights_in_the_mask_weigh_tokens(name):
    student, teacher = draw(2, 3, 5).requires_grad_(), draw(2, 3, 5, seed=1)
    weights = torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.0, 0.25]], dtype=torch.float64)
    each = oracle(name, student, teacher)
    got = LOSSES[name](student, teacher, mask=weights)
    want = (each * weights).sum() / weights.sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, student), gradients(want, student))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_mask_without_tokens_gives_zero_with_a_graph(name, fused):
    logits = draw(2, 3, 4).requires_grad_()
    weight = draw(5, 4, seed=1).requires_grad_()
    student = HiddenLogits(logits, weight) if fused else logits
    teacher = draw(2, 3, 5 if fused else 4, seed=2)
    loss = LOSSES[name](student, teacher, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert loss.item() == 0
    (gradient,) = gradients(loss, logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_logits_are_reduced_in_float32(name):
    student, teacher = draw(3, 40).bfloat16().requires_grad_(), draw(3, 40, seed=1).bfloat16()
    got = LOSSES[name](student, teacher)
    want = oracle(name, student.detach().double(), teacher.double()).mean()
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) < 1e-5
    assert gradients(got, student)[0].dtype == torch.bfloat16


def test_nothing_is_written_to_and_the_teacher_gets_no_gradient():
    student, teacher = draw(2, 3, 5).requires_grad_(), draw(2, 3, 5, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    for loss in LOSSES.values():
        loss(student, teacher).backward()
    assert teacher.grad is None
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher.detach(), before[1])


def test_tokens_that_the_teacher_forbids():
    student, teacher = draw(2, 5).requires_grad_(), draw(2, 5, seed=1)
    teacher[:, 1] = -torch.inf
    p = teacher.softmax(-1)
    log_q = student.log_softmax(-1)
    want = (torch.xlogy(p, p) - p * log_q).sum(-1).mean()
    got = token_kl(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, student), gradients(want, student))
    q, m = log_q.exp(), 0.5 * p + 0.5 * log_q.exp()
    jsd = 0.5 * (torch.xlogy(p, p / m) + q * (q / m).log()).sum(-1).mean()
    torch.testing.assert_close(generalized_jsd(student, teacher), jsd)
    for weight in (1.0, 0.2):
        with pytest.raises(ValueError, match="finite divergence, got (inf|nan) at 2 of 2 tokens"):
            mixed_kl(student, teacher, reverse_weight=weight)


def coarse(logits, indices, temperature):
    """Probabilities of the given tokens and of all others."""
    p = (logits / temperature).softmax(-1)
    top = p.gather(-1, indices)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_top_k_teacher_is_compared_on_k_tokens_and_the_rest(name, temperature):
    student, teacher = draw(2, 4, 9).requires_grad_(), draw(2, 4, 9, seed=1)
    top = top_k_log_probs(teacher, 3, temperature=temperature)
    got = LOSSES[name](student, top, temperature=temperature, chunk_size=3)
    q, p = coarse(student, top.indices, temperature), coarse(teacher, top.indices, temperature)
    want = oracle(name, q.log(), p.log()).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, student), gradients(want, student))
    # Data processing: merging events can only lose divergence.
    whole = LOSSES[name](student, teacher, temperature=temperature, reduction="none")
    part = LOSSES[name](student, top, temperature=temperature, reduction="none")
    assert (part <= whole + 1e-12).all()


@pytest.mark.parametrize("name", LOSSES)
def test_top_k_of_the_whole_vocabulary_is_the_teacher(name):
    student, teacher = draw(3, 6).requires_grad_(), draw(3, 6, seed=1)
    top = top_k_log_probs(teacher, 6)
    assert (top.log_tail == -torch.inf).all()
    got, want = LOSSES[name](student, top), LOSSES[name](student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, student), gradients(want, student))


def test_top_k_log_probs_are_sorted_and_complete():
    logits = draw(2, 5, 30)
    top = top_k_log_probs(logits, 4, chunk_size=3)
    want = logits.log_softmax(-1).sort(-1, descending=True)
    torch.testing.assert_close(top.log_probs, want.values[..., :4])
    assert torch.equal(top.indices, want.indices[..., :4])
    torch.testing.assert_close(top.log_tail[..., 0], want.values[..., 4:].logsumexp(-1))
    weight = draw(30, 5, seed=3)
    fused = top_k_log_probs(HiddenLogits(draw(2, 5), weight), 4)
    torch.testing.assert_close(fused, top_k_log_probs(draw(2, 5) @ weight.T, 4))


def test_sampled_estimates_average_to_the_reverse_kl_and_its_gradient():
    """Every token of the vocabulary as the drawn one, weighted by its probability."""
    vocabulary = 7
    student, teacher = draw(vocabulary).requires_grad_(), draw(vocabulary, seed=1)
    q = student.detach().softmax(-1)
    rows = student.expand(1, vocabulary, vocabulary), teacher.expand(1, vocabulary, vocabulary)
    labels = torch.arange(vocabulary)[None]
    exact = token_kl(student[None], teacher[None], direction="reverse")
    for estimator in ("k1", "k2", "k3"):
        each = sampled_reverse_kl(*rows, labels, estimator=estimator, shift=False, reduction="none")
        average = (q * each[0]).sum()
        if estimator != "k2":
            torch.testing.assert_close(average, exact)
        torch.testing.assert_close(gradients(average, student), gradients(exact, student))
    ratio = (teacher.log_softmax(-1) - student.detach().log_softmax(-1)).exp()
    torch.testing.assert_close(each[0].detach(), ratio - 1 - ratio.log())
    k2 = sampled_reverse_kl(*rows, labels, estimator="k2", shift=False, reduction="none")
    torch.testing.assert_close(k2[0].detach(), ratio.log().square() / 2)


def test_sampled_gradient_is_the_policy_gradients():
    student, teacher = draw(2, 5, 6).requires_grad_(), draw(2, 5, 6, seed=1)
    labels = torch.randint(6, (2, 5), generator=torch.Generator().manual_seed(3))
    labels[1, :2] = -100
    got = sampled_reverse_kl(student, teacher, labels)
    keep = labels[:, 1:] != -100
    index = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    logq, logp = (
        z.log_softmax(-1)[:, :-1].gather(-1, index).squeeze(-1) for z in (student, teacher)
    )
    reward = (logp - logq).detach()
    torch.testing.assert_close(got, -reward[keep].mean())
    surrogate = -(reward * logq)[keep].mean()
    torch.testing.assert_close(gradients(got, student), gradients(surrogate, student))
    hidden, weight = draw(2, 5, 3).requires_grad_(), draw(6, 3, seed=4).requires_grad_()
    fused = sampled_reverse_kl(HiddenLogits(hidden, weight), teacher, labels)
    dense = sampled_reverse_kl(hidden @ weight.T, teacher, labels)
    torch.testing.assert_close(gradients(fused, hidden, weight), gradients(dense, hidden, weight))
    empty = sampled_reverse_kl(student, teacher, torch.full((2, 5), -100))
    assert empty.item() == 0
    assert (gradients(empty, student)[0] == 0).all()


def test_sampled_reverse_kl_ignores_what_the_mask_hides():
    student = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    teacher = torch.tensor([[-2.0, -torch.inf]])
    loss = sampled_reverse_kl_from_logps(student, teacher, torch.tensor([[True, False]]))
    assert loss.item() == 1
    assert torch.equal(gradients(loss, student)[0], torch.tensor([[1.0, 0.0]]))


def test_sequence_kl_is_the_sum_of_expected_token_kls():
    """Two models over 3 tokens and length 3, with every sequence enumerated."""
    vocabulary, length = 3, 3
    contexts = [c for n in range(length) for c in itertools.product(range(vocabulary), repeat=n)]
    student = {c: draw(vocabulary, seed=2 * i) for i, c in enumerate(contexts)}
    teacher = {c: draw(vocabulary, seed=2 * i + 1) for i, c in enumerate(contexts)}

    def logp(model, sequence):
        return sum(model[sequence[:t]].log_softmax(-1)[token] for t, token in enumerate(sequence))

    sequences = list(itertools.product(range(vocabulary), repeat=length))
    log_p = torch.stack([logp(teacher, s) for s in sequences])
    log_q = torch.stack([logp(student, s) for s in sequences])
    for prefixes, direction, whole in (
        (teacher, "forward", (log_p.exp() * (log_p - log_q)).sum()),
        (student, "reverse", (log_q.exp() * (log_q - log_p)).sum()),
    ):
        tokens = sum(
            (logp(prefixes, c) if c else torch.zeros(())).exp()
            * token_kl(student[c][None], teacher[c][None], direction=direction)
            for c in contexts
        )
        assert abs(float(tokens - whole)) < 1e-10


def test_one_label_drawn_from_the_teacher_is_supervised_fine_tuning():
    """The forward gradient is the cross entropy's, averaged over the teacher's tokens."""
    student, teacher = draw(1, 6).requires_grad_(), draw(1, 6, seed=1)
    p = teacher.softmax(-1)[0]
    hard = sum(
        p[y] * gradients(F.cross_entropy(student, torch.tensor([y])), student)[0] for y in range(6)
    )
    torch.testing.assert_close(gradients(token_kl(student, teacher), student)[0], hard)


ROWS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_kl(ROWS, torch.zeros(2, 3, 5)), ValueError, "vocabulary.*4.*5.*cross-tok"),
        (lambda: token_kl(ROWS, torch.zeros(2, 4)), ValueError, "leading shape"),
        (lambda: token_kl(ROWS, ROWS, direction="both"), ValueError, "direction"),
        (lambda: token_kl(ROWS, ROWS, temperature=0.0), ValueError, "temperature"),
        (lambda: token_kl(ROWS, ROWS, reduction="max"), ValueError, "reduction"),
        (lambda: token_kl(ROWS, ROWS, mask=torch.ones(2, 2)), ValueError, "mask.*(2, 3)"),
        (lambda: token_kl(ROWS, ROWS, mask=-torch.ones(2, 3)), ValueError, "mask"),
        (lambda: token_kl(ROWS, ROWS, mask=torch.full((2, 3), torch.nan)), ValueError, "mask"),
        (lambda: token_kl(ROWS, ROWS, num_items_in_batch=0), ValueError, "num_items_in_batch"),
        (lambda: token_kl(ROWS, ROWS, chunk_size=0), ValueError, "chunk_size"),
        (lambda: token_kl(ROWS * torch.nan, ROWS), ValueError, "got nan at 6 of 6 tokens"),
        (lambda: token_kl(ROWS.long(), ROWS), TypeError, "floating"),
        (lambda: mixed_kl(ROWS, ROWS, reverse_weight=1.1), ValueError, "reverse_weight"),
        (lambda: generalized_jsd(ROWS, ROWS, beta=-0.1), ValueError, "beta"),
        (lambda: adaptive_kl(ROWS, ROWS, head_mass=1.5), ValueError, "head_mass"),
        (
            lambda: token_kl(ROWS, top_k_log_probs(ROWS, 2), temperature=2.0),
            ValueError,
            "temperature must be that",
        ),
        (lambda: token_kl(ROWS, top_k_log_probs(ROWS[0], 2)), ValueError, "leading shape"),
        (lambda: top_k_log_probs(ROWS, 5), ValueError, "k must be"),
        (
            lambda: sampled_reverse_kl(ROWS, ROWS, torch.zeros(2, 3).long(), estimator="k4"),
            ValueError,
            "estimator",
        ),
        (
            lambda: sampled_reverse_kl_from_logps(torch.zeros(2, 3), torch.zeros(2, 2)),
            ValueError,
            "teacher_logps",
        ),
        (
            lambda: sampled_reverse_kl_from_logps(torch.zeros(1), torch.full((1,), -torch.inf)),
            ValueError,
            "finite log-prob",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
