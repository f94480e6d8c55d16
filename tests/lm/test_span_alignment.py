import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl.experimental.gold.gold_trainer import ULDLoss

from sciml.lm import align_offsets, align_spans, align_texts, token_bytes

TEXTS = [
    "the price is 201 hundreds, not 34.",
    "naïve café 😀 12 + 30 = 42\nthe end",
    "prices: 12, 34, 201; the sum is 247!",
]


def bpe(digits, vocab_size=300):
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def cut(text, places):
    ends = sorted({0, len(text), *(p for p in places if 0 < p < len(text))})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def chunk_texts(tokens, chunks):
    result = {}
    for token, chunk in zip(tokens, chunks.tolist(), strict=True):
        if chunk >= 0:
            result[chunk] = result.get(chunk, type(token)()) + token
    return result


def slow_chunks(student, teacher):
    """Chunks by comparing every prefix with every other."""

    def numbers(tokens, common):
        prefixes = ["".join(tokens[: i + 1]) for i in range(len(tokens))]
        return [sum(len(c) < len(p) for c in common) for p in prefixes]

    prefixes = [
        {"".join(tokens[: i + 1]) for i in range(len(tokens))} for tokens in (student, teacher)
    ]
    common = prefixes[0] & prefixes[1]
    return numbers(student, common), numbers(teacher, common)


# Few letters, so that cuts repeat and an alignment of equal tokens can go astray.
texts = st.text(alphabet="ab1 é", min_size=1, max_size=30)
places = st.lists(st.integers(1, 29), max_size=20)


def test_the_notes_example_is_one_chunk():
    student, teacher = align_spans(["201", "Ġhundreds"], ["2", "0", "1", "Ġhundreds"])
    assert student.tolist() == [0, 1]
    assert teacher.tolist() == [0, 0, 0, 1]


@settings(max_examples=150, deadline=None)
@given(texts, places, places)
def test_chunks_of_clean_text_are_those_of_the_definition_by_both_methods(text, ours, theirs):
    student, teacher = cut("x" + text, ours), cut("x" + text, theirs)
    want = slow_chunks(student, teacher)
    for method in ("offsets", "dp"):
        got = align_spans(student, teacher, method=method)
        assert [side.tolist() for side in got] == [list(side) for side in want]


@settings(max_examples=150, deadline=None)
@given(texts, places, places, places, st.sampled_from(["", "b", "1 ", "zz"]))
def test_chunks_spell_the_same_on_both_sides_and_are_in_order(text, ours, theirs, more, extra):
    where = more[0] if more else 0
    student, teacher = cut("x" + text, ours), cut("x" + text[:where] + extra + text[where:], theirs)
    for method in ("offsets", "dp"):
        chunks = align_spans(student, teacher, method=method)
        for side in chunks:
            numbers = side[side >= 0]
            assert (numbers.diff() >= 0).all()  # in order
            n = int(numbers.max()) + 1 if len(numbers) else 0
            assert set(numbers.tolist()) == set(range(n))  # none is missing
            for number in range(n):  # and each is in one piece
                positions = (side == number).nonzero().squeeze(1)
                assert (positions.diff() == 1).all()
        assert chunk_texts(student, chunks[0]) == chunk_texts(teacher, chunks[1])
        if not extra:
            assert all((side >= 0).all() for side in chunks)  # all of a clean text is covered


@settings(max_examples=60, deadline=None)
@given(texts, places, places, places)
def test_finer_cuts_on_both_sides_cover_no_less(text, ours, theirs, both):
    """A common cut more makes no chunk longer."""
    text = "x" + text
    coarse = align_spans(cut(text, ours), cut(text, theirs))
    fine = align_spans(cut(text, ours + both), cut(text, theirs + both))
    assert int(fine[0].max()) >= int(coarse[0].max())
    lengths = [
        sorted(len(t) for t in chunk_texts(cut(text, c), chunks[0]).values())
        for c, chunks in ((ours, coarse), (ours + both, fine))
    ]
    assert lengths[1][-1] <= lengths[0][-1]


@settings(max_examples=50, deadline=None)
@given(texts, places, places)
def test_offsets_give_the_groups_of_trl(text, ours, theirs):
    spans = []
    for c in (ours, theirs):
        ends = np.cumsum([len(piece) for piece in cut("x" + text, c)])
        spans.append(list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)))
    student, teacher = align_offsets(*spans)
    groups = ULDLoss._align_by_byte_offsets(*spans)
    for chunks, grouped in zip((student, teacher), groups, strict=True):
        assert [(chunks == i).nonzero().squeeze(1).tolist() for i in range(len(grouped))] == grouped


def test_dp_finds_its_way_round_a_token_that_one_side_has_not():
    student = ["<bos>", "the", "Ġcat", "Ġsat", "Ġon", "Ġ12"]
    teacher = ["the", "Ġcat", "Ġs", "at", "Ġon", "Ġ", "1", "2"]
    assert (align_spans(student, teacher)[0] == -1).all()
    ours, theirs = align_spans(student, teacher, method="dp")
    assert ours.tolist() == [-1, 0, 1, 2, 3, 4]
    assert theirs.tolist() == [0, 1, 2, 2, 3, 4, 4, 4]


def test_texts_that_differ_share_no_chunk():
    for method in ("offsets", "dp"):
        student, teacher = align_spans(["abc", "d"], ["x", "y", "z"], method=method)
        assert (student == -1).all()
        assert (teacher == -1).all()


def test_long_texts_are_aligned_alike_with_anchors_and_without():
    generator = random.Random(0)
    words = ["the", "Ġcat", "Ġ12", "Ġsat", "Ġon", "Ġmats", ".", "Ġ340", "Ġand"]
    student = [generator.choice(words) for _ in range(130)]
    text = "".join(student)
    teacher = cut(text, generator.sample(range(len(text)), 200))
    noisy = [*student[:50], "Ġnew", *student[50:]]
    want = align_spans(student, teacher)
    for anchors in (True, False):
        got = align_spans(student, teacher, method="dp", anchors=anchors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        # One token more loses its own place, and no other.
        ours, _ = align_spans(noisy, student, method="dp", anchors=anchors)
        assert (ours == -1).nonzero().squeeze(1).tolist() == [50]


def test_markers_bytes_and_a_leading_space():
    want = ([0, 1, 2], [0, 1, 1, 2])
    for student, teacher in (
        (["Ġa", "Ġbc", "Ċ"], ["▁a", "▁b", "c", "<0x0A>"]),
        (["a", "Ġbc", "Ċ"], ["▁a", "▁b", "c", "\n"]),
        ([b"a", b" bc", b"\n"], ["a", "Ġb", "c", "Ċ"]),
    ):
        got = align_spans(student, teacher)
        assert tuple(side.tolist() for side in got) == want
    ours, theirs = align_spans(["a", "b"], ["▁", "a", "b"])  # the space is a token of its own
    assert ours.tolist() == [0, 1]
    assert theirs.tolist() == [-1, 0, 1]


def test_empty_sides_and_special_tokens():
    student, teacher = align_spans([], ["a"])
    assert student.tolist() == []
    assert teacher.tolist() == [-1]
    student, teacher = align_spans([b"", b"ab", b""], [b"a", b"b"])
    assert student.tolist() == [-1, 0, -1]
    assert teacher.tolist() == [0, 0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="method must be one of 'offsets', 'dp', got 'nw'"):
        align_spans(["a"], ["a"], method="nw")
    with pytest.raises(ValueError, match="max_combination"):
        align_spans(["a"], ["a"], method="dp", max_combination=0)
    with pytest.raises(ValueError, match=r"teacher_offsets must have shape \(n_tokens, 2\)"):
        align_offsets([(0, 1)], [(0, 1, 2)])
    with pytest.raises(ValueError, match="student_offsets must have ends that do not decrease"):
        align_offsets([(0, 3), (1, 2)], [(0, 3)])
    tokenizer = bpe(digits=False)
    with pytest.raises(TypeError, match="texts must be a sequence of str"):
        align_texts("a text", tokenizer, tokenizer)
    with pytest.raises(ValueError, match="texts must hold one text or more"):
        align_texts([], tokenizer, tokenizer)


def test_bytes_of_a_byte_level_vocabulary_spell_the_text():
    tokenizer = bpe(digits=True)
    spelled = token_bytes(tokenizer)
    for text in TEXTS:
        assert b"".join(spelled[i] for i in tokenizer(text)["input_ids"]).decode() == text
    assert spelled[tokenizer.eos_token_id] == b""


def test_bytes_of_a_sentencepiece_vocabulary():
    class Pieces:
        def get_vocab(self):
            return {"<s>": 0, "▁a": 1, "<0x0A>": 2, "Ġ": 3, "é": 4}

    assert token_bytes(Pieces()) == [b"", b" a", b"\n", "Ġ".encode(), "é".encode()]


def test_texts_through_two_tokenizers():
    student, teacher = bpe(digits=False, vocab_size=340), bpe(digits=True)
    batch = align_texts(TEXTS, student, teacher)
    spelled = token_bytes(student), token_bytes(teacher)
    for row in range(len(TEXTS)):
        sides = []
        for ids, mask, chunks, table in (
            (batch.student_ids, batch.student_mask, batch.student_chunks, spelled[0]),
            (batch.teacher_ids, batch.teacher_mask, batch.teacher_chunks, spelled[1]),
        ):
            n = int(mask[row].sum())
            assert (chunks[row, :n] >= 0).all()
            assert (chunks[row, n:] == -1).all()
            tokens = [table[i] for i in ids[row, :n].tolist()]
            sides.append(chunk_texts(tokens, chunks[row, :n]))
        assert sides[0] == sides[1]
        assert b"".join(sides[0].values()).decode() == TEXTS[row]
    dp = align_texts(TEXTS, student, teacher, method="dp")
    assert torch.equal(dp.student_chunks, batch.student_chunks)
    assert torch.equal(dp.teacher_chunks, batch.teacher_chunks)


def test_chunks_that_are_cut_are_left_out():
    student, teacher = bpe(digits=False, vocab_size=340), bpe(digits=True)
    whole = align_texts(TEXTS[:1], student, teacher)
    short = align_texts(TEXTS[:1], student, teacher, max_length=6)
    assert short.student_ids.shape == short.teacher_ids.shape == (1, 6)
    last = min(int(whole.student_chunks[0, 6]), int(whole.teacher_chunks[0, 6]))
    for ours, all_of_it in (
        (short.student_chunks, whole.student_chunks), (short.teacher_chunks, whole.teacher_chunks)
    ):  # fmt: skip
        want = all_of_it[:, :6]
        assert torch.equal(ours, want.masked_fill(want >= last, -1))
