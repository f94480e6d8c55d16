import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sciml.lm import HiddenLogits, byte_language_model, mask_inputs, mir_loss, split_weight_decay
from sciml.lm.mir import MIRTrainerMixin

IDS = torch.arange(4 * 40).reshape(4, 40) % 250


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_logits(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def test_ratio_one_masks_all_but_the_prefix_and_zero_nothing():
    masked, mask = mask_inputs(IDS, 256, mask_ratio=(1.0, 1.0))
    assert (masked[:, 8:] == 256).all()
    assert torch.equal(masked[:, :8], IDS[:, :8])
    assert torch.equal(mask, masked == 256)
    masked, mask = mask_inputs(IDS, 256, mask_ratio=(0.0, 0.0))
    assert torch.equal(masked, IDS)
    assert not mask.any()


def test_mask_fraction_has_the_mean_of_the_uniform_rate():
    ids = torch.zeros(20_000, 40, dtype=torch.long)
    _, mask = mask_inputs(ids, 9, generator=generator())
    share = mask.double().mean(1)
    # mean of a quarter over the positions after the prefix; rates differ between sequences
    assert abs(share.mean().item() - 0.25 * 32 / 40) < 0.003
    within = (0.25 * 0.75 - 0.25 / 12) / 32  # a rate of its own: binomial plus uniform variance
    expected = (0.25 / 12 + within) * (32 / 40) ** 2
    assert abs(share.var().item() - expected) < 0.1 * expected


def test_same_generator_same_mask():
    first = mask_inputs(IDS, 256, generator=generator(3))[1]
    assert torch.equal(first, mask_inputs(IDS, 256, generator=generator(3))[1])
    assert not torch.equal(first, mask_inputs(IDS, 256, generator=generator(4))[1])


@settings(max_examples=30, deadline=None)
@given(
    prefix=st.integers(0, 10),
    n_masked=st.integers(0, 6),
    seed=st.integers(0, 1000),
    padding=st.integers(0, 5),
)
def test_prefix_padding_and_special_tokens_are_never_masked(prefix, n_masked, seed, padding):
    attention = torch.ones_like(IDS)
    attention[0, 40 - padding :] = 0
    special = torch.zeros_like(IDS)
    special[:, 20] = 1
    before = IDS.clone()
    masked, mask = mask_inputs(
        IDS,
        256,
        keep_prefix=prefix,
        n_masked=n_masked,
        attention_mask=attention,
        special_tokens_mask=special,
        generator=generator(seed),
    )
    assert (mask.sum(1) == n_masked).all()
    assert not mask[:, :prefix].any()
    assert not mask[attention == 0].any()
    assert not mask[:, 20].any()
    assert torch.equal(torch.where(mask, IDS, masked), IDS)
    assert torch.equal(IDS, before)


def test_loss_is_the_weighted_sum_of_two_cross_entropies():
    z, zm = random_logits(2, 9, 11), random_logits(2, 9, 11, seed=1)
    labels = torch.randint(11, (2, 9), generator=generator())
    labels[0, :4] = -100

    def ce(logits):
        return F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))

    loss, parts = mir_loss(z, zm, labels, weight=0.7, ntp_weight=2.0, return_parts=True)
    torch.testing.assert_close(loss, 2 * ce(z) + 0.7 * ce(zm))
    torch.testing.assert_close(parts["aux"], ce(zm))
    torch.testing.assert_close(mir_loss(z, z, labels), 1.4 * ce(z))
    per_token = mir_loss(z, zm, labels, weight=0.7, ntp_weight=2.0, reduction="none")
    torch.testing.assert_close(per_token.sum() / (labels[:, 1:] != -100).sum(), loss)


def test_gradients_equal_autograd_in_both_forms():
    hidden = random_logits(2, 7, 5).requires_grad_()
    masked_hidden = random_logits(2, 7, 5, seed=1).requires_grad_()
    weight = random_logits(11, 5, seed=2).requires_grad_()
    labels = torch.randint(11, (2, 7), generator=generator())
    inputs = (hidden, masked_hidden, weight)
    fused = mir_loss(HiddenLogits(hidden, weight), HiddenLogits(masked_hidden, weight), labels)
    plain = sum(
        factor * F.cross_entropy((h @ weight.T)[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
        for factor, h in ((1.0, hidden), (0.4, masked_hidden))
    )
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fused, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_loss_on_masked_counts_the_rows_that_predict_a_masked_token():
    z, zm = random_logits(1, 12, 7), random_logits(1, 12, 7, seed=1).requires_grad_()
    labels = torch.randint(7, (1, 12), generator=generator())
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [9, 11]] = True
    _, parts = mir_loss(z, zm, labels, loss_on="masked", mask=mask, return_parts=True)
    expected = F.cross_entropy(zm[0, [8, 10]], labels[0, [9, 11]])
    torch.testing.assert_close(parts["aux"], expected.detach())
    empty = mir_loss(z, zm, labels, ntp_weight=0.0, loss_on="masked", mask=mask & False)
    (gradient,) = torch.autograd.grad(empty, zm)
    assert empty.item() == 0
    assert not gradient.any()


def test_num_items_in_batch_adds_micro_batches_up():
    z, zm = random_logits(4, 9, 11), random_logits(4, 9, 11, seed=1)
    labels = torch.randint(11, (4, 9), generator=generator())
    labels[0, 3:] = -100
    n = int((labels[:, 1:] != -100).sum())
    whole = mir_loss(z, zm, labels)
    parts = sum(
        mir_loss(z[s], zm[s], labels[s], num_items_in_batch=n) for s in (slice(1), slice(1, 4))
    )
    torch.testing.assert_close(parts, whole)


def test_logits_before_the_first_masked_position_are_the_clean_ones():
    model = byte_language_model(32, 2, random_state=0)
    masked, mask = mask_inputs(IDS, 258, generator=generator(1))
    with torch.no_grad():
        clean, holes = model(input_ids=IDS).logits, model(input_ids=masked).logits
    for row in range(4):
        first = int(mask[row].float().argmax())
        torch.testing.assert_close(clean[row, :first], holes[row, :first])
        assert not torch.allclose(clean[row, first:], holes[row, first:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": (-0.1, 0.5)}, r"mask_ratio\[0\]"),
        ({"mask_ratio": (0.0, 1.5)}, r"mask_ratio\[1\]"),
        ({"mask_ratio": (0.6, 0.5)}, "low <= high"),
        ({"keep_prefix": 40}, "more than keep_prefix = 40 positions, got 40"),
        ({"n_masked": 33}, "n_masked must be at most .* 32 .* got 33"),
        ({"attention_mask": torch.ones(4, 3)}, "attention_mask must have the shape"),
    ],
)
def test_bad_masks(options, message):
    with pytest.raises(ValueError, match=message):
        mask_inputs(IDS, 256, **options)


def test_bad_loss_arguments():
    z, labels = random_logits(1, 9, 5), torch.zeros(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="weight"):
        mir_loss(z, z, labels, weight=-1)
    with pytest.raises(ValueError, match="mask must be given"):
        mir_loss(z, z, labels, loss_on="masked")
    with pytest.raises(ValueError, match="loss_on must be one of"):
        mir_loss(z, z, labels, loss_on="some")
    with pytest.raises(ValueError, match="mask must have the shape"):
        mir_loss(z, z, labels, loss_on="masked", mask=torch.ones(1, 3, dtype=torch.bool))


def test_split_weight_decay_spares_embeddings_gains_and_biases():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 9)}
    )
    decayed, spared = split_weight_decay(model, 1.6)
    assert [p is model["head"].weight for p in decayed["params"]] == [True]
    assert len(spared["params"]) == 4
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1.6, 0.0)
    model["head"].weight = model["embed"].weight
    assert not split_weight_decay(model, 1.6)[0]["params"]
    with pytest.raises(ValueError, match="weight_decay"):
        split_weight_decay(model, -1.0)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(256, (24,), generator=generator(i))
        return {"input_ids": ids, "labels": ids.clone()}


def trainer(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    class MIRTrainer(MIRTrainerMixin, Trainer):
        pass

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4}
    mir = {"mask_token_id": 258}
    for name, value in options.items():
        (settings if name in settings or name.startswith("save") else mir)[name] = value
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        optim="sgd",
        max_grad_norm=0.0,
        **({"save_strategy": "no"} | settings),
    )
    return MIRTrainer(model=model, args=arguments, train_dataset=Rows(), **mir)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_trainer_step_is_a_step_on_the_loss(tmp_path):
    # With every position masked nothing is left to chance but the batch.
    start = byte_language_model(16, 1, random_state=0)
    run = trainer(copy.deepcopy(start), tmp_path, max_steps=1, mask_ratio=(1.0, 1.0))
    batch = next(iter(run.get_train_dataloader()))
    run = trainer(copy.deepcopy(start), tmp_path, max_steps=1, mask_ratio=(1.0, 1.0))
    run.train()

    model = copy.deepcopy(start).train()
    ids = batch["input_ids"]
    masked, _ = mask_inputs(ids, 258, mask_ratio=(1.0, 1.0))
    mir_loss(model(input_ids=ids).logits, model(input_ids=masked).logits, ids).backward()
    stepped = torch.cat([(p - 1e-2 * p.grad).detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(run.model), stepped, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(weights(start), stepped)


def test_hidden_states_give_the_same_step(tmp_path):
    models = []
    for hidden in (False, True):
        run = trainer(byte_language_model(16, 1), tmp_path, from_hidden_states=hidden)
        run.train()
        models.append(weights(run.model))
    torch.testing.assert_close(*models, atol=1e-6, rtol=1e-4)


def test_accumulation_equals_one_big_batch(tmp_path):
    results = []
    for accumulate in (1, 4):
        run = trainer(
            byte_language_model(16, 1),
            tmp_path,
            mask_ratio=(1.0, 1.0),
            per_device_train_batch_size=16 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
        )
        run.train()
        results.append(weights(run.model))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_resumed_run_draws_the_same_masks(tmp_path):
    whole = trainer(byte_language_model(16, 1), tmp_path / "whole", save_strategy="no")
    whole.train()
    first = trainer(
        byte_language_model(16, 1), tmp_path / "cut", save_strategy="steps", save_steps=2
    )
    first.train()
    second = trainer(byte_language_model(16, 1, random_state=5), tmp_path / "cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    torch.testing.assert_close(weights(second.model), weights(whole.model), atol=0, rtol=0)


def test_evaluation_uses_clean_inputs(tmp_path):
    model = byte_language_model(16, 1)
    run = trainer(model, tmp_path)
    ids = IDS[:, :24]
    run.model.eval()
    with torch.no_grad():
        loss, outputs = run.compute_loss(
            run.model, {"input_ids": ids, "labels": ids}, return_outputs=True
        )
    expected = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, 259), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)


def test_trainer_rejects_a_mask_token_without_a_row_and_in_labels(tmp_path):
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        trainer(byte_language_model(16, 1), tmp_path, mask_token_id=259)
    run = trainer(byte_language_model(16, 1), tmp_path, mask_token_id=7)
    ids = torch.full((1, 24), 7)
    with pytest.raises(ValueError, match="must not hold the mask token 7"):
        run.compute_loss(run.model, {"input_ids": ids, "labels": ids})
