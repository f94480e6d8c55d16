import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sciml.lm import TokenProjection, build_token_projection, coverage_report


class Words:
    """A tokenizer that cuts texts greedily into the longest known tokens."""

    def __init__(self, tokens):
        self.vocabulary = {token: i for i, token in enumerate(tokens)}

    def get_vocab(self):
        return self.vocabulary

    def decode(self, ids):
        names = {i: token for token, i in self.vocabulary.items()}
        return "".join(names[i] for i in ids)

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [self.cut(text) for text in texts]}

    def cut(self, text):
        ids = []
        while text:
            size = max(n for n in range(1, len(text) + 1) if text[:n] in self.vocabulary)
            ids.append(self.vocabulary[text[:size]])
            text = text[size:]
        return ids


STUDENT = Words(["a", "b", "12", "345", "11", "12345", "~", "<|end|>", "<|begin|>"])
TEACHER = Words(["a", "b", "1", "2", "3", "4", "5", "~", "%", "</s>", "<|beginning|>"])


def dense(projection):
    result = torch.zeros(projection.n_student_tokens, projection.n_teacher_tokens)
    for row, (indices, weights) in enumerate(
        zip(projection.indices, projection.weights, strict=True)
    ):
        for index, weight in zip(indices.tolist(), weights.tolist(), strict=True):
            if index >= 0:
                result[row, index] += weight
    return result


def test_weights_are_the_notes():
    w = dense(build_token_projection(STUDENT, TEACHER))
    assert w[0].tolist() == [1] + 10 * [0]  # "a" is "a"
    np.testing.assert_allclose(w[2, 2:4], [0.90909, 0.09091], atol=1e-5)  # "12": "1", "2"
    np.testing.assert_allclose(w[3, 4:7], [0.900901, 0.090090, 0.009009], atol=1e-6)
    assert w[4, 2] == 1  # "11": the same piece twice
    # Five pieces: the first four count.
    np.testing.assert_allclose(w[5, 2:7], np.append(0.1 ** np.arange(4) / 1.111, 0), atol=1e-6)
    assert w[6, 7] == 1  # "~" is "~"
    assert (w[7:] == 0).all()  # special tokens
    torch.testing.assert_close(w.sum(1)[:7], torch.ones(7))


def test_options_change_what_they_name():
    w = dense(build_token_projection(STUDENT, TEACHER, decay=0.5, max_pieces=2))
    np.testing.assert_allclose(w[3, 4:6], [2 / 3, 1 / 3], atol=1e-6)
    w = dense(build_token_projection(STUDENT, TEACHER, top_k=1))
    assert w[2, 2] == 1
    assert w[3, 4] == 1


def test_pieces_of_teacher_tokens_are_added_both_ways():
    student, teacher = Words(["ab", "a", "b", "abc", "c"]), Words(["a", "b", "c", "bc", "ca"])
    one = dense(build_token_projection(student, teacher))
    both = dense(build_token_projection(student, teacher, bidirectional=True))
    assert one[4].tolist() == [0, 0, 1, 0, 0]
    assert torch.equal(both[4], one[4])  # exact matches stay
    # The teacher's tokens are a, b, c, "b" "c" and "c" "a": none has a piece "ab" or "abc".
    assert torch.equal(both, one)
    student = Words(["ab", "x", "y", "a", "b"])
    teacher = Words(["a", "b", "x", "y", "abx"])
    both = dense(build_token_projection(student, teacher, bidirectional=True))
    # "ab": "a" (10/11), "b" (1/11), and 10/11 for the teacher's "abx" = "ab" "x".
    np.testing.assert_allclose(both[0], np.array([10, 1, 0, 0, 10]) / 21, atol=1e-6)


def test_similar_special_tokens_are_mapped_where_asked_for():
    w = dense(build_token_projection(STUDENT, TEACHER, special_tokens=True))
    assert w[8].argmax() == 10  # <|begin|>, <|beginning|>
    torch.testing.assert_close(w.sum(1), torch.ones(9))
    assert torch.equal(w[:7], dense(build_token_projection(STUDENT, TEACHER))[:7])


def test_identical_vocabularies_give_the_identity():
    w = dense(build_token_projection(STUDENT, STUDENT))
    assert torch.equal(w[:7, :7], torch.eye(7))


def test_markers_of_two_vocabularies_are_the_same_space():
    student, teacher = Words(["Ġthe", "the", "Ċ"]), Words(["▁the", "the", "<0x0A>"])
    assert torch.equal(dense(build_token_projection(student, teacher)), torch.eye(3))


def test_matrix_is_the_dense_one():
    projection = build_token_projection(STUDENT, TEACHER)
    w = dense(projection)
    assert torch.equal(projection.matrix().to_dense(), w)
    columns = torch.tensor([4, 2, 9])
    part = projection.matrix(columns=columns, n_rows=12, dtype=torch.float64)
    assert part.shape == (12, 3)
    assert torch.equal(part.to_dense()[:9].float(), w[:, columns])
    assert (part.to_dense()[9:] == 0).all()


def test_common_ids_are_those_of_the_note():
    # Three student tokens want teacher token 1; 0.6 and more are common.
    indices = torch.tensor([[1, 0], [1, 2], [1, 0], [2, 0], [3, -1], [-1, -1], [3, -1]])
    weights = torch.tensor(
        [[0.7, 0.3], [0.8, 0.2], [0.8, 0.2], [0.55, 0.45], [1, 0], [0, 0], [1, 0]]
    )
    projection = TokenProjection(indices, weights, 5)
    student, teacher = projection.common_ids(0.6)
    assert list(zip(student.tolist(), teacher.tolist(), strict=True)) == [(1, 1), (4, 3)]
    student, teacher = projection.common_ids()
    assert list(zip(student.tolist(), teacher.tolist(), strict=True)) == [(4, 3)]
    assert projection.common_ids(0.5)[0].tolist() == [1, 3, 4]


def test_coverage_by_class_of_token():
    projection = build_token_projection(STUDENT, TEACHER)
    report = coverage_report(projection, STUDENT)
    assert report["numeral"] == {
        "n_tokens": 4, "exact": 0.25, "common": 0.5, "projected": 1, "pieces": 2.5
    }  # fmt: skip
    assert report["word"]["exact"] == 1
    assert report["all"]["n_tokens"] == 9
    assert report["all"]["projected"] == pytest.approx(7 / 9)
    assert set(coverage_report(projection)) == {"all"}
    with pytest.raises(ValueError, match="student_tokenizer must have at most the 9 tokens"):
        coverage_report(projection, TEACHER)


def test_files_give_back_what_was_written(tmp_path):
    projection = build_token_projection(STUDENT, TEACHER)
    projection.save(tmp_path / "projection.safetensors")
    again = TokenProjection.load(tmp_path / "projection.safetensors")
    assert torch.equal(again.indices, projection.indices)
    assert torch.equal(again.weights, projection.weights)
    assert again.n_teacher_tokens == projection.n_teacher_tokens
    save_file({"counts": projection.indices}, tmp_path / "counts.safetensors")
    with pytest.raises(ValueError, match="indices, weights and n_teacher_tokens, got .*counts"):
        TokenProjection.load(tmp_path / "counts.safetensors")


@pytest.mark.parametrize(
    ("indices", "weights", "message"),
    [
        ([[0, 1]], [[0.5, 0.4]], "must sum to 1 or 0, got 0.89.* in row 0"),
        ([[0, 5]], [[0.5, 0.5]], r"in \[0, 5\), got 5"),
        ([[0, -1]], [[0.5, 0.5]], "0 where indices are -1"),
        ([[0, 1]], [[1.5, -0.5]], "weights must be 0 or larger"),
        ([[0, 1]], [[1.0]], "same shape"),
        ([[0, 1]], [[float("nan"), 1]], "weights must be 0 or larger"),
    ],
)
def test_bad_projections(indices, weights, message):
    with pytest.raises(ValueError, match=message):
        TokenProjection(torch.tensor(indices), torch.tensor(weights), 5)


def test_bad_arguments():
    with pytest.raises(TypeError, match="weights must be floating-point, not counts"):
        TokenProjection(torch.tensor([[0]]), torch.tensor([[1]]), 5)
    for name, value in (("top_k", 0), ("max_pieces", 0), ("decay", 0.0), ("decay", 1.5)):
        with pytest.raises(ValueError, match=name):
            build_token_projection(STUDENT, TEACHER, **{name: value})
    with pytest.raises(ValueError, match="threshold"):
        build_token_projection(STUDENT, TEACHER).common_ids(0)
