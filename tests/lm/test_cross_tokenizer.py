import itertools
import runpy
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast
from trl.experimental.gold.gold_config import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

from sciml.lm import (
    CrossTokenizerDistillationLoss,
    HiddenLogits,
    TokenProjection,
    align_texts,
    build_token_projection,
    byte_language_model,
    combine_teachers,
    english_text,
    hidden_logits,
    hybrid_kl_loss,
    hybrid_uld_loss,
    projected_kl_loss,
    teacher_scores,
    token_kl,
    uld_loss,
)

N_STUDENT, N_TEACHER = 7, 9
# Chunks of tokens: 1 to 1, 2 to 1, 1 to 3, one without a partner, none; and a sequence of none.
STUDENT_CHUNKS = torch.tensor([[0, 1, 2, 2, 3, 4], [0, 1, 1, -1, 2, -1], [-1] * 6])
TEACHER_CHUNKS = torch.tensor(
    [[0, 1, 2, 3, 3, 3, -1], [0, 1, -1, 2, 2, 2, 3], [0, 1, 2, -1, -1, -1, -1]]
)


def draw(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_projection(seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack(
        [torch.randperm(N_TEACHER, generator=generator)[:3] for _ in range(N_STUDENT)]
    )
    weights = torch.rand(N_STUDENT, 3, generator=generator).sort(1, descending=True).values
    weights[1, 1:] = 0
    weights[4] = 0
    indices[weights == 0] = -1
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    return TokenProjection(indices, weights, N_TEACHER)


def identity(n):
    return TokenProjection(torch.arange(n)[:, None], torch.ones(n, 1), n)


def exact_pairs(pairs):
    """Student to teacher ids that spell the same; the others are mapped half and half."""
    indices = torch.tensor([[0, 1]] * N_STUDENT)
    weights = torch.full((N_STUDENT, 2), 0.5)
    for student, teacher in pairs:
        indices[student] = torch.tensor([teacher, -1])
        weights[student] = torch.tensor([1.0, 0.0])
    return TokenProjection(indices, weights, N_TEACHER)


def dense(projection):
    return projection.matrix(dtype=torch.float64).to_dense()


def row_groups(shift=True):
    """Rows of either side of every chunk that counts, by the definition."""
    for b in range(len(STUDENT_CHUNKS)):
        for number in range(6):
            sides = []
            for chunks in (STUDENT_CHUNKS, TEACHER_CHUNKS):
                rows = (chunks[b] == number).nonzero().squeeze(1) - int(shift)
                sides.append(rows.tolist())
            if all(sides) and min(sides[0] + sides[1]) >= 0:
                yield b, *sides


def mean_log_probs(logits, temperature):
    return (logits / temperature).log_softmax(-1).mean(0)


def slow_projected_kl(student, teacher, projection, temperature, top_k, direction):
    rows = [(b, j) for b, _, js in row_groups() for j in js]
    best = torch.stack([teacher[b, j] for b, j in rows]).amax(0)
    kept = best.topk(top_k).indices
    each = []
    for b, i, j in row_groups():
        p = ((student[b, i] / temperature).softmax(-1) @ dense(projection))[:, kept].mean(0)
        p = p / (p.sum() + 1e-10) + 1e-10
        log_q = mean_log_probs(teacher[b, j][:, kept], temperature)
        if direction == "forward":
            each.append((log_q.exp() * (log_q - p.log())).sum())
        else:
            each.append(((p - 1e-10) * (p.log() - log_q)).sum())
    return torch.stack(each) * temperature**2


def sorted_l1(p, q, n=None):
    p, q = p.sort(descending=True).values, q.sort(descending=True).values
    if n is None:
        n = max(len(p), len(q))
        p, q = F.pad(p, (0, n - len(p))), F.pad(q, (0, n - len(q)))
    return (p[:n] - q[:n]).abs().sum()


def slow_hybrid_kl(student, teacher, projection, temperature, threshold, top_k):
    ours, theirs = (ids.tolist() for ids in projection.common_ids(threshold))
    rest = (
        [i for i in range(N_STUDENT) if i not in ours],
        [j for j in range(N_TEACHER) if j not in theirs],
    )
    each = []
    for b, i, j in row_groups():
        s, q = (
            mean_log_probs(student[b, i], temperature),
            mean_log_probs(teacher[b, j], temperature),
        )
        kl = (q[theirs].exp() * (q[theirs] - s[ours])).sum()
        n = min(len(rest[0]), len(rest[1]), top_k)
        each.append(kl + sorted_l1(s[rest[0]].exp(), q[rest[1]].exp(), n))
    return torch.stack(each) * temperature**2


LOSSES = {
    "p-kl": (
        lambda s, t, **k: projected_kl_loss(
            s, t, STUDENT_CHUNKS, TEACHER_CHUNKS, random_projection(), **k
        ),
        lambda s, t, T: slow_projected_kl(s, t, random_projection(), T, N_TEACHER, "forward"),
    ),
    "reverse p-kl, 5 columns": (
        lambda s, t, **k: projected_kl_loss(
            s, t, STUDENT_CHUNKS, TEACHER_CHUNKS, random_projection(), vocab_topk=5,
            direction="reverse", **k,
        ),
        lambda s, t, T: slow_projected_kl(s, t, random_projection(), T, 5, "reverse"),
    ),
    "h-kl": (
        lambda s, t, **k: hybrid_kl_loss(
            s, t, STUDENT_CHUNKS, TEACHER_CHUNKS, random_projection(), threshold=0.5, **k
        ),
        lambda s, t, T: slow_hybrid_kl(s, t, random_projection(), T, 0.5, 8192),
    ),
    "gold, 2 sorted": (
        lambda s, t, **k: hybrid_kl_loss(
            s, t, STUDENT_CHUNKS, TEACHER_CHUNKS, exact_pairs([(2, 3), (6, 0)]), threshold=1.0,
            uncommon_topk=2, **k,
        ),
        lambda s, t, T: slow_hybrid_kl(s, t, exact_pairs([(2, 3), (6, 0)]), T, 1.0, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_equal_the_definitions(name, temperature):
    fast, slow = LOSSES[name]
    student, teacher = draw(3, 6, N_STUDENT).requires_grad_(), draw(3, 7, N_TEACHER, seed=1)
    each = slow(student, teacher, temperature)
    assert len(each) == 5
    for chunk_size in (None, 1, 4):
        got = fast(student, teacher, temperature=temperature, chunk_size=chunk_size)
        torch.testing.assert_close(got, each.mean(), rtol=1e-7, atol=1e-7)
        ours, want = (
            torch.autograd.grad(x, student, retain_graph=True)[0] for x in (got, each.mean())
        )
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-7)
    got = fast(student, teacher, temperature=temperature, num_items_in_batch=11)
    torch.testing.assert_close(got, each.sum() / 11, rtol=1e-7, atol=1e-7)
    got = fast(student, teacher, temperature=temperature, average="sequence")
    n = [sum(b == i for b, _, _ in row_groups()) for i in range(3)]
    want = (each[: n[0]].mean() + each[n[0] :].mean()) / 3
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def uld_losses(**options):
    ids = {"student_ids": torch.randint(7, (3, 6)), "teacher_ids": torch.randint(9, (3, 7))}
    chunks = STUDENT_CHUNKS, TEACHER_CHUNKS
    return {
        "uld": lambda s, t: uld_loss(s, t, *chunks, **ids, **options),
        "hybrid": lambda s, t: hybrid_uld_loss(
            s, t, *chunks, random_projection(), **ids, **options
        ),
    }


@pytest.mark.parametrize("name", [*LOSSES, "uld", "hybrid"])
def test_hidden_states_give_what_logits_give(name):
    torch.manual_seed(0)
    loss = LOSSES[name][0] if name in LOSSES else uld_losses()[name]
    hidden, weight, bias = draw(3, 6, 4), draw(N_STUDENT, 4, seed=2), draw(N_STUDENT, seed=3)
    teacher = HiddenLogits(
        draw(3, 7, 5, seed=4), draw(N_TEACHER, 5, seed=5), draw(N_TEACHER, seed=6)
    )
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    got = loss(HiddenLogits(*leaves), teacher)
    full = F.linear(hidden, weight, bias), F.linear(teacher.hidden, teacher.weight, teacher.bias)
    want = loss(*full)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [*LOSSES, "uld", "hybrid"])
def test_gradients_equal_finite_differences(name):
    torch.manual_seed(0)
    loss = LOSSES[name][0] if name in LOSSES else uld_losses()[name]
    teacher = draw(3, 7, N_TEACHER, seed=1)
    student = (draw(3, 6, N_STUDENT) / 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    assert (
        torch.autograd.grad(loss(student, teacher.requires_grad_()), teacher, allow_unused=True)[0]
        is None
    )


def test_identical_vocabularies_give_the_plain_forward_kl():
    chunks = torch.arange(6).expand(2, -1)
    student, teacher = draw(2, 6, 9).requires_grad_(), draw(2, 6, 9, seed=1)
    mask = torch.ones(2, 6).bool()
    mask[:, -1] = False  # row t predicts token t + 1
    plain = token_kl(student, teacher, mask=mask)
    for got in (
        projected_kl_loss(student, teacher, chunks, chunks, identity(9)),
        hybrid_kl_loss(student, teacher, chunks, chunks, identity(9), threshold=1.0),
    ):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
        ours, want = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (got, plain))
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-7)


def test_consistent_permutations_of_the_teachers_vocabulary_change_nothing():
    projection, order = random_projection(), torch.randperm(N_TEACHER)
    place = order.argsort()  # token j becomes place[j]
    indices = torch.where(projection.indices >= 0, place[projection.indices], -1)
    permuted = TokenProjection(indices, projection.weights, N_TEACHER)
    student, teacher = draw(3, 6, N_STUDENT), draw(3, 7, N_TEACHER, seed=1)
    for loss in (projected_kl_loss, hybrid_kl_loss):
        want = loss(student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, projection)
        got = loss(student, teacher[..., order], STUDENT_CHUNKS, TEACHER_CHUNKS, permuted)
        torch.testing.assert_close(got, want)


def test_uld_does_not_see_which_token_is_which():
    chunks = torch.arange(6).expand(3, -1)
    student, teacher = draw(3, 6, 7), draw(3, 6, 9, seed=1)
    want = uld_loss(student, teacher, chunks, chunks)
    torch.testing.assert_close(
        uld_loss(student[..., torch.randperm(7)], teacher[..., torch.randperm(9)], chunks, chunks),
        want,
    )
    wide = F.pad(student, (0, 2), value=-torch.inf)[..., torch.randperm(9)]
    torch.testing.assert_close(uld_loss(student, wide, chunks, chunks), torch.zeros(()).double())


def test_common_part_pushes_every_uncommon_token_down():
    """Its gradient there is the probability times the teacher's common mass."""
    projection = exact_pairs([(0, 0), (1, 1)])
    student, teacher = draw(1, 1, N_STUDENT).requires_grad_(), draw(1, 1, N_TEACHER, seed=1)
    chunk = torch.zeros(1, 1, dtype=torch.long)
    _, parts = hybrid_kl_loss(
        student, teacher, chunk, chunk, projection, threshold=1.0, shift=False, return_parts=True
    )
    s, q = student.log_softmax(-1)[0, 0], teacher.log_softmax(-1)[0, 0]
    common = (q[:2].exp() * (q[:2] - s[:2])).sum()
    torch.testing.assert_close(parts["common"], common.detach())
    (gradient,) = torch.autograd.grad(common, student)
    want = q[:2].exp().sum() * s[2:].exp()
    torch.testing.assert_close(gradient[0, 0, 2:], want.detach())
    assert (gradient[0, 0, 2:] > 0).all()


def optimise(loss, n_steps=400):
    logits = torch.zeros(1, 1, 5, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
    return logits.detach().softmax(-1)[0, 0].tolist()


def one_span():
    """Student {a, b, 12, 34, ~} at "12", which the teacher, {a, b, 1, 2, 3, 4, %}, splits."""
    teacher = torch.full((1, 2, 7), 0.1 / 6)
    teacher[0, 0, 2] = teacher[0, 1, 3] = 0.9
    indices = torch.tensor([[0, -1], [1, -1], [2, 3], [4, 5], [-1, -1]])
    weights = torch.tensor([[1, 0], [1, 0], [10 / 11, 1 / 11], [10 / 11, 1 / 11], [0, 0]])
    chunks = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    return teacher.log(), chunks, TokenProjection(indices, weights, 7)


def test_gold_suppresses_the_split_numeral_that_p_kl_learns():
    teacher, chunks, projection = one_span()
    p_kl = optimise(lambda z: projected_kl_loss(z, teacher, *chunks, projection, shift=False))
    gold = optimise(
        lambda z: hybrid_kl_loss(z, teacher, *chunks, projection, threshold=1.0, shift=False)
    )
    print(f"P(12), P(34), P(a): P-KL {p_kl[2]:.3f} {p_kl[3]:.3f} {p_kl[0]:.3f}, ", end="")
    print(f"GOLD {gold[2]:.3f} {gold[3]:.3f} {gold[0]:.3f}")
    assert p_kl[2] > 0.5
    assert p_kl[2] >= 5 * gold[2]
    assert gold[2] == pytest.approx(gold[3], abs=1e-3)  # cannot tell 12 from 34
    # The common part alone drives both towards 0.
    q = teacher.log_softmax(-1)[0].mean(0)[:2]
    alone = optimise(lambda z: (q.exp() * (q - z.log_softmax(-1)[0, 0, :2])).sum())
    print(f"common part alone {alone[2]:.3f}")
    assert alone[2] < 0.05


def test_the_mean_over_a_chunk_forgets_the_order_of_its_rows():
    """P-KL cannot tell "12" from "21"."""
    teacher, chunks, projection = one_span()
    student = draw(1, 1, 5)
    torch.testing.assert_close(
        projected_kl_loss(student, teacher, *chunks, projection, shift=False),
        projected_kl_loss(student, teacher.flip(1), *chunks, projection, shift=False),
    )


@pytest.mark.slow
def test_numerals_keep_their_probability_under_p_kl_only(tmp_path, monkeypatch):
    """The example: two tokenizers, of which the teacher's splits digits."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    example = Path(__file__).parents[2] / "examples/lm/plot_cross_tokenizer.py"
    monkeypatch.chdir(tmp_path)
    results = runpy.run_path(str(example))["results"]
    for p_kl, gold in zip(results["P-KL"], results["GOLD"], strict=True):
        assert p_kl[0] > 0.5
        assert p_kl[0] > 2 * gold[0]
        assert p_kl[1] > 2 * gold[1]


# TRL.


@pytest.fixture(scope="module")
def trl_config(tmp_path_factory):
    def make(**options):
        return GOLDConfig(
            output_dir=str(tmp_path_factory.mktemp("gold")), use_uld_loss=True, bf16=False,
            uld_crossentropy_weight=0.0, use_cpu=True, report_to=[],
            uld_skip_student_eos=False, uld_skip_teacher_eos=False, **options,
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield make


class Vocabulary:
    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def trl_inputs(dtype=torch.float64):
    """Sequences with a prompt of one token and answers with spans of 1, 2 and 3 tokens."""
    torch.manual_seed(0)
    student_chunks = torch.tensor([[-1, 0, 1, 1, 2, 3], [-1, 0, 1, 2, 2, -1]])
    teacher_chunks = torch.tensor([[-1, 0, 1, 2, 2, 2, 3], [-1, 0, 1, 1, 2, -1, -1]])
    result = {}
    for side, chunks, n in (("student", student_chunks, 7), ("teacher", teacher_chunks, 9)):
        ids = torch.randint(n, chunks.shape)
        offsets = torch.zeros(*chunks.shape, 2, dtype=torch.long)
        for b, row in enumerate(chunks.tolist()):
            for t, number in enumerate(row):
                if number >= 0:  # chunks end at multiples of 10 bytes
                    last = t + 1 == len(row) or row[t + 1] != number
                    start = int(offsets[b, t - 1, 1])
                    offsets[b, t, 0] = start
                    step = 1 if side == "student" else 3
                    offsets[b, t, 1] = 10 * (number + 1) if last else max(start, 10 * number) + step
        result |= {
            f"{side}_logits": draw(*chunks.shape, n, seed=len(result), dtype=dtype),
            f"{side}_labels": torch.where(chunks >= 0, ids, -100),
            f"{side}_input_ids": ids,
            f"{side}_byte_offsets": offsets,
        }
    return result, student_chunks, teacher_chunks


@pytest.mark.parametrize("strategy", ["bayesian", "observed"])
@pytest.mark.parametrize("extended", [True, False])
def test_uld_equals_trl(trl_config, strategy, extended):
    inputs, student_chunks, teacher_chunks = trl_inputs()
    student = inputs["student_logits"].requires_grad_()
    peer = ULDLoss(trl_config(uld_token_merge_strategy=strategy, use_extended_uld=extended))
    want = peer(**inputs)
    if not extended:  # tokens are paired by position, as far as the shorter side goes
        student_chunks, teacher_chunks = (
            torch.where(chunks >= 0, torch.arange(chunks.shape[1]) - 1, -1)
            for chunks in (student_chunks, teacher_chunks)
        )
    got = uld_loss(
        student, inputs["teacher_logits"], student_chunks, teacher_chunks,
        student_ids=inputs["student_input_ids"], teacher_ids=inputs["teacher_input_ids"],
        merge="last" if strategy == "bayesian" else "first", shift=strategy == "bayesian",
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["bayesian", "observed"])
@pytest.mark.parametrize(
    ("beta", "weights"), [(0.5, None), (0.0, (0.7, 2.0)), (1.0, None), (0.3, (1.0, 0.0))]
)
def test_hybrid_uld_equals_trls_gold(trl_config, strategy, beta, weights):
    inputs, student_chunks, teacher_chunks = trl_inputs()
    student = inputs["student_logits"].requires_grad_()
    options = dict(
        zip(
            ("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight"),
            weights or (),
            strict=False,
        )
    )
    config = trl_config(
        uld_token_merge_strategy=strategy, uld_use_hybrid_loss=True, beta=beta, **options
    )
    pairs = [(0, 4), (2, 3), (5, 8)]
    names = [f"s{i}" for i in range(7)], [f"t{i}" for i in range(9)]
    for i, j in pairs:
        names[0][i] = names[1][j] = f"both{i}"
    want = ULDLoss(config, Vocabulary(names[0]), Vocabulary(names[1]))(**inputs)
    got, parts = hybrid_uld_loss(
        student, inputs["teacher_logits"], student_chunks, teacher_chunks, exact_pairs(pairs),
        student_ids=inputs["student_input_ids"], teacher_ids=inputs["teacher_input_ids"],
        beta=beta, merge="last" if strategy == "bayesian" else "first",
        shift=strategy == "bayesian",
        matched_weight=weights and weights[0], unmatched_weight=weights and weights[1],
        return_parts=True,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert set(parts) == {"matched", "unmatched"}
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# Several teachers, and the module.


def test_teachers_are_combined_as_asked():
    losses = [torch.tensor(2.0, requires_grad=True), torch.tensor(5.0)]
    assert combine_teachers(losses) == 3.5
    assert combine_teachers(losses, weights=[1, 2]) == 12
    weights = torch.tensor([-1.0, -3.0]).mul(0.5).softmax(0)
    got = combine_teachers(losses, scores=[-1.0, -3.0], alpha=0.5)
    torch.testing.assert_close(got, 2 * weights[0] + 5 * weights[1])
    got.backward()
    torch.testing.assert_close(losses[0].grad, weights[0])
    assert combine_teachers(losses, scores=[-3.0, -1.0], select=True) == 5
    factor = torch.tensor(1000.0).log() / torch.tensor(10.0).log()
    torch.testing.assert_close(
        combine_teachers(losses, weights=[1, 1], vocabulary_sizes=[10, 1000]), 2 + 5 * factor
    )
    for options, message in (
        ({"weights": [1.0]}, "weights must have one entry a loss, 2, got 1"),
        ({"weights": [1, 1], "scores": [1, 1]}, "exclude each other"),
        ({"select": True}, "select needs scores"),
        ({"weights": [1, -1]}, "weights"),
        ({"scores": [1, float("nan")]}, "scores must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            combine_teachers(losses, **options)
    with pytest.raises(ValueError, match="losses must hold one loss"):
        combine_teachers([])


def test_scores_of_teachers_are_means_over_their_tokens():
    logits, labels = draw(2, 5, 6), torch.randint(6, (2, 5))
    labels[0, 2] = -100
    logp = logits.log_softmax(-1)
    target = labels[:, 1:]
    counts = target != -100
    ce = F.cross_entropy(logits[:, :-1].reshape(-1, 6), target.reshape(-1))
    torch.testing.assert_close(teacher_scores(logits, labels), -ce)
    rows = logp[:, :-1][counts]
    torch.testing.assert_close(
        teacher_scores(logits, labels, score="entropy"), (rows.exp() * rows).sum(-1).mean()
    )
    torch.testing.assert_close(
        teacher_scores(logits, labels, score="max_prob"), rows.exp().amax(-1).mean()
    )
    with pytest.raises(ValueError, match="score"):
        teacher_scores(logits, labels, score="accuracy")


@pytest.mark.parametrize("mode", ["p-kl", "h-kl", "gold", "uld"])
def test_module_adds_the_cross_entropy(mode):
    student, teacher = draw(3, 6, N_STUDENT).requires_grad_(), draw(3, 7, N_TEACHER, seed=1)
    labels, theirs = torch.randint(7, (3, 6)), torch.randint(9, (3, 7))
    projection = random_projection()
    chunks = STUDENT_CHUNKS, TEACHER_CHUNKS
    kd = {
        "p-kl": lambda: projected_kl_loss(student, teacher, *chunks, projection),
        "h-kl": lambda: hybrid_kl_loss(student, teacher, *chunks, projection, threshold=0.6),
        "gold": lambda: hybrid_kl_loss(student, teacher, *chunks, projection, threshold=1.0),
        "uld": lambda: uld_loss(
            student, teacher, *chunks, student_ids=labels, teacher_ids=theirs, average="chunk"
        ),
    }[mode]()
    ce = F.cross_entropy(student[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    fixed = CrossTokenizerDistillationLoss(
        mode, projection, dynamic_scaling=False, kl_weight=2.0, ce_weight=0.3
    )
    got = fixed(student, teacher, *chunks, labels=labels, teacher_labels=theirs)
    torch.testing.assert_close(got, 2 * kd + 0.3 * ce)
    dynamic = CrossTokenizerDistillationLoss(mode, projection)
    got, parts = dynamic(
        student, teacher, *chunks, labels=labels, teacher_labels=theirs, return_parts=True
    )
    torch.testing.assert_close(got, 2 * ce)
    torch.testing.assert_close(parts["scale"], (ce / kd).detach())
    ours, want = (
        torch.autograd.grad(x, student, retain_graph=True)[0]
        for x in (got, (ce / kd).detach() * kd + ce)
    )
    torch.testing.assert_close(ours, want)
    assert mode in repr(dynamic)


def test_chunks_with_an_unlabelled_token_teach_nothing():
    student, teacher = draw(3, 6, N_STUDENT), draw(3, 7, N_TEACHER, seed=1)
    labels = torch.randint(7, (3, 6))
    labels[0, 3] = -100  # half of chunk 2
    objective = CrossTokenizerDistillationLoss("p-kl", random_projection())
    _, parts = objective(
        student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, labels=labels, return_parts=True
    )
    fewer = STUDENT_CHUNKS.masked_fill(
        torch.tensor([[True], [False], [False]]) & (STUDENT_CHUNKS == 2), -1
    )
    want = projected_kl_loss(student, teacher, fewer, TEACHER_CHUNKS, random_projection())
    torch.testing.assert_close(parts["kd"], want)


# Edges.


def test_batches_without_a_chunk_give_a_zero_in_the_graph_and_a_warning():
    torch.manual_seed(0)
    none = torch.full((3, 6), -1)
    teacher = draw(3, 7, N_TEACHER, seed=1)
    projection = random_projection()
    for loss in (
        lambda s: projected_kl_loss(s, teacher, none, TEACHER_CHUNKS, projection),
        lambda s: hybrid_kl_loss(s, teacher, none, TEACHER_CHUNKS, projection),
        lambda s: uld_loss(s, teacher, none, TEACHER_CHUNKS),
        lambda s: hybrid_uld_loss(s, teacher, none, TEACHER_CHUNKS, projection),
    ):
        student = draw(3, 6, N_STUDENT).requires_grad_()
        with pytest.warns(UserWarning, match="no chunk of the batch has rows on both sides"):
            value = loss(student)
        assert value == 0
        value.backward()
        assert torch.equal(student.grad, torch.zeros_like(student))
    student = draw(3, 6, N_STUDENT).requires_grad_()
    objective = CrossTokenizerDistillationLoss("p-kl", projection)
    with pytest.warns(UserWarning, match="no chunk"):
        value, parts = objective(
            student, teacher, none, TEACHER_CHUNKS, labels=torch.zeros(3, 6, dtype=torch.long),
            return_parts=True,
        )  # fmt: skip
    assert parts["scale"] == 1
    torch.testing.assert_close(value.detach(), parts["ce"])


def test_padding_of_either_vocabulary():
    """The teacher's is cut off; the student's has no teacher and takes part in the softmax."""
    student, teacher = draw(3, 6, N_STUDENT), draw(3, 7, N_TEACHER, seed=1)
    projection = random_projection()
    wide = torch.cat([teacher, torch.full((3, 7, 4), 50.0)], -1)
    for loss in (projected_kl_loss, hybrid_kl_loss):
        want = loss(student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, projection)
        got = loss(student, wide, STUDENT_CHUNKS, TEACHER_CHUNKS, projection)
        torch.testing.assert_close(got, want)
        padded = torch.cat([student, torch.full((3, 6, 2), -torch.inf)], -1)
        got = loss(padded, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, projection)
        torch.testing.assert_close(got, want)


class Largest(TorchDispatchMode):
    """Number of entries of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["p-kl", "h-kl", "gold", "uld"])
def test_no_array_over_batch_time_and_vocabulary_exists(name):
    n_student, n_teacher, length = 600, 800, 200
    chunks = torch.arange(length)[None] // 2
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(n_teacher, (n_student, 1), generator=generator)
    projection = TokenProjection(indices, torch.ones(n_student, 1), n_teacher)
    ids = torch.zeros(1, length, dtype=torch.long)
    hidden = draw(1, length, 8).requires_grad_()
    weight = draw(n_student, 8, seed=1).requires_grad_()
    teacher = HiddenLogits(draw(1, length, 8, seed=2), draw(n_teacher, 8, seed=3))
    objective = CrossTokenizerDistillationLoss(name, projection, vocab_topk=50, chunk_size=10)
    with Largest() as largest:
        objective(
            HiddenLogits(hidden, weight), teacher, chunks, chunks, labels=ids, teacher_labels=ids
        ).backward()
    assert largest.size < 25 * n_teacher  # where all rows would take 200


def test_half_precision_and_inputs_stay():
    student = draw(3, 6, N_STUDENT, dtype=torch.float32)
    teacher = draw(3, 7, N_TEACHER, seed=1, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = student.to(dtype).requires_grad_(), teacher.to(dtype)
        before = ours.detach().clone(), theirs.clone()
        for name in LOSSES:
            got = LOSSES[name][0](ours, theirs)
            want = LOSSES[name][0](before[0].float(), before[1].float())
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
            (gradient,) = torch.autograd.grad(got, ours)
            assert gradient.dtype == dtype
            assert gradient.isfinite().all()
        assert torch.equal(ours, before[0])
        assert torch.equal(theirs, before[1])


def test_bad_arguments():
    student, teacher = draw(3, 6, N_STUDENT), draw(3, 7, N_TEACHER, seed=1)
    chunks, projection = (STUDENT_CHUNKS, TEACHER_CHUNKS), random_projection()
    for loss, options in itertools.product(
        (projected_kl_loss, hybrid_kl_loss, hybrid_uld_loss),
        ({"temperature": 0.0}, {"temperature": -1.0}, {"average": "token"}),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            loss(student, teacher, *chunks, projection, **options, **(
                {"student_ids": torch.zeros(3, 6).long(), "teacher_ids": torch.zeros(3, 7).long()}
                if loss is hybrid_uld_loss else {}
            ))  # fmt: skip
    kl = partial(projected_kl_loss, student, teacher)
    uld = partial(uld_loss, student, teacher, *chunks)
    for call, message in (
        (lambda: projected_kl_loss(student[..., :5], teacher, *chunks, projection),
         "student_logits must score the 7"),
        (lambda: projected_kl_loss(student, teacher[..., :5], *chunks, projection),
         "teacher_logits must score the 9"),
        (lambda: kl(*chunks[::-1], projection), "student_chunks must have the leading"),
        (lambda: kl(chunks[0] - 1, chunks[1], projection), "student_chunks must be numbers"),
        (lambda: kl(chunks[0] + 9, chunks[1], projection), "student_chunks must be numbers"),
        (lambda: kl(*chunks, projection, direction="up"), "direction"),
        (lambda: projected_kl_loss(student * torch.nan, teacher, *chunks, projection),
         "finite loss"),
        (lambda: hybrid_kl_loss(student * torch.nan, teacher, *chunks, projection), "finite loss"),
        (lambda: hybrid_kl_loss(student, teacher, *chunks, projection, threshold=1.5),
         "threshold"),
        (uld, "student_ids must be given"),
        (lambda: uld(student_ids=torch.zeros(3, 5)), "student_ids must have the shape"),
        (lambda: uld(student_ids=torch.full((3, 6), 7)), "student_ids must be below 7"),
        (lambda: uld(merge="mean"), "merge"),
        (lambda: kl(*chunks, projection, num_items_in_batch=3, average="sequence"),
         "average must be 'chunk'"),
        (lambda: hybrid_uld_loss(student, teacher, *chunks, projection, matched_weight=1.0),
         "both or neither"),
        (lambda: hybrid_uld_loss(student, teacher, *chunks, projection, beta=2.0), "beta"),
        (lambda: CrossTokenizerDistillationLoss("p-kl"), "projection must be given for mode"),
        (lambda: CrossTokenizerDistillationLoss("kl", projection), "mode"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="student_chunks must be integers"):
        projected_kl_loss(student, teacher, chunks[0].double(), chunks[1], projection)


# Real tokenizers and models.


def bpe(digits, text, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize("mode", ["p-kl", "h-kl", "gold", "uld"])
def test_two_models_with_trained_tokenizers(mode):
    text = english_text()[:20_000]
    tokenizers = bpe(False, text, 500), bpe(True, text, 400)
    projection = build_token_projection(*tokenizers)
    batch = align_texts([text[:120], text[300:380]], *tokenizers)
    student = byte_language_model(16, 1, random_state=0)
    student.resize_token_embeddings(500)
    teacher = byte_language_model(16, 1, random_state=1)
    teacher.resize_token_embeddings(416)  # padded, as many models are
    objective = CrossTokenizerDistillationLoss(mode, projection)
    labels = torch.where(batch.student_mask > 0, batch.student_ids, -100)
    with torch.no_grad():
        theirs = hidden_logits(
            teacher, input_ids=batch.teacher_ids, attention_mask=batch.teacher_mask
        )
    values = []
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(8):
        ours = hidden_logits(
            student, input_ids=batch.student_ids, attention_mask=batch.student_mask
        )
        loss, parts = objective(
            ours, theirs, batch.student_chunks, batch.teacher_chunks, labels=labels,
            teacher_labels=torch.where(batch.teacher_mask > 0, batch.teacher_ids, -100),
            return_parts=True,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append((float(parts["kd"]), float(parts["ce"])))
    assert values[-1][1] < values[0][1]
    assert all(torch.tensor(values).isfinite().flatten())


@pytest.mark.slow
def test_smollm2_teaches_a_student_with_a_tokenizer_of_its_own():
    from sciml.lm import load_smollm2

    teacher, teacher_tokenizer = load_smollm2()
    text = english_text()[:60_000]
    student_tokenizer = bpe(False, text, 2000)
    projection = build_token_projection(student_tokenizer, teacher_tokenizer)
    batch = align_texts(
        [text[i : i + 300] for i in range(0, 1800, 300)], student_tokenizer, teacher_tokenizer
    )
    covered = (batch.student_chunks >= 0)[batch.student_mask > 0]
    assert covered.all()
    with torch.no_grad():
        theirs = hidden_logits(
            teacher, input_ids=batch.teacher_ids, attention_mask=batch.teacher_mask
        )
    student = byte_language_model(64, 2, random_state=0)
    student.resize_token_embeddings(2000)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    values = []
    for _ in range(15):
        ours = hidden_logits(
            student, input_ids=batch.student_ids, attention_mask=batch.student_mask
        )
        loss = projected_kl_loss(
            ours, theirs, batch.student_chunks, batch.teacher_chunks, projection
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    print(f"P-KL to SmolLM2: {values[0]:.3f} -> {values[-1]:.3f} nats a chunk")
    assert values[-1] < 0.8 * values[0]
