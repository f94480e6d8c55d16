import pytest
import torch
import torch.nn.functional as F

from sciml.lm import (
    HiddenLogits,
    entropy,
    forward_kl,
    label_logp,
    log_sum_exp,
    reduce_rows,
    reverse_kl,
    sum_rows,
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
