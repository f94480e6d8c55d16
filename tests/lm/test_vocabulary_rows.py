import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.lm import (
    HiddenLogits,
    combine,
    entropy,
    forward_kl,
    label_logp,
    log_sum_exp,
    reduce_rows,
    reverse_kl,
    softmax_pullback,
    sum_rows,
    tempered,
)


def plain(name, logits, labels, ref):
    logp, ref_logp = logits.log_softmax(-1), ref.log_softmax(-1)
    return {
        "label_logp": lambda: (
            -F.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100
            ).reshape(labels.shape)
        ),
        "log_sum_exp": lambda: logits.logsumexp(-1),
        "entropy": lambda: -(logp.exp() * logp).sum(-1),
        "forward_kl": lambda: (ref_logp.exp() * (ref_logp - logp)).sum(-1),
        "reverse_kl": lambda: (logp.exp() * (logp - ref_logp)).sum(-1),
    }[name]()


REDUCTIONS = {
    "label_logp": (label_logp, ["labels"]),
    "log_sum_exp": (log_sum_exp, []),
    "entropy": (entropy, []),
    "forward_kl": (forward_kl, ["ref"]),
    "reverse_kl": (reverse_kl, ["ref"]),
}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    labels[0, 1] = -100

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "logits": normal(2, 5, 11) * 3,
        "labels": labels,
        "ref": normal(2, 5, 11) * 2,
        "hidden": normal(2, 5, 4),
        "weight": normal(11, 4),
        "bias": normal(11),
        "upstream": normal(2, 5),
    }


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_logits_form_equals_autograd(name, chunk_size, inputs):
    reduction, sides = REDUCTIONS[name]
    logits = inputs["logits"].requires_grad_()
    values = reduce_rows(
        reduction, logits, *(inputs[side] for side in sides), chunk_size=chunk_size
    ).squeeze(-1)
    expected = plain(name, logits, inputs["labels"], inputs["ref"])
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    (got,) = torch.autograd.grad((values * inputs["upstream"]).sum(), logits)
    (want,) = torch.autograd.grad((expected * inputs["upstream"]).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_hidden_form_equals_autograd(name, chunk_size, summed, inputs):
    reduction, sides = REDUCTIONS[name]
    leaves = [inputs[key].requires_grad_() for key in ("hidden", "weight", "bias")]
    arguments = [inputs[side] for side in sides]
    expected = plain(name, F.linear(*leaves), inputs["labels"], inputs["ref"])
    expected_total = (expected * inputs["upstream"]).sum()
    if summed:
        total, values = sum_rows(
            reduction,
            HiddenLogits(*leaves),
            *arguments,
            weights=inputs["upstream"],
            chunk_size=chunk_size,
        )
        assert not values.requires_grad
    else:
        values = reduce_rows(reduction, HiddenLogits(*leaves), *arguments, chunk_size=chunk_size)
        total = (values.squeeze(-1) * inputs["upstream"]).sum()
    torch.testing.assert_close(values.squeeze(-1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, expected_total)
    for got, want in zip(
        torch.autograd.grad(2 * total, leaves),
        torch.autograd.grad(2 * expected_total, leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradcheck(name, inputs):
    reduction, sides = REDUCTIONS[name]
    arguments = [inputs[side].reshape(10, *inputs[side].shape[2:])[:4] for side in sides]
    logits = inputs["logits"].reshape(10, 11)[:4].clone().requires_grad_()
    leaves = [
        inputs["hidden"].reshape(10, 4)[:4].clone().requires_grad_(),
        inputs["weight"].clone().requires_grad_(),
        inputs["bias"].clone().requires_grad_(),
    ]
    assert torch.autograd.gradcheck(
        lambda z: reduce_rows(reduction, z, *arguments, chunk_size=3), logits
    )
    assert torch.autograd.gradcheck(
        lambda *parts: reduce_rows(reduction, HiddenLogits(*parts), *arguments, chunk_size=3),
        leaves,
    )


def test_reference_may_be_hidden_too(inputs):
    ref = HiddenLogits(inputs["hidden"] - 1, inputs["weight"], inputs["bias"])
    logits = inputs["logits"].requires_grad_()
    for reduction in (forward_kl, reverse_kl):
        got = reduce_rows(reduction, logits, ref, chunk_size=4)
        want = reduce_rows(reduction, logits, F.linear(ref.hidden, ref.weight, ref.bias))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_masked_rows_are_not_computed(form, inputs):
    mask = torch.tensor([[True, False, True, True, False], [False] * 4 + [True]])
    seen = []

    def spy(rows, labels):
        seen.append(len(rows))
        return label_logp(rows, labels)

    leaf = inputs["logits" if form == "logits" else "hidden"]
    leaf[~mask] = torch.nan  # what is not computed cannot spoil anything
    leaf.requires_grad_()
    logits = leaf if form == "logits" else HiddenLogits(leaf, inputs["weight"])
    labels = torch.arange(10).reshape(2, 5)
    values = reduce_rows(spy, logits, labels, mask=mask, chunk_size=3).squeeze(-1)
    assert seen == [3, 1]
    assert (values[~mask] == 0).all()
    total, summed = sum_rows(
        label_logp, logits, labels, weights=inputs["upstream"], mask=mask, chunk_size=3
    )
    torch.testing.assert_close(summed.squeeze(-1), values.detach())
    for loss in (values.sum(), total):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].isfinite().all()
        assert (gradient[mask] != 0).any()


def test_rows_without_a_label_have_no_gradient(inputs):
    logits = inputs["logits"].requires_grad_()
    values = reduce_rows(label_logp, logits, inputs["labels"])
    assert values[0, 1, 0] == 0
    values.sum().backward()
    assert (logits.grad[0, 1] == 0).all()
    assert (logits.grad[0, 0] != 0).all()


def test_no_rows_at_all_is_zero_with_a_graph():
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    logits = HiddenLogits(hidden, weight)
    total, values = sum_rows(entropy, logits, weights=torch.ones(2, 3), mask=nowhere)
    assert values.shape == (2, 3, 1)
    assert total.item() == 0
    (total + reduce_rows(entropy, logits, mask=nowhere).sum()).backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()
    assert reduce_rows(entropy, torch.randn(0, 7)).shape == (0, 1)


def test_combined_columns_equal_their_parts(inputs):
    logits = inputs["logits"].requires_grad_()
    both = combine((label_logp, [1]), (reverse_kl, [0]), (entropy, []))
    values = reduce_rows(both, logits, inputs["ref"], inputs["labels"], chunk_size=4)
    parts = [
        reduce_rows(label_logp, logits, inputs["labels"]),
        reduce_rows(reverse_kl, logits, inputs["ref"]),
        reduce_rows(entropy, logits),
    ]
    torch.testing.assert_close(values, torch.cat(parts, dim=-1))
    weights = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (want,) = torch.autograd.grad((torch.cat(parts, -1) * weights).sum(), logits)
    (got,) = torch.autograd.grad((values * weights).sum(), logits)
    torch.testing.assert_close(got, want)
    total, _ = sum_rows(both, logits, inputs["ref"], inputs["labels"], weights=weights)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], want)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_temperature_divides_logits_and_reference(name, inputs):
    reduction, sides = REDUCTIONS[name]
    logits = inputs["logits"].requires_grad_()
    got = reduce_rows(tempered(reduction, 2.5), logits, *(inputs[side] for side in sides))
    want = plain(name, logits / 2.5, inputs["labels"], inputs["ref"] / 2.5)
    torch.testing.assert_close(got.squeeze(-1), want)
    (got_gradient,) = torch.autograd.grad(got.sum(), logits)
    (want_gradient,) = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(got_gradient, want_gradient)
    assert tempered(reduction, 1.0) is reduction


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_bfloat16_in_float32_arithmetic(form, summed, inputs):
    inputs = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    leaves = [inputs["logits"]] if form == "logits" else [inputs["hidden"], inputs["weight"]]
    for leaf in leaves:
        leaf.requires_grad_()
    logits = leaves[0] if form == "logits" else HiddenLogits(*leaves)
    materialised = leaves[0] if form == "logits" else F.linear(*leaves)
    expected = plain("entropy", materialised.float(), None, inputs["ref"].float())
    if summed:
        total, values = sum_rows(entropy, logits, weights=torch.ones(2, 5))
    else:
        values = reduce_rows(entropy, logits)
        total = values.sum()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.squeeze(-1), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_float16_gradients_are_lifted_by_a_gradient_scaler(form, inputs):
    keys = ["logits"] if form == "logits" else ["hidden", "weight"]
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaves = [inputs[key].to(torch.float16).to(dtype).requires_grad_() for key in keys]
        logits = leaves[0] if form == "logits" else HiddenLogits(*leaves)
        total, _ = sum_rows(entropy, logits, weights=torch.full((2, 5), 1e-9))
        gradients.append(torch.autograd.grad(total * 2.0**30, leaves))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_autocast_decides_the_dtype_of_the_product_only(inputs):
    hidden, weight = (inputs[key].float().requires_grad_() for key in ("hidden", "weight"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = reduce_rows(entropy, HiddenLogits(hidden, weight))
        total, _ = sum_rows(entropy, HiddenLogits(hidden, weight), weights=torch.ones(2, 5))
        product = F.linear(hidden, weight)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, reduce_rows(entropy, product.float()))
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (values.sum(), total)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_are_finite(name, scale):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(4, 9, generator=generator)).requires_grad_()
    ref = scale * torch.randn(4, 9, generator=generator)
    labels = torch.tensor([0, 1, 2, 3])
    reduction, sides = REDUCTIONS[name]
    arguments = [{"labels": labels, "ref": ref}[side] for side in sides]
    values = reduce_rows(reduction, logits, *arguments).squeeze(-1)
    wide = plain(name, logits.detach().double(), labels, ref.double())
    # 0 log 0 of the plain form: float64 does not underflow to 0 here unless the scale is large
    finite = wide.isfinite()
    torch.testing.assert_close(values[finite], wide[finite].float(), rtol=1e-5, atol=1e-5)
    assert values.isfinite().all()
    values.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", REDUCTIONS)
def test_forbidden_tokens_count_for_nothing(name, inputs):
    reduction, sides = REDUCTIONS[name]
    labels = inputs["labels"].where(inputs["labels"] != 10, 0)
    logits, ref = inputs["logits"].clone(), inputs["ref"].clone()
    logits[..., 10] = ref[..., 10] = -torch.inf
    logits.requires_grad_()
    arguments = [{"labels": labels, "ref": ref}[side] for side in sides]
    values = reduce_rows(reduction, logits, *arguments).squeeze(-1)
    expected = plain(name, logits[..., :10], labels, ref[..., :10])
    torch.testing.assert_close(values, expected)
    (got,) = torch.autograd.grad(values.sum(), logits)
    (want,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(got, want)


def test_nan_is_not_hidden():
    logits = torch.zeros(2, 3)
    logits[1, 2] = torch.nan
    for name, (reduction, sides) in REDUCTIONS.items():
        arguments = [
            {"labels": torch.tensor([0, 0]), "ref": torch.zeros(2, 3)}[side] for side in sides
        ]
        values = reduce_rows(reduction, logits, *arguments)
        assert values[0].isfinite().all(), name
        assert values[1].isnan().all(), name


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_vocabulary=st.integers(1, 12),
    n_rows=st.integers(1, 9),
    shift=st.floats(-100, 100),
    chunk_size=st.integers(1, 10),
    n_padding=st.integers(0, 3),
    name=st.sampled_from(sorted(REDUCTIONS)),
)
def test_laws(seed, n_vocabulary, n_rows, shift, chunk_size, n_padding, name):
    generator = torch.Generator().manual_seed(seed)
    logits, ref = (
        3 * torch.randn(n_rows, n_vocabulary, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    labels = torch.randint(0, n_vocabulary, (n_rows,), generator=generator)
    reduction, sides = REDUCTIONS[name]

    def values(logits, ref, labels, **options):
        arguments = [{"labels": labels, "ref": ref}[side] for side in sides]
        return reduce_rows(reduction, logits, *arguments, **options).squeeze(-1)

    value = values(logits, ref, labels)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(values(logits, ref, labels, chunk_size=chunk_size), value, **close)
    moved = value + shift if name == "log_sum_exp" else value
    torch.testing.assert_close(values(logits + shift, ref - shift, labels), moved, **close)
    more = F.pad(logits, (0, 0, 0, n_padding), value=7.0)
    mask = F.pad(torch.ones(n_rows, dtype=torch.bool), (0, n_padding))
    padded = values(
        more,
        F.pad(ref, (0, 0, 0, n_padding)),
        F.pad(labels, (0, n_padding), value=-100),
        mask=mask,
    )
    torch.testing.assert_close(padded, F.pad(value, (0, n_padding)), **close)
    if name == "entropy":
        assert (value > -1e-12).all()
        assert (value < torch.tensor(n_vocabulary).log() + 1e-6).all()
    if name.endswith("_kl"):
        assert (value > -1e-12).all()


def test_softmax_pullback_equals_autograd():
    z = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    p = z.softmax(-1)
    (want,) = torch.autograd.grad((p**3).sum(), z, retain_graph=True)
    got = softmax_pullback(p.detach(), 3 * p.detach() ** 2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(softmax_pullback(p.detach(), 3 * p.detach() ** 2 + 5), want)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_inputs_are_not_modified_and_backward_may_run_twice(form, inputs):
    keys = ["logits"] if form == "logits" else ["hidden", "weight", "bias"]
    copies = {key: value.clone() for key, value in inputs.items()}
    leaves = [inputs[key].requires_grad_() for key in keys]
    logits = leaves[0] if form == "logits" else HiddenLogits(*leaves)
    for reduction, sides in REDUCTIONS.values():
        total, _ = sum_rows(
            reduction, logits, *(inputs[side] for side in sides), weights=inputs["upstream"]
        )
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        first = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(total, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[key], copy) for key, copy in copies.items())


def test_only_what_needs_a_gradient_gets_one(inputs):
    hidden, weight = inputs["hidden"], inputs["weight"].requires_grad_()
    total, _ = sum_rows(entropy, HiddenLogits(hidden, weight), weights=inputs["upstream"])
    total.backward()
    assert hidden.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        total, _ = sum_rows(entropy, HiddenLogits(hidden, weight), weights=inputs["upstream"])
    assert not total.requires_grad
    ref = inputs["ref"].requires_grad_()
    logits = inputs["logits"].requires_grad_()
    reduce_rows(forward_kl, logits, ref).sum().backward()
    assert ref.grad is None


def test_rows_may_lie_anywhere_in_memory(inputs):
    logits = inputs["logits"].transpose(0, 1).requires_grad_()
    values = reduce_rows(entropy, logits).squeeze(-1)
    expected = plain("entropy", logits, None, inputs["ref"])
    torch.testing.assert_close(values, expected)
    (got,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: reduce_rows(entropy, z.long()), TypeError, "floating-point tensor.*int64"),
        (lambda z: reduce_rows(entropy, z[0, 0, 0]), ValueError, "at least one dimension"),
        (
            lambda z: reduce_rows(forward_kl, z, z[:1]),
            ValueError,
            r"side input 1 must have the leading shape \(2, 3\).*got shape \(1, 3, 4\)",
        ),
        (
            lambda z: reduce_rows(forward_kl, z, z[..., :3]),
            ValueError,
            "same vocabulary, got 4 and 3 tokens",
        ),
        (
            lambda z: reduce_rows(entropy, HiddenLogits(z, torch.zeros(9, 5))),
            ValueError,
            r"weight must have shape \(vocabulary_size, 4\).*got shape \(9, 5\)",
        ),
        (lambda z: reduce_rows(entropy, z, chunk_size=0), ValueError, "chunk_size"),
        (
            lambda z: reduce_rows(entropy, z, mask=torch.ones(2, 3)),
            ValueError,
            "mask must be a bool tensor of shape",
        ),
        (
            lambda z: sum_rows(entropy, z, weights=torch.ones(3)),
            ValueError,
            r"weights must have shape \(2, 3\)",
        ),
        (
            lambda z: sum_rows(entropy, z, weights=torch.ones(2, 3, requires_grad=True)),
            ValueError,
            "weights must be constants",
        ),
        (lambda z: tempered(entropy, 0.0), ValueError, "temperature"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 4))
