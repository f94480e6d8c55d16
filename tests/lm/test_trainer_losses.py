import pytest
import torch
from transformers import Trainer, TrainingArguments

from sciml.lm import (
    HiddenLogits,
    ReferenceLossMixin,
    as_compute_loss_func,
    byte_language_model,
    encode_bytes,
    english_text,
    forward_kl,
    hidden_logits,
    label_logp,
    reduce_rows,
    reduce_tokens,
    reference,
    supervised_labels,
    token_logps,
)


def nll(logits, labels, *, num_items_in_batch=None):
    logps, mask = token_logps(logits, labels)
    return -reduce_tokens(logps, mask, num_items_in_batch=num_items_in_batch)


def nll_and_kl(logits, labels, *, ref_logits, num_items_in_batch=None):
    labels, mask = supervised_labels(logits, labels)
    kl = reduce_rows(forward_kl, logits, ref_logits, mask=mask).squeeze(-1)
    logps = reduce_rows(label_logp, logits, labels, mask=mask).squeeze(-1)
    loss = reduce_tokens(kl - logps, mask, num_items_in_batch=num_items_in_batch)
    return loss, {"kl": reduce_tokens(kl, mask)}


def data(n=16, length=20):
    ids = encode_bytes(english_text()[: n * length]).reshape(n, length)
    items = []
    for i, row in enumerate(ids):
        labels = row.clone()
        labels[: i % 7] = -100  # rows with different numbers of labels
        items.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels})
    return items


def arguments(folder, **changes):
    options = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    return TrainingArguments(**{**options, **changes})


def tiny():
    return byte_language_model(16, 1, 2)


def lora_model():
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(
            tiny(),
            LoraConfig(
                r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1
            ),
        )


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


class KLTrainer(ReferenceLossMixin, Trainer):
    pass


def reference_trainer(model, args, **options):
    return KLTrainer(model=model, args=args, train_dataset=data(), objective=nll_and_kl, **options)


def test_compute_loss_func_equals_the_stock_loss(tmp_path):
    weights = []
    for func in (None, as_compute_loss_func(nll)):
        model = tiny()
        args = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
        Trainer(model=model, args=args, train_dataset=data(), compute_loss_func=func).train()
        weights.append(trained(model))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights[0], trained(tiny()), atol=1e-4)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    func = as_compute_loss_func(nll)
    weights = []
    for size, steps in ((16, 1), (4, 4)):
        model = tiny()
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        Trainer(model=model, args=args, train_dataset=data(), compute_loss_func=func).train()
        weights.append(trained(model))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", [False, True])
def test_mixin_accumulates_as_one_batch(tmp_path, hidden):
    weights = []
    for size, steps in ((16, 1), (4, 4)):
        model = lora_model()
        for module in model.modules():  # dropout would draw other masks
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        trainer = reference_trainer(model, args, from_hidden_states=hidden)
        trainer.train()
        weights.append(trained(model))
        assert trainer.state.log_history[0]["kl"] > 0
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights[0], trained(lora_model()), atol=1e-4)


def test_mixin_in_trl_equals_transformers(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class KLSFTTrainer(ReferenceLossMixin, SFTTrainer):
        pass

    rows = [
        {"input_ids": item["input_ids"].tolist(), "labels": item["labels"].tolist()}
        for item in data()
    ]
    weights = []
    for sft in (False, True):
        model = tiny()
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        other = byte_language_model(16, 1, 2, random_state=1)
        if sft:
            args = SFTConfig(
                **{
                    **arguments(tmp_path, **options).to_dict(),
                    "bf16": False,
                    "activation_checkpointing": False,
                    "dataset_kwargs": {"skip_prepare_dataset": True},
                    "max_length": None,
                }
            )
            trainer = KLSFTTrainer(
                model=model,
                args=args,
                train_dataset=Dataset.from_list(rows),
                processing_class=byte_tokenizer(),
                objective=nll_and_kl,
                ref_model=other,
            )
        else:
            trainer = reference_trainer(model, arguments(tmp_path, **options), ref_model=other)
        trainer.train()
        weights.append(trained(model))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def byte_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"b{i}": i for i in range(256)} | {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="b0")),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


class Killed(Exception):
    pass


def test_killed_and_resumed_gives_the_same_weights(tmp_path):
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    def run(folder, callbacks, resume):
        model = lora_model()
        args = arguments(
            folder,
            max_steps=8,
            optim="adamw_torch",
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=3,
        )
        trainer = reference_trainer(model, args, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trained(model)

    whole = run(tmp_path / "whole", [], None)
    with pytest.raises(Killed):
        run(tmp_path / "killed", [Kill()], None)
    resumed = run(tmp_path / "killed", [], True)
    assert torch.equal(resumed, whole)


def test_evaluation_gives_the_loss_and_the_logits(tmp_path):
    model = lora_model()
    args = arguments(tmp_path, per_device_eval_batch_size=16)
    trainer = KLTrainer(model=model, args=args, objective=nll_and_kl, from_hidden_states=True)
    result = trainer.predict(data())
    assert result.predictions.shape == (16, 20, 259)
    batch = {name: torch.stack([item[name] for item in data()]) for name in data()[0]}
    labels = batch.pop("labels")
    model.eval()
    with reference(model) as frozen:
        ref_logits = frozen(**batch).logits
    expected, _ = nll_and_kl(model(**batch).logits, labels, ref_logits=ref_logits)
    assert result.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("make", [tiny, lora_model])
def test_hidden_logits_equal_logits_with_gradients(make):
    model = make().double()
    ids = torch.stack([item["input_ids"] for item in data(3)])
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for hidden in (False, True):
        model.eval()
        logits = hidden_logits(model, input_ids=ids) if hidden else model(input_ids=ids).logits
        if hidden:
            assert isinstance(logits, HiddenLogits)
            product = logits.hidden @ logits.weight.T
            torch.testing.assert_close(product, model(input_ids=ids).logits)
        gradients.append(torch.autograd.grad(nll(logits, ids), parameters))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_hidden_logits_refuses_what_it_would_get_wrong():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="labels must not be among the inputs"):
        hidden_logits(tiny(), input_ids=ids, labels=ids)
    adapted = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="plain torch.nn.Linear"):
        hidden_logits(adapted, input_ids=ids)
    capped = tiny()
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping = 30.0"):
        hidden_logits(capped, input_ids=ids)
    prompted = get_peft_model(
        tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(ValueError, match="learned prompts"):
        hidden_logits(prompted, input_ids=ids)


def test_missing_labels_and_reference_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no labels"):
        as_compute_loss_func(nll)({"logits": torch.zeros(1, 2, 3)}, None)
    with pytest.raises(ValueError, match="give ref_model"):
        reference_trainer(tiny(), arguments(tmp_path))
    trainer = reference_trainer(lora_model(), arguments(tmp_path))
    with pytest.raises(ValueError, match="must have labels"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})
