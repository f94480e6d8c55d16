"""LfU: the consistency, the undesirable step, gradients against three passes with a copy."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sciml.lm import LfURegularizer, LfUTrainerMixin, consistency_loss

F64 = torch.float64


def llama(n_layers=2, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=n_layers,
        num_attention_heads=2, max_position_embeddings=64, attention_dropout=dropout,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    return model.train()


def batch(n_padding=0):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 17, (3, 7), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    attention = torch.ones_like(ids)
    if n_padding:
        ids = F.pad(ids, (0, n_padding), value=3)
        labels = F.pad(labels, (0, n_padding), value=-100)
        attention = F.pad(attention, (0, n_padding))
    return {"input_ids": ids, "labels": labels, "attention_mask": attention}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


KINDS = ["lora", "steering"]


def test_consistency_of_known_states():
    hidden = [torch.zeros(2, 2, 3, dtype=F64), torch.ones(2, 2, 3, dtype=F64)]
    aux = [torch.full((2, 2, 3), 2.0, dtype=F64), torch.ones(2, 2, 3, dtype=F64)]
    aux[1][1, 0] = 3.0
    # Layer 0: 12 at every token. Layer 1: 12 at one token of the second example.
    each = consistency_loss(hidden, aux, reduction="none")
    assert each.tolist() == [6.0, 9.0]
    assert consistency_loss(hidden, aux) == 7.5
    assert consistency_loss(hidden, aux, reduction="sum") == 15
    mask = torch.tensor([[1, 1], [0, 1]])
    assert consistency_loss(hidden, aux, mask, reduction="none").tolist() == [6.0, 6.0]
    assert consistency_loss(hidden, aux, torch.zeros(2, 2)).item() == 0.0


def test_consistency_gives_no_gradient_to_the_clean_states():
    hidden = [torch.randn(1, 2, 3, dtype=F64, requires_grad=True)]
    aux = [torch.randn(1, 2, 3, dtype=F64, requires_grad=True)]
    consistency_loss(hidden, aux).backward()
    assert hidden[0].grad is None
    torch.testing.assert_close(aux[0].grad, (aux[0] - hidden[0]).detach())  # 2 (h' - h) / T, T = 2
    assert torch.autograd.gradcheck(lambda a: consistency_loss(hidden, [a]), (aux[0],))


def test_padding_may_hold_anything():
    hidden, aux = [torch.zeros(1, 2, 3)], [torch.ones(1, 2, 3)]
    aux[0][0, 1] = math.nan
    assert consistency_loss(hidden, aux, torch.tensor([[1, 0]])) == 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_0_is_plain_fine_tuning_bit_by_bit(kind):
    plain, ours = llama(), llama()
    plain(**batch()).loss.backward()
    loss, parts = LfURegularizer(ours, perturbation=kind, alpha=0.0)(ours, batch())
    loss.backward()
    assert parts["consistency"] == 0
    assert loss.item() == plain(**batch()).loss.item()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(ours)[name], gradient), name


@pytest.mark.parametrize(("kind", "alpha"), [("lora", 1e-2), ("steering", 1e-3)])
def test_step_has_length_alpha_and_raises_the_loss_by_alpha_times_the_gradient(kind, alpha):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    regularizer = LfURegularizer(model, perturbation=kind, alpha=alpha)
    _, parts = regularizer(model, batch(), step=3)
    with regularizer.undesirable(model, batch(), step=3) as psi, torch.no_grad():
        length = torch.cat([p.flatten() for p in psi]).norm()
        worse = model(**batch()).loss
        for moved in psi:  # a step the other way, for the central difference
            moved.neg_()
        better = model(**batch()).loss
    torch.testing.assert_close(length.item(), alpha)
    assert better < parts["sft"] < worse
    gain = (worse - better) / (2 * alpha * parts["gradient_norm"])
    assert gain.item() == pytest.approx(1.0, abs=1e-2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_grows_with_the_square_of_alpha(kind):
    model = llama()
    ratios = []
    for alpha in (1e-3, 1e-4):
        regularizer = LfURegularizer(model, perturbation=kind, alpha=alpha)
        _, parts = regularizer(model, batch(), step=0)
        ratios.append(parts["consistency"].item() / alpha**2)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-2)
    assert ratios[0] > 0


class OneBlock(nn.Module):
    """Embedding, one linear block, output layer: the steering vector is all that h' - h can be."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, ids):
        return self.head(self.block(self.embedding(ids)))


def next_token_loss(model, inputs):
    logits = model(inputs["ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["ids"][:, 1:].flatten())


def test_steering_of_one_block_costs_alpha_squared():
    torch.manual_seed(0)
    model = OneBlock().double()
    inputs = {"ids": torch.randint(5, (2, 6))}
    regularizer = LfURegularizer(model, perturbation="steering", alpha=0.3, layers=[model.block])
    loss, parts = regularizer(model, inputs, next_token_loss)
    torch.testing.assert_close(parts["consistency"].item(), 0.09)
    torch.testing.assert_close(loss.item(), parts["sft"].item() + 0.09)
    hidden = model.block(model.embedding(inputs["ids"])).detach().requires_grad_()
    logits = model.head(hidden)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["ids"][:, 1:].flatten()).backward()
    g = hidden.grad.sum((0, 1))
    with regularizer.undesirable(model, inputs, next_token_loss) as (vector,):
        torch.testing.assert_close(vector, 0.3 * g / g.norm())


class WithPair(nn.Module):
    """A linear map with an explicit low-rank pair, for the oracle."""

    def __init__(self, linear, a, b):
        super().__init__()
        self.linear, self.a, self.b = linear, a, b

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


def oracle(model, inputs, regularizer, step):
    """Three passes: the model, a copy with B = 0 for g, the model with the stepped pairs."""
    plain = model(**inputs, output_hidden_states=False)
    hidden = block_outputs(model, inputs)
    drawn = [a for _, a in regularizer._initial_psi(step).values()]
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in ("q_proj", "v_proj")]

    def paired(base, bs):
        for name, a, b in zip(names, drawn, bs, strict=True):
            parent, _, leaf = name.rpartition(".")
            module = base.get_submodule(parent)
            setattr(module, leaf, WithPair(getattr(module, leaf), a, b))
        return base

    zeros = [
        torch.zeros(
            model.get_submodule(n).out_features, regularizer.rank, dtype=F64
        ).requires_grad_()
        for n in names
    ]
    aux = paired(copy.deepcopy(model), zeros)
    g = torch.autograd.grad(aux(**inputs).loss, zeros)
    norm = torch.sqrt(sum((x**2).sum() for x in g))
    stepped = [regularizer.alpha * x / norm for x in g]
    originals = [model.get_submodule(n) for n in names]
    aux_hidden = block_outputs(paired(model, stepped), inputs)
    for name, original in zip(names, originals, strict=True):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, original)
    mask = inputs["attention_mask"].bool()
    n_tokens = mask.sum(1)
    total = 0
    for h, h_aux in zip(hidden, aux_hidden, strict=True):
        squared = ((h.detach() - h_aux) ** 2).sum(-1)
        total = total + ((squared * mask).sum(1) / n_tokens).mean()
    return plain.loss, total / len(hidden)


def block_outputs(model, inputs):
    outputs, handles = [], []
    for block in model.model.layers:
        handles.append(block.register_forward_hook(lambda m, a, out: outputs.append(out)))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("n_padding", [0, 2])
def test_loss_and_gradient_equal_three_passes_with_a_copy(n_padding):
    model, inputs = llama(), batch(n_padding)
    regularizer = LfURegularizer(model, alpha=0.5, weight=3.0, rank=2)
    loss, parts = regularizer(model, inputs, step=4)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    sft, consistency = oracle(model, inputs, regularizer, 4)
    torch.testing.assert_close(parts["sft"], sft.detach())
    torch.testing.assert_close(parts["consistency"], consistency.detach())
    (sft + 3 * consistency).backward()
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)


def test_scaled_backward_scales_and_a_second_one_is_refused():
    model = llama()
    regularizer = LfURegularizer(model)
    loss, _ = regularizer(model, batch(), step=0)
    loss.backward()
    once = gradients(model)
    model.zero_grad()
    loss, _ = regularizer(model, batch(), step=0)
    (loss / 4).backward()
    for name, gradient in once.items():
        torch.testing.assert_close(gradients(model)[name], gradient / 4)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_columns_do_not_matter(kind):
    values = []
    for n_padding in (0, 3):
        model = llama()
        _, parts = LfURegularizer(model, perturbation=kind)(model, batch(n_padding))
        values.append(parts["consistency"])
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_restored_and_the_same_step_gives_the_same_loss(kind):
    model = llama()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    inputs = batch()
    names = [n for n, _ in model.named_parameters()]
    regularizer = LfURegularizer(model, perturbation=kind)
    first, _ = regularizer(model, inputs, step=1)
    state = torch.get_rng_state()
    again, _ = regularizer(model, inputs, step=1)
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = LfURegularizer(model, perturbation=kind, random_state=1)(model, inputs, step=1)
    assert first.item() == again.item()
    assert (first.item() == other.item()) is (kind == "steering")  # only A is random
    assert [m.training for m in model.modules()] == modes
    assert all(not m._forward_hooks for m in model.modules())
    assert [n for n, _ in model.named_parameters()] == names
    assert inputs.keys() == batch().keys()
    assert all(torch.equal(inputs[k], v) for k, v in batch().items())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_go_away_when_the_loss_fails():
    model = llama()

    def broken(model, inputs):
        model(**inputs)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        LfURegularizer(model)(model, batch(), broken)
    assert all(not m._forward_hooks for m in model.modules())


def test_calls_are_counted_and_each_draws_its_own_a():
    model = llama()
    regularizer = LfURegularizer(model, rank=1)
    counted = [regularizer(model, batch())[0].item() for _ in range(2)]
    named = [regularizer(model, batch(), step=step)[0].item() for step in range(2)]
    assert counted == named
    assert counted[0] != counted[1]


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_share_their_dropout(kind):
    """With alpha 0 the auxiliary model is the model; different masks would show."""
    model = llama(dropout=0.5)
    torch.manual_seed(0)
    _, parts = LfURegularizer(model, perturbation=kind, alpha=0.0)(model, batch())
    assert parts["consistency"] == 0
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model(**batch())
    assert torch.equal(state, torch.get_rng_state())  # as after one pass


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    results = []
    for checkpointing in (False, True):
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, _ = LfURegularizer(model, perturbation=kind, alpha=0.5)(model, batch(), step=0)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_learn_and_the_base_stays(kind):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    regularizer = LfURegularizer(model, perturbation=kind, alpha=0.5)
    assert len(regularizer.targets) == (4 if kind == "lora" else 0)
    loss, parts = regularizer(model, batch())
    loss.backward()
    assert parts["consistency"] > 0
    assert loss.item() == pytest.approx((parts["sft"] + parts["consistency"]).item())
    moved = gradients(model)
    assert moved
    assert all("lora_" in name for name in moved)
    assert list(model.peft_config) == ["default"]


def test_completion_positions_layers_and_targets():
    model, inputs = llama(n_layers=3), batch()
    regularizer = LfURegularizer(
        model, layers=[0, -1], target_modules="all-linear", positions="completion", alpha=0.5
    )
    assert regularizer.blocks == [model.model.layers[0], model.model.layers[2]]
    assert len(regularizer.targets) == 2 * 7
    _, parts = regularizer(model, inputs, step=0)
    hidden = [h.detach() for h in block_outputs(model, inputs)]
    with regularizer.undesirable(model, inputs, step=0), torch.no_grad():
        aux = block_outputs(model, inputs)
    expected = consistency_loss([hidden[0], hidden[2]], [aux[0], aux[2]], inputs["labels"] != -100)
    torch.testing.assert_close(parts["consistency"], expected)
    assert LfURegularizer(model, target_modules=["down_proj"]).targets == [
        block.mlp.down_proj for block in model.model.layers
    ]


def test_no_gradient_no_consistency():
    """A batch whose loss is constant in ψ takes no step: 0 / 0 must not come out."""
    model = llama()
    regularizer = LfURegularizer(model)
    loss, parts = regularizer(model, batch(), lambda m, x: 0 * m(**x).logits.sum())
    assert parts["gradient_norm"] == parts["consistency"] == loss == 0


class LfUTrainer(LfUTrainerMixin, Trainer):
    pass


def rows():
    """Items of different lengths, so that micro-batches weigh differently."""
    whole = batch()
    return [
        {"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist()}
        for n, ids, labels in zip((7, 5, 6), whole["input_ids"], whole["labels"], strict=True)
    ] * 4


def collate(items):
    (item,) = items
    return {name: torch.tensor([item[name]]) for name in item}


def arguments(folder, **more):
    options = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
    } | more  # fmt: skip
    return TrainingArguments(**options)


def test_trainer_weighs_micro_batches_by_their_tokens(tmp_path):
    """One step of SGD over three micro-batches is the step by hand."""
    options = {"alpha": 0.5, "weight": 2.0}
    model, by_hand = llama().float(), llama().float()
    trainer = LfUTrainer(
        model, arguments(tmp_path, max_steps=1), collate, rows()[:3],
        regularizer=lambda m: LfURegularizer(m, **options),
    )  # fmt: skip
    trainer.train()
    regularizer = LfURegularizer(by_hand, **options)
    batches = [collate([item]) for item in rows()[:3]]
    counts = [int((b["labels"] != -100).sum()) for b in batches]
    consistency = []
    for inputs, count in zip(batches, counts, strict=True):
        loss, parts = regularizer(by_hand, inputs, step=0)
        (loss * count / sum(counts)).backward()
        consistency.append(parts["consistency"])
    for name, parameter in by_hand.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)
    logged = trainer.state.log_history[0]["consistency"]
    assert logged == pytest.approx(torch.stack(consistency).mean().item(), rel=1e-5)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    def train(folder, resume=None, **more):
        model = llama(dropout=0.1).float()
        trainer = LfUTrainer(
            model, arguments(folder, learning_rate=1e-2, optim="adamw_torch", **more), collate,
            rows(), regularizer=lambda m: LfURegularizer(m, alpha=0.5),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight = train(tmp_path / "a")
    train(tmp_path / "b", max_steps=2, save_strategy="steps", save_steps=2)
    resumed = train(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2"))
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


def test_evaluation_reports_the_plain_loss(tmp_path):
    model = llama().float()
    trainer = LfUTrainer(model, arguments(tmp_path), collate, rows(), eval_dataset=rows()[:1])
    model.eval()
    expected = model(**collate(rows()[:1])).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha must be in"),
        ({"weight": -1.0}, "weight must be in"),
        ({"rank": 0}, "rank must be an integer"),
        ({"perturbation": "noise"}, "perturbation must be one of"),
        ({"positions": "prompt"}, "positions must be one of"),
        ({"target_modules": ["attn"]}, r"target_modules must name linear maps.*\['attn'\]"),
        ({"target_modules": "q_proj"}, "target_modules must be a sequence"),
        ({"layers": [7]}, r"layers must be an integer in \[-2, 1\]"),
        ({"layers": "last"}, "layers must be one of"),
        ({"layers": [nn.Linear(2, 2)]}, "layers must be modules of the model"),
        ({"layers": []}, "layers must name at least one"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LfURegularizer(llama(), **options)


def test_models_without_known_blocks_or_trainable_parts():
    with pytest.raises(ValueError, match=r"layers must be given as modules.*OneBlock"):
        LfURegularizer(OneBlock())
    model = llama()
    regularizer = LfURegularizer(model)
    with pytest.raises(ValueError, match="inputs must hold labels"):
        regularizer(model, {"input_ids": batch()["input_ids"]})
    with pytest.raises(ValueError, match="no gradient reached it"):
        regularizer(model, batch(), lambda m, x: m(**x).loss.detach() + m.lm_head.weight.sum())
    with pytest.raises(ValueError, match="parameter that requires a gradient"):
        regularizer(model.requires_grad_(False), batch())


def test_bad_states():
    h = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="same number of layers"):
        consistency_loss([h], [])
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 3, 5\) in layer 0"):
        consistency_loss([h], [torch.zeros(2, 3, 5)])
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\), got \(2, 4\)"):
        consistency_loss([h], [h], torch.ones(2, 4))
