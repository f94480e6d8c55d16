"""EKSFT: mask, loss and gradients against the formulas written with autograd; both variants."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sciml.lm import (
    EKSFTTrainerMixin,
    HiddenLogits,
    byte_language_model,
    eksft_loss,
    eksft_mask,
    encode_bytes,
    english_text,
    entropy,
    next_token_labels,
    reduce_rows,
    reverse_kl,
    token_logps,
    train_byte_language_model,
)

F64 = torch.float64


def batch(seed=0, n_rows=3, n_tokens=9, n_vocabulary=13, prompt=2):
    """Logits, reference logits and labels whose first tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_rows, n_tokens, n_vocabulary)
    logits = 2 * torch.randn(shape, dtype=F64, generator=generator)
    ref_logits = logits + torch.randn(shape, dtype=F64, generator=generator)
    labels = torch.randint(n_vocabulary, shape[:2], generator=generator)
    labels[:, :prompt] = -100
    labels[0, -2:] = -100  # padding
    return logits, ref_logits, labels


def scores(logits, ref_logits):
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p = logp.exp()
    return -(p * logp).sum(-1), (p * (logp - ref_logp)).sum(-1)


def top(values, k):
    """The k largest of a flat list, by Python."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return set(order[:k])


def oracle(logits, ref_logits, labels, *, ratio=0.2, l_ent=0.05, l_kl=0.05, union=True,
           official=False, targets=(0.5, 2.0)):  # fmt: skip
    """The loss token by token, from its definition (official: from the official code's steps)."""
    entropy, kl = scores(logits, ref_logits)
    n_rows, n_tokens, n_vocabulary = logits.shape
    # (row, place): `place` indexes the scores; `target` is the position of the label in question.
    places = [
        (i, t)
        for i in range(n_rows)
        for t in range(n_tokens)
        if labels[i, t if official else min(t + 1, n_tokens - 1)] != -100
        and (official or t + 1 < n_tokens)
    ]
    k = int(ratio * len(places))
    by_entropy = top([entropy[p].item() for p in places], k)
    by_kl = top([kl[p].item() for p in places], k)
    removed = by_entropy | by_kl if union else by_entropy & by_kl
    gone = {(places[j][0], places[j][1] + (0 if official else 1)) for j in removed}
    nll = [
        -logits[i, t - 1].log_softmax(-1)[labels[i, t]]
        for i in range(n_rows)
        for t in range(1, n_tokens)
        if labels[i, t] != -100 and (i, t) not in gone
    ]
    loss = sum(nll) / len(nll) if nll else 0 * logits.sum()
    ent = sum(entropy[places[j]] for j in by_entropy) / max(k, 1) / math.log(n_vocabulary)
    if official:
        p = logits.softmax(-1)
        kl = (p * (p - ref_logits.log_softmax(-1))).sum(-1)
    mean_kl = sum(kl[places[j]] for j in by_kl) / max(k, 1)
    l_ent *= 1.05 if ent < targets[0] else 0.95
    l_kl *= 1.05 if mean_kl > targets[1] else 0.95
    return loss - l_ent * ent + l_kl * mean_kl


def cross_entropy(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_loss_and_gradient_equal_the_definition(official, union, ratio):
    logits, ref_logits, labels = batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = eksft_loss(
        ours, labels, ref_logits=ref_logits, top_k_ratio=ratio, lambda_entropy=0.3, lambda_kl=0.7,
        combine="union" if union else "intersection",
        variant="official" if official else "aligned", chunk_size=4,
    )  # fmt: skip
    expected = oracle(
        theirs, ref_logits, labels, ratio=ratio, l_ent=0.3, l_kl=0.7, union=union,
        official=official,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_hidden_states_and_output_layer_give_the_same_gradients():
    _, _, labels = batch()
    generator = torch.Generator().manual_seed(3)
    hidden, ref_hidden = torch.randn(2, 3, 9, 6, dtype=F64, generator=generator)
    weight = torch.randn(13, 6, dtype=F64, generator=generator)
    results = []
    for formed in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if formed:
            loss = eksft_loss(h @ w.T, labels, ref_logits=ref_hidden @ weight.T)
        else:
            loss = eksft_loss(
                HiddenLogits(h, w), labels, ref_logits=HiddenLogits(ref_hidden, weight)
            )
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ratio_0_is_plain_fine_tuning():
    logits, ref_logits, labels = batch()
    loss, parts = eksft_loss(
        logits, labels, ref_logits=ref_logits, top_k_ratio=0.0, return_parts=True
    )
    torch.testing.assert_close(loss, cross_entropy(logits, labels))
    assert parts["masked"] == 0
    assert parts["entropy"] == parts["kl"] == 0


def test_few_tokens_give_k_0_and_plain_fine_tuning():
    logits, ref_logits, labels = batch(n_rows=1, n_tokens=4, prompt=0)
    labels[:] = torch.tensor([[1, 2, 3, 4]])
    loss = eksft_loss(logits, labels, ref_logits=ref_logits, top_k_ratio=0.2)  # int(0.6) = 0
    torch.testing.assert_close(loss, cross_entropy(logits, labels))


def test_disjoint_sets_without_terms_are_plain_fine_tuning():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 7, dtype=F64, generator=generator)
    logits[0, 0] *= 0.1  # the largest entropy
    ref_logits = logits.clone()
    ref_logits[0, 3] = -ref_logits[0, 3]  # the largest KL
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    options = {"top_k_ratio": 0.25, "combine": "intersection"}
    loss, parts = eksft_loss(
        logits,
        labels,
        ref_logits=ref_logits,
        lambda_entropy=0.0,
        lambda_kl=0.0,
        return_parts=True,
        **options,
    )
    assert parts["masked"] == 0
    assert parts["entropy"] > 0
    assert parts["kl"] > 0
    torch.testing.assert_close(loss, cross_entropy(logits, labels))


def test_ratio_1_leaves_no_label_and_a_defined_gradient():
    logits, ref_logits, labels = batch()
    logits.requires_grad_()
    options = {"top_k_ratio": 1.0, "lambda_entropy": 0.0, "lambda_kl": 0.0}
    loss, parts = eksft_loss(logits, labels, ref_logits=ref_logits, return_parts=True, **options)
    assert loss == 0
    assert parts["masked"] == 1
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_model_equal_to_reference_has_no_kl():
    logits, _, labels = batch()
    _, parts = eksft_loss(logits, labels, ref_logits=logits.clone(), return_parts=True)
    assert parts["kl"] == 0


def test_uniform_logits_have_entropy_1():
    _, ref_logits, labels = batch()
    _, parts = eksft_loss(
        torch.zeros_like(ref_logits), labels, ref_logits=ref_logits, return_parts=True
    )
    torch.testing.assert_close(parts["entropy"].item(), 1.0)


def test_official_kl_term_is_the_kl_and_the_entropy_and_the_sum_of_squares():
    logits, ref_logits, labels = batch()
    options = {"top_k_ratio": 1.0, "return_parts": True}
    _, parts = eksft_loss(logits, labels, ref_logits=ref_logits, variant="official", **options)
    entropy, kl = scores(logits, ref_logits)
    term = kl + entropy + (logits.softmax(-1) ** 2).sum(-1)
    torch.testing.assert_close(parts["kl"], term[labels != -100].mean())
    assert (term > kl).all()


def test_rows_that_predict_removed_labels_have_no_gradient_without_the_terms():
    logits, ref_logits, labels = batch()
    logits.requires_grad_()
    eksft_loss(logits, labels, ref_logits=ref_logits, lambda_entropy=0.0, lambda_kl=0.0).backward()
    entropy, kl = scores(logits.detach(), ref_logits)
    mask = eksft_mask(entropy, kl, next_token_labels(labels))
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, mask.ce)


@pytest.mark.parametrize(("entropy", "raised"), [(0.999, True), (0.0, False)])
def test_weights_move_by_5_percent_from_what_was_given(entropy, raised):
    logits, ref_logits, labels = batch()
    options = {"target_entropy": entropy, "target_kl": 100.0, "return_parts": True}
    _, parts = eksft_loss(logits, labels, ref_logits=ref_logits, **options)
    torch.testing.assert_close(parts["lambda_entropy"].item(), 0.05 * (1.05 if raised else 0.95))
    torch.testing.assert_close(parts["lambda_kl"].item(), 0.05 * 0.95)
    _, fixed = eksft_loss(logits, labels, ref_logits=ref_logits, adapt=False, **options)
    assert fixed["lambda_entropy"].item() == fixed["lambda_kl"].item() == 0.05


@given(st.integers(0, 10_000), st.floats(0, 1), st.booleans())
def test_number_of_removed_tokens(seed, ratio, union):
    generator = torch.Generator().manual_seed(seed)
    entropy, kl = torch.rand(2, 3, 8, dtype=F64, generator=generator)
    mask = torch.rand(3, 8, generator=generator) < 0.7
    mask[0, 0] = True
    selected = eksft_mask(
        entropy, kl, mask, top_k_ratio=ratio, combine="union" if union else "intersection"
    )
    k = int(ratio * int(mask.sum()))
    assert selected.entropy.sum() == selected.kl.sum() == k
    n_removed = int(mask.sum() - selected.ce.sum())
    assert (k <= n_removed <= 2 * k) if union else n_removed <= k
    assert not (selected.ce & ~mask).any()
    assert not ((selected.entropy | selected.kl) & ~mask).any()
    if k:
        outside = mask & ~selected.entropy
        assert not outside.any() or entropy[selected.entropy].min() > entropy[outside].max()


def test_scope_and_smallest():
    entropy = torch.tensor([[4.0, 3.0, 1.0, 2.0], [0.4, 0.1, 0.3, 0.2]])
    labels = torch.tensor([[1, 1, 1, 1], [1, 1, 1, -100]])
    options = {"top_k_ratio": 0.5, "labels": labels}
    across = eksft_mask(entropy, entropy, **options)  # int(0.5 * 7) = 3
    assert across.entropy.tolist() == [[True, True, False, True], [False] * 4]
    within = eksft_mask(entropy, entropy, scope="sequence", **options)
    assert within.entropy.tolist() == [[True, True, False, False], [True, False, False, False]]
    small = eksft_mask(entropy, entropy, scope="sequence", largest_entropy=False, **options)
    assert small.entropy.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert small.kl.tolist() == within.kl.tolist()


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 4))
def test_shifts_padding_and_chunks_change_nothing(seed, chunk_size, n_padding):
    logits, ref_logits, labels = batch(seed)
    loss = eksft_loss(logits, labels, ref_logits=ref_logits)
    shift = torch.randn(2, 3, 9, 1, dtype=F64)
    shifted = eksft_loss(logits + shift[0], labels, ref_logits=ref_logits + shift[1])
    padded = eksft_loss(
        F.pad(logits, (0, 0, 0, n_padding), value=2.0),
        F.pad(labels, (0, n_padding), value=-100),
        ref_logits=F.pad(ref_logits, (0, 0, 0, n_padding), value=-1.0),
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(shifted, loss)
    torch.testing.assert_close(padded, loss)


def test_micro_batches_weighted_by_their_tokens_sum_to_one_of_them():
    logits, ref_logits, labels = batch()
    n_tokens = int((next_token_labels(labels) != -100).sum())
    alone = eksft_loss(logits, labels, ref_logits=ref_logits)
    torch.testing.assert_close(
        eksft_loss(logits, labels, ref_logits=ref_logits, num_items_in_batch=n_tokens), alone
    )
    twice = eksft_loss(
        logits, labels, ref_logits=ref_logits, num_items_in_batch=torch.tensor(2 * n_tokens)
    )
    torch.testing.assert_close(2 * twice, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    logits, ref_logits, labels = batch()
    low = logits.to(dtype).requires_grad_()
    loss = eksft_loss(low, labels, ref_logits=ref_logits.to(dtype))
    assert loss.dtype == torch.float32
    loss.backward()
    expected = eksft_loss(low.detach().float(), labels, ref_logits=ref_logits.to(dtype).float())
    torch.testing.assert_close(loss, expected)
    assert low.grad.dtype == dtype
    assert low.grad.isfinite().all()


def test_inputs_are_not_changed_and_the_reference_gets_no_gradient():
    logits, ref_logits, labels = (t.clone() for t in batch())
    ref_logits.requires_grad_()
    copies = [t.detach().clone() for t in (logits, ref_logits, labels)]
    eksft_loss(logits.requires_grad_(), labels, ref_logits=ref_logits).backward()
    assert ref_logits.grad is None
    for tensor, original in zip((logits, ref_logits, labels), copies, strict=True):
        assert torch.equal(tensor, original)


def test_forbidden_tokens_are_no_nan():
    logits, ref_logits, labels = batch()
    labels = labels.clamp(max=11)
    logits[..., 12] = -math.inf
    ref_logits[..., 12] = -math.inf
    logits.requires_grad_()
    loss = eksft_loss(logits, labels, ref_logits=ref_logits)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    expected = eksft_loss(logits[..., :12].detach(), labels, ref_logits=ref_logits[..., :12])
    _, parts = eksft_loss(logits.detach(), labels, ref_logits=ref_logits, return_parts=True)
    ratio = math.log(12) / math.log(13)  # the entropy is a share of log V
    change = parts["lambda_entropy"] * parts["entropy"] * (1 / ratio - 1)
    torch.testing.assert_close(loss.detach() - change, expected)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda a, b, y: (a, b, torch.full_like(y, -100)), {}, "at least one token"),
        (lambda a, b, y: (a, b, y), {"top_k_ratio": 1.1}, "top_k_ratio must be in"),
        (lambda a, b, y: (a, b, y), {"top_k_ratio": -0.1}, "top_k_ratio must be in"),
        (lambda a, b, y: (a, b[..., :-1], y), {}, "same vocabulary, got 13 and 12"),
        (lambda a, b, y: (a, b[:, :-1], y), {}, "side input"),
        (lambda a, b, y: (a, b, y[:, :-1]), {}, "labels must have shape"),
        (lambda a, b, y: (a[0], b[0], y[0]), {}, r"labels must have shape \(batch, n_tokens\)"),
        (lambda a, b, y: (a * math.nan, b, y), {}, "entropy must be finite"),
        (lambda a, b, y: (a, b, y), {"combine": "both"}, "combine must be one of"),
        (lambda a, b, y: (a, b, y), {"variant": "paper"}, "variant must be one of"),
        (lambda a, b, y: (a, b, y), {"scope": "row"}, "scope must be one of"),
        (lambda a, b, y: (a, b, y), {"lambda_kl": -1.0}, "lambda_kl must be in"),
    ],
)
def test_bad_input(change, options, message):
    logits, ref_logits, labels = change(*batch())
    with pytest.raises(ValueError, match=message):
        eksft_loss(logits, labels, ref_logits=ref_logits, **options)


class EKSFTTrainer(EKSFTTrainerMixin, Trainer):
    pass


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows():
    generator = torch.Generator().manual_seed(0)
    result = []
    for n_tokens in (12, 9, 14) * 4:
        ids = torch.randint(1, 17, (n_tokens,), generator=generator)
        result.append({"input_ids": ids, "labels": ids.index_fill(0, torch.arange(3), -100)})
    return result


def collate(items):
    (item,) = items
    return {name: value[None] for name, value in item.items()}


def arguments(folder, **more):
    options = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3, "learning_rate": 0.5, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
    } | more  # fmt: skip
    return TrainingArguments(**options)


OPTIONS = {"lambda_entropy": 0.5, "lambda_kl": 0.5, "return_parts": True}


@pytest.mark.parametrize("from_hidden_states", [False, True])
def test_trainer_takes_the_step_by_hand(tmp_path, from_hidden_states):
    model, by_hand, ref_model = llama(), llama(), llama(1)
    trainer = EKSFTTrainer(
        model, arguments(tmp_path, max_steps=1), collate, rows()[:3], ref_model=ref_model,
        objective=partial(eksft_loss, **OPTIONS), from_hidden_states=from_hidden_states,
    )  # fmt: skip
    trainer.train()
    batches = [collate([item]) for item in rows()[:3]]
    n_tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for inputs in batches:
        with torch.no_grad():
            ref_logits = ref_model(inputs["input_ids"]).logits
        logits = by_hand(inputs["input_ids"]).logits
        loss, _ = eksft_loss(logits, inputs["labels"], ref_logits=ref_logits, **OPTIONS)
        count = int((inputs["labels"][:, 1:] != -100).sum())
        (loss * count / n_tokens).backward()
    for name, parameter in by_hand.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)
    assert trainer.state.log_history[0].keys() >= {"ce", "entropy", "kl", "masked"}


def test_peft_model_is_its_own_reference(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    trainer = EKSFTTrainer(model, arguments(tmp_path), collate, rows())
    inputs = collate(rows()[:1])
    n_tokens = (inputs["labels"] != -100).sum()
    loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=n_tokens)
    expected = eksft_loss(
        model(inputs["input_ids"]).logits, inputs["labels"],
        ref_logits=llama()(inputs["input_ids"]).logits,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="ref_model"):
        EKSFTTrainer(llama(), arguments(tmp_path), collate, rows())


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    def train(folder, resume=None, **more):
        model = llama()
        arguments_ = arguments(folder, learning_rate=1e-2, optim="adamw_torch", **more)
        trainer = EKSFTTrainer(model, arguments_, collate, rows(), ref_model=llama())
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight = train(tmp_path / "a")
    train(tmp_path / "b", max_steps=2, save_strategy="steps", save_steps=2)
    resumed = train(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2"))
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


def test_bad_scores():
    entropy = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"kl must have shape.*\(2, 2\).*\(2, 3\)"):
        eksft_mask(entropy, entropy[:, :2], torch.ones(2, 3, dtype=torch.long))


@pytest.mark.slow
def test_over_training_costs_less_entropy_and_drift():
    """Sums in words, a byte model, equal steps, three seeds; printed: NLL, entropy, KL."""
    text = encode_bytes(english_text())
    base = byte_language_model(random_state=0)
    train_byte_language_model(base, text[:-20_000], 200, length=96)
    documentation = text[-20_000:][: 20 * 128].view(20, 128)
    generator = torch.Generator().manual_seed(0)

    def problems(n):
        ids, prompts = [], []
        for a, b, thing in torch.randint(2, 10, (n, 3), generator=generator).tolist():
            thing = ("pens", "figs", "cards", "keys")[thing % 4]
            question = f"Ada has {a} {thing} and gets {b} more. "
            ids.append(encode_bytes(f"{question}Ada now has {a} + {b} = {a + b} {thing}."))
            prompts.append(len(question))
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=258)
        before = torch.arange(ids.shape[1]) < torch.tensor(prompts)[:, None]
        return ids, ids.masked_fill((ids == 258) | before, -100)

    (ids, labels), (held_ids, held_labels) = problems(30), problems(40)

    @torch.no_grad()
    def measure(model):
        logits = model(held_ids).logits
        logps, mask = token_logps(logits, held_labels)
        entropies = reduce_rows(entropy, logits, mask=mask)[mask]
        drift = reduce_rows(reverse_kl, model(documentation).logits, base(documentation).logits)
        return [-logps[mask].mean().item(), entropies.mean().item(), drift.mean().item()]

    def tuned(seed, selective):
        model = copy.deepcopy(base).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        order = torch.Generator().manual_seed(seed)
        for _ in range(90):
            rows = torch.randperm(30, generator=order)[:8]
            logits = model(ids[rows]).logits
            if selective:
                with torch.no_grad():
                    ref_logits = base(ids[rows]).logits
                loss = eksft_loss(logits, labels[rows], ref_logits=ref_logits)
            else:
                logps, mask = token_logps(logits, labels[rows])
                loss = -logps[mask].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return measure(model)

    print("\ninitial", measure(base))
    means = []
    for selective in (False, True):
        rows = torch.tensor([tuned(seed, selective) for seed in range(3)])
        print("EKSFT" if selective else "SFT  ", rows.mean(0).tolist(), "±", rows.std(0).tolist())
        means.append(rows.mean(0))
    (_, plain_entropy, plain_kl), (_, kept_entropy, kept_kl) = means
    assert kept_entropy > 1.2 * plain_entropy
    assert kept_kl < plain_kl
