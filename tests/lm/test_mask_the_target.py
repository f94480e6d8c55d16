import argparse
import copy
import inspect
import math
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.lm import (
    HiddenLogits,
    TargetMaskedKL,
    TargetMaskedKLTrainerMixin,
    byte_language_model,
    encode_bytes,
    english_text,
    forward_kl,
    perplexity,
    reduce_rows,
    reference,
    target_masked_kl,
    train_byte_language_model,
)


def oracle(logits, ref_logits, labels, direction="forward", temperature=1.0):
    """Per row, by deleting the target's column."""
    keep = torch.ones_like(logits, dtype=torch.bool).scatter(-1, labels.unsqueeze(-1), False)
    shape = (*logits.shape[:-1], logits.shape[-1] - 1)
    logq = (logits[keep].reshape(shape) / temperature).log_softmax(-1)
    logp = (ref_logits[keep].reshape(shape) / temperature).log_softmax(-1)
    if direction == "reverse":
        logp, logq = logq, logp
    return temperature**2 * (logp.exp() * (logp - logq)).sum(-1)


def rows(n_vocabulary, n=6, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits, ref = (
        scale * torch.randn(n, n_vocabulary, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    return logits, ref, torch.randint(0, n_vocabulary, (n,), generator=generator)


def per_row(logits, labels, ref, **options):
    return target_masked_kl(
        logits, labels, ref_logits=ref, shift=False, reduction="none", **options
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("n_vocabulary", [2, 3, 50])
def test_equals_deleting_the_target(n_vocabulary, direction, temperature):
    logits, ref, labels = rows(n_vocabulary)
    logits.requires_grad_()
    upstream = torch.arange(1.0, 7.0, dtype=torch.float64)
    options = {"direction": direction, "temperature": temperature}
    got = per_row(logits, labels, ref, **options)
    want = oracle(logits, ref, labels, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for_got, for_want = (
        torch.autograd.grad((value * upstream).sum(), logits)[0] for value in (got, want)
    )
    torch.testing.assert_close(for_got, for_want, rtol=1e-10, atol=1e-12)
    assert (for_got.gather(-1, labels.unsqueeze(-1)) == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_objective_is_cross_entropy_plus_weight_times_divergence(direction, temperature):
    logits, ref, labels = rows(20)
    logits.requires_grad_()
    objective = TargetMaskedKL(0.7, direction=direction, temperature=temperature)
    loss, parts = objective(logits, labels, ref_logits=ref, shift=False, return_parts=True)
    nll = F.cross_entropy(logits, labels)
    kl = oracle(logits, ref, labels, direction, temperature).mean()
    torch.testing.assert_close(loss, nll + 0.7 * kl)
    torch.testing.assert_close(parts["nll"], nll.detach())
    torch.testing.assert_close(parts["target_masked_kl"], kl.detach())
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0], torch.autograd.grad(nll + 0.7 * kl, logits)[0]
    )
    none = objective(logits, labels, ref_logits=ref, shift=False, reduction="none")
    torch.testing.assert_close(none.mean(), loss)


def test_weight_zero_is_cross_entropy():
    logits, ref, labels = rows(20)
    loss = TargetMaskedKL(0.0)(logits, labels, ref_logits=ref, shift=False)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_hand_value():
    base = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float64)
    adapted = torch.tensor([[-5.0, math.log(3), 0.0]], dtype=torch.float64)
    loss = target_masked_kl(adapted, torch.tensor([0]), ref_logits=base, shift=False)
    assert loss.item() == pytest.approx(0.143841036, abs=1e-9)
    reverse = target_masked_kl(
        adapted, torch.tensor([0]), ref_logits=base, shift=False, direction="reverse"
    )
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert reverse.item() == pytest.approx(expected, abs=1e-12)


def test_it_is_a_factor_of_the_full_divergence():
    logits, ref, labels = rows(30)
    p_y, q_y = (z.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) for z in (ref, logits))
    two_way = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    full = F.kl_div(logits.log_softmax(-1), ref.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(two_way + (1 - p_y) * per_row(logits, labels, ref), full)
    torch.testing.assert_close(reduce_rows(forward_kl, logits, ref).squeeze(-1), full)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_vocabulary=st.integers(2, 12),
    shift=st.floats(-50, 50),
    target_change=st.floats(-50, 50),
    direction=st.sampled_from(["forward", "reverse"]),
    chunk_size=st.integers(1, 7),
)
def test_laws(seed, n_vocabulary, shift, target_change, direction, chunk_size):
    logits, ref, labels = rows(n_vocabulary, seed=seed)
    value = per_row(logits, labels, ref, direction=direction)
    assert (value > -1e-12).all()
    moved = logits.scatter_add(
        -1, labels.unsqueeze(-1), torch.full((6, 1), target_change, dtype=torch.float64)
    )
    for changed in (
        per_row(logits + shift, labels, ref, direction=direction),
        per_row(logits, labels, ref - shift, direction=direction),
        per_row(moved, labels, ref, direction=direction),
        per_row(logits, labels, ref, direction=direction, chunk_size=chunk_size),
    ):
        torch.testing.assert_close(changed, value, rtol=1e-9, atol=1e-10)
    if n_vocabulary == 2:
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_no_drift_no_loss_no_gradient(direction):
    logits, _, labels = rows(9)
    logits = logits.float().requires_grad_()
    loss = target_masked_kl(
        logits, labels, ref_logits=logits.detach(), shift=False, direction=direction
    )
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck(direction):
    logits, ref, labels = rows(5)
    labels[2] = -100
    hidden = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = logits[:5, :3].clone()
    objective = TargetMaskedKL(0.5, direction=direction, chunk_size=4)
    assert torch.autograd.gradcheck(
        lambda z: objective(z, labels, ref_logits=ref, shift=False), logits.requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda h, w: objective(HiddenLogits(h, w), labels, ref_logits=ref, shift=False),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("extreme", [80.0, -80.0, 1e4])
def test_extreme_target_is_finite_and_exact(extreme, direction):
    logits, ref, labels = rows(6)
    expected = oracle(logits, ref, labels, direction)
    index = labels.unsqueeze(-1)
    logits, ref = (z.float().scatter(-1, index, extreme).requires_grad_() for z in (logits, ref))
    value = per_row(logits, labels, ref.detach(), direction=direction)
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
    TargetMaskedKL()(logits, labels, ref_logits=ref, shift=False).backward()
    assert logits.grad.isfinite().all()
    assert ref.grad is None


def test_tokens_forbidden_in_both_models_count_for_nothing():
    logits, ref, labels = rows(8)
    forbidden = (labels + 1) % 8
    index = forbidden.unsqueeze(-1)
    logits, ref = (z.scatter(-1, index, -torch.inf).requires_grad_() for z in (logits, ref))
    for direction in ("forward", "reverse"):
        value = per_row(logits, labels, ref.detach(), direction=direction)
        finite = (z.detach().clamp(min=-500) for z in (logits, ref))
        torch.testing.assert_close(value, oracle(*finite, labels, direction))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient.isfinite().all()
        assert (gradient.gather(-1, index) == 0).all()


def test_shift_padding_and_normaliser():
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    labels = torch.tensor([[-100, 1, 2, 3, 4], [-100, -100, 5, -100, -100]])
    value = target_masked_kl(logits, labels, ref_logits=ref)
    chosen = labels[:, 1:] != -100
    expected = oracle(logits[:, :-1][chosen], ref[:, :-1][chosen], labels[:, 1:][chosen])
    torch.testing.assert_close(value, expected.mean())
    by_sum = target_masked_kl(logits, labels, ref_logits=ref, num_items_in_batch=10)
    torch.testing.assert_close(by_sum, expected.sum() / 10)
    padded = [F.pad(z, (0, 0, 0, 3), value=1e3) for z in (logits, ref)]
    wide = target_masked_kl(padded[0], F.pad(labels, (0, 3), value=-100), ref_logits=padded[1])
    torch.testing.assert_close(wide, value)
    none = target_masked_kl(logits, labels, ref_logits=ref, reduction="none")
    assert none.shape == (2, 5)
    assert (none[~F.pad(chosen, (0, 1))] == 0).all()
    torch.testing.assert_close(none.sum(), expected.sum())


def test_bfloat16_is_computed_in_float32():
    logits, ref, labels = rows(50)
    logits, ref = logits.bfloat16().requires_grad_(), ref.bfloat16()
    value = per_row(logits, labels, ref)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, oracle(logits.float(), ref.float(), labels), atol=1e-5, rtol=1e-5
    )
    value.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_hidden_form_equals_logits_form():
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
    weight = torch.randn(9, 4, generator=generator)
    labels = torch.randint(0, 9, (2, 6), generator=generator)
    objective = TargetMaskedKL(0.3, chunk_size=3)
    full = objective(hidden @ weight.T, labels, ref_logits=ref_hidden @ weight.T)
    fused = objective(
        HiddenLogits(hidden, weight), labels, ref_logits=HiddenLogits(ref_hidden, weight)
    )
    torch.testing.assert_close(full, fused)


def test_no_label_at_all_is_zero_with_a_graph():
    logits = torch.randn(1, 4, 6, requires_grad=True)
    loss = TargetMaskedKL()(logits, torch.full((1, 4), -100), ref_logits=torch.randn(1, 4, 6))
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()


def test_inputs_are_not_modified():
    logits, ref, labels = rows(9)
    copies = logits.clone(), ref.clone(), labels.clone()
    for direction in ("forward", "reverse"):
        objective = TargetMaskedKL(direction=direction, temperature=2.0)
        objective(logits.requires_grad_(), labels, ref_logits=ref).backward()
    assert all(torch.equal(a, b) for a, b in zip((logits, ref, labels), copies, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda z, y: target_masked_kl(z, y, ref_logits=z[..., :-1]),
            ValueError,
            "same vocabulary, got 5 and 4 tokens",
        ),
        (
            lambda z, y: target_masked_kl(z, y.where(y != 1, 5), ref_logits=z),
            IndexError,
            r"in \[0, 5\), got 5 at \(0, 1\)",
        ),
        (
            lambda z, y: target_masked_kl(z, y.where(y != 1, -1), ref_logits=z),
            IndexError,
            r"got -1 at \(0, 1\)",
        ),
        (lambda z, y: target_masked_kl(z, y.float(), ref_logits=z), TypeError, "labels must be"),
        (lambda z, y: target_masked_kl(z, y[:, 1:], ref_logits=z), ValueError, "shape"),
        (lambda z, y: target_masked_kl(z, y, ref_logits=z[:, 1:]), ValueError, "leading shape"),
        (
            lambda z, y: target_masked_kl(z, y, ref_logits=z, direction="both"),
            ValueError,
            "direction must be one of 'forward', 'reverse', got 'both'",
        ),
        (
            lambda z, y: target_masked_kl(z, y, ref_logits=z, temperature=0.0),
            ValueError,
            "temperature",
        ),
        (
            lambda z, y: target_masked_kl(z, y, ref_logits=z, reduction="batchmean"),
            ValueError,
            "reduction must be one of",
        ),
        (
            lambda z, y: target_masked_kl(z[..., :1], y * 0, ref_logits=z[..., :1]),
            ValueError,
            "size of the vocabulary",
        ),
        (lambda z, y: TargetMaskedKL(-0.1), ValueError, r"weight must be in \[0"),
        (lambda z, y: TargetMaskedKL(math.nan), ValueError, "weight must be"),
        (lambda z, y: TargetMaskedKL(direction="up"), ValueError, "direction must be"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(1, 4, 5), torch.tensor([[0, 1, 2, 3]]))


def test_trainer_needs_adapters_or_a_reference_and_logs_both_parts(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    class TargetMaskedKLTrainer(TargetMaskedKLTrainerMixin, Trainer):
        pass

    ids = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        learning_rate=2e-2,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    with pytest.raises(ValueError, match="give ref_model"):
        TargetMaskedKLTrainer(model=byte_language_model(16, 1, 2), args=args)
    final = {}
    for weight in (0.0, 30.0):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(byte_language_model(16, 1, 2), config)
        trainer = TargetMaskedKLTrainer(model=model, args=args, train_dataset=data, weight=weight)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "nll" in entry]
        assert logs[0]["target_masked_kl"] == pytest.approx(0, abs=1e-6)
        assert logs[-1]["nll"] < logs[0]["nll"]
        final[weight] = logs[-1]["target_masked_kl"]
    assert final[30.0] < 0.5 * final[0.0]


def finetuned(base, task, kind, weight, seed):
    """A LoRA copy of a byte model after 100 steps on other text."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    objective = TargetMaskedKL(weight if kind == "masked" else 0.0)
    for _ in range(100):
        batch = task[torch.randint(len(task) - 128, (8, 1)) + torch.arange(128)]
        with reference(model) as frozen:
            ref_logits = frozen(input_ids=batch).logits
        logits = model(input_ids=batch).logits
        loss = objective(logits, batch, ref_logits=ref_logits)
        if kind == "full":
            loss = loss + weight * reduce_rows(forward_kl, logits, ref_logits)[:, :-1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_it_forgets_less_than_cross_entropy_and_no_more_than_the_full_divergence():
    text = english_text()
    base = byte_language_model(64, 2)
    train_byte_language_model(base, text[:-20_000], 500, learning_rate=5e-3)
    code = encode_bytes(inspect.getsource(typing) + inspect.getsource(argparse))

    def losses(model):
        return [math.log(perplexity(model, t)) for t in (code[-20_000:], text[-20_000:])]

    start = losses(base)
    runs = [
        ("none", 0.0),
        *((kind, weight) for kind in ("masked", "full") for weight in (0.1, 0.3, 1.0, 3.0)),
    ]
    mean = {
        run: torch.tensor(
            [losses(finetuned(base, code[:-20_000], *run, seed)) for seed in range(3)]
        ).mean(0)
        for run in runs
    }
    print(f"\nbase: new {start[0]:.3f}, old {start[1]:.3f}")
    for (kind, weight), (new, old) in mean.items():
        print(f"{kind:7s} {weight:3.1f}: new {new:.3f}, old {old:.3f}")
    rise = mean["none", 0.0][1] - start[1]
    assert 1 - (mean["masked", 0.3][1] - start[1]) / rise > 0.3
    assert 1 - (mean["masked", 1.0][1] - start[1]) / rise > 0.6
    assert mean["masked", 1.0][0] < start[0] - 0.5 * (start[0] - mean["none", 0.0][0])
    # On the full divergence's frontier: retention at the same new-task loss, interpolated.
    full = sorted((mean[run] for run in runs if run[0] == "full"), key=lambda point: point[0])
    full = torch.stack([mean["none", 0.0], *full]).double().numpy()
    for weight in (0.3, 1.0):
        new, old = mean["masked", weight].tolist()
        assert old < np.interp(new, full[:, 0], full[:, 1]) + 0.02
