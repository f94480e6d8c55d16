"""ChiPOTrainer on a tiny random Llama: DPO's steps without the χ² term, its own with it."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from sciml.lm import ChiPOConfig, ChiPOTrainer, chipo_loss

WORDS = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "four", "five", "six", "plus", "is"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL reports no usage then
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(
        [
            {"prompt": "one plus two is", "chosen": " three", "rejected": " four five"},
            {"prompt": "two plus two is", "chosen": " four", "rejected": " six"},
            {"prompt": "one plus three is", "chosen": " four", "rejected": " two"},
            {"prompt": "four plus two is", "chosen": " six", "rejected": " one one"},
        ]
    )


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def lora_model():
    model = tiny_model()
    torch.manual_seed(1)
    return get_peft_model(model, LORA)


def options(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "seed": 0, "disable_tqdm": True, "beta": 0.5,
    } | more  # fmt: skip


def train(cls, config, model, data, tokenizer, ref_model=None):
    trainer = cls(
        model, ref_model=ref_model, args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return trainer


def trainable(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("peft", [False, True])
def test_without_the_chi2_term_every_step_is_dpo(tmp_path, data, tokenizer, peft):
    results = []
    for cls, config in (
        (DPOTrainer, DPOConfig(**options(tmp_path))),
        (ChiPOTrainer, ChiPOConfig(**options(tmp_path, chi_weight=0.0))),
    ):
        model, ref = (lora_model(), None) if peft else (tiny_model(), tiny_model())
        trainer = train(cls, config, model, data, tokenizer, ref)
        results.append((trainable(model), trainer.state.log_history))
    (dpo, dpo_logs), (chipo, chipo_logs) = results
    assert dpo.keys() == chipo.keys()
    for name, value in dpo.items():
        torch.testing.assert_close(chipo[name], value, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(chipo_logs[:3], dpo_logs[:3], strict=True):
        assert ours.keys() == theirs.keys()  # metrics have TRL's names, and its values
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("peft", [False, True])
def test_training_lowers_the_loss_and_logs_the_implicit_rewards(tmp_path, data, tokenizer, peft):
    config = ChiPOConfig(**options(tmp_path, max_steps=16, per_device_train_batch_size=4))
    model, ref = (lora_model(), None) if peft else (tiny_model(), tiny_model())
    before = trainable(model)
    trainer = train(ChiPOTrainer, config, model, data, tokenizer, ref)
    after = trainable(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0.5, abs=1e-5)  # beta phi(1)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert last["loss"] < 0.6
    assert last["rewards/accuracies"] == 1.0
    margin = last["rewards/chosen"] - last["rewards/rejected"]
    assert last["rewards/margins"] == pytest.approx(margin, rel=1e-4)


def batch_of(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_loss_of_a_batch_is_the_function_of_its_log_probabilities(tmp_path, data, tokenizer):
    model, ref = tiny_model(0), tiny_model(1)
    config = ChiPOConfig(**options(tmp_path, r_max=0.6, label_smoothing=0.1))
    trainer = ChiPOTrainer(
        model, ref_model=ref, args=config, train_dataset=data, processing_class=tokenizer
    )
    batch = batch_of(trainer)

    def logps(network):
        shown = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        each = shown.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])
        return (each[..., 0] * batch["completion_mask"][:, 1:]).sum(1).chunk(2)

    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, batch)
    gradient = torch.autograd.grad(ours, model.model.layers[0].mlp.up_proj.weight)[0]
    expected = chipo_loss(*logps(model), *logps(ref), beta=0.5, r_max=0.6, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected)
    expected_gradient = torch.autograd.grad(expected, model.model.layers[0].mlp.up_proj.weight)[0]
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_precomputed_references_give_the_same_weights(tmp_path, data, tokenizer):
    weights = []
    for precompute in (False, True):
        config = ChiPOConfig(**options(tmp_path, precompute_ref_log_probs=precompute))
        model = tiny_model()
        trainer = train(ChiPOTrainer, config, model, data, tokenizer, tiny_model())
        assert trainer.precompute_ref_logps is precompute
        weights.append(trainable(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)


def test_evaluation_returns_the_loss_and_rewards_of_chipo(tmp_path, data, tokenizer):
    model = tiny_model(1)
    reference = copy.deepcopy(model)
    config = ChiPOConfig(**options(tmp_path))
    trainer = ChiPOTrainer(
        model, ref_model=reference, args=config, train_dataset=data, eval_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.5, abs=1e-5)


def test_a_plain_dpo_config_means_the_default_options(tmp_path, data, tokenizer):
    losses = []
    for config in (DPOConfig(**options(tmp_path)), ChiPOConfig(**options(tmp_path))):
        trainer = train(ChiPOTrainer, config, tiny_model(), data, tokenizer, tiny_model())
        losses.append([row["loss"] for row in trainer.state.log_history[:3]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss_type": ["ipo"]}, "loss_type must keep its default"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type must keep its default"),
        ({"use_weighting": True}, "use_weighting must keep its default"),
        ({"beta": 0.0}, "beta must be in"),
        ({"label_smoothing": 0.7}, "label_smoothing must be in"),
        ({"r_max": -1.0}, "r_max must be in"),
        ({"chi_weight": -1.0}, "chi_weight must be in"),
    ],
)
def test_options_of_dpo_alone_and_bad_ones_are_refused(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        ChiPOConfig(**options(tmp_path, **bad))
