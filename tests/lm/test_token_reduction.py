import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.lm import (
    HiddenLogits,
    label_logp,
    next_token_labels,
    reduce_tokens,
    sequence_logps,
    sum_rows,
    supervised_labels,
    token_logps,
    token_weights,
)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 9, dtype=torch.float64, generator=generator)


@pytest.fixture
def labels():
    return torch.tensor([[-100, -100, 3, 4, 8, -100], [1, 2, 3, 0, 5, 6]])


def test_next_token_labels_equals_slicing(labels):
    shifted = next_token_labels(labels)
    assert torch.equal(shifted[:, :-1], labels[:, 1:])
    assert (shifted[:, -1] == -100).all()
    assert next_token_labels(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0)


def test_token_logps_equals_cross_entropy_of_sliced_logits(logits, labels):
    logps, mask = token_logps(logits, labels)
    expected = -F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).reshape(2, 5)
    torch.testing.assert_close(logps[:, :-1], expected)
    assert torch.equal(mask[:, :-1], labels[:, 1:] != -100)
    assert (logps[~mask] == 0).all()
    same, _ = token_logps(logits, next_token_labels(labels), shift=False)
    assert torch.equal(same, logps)
    torch.testing.assert_close(sequence_logps(logits, labels), expected.sum(-1))


def test_mean_loss_equals_that_of_transformers(logits, labels):
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = logits.float().requires_grad_()
    for num_items in (None, 17, torch.tensor(17)):
        logps, mask = token_logps(logits, labels)
        ours = -reduce_tokens(logps, mask, num_items_in_batch=num_items)
        theirs = ForCausalLMLoss(logits, labels, 9, num_items_in_batch=num_items)
        torch.testing.assert_close(ours, theirs)
        got, want = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
        torch.testing.assert_close(got, want)


def test_temperature(logits, labels):
    cooled, _ = token_logps(logits, labels, temperature=3.0)
    torch.testing.assert_close(cooled, token_logps(logits / 3, labels)[0])


def test_sequences_padded_or_not(logits, labels):
    left = sequence_logps(F.pad(logits, (0, 0, 2, 0), value=9.0), F.pad(labels, (2, 0), value=-100))
    right = sequence_logps(
        F.pad(logits, (0, 0, 0, 2), value=9.0), F.pad(labels, (0, 2), value=-100)
    )
    # The first label of a left-padded row is predicted by padding: drop it on both sides.
    labels = labels.clone()
    labels[:, 0] = -100
    torch.testing.assert_close(right, sequence_logps(logits, labels))
    expected = sequence_logps(logits, labels)
    expected[1] += F.pad(logits, (0, 0, 2, 0), value=9.0)[1, 1].log_softmax(-1)[1]
    torch.testing.assert_close(left, expected)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shift=st.floats(-50, 50),
    chunk_size=st.integers(1, 9),
    reduction=st.sampled_from(["mean", "sum"]),
    num_items=st.one_of(st.none(), st.integers(1, 50)),
)
def test_weights_of_sum_rows_give_reduce_tokens(seed, shift, chunk_size, reduction, num_items):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(-1, 7, (2, 4), generator=generator)
    labels[labels == -1] = -100
    logits = HiddenLogits(hidden, weight, torch.full((7,), shift, dtype=torch.float64))
    logps, mask = token_logps(hidden @ weight.T, labels)
    expected = reduce_tokens(logps, mask, reduction, num_items)
    shifted, mask = supervised_labels(logits, labels)
    weights = token_weights(mask, reduction, num_items, torch.float64)
    total, _ = sum_rows(
        label_logp, logits, shifted, weights=weights, mask=mask, chunk_size=chunk_size
    )
    torch.testing.assert_close(total, expected)


def test_an_empty_mask_gives_zero_with_a_graph():
    values = torch.full((2, 3), torch.nan, requires_grad=True)
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    for reduction, num_items in (
        ("mean", None),
        ("mean", 0),
        ("mean", torch.tensor(0)),
        ("sum", None),
    ):
        loss = reduce_tokens(values, nowhere, reduction, num_items)
        assert loss.item() == 0
        loss.backward()
        assert (values.grad == 0).all()
        assert (token_weights(nowhere, reduction, num_items) == 0).all()


def test_reductions_by_hand():
    values, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, False, True]])
    assert reduce_tokens(values, mask).item() == 2.5
    assert reduce_tokens(values, mask, "sum").item() == 5
    assert reduce_tokens(values, mask, "none").tolist() == [[1, 0, 4]]
    assert reduce_tokens(values, mask, num_items_in_batch=10).item() == 0.5
    assert reduce_tokens(values, mask, num_items_in_batch=torch.tensor(20.0)).item() == 0.25


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda z, y: token_logps(z, y + (y == 8).int()),
            IndexError,
            r"\[0, 9\), got 9 at \(0, 4\)",
        ),
        (lambda z, y: token_logps(z, y.clamp(min=-7)), IndexError, r"got -7 at \(0, 0\)"),
        (lambda z, y: token_logps(z, y.double()), TypeError, "labels must be integers"),
        (lambda z, y: token_logps(z, y > 0), TypeError, "labels must be integers"),
        (lambda z, y: token_logps(z, y[:, 1:]), ValueError, r"shape \(2, 6\).*got \(2, 5\)"),
        (lambda z, y: reduce_tokens(z, y > 0), ValueError, "values and mask must have the same"),
        (
            lambda z, y: reduce_tokens(z[..., 0], y > 0, "median"),
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none', got 'median'",
        ),
        (lambda z, y: token_weights(y > 0, "none"), ValueError, "reduction must be one of"),
        (
            lambda z, y: reduce_tokens(z[..., 0], y > 0, num_items_in_batch=-1),
            ValueError,
            "num_items_in_batch must be in",
        ),
    ],
)
def test_bad_input(call, error, message, logits, labels):
    with pytest.raises(error, match=message):
        call(logits, labels)
