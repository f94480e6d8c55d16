"""LfU, NEFTune and plain fine-tuning on 64 sums: what is learned and what is forgotten (slow)."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sciml.lm import LfURegularizer

MODULUS, WORDINGS, LENGTH = 17, 5, 4
EQUALS, END, ADD, COPY, REVERSE, NUMBER = 1, 2, 3, 8, 13, 18


def sequence(task, wording, question, answer):
    n = len(question)
    parts = [wording + task, question + NUMBER, torch.full((n, 1), EQUALS), answer + NUMBER]
    ids = torch.cat([*parts, torch.full((n, 1), END)], dim=1)
    labels = ids.clone()
    labels[:, : question.shape[1] + 2] = -100
    return {"input_ids": ids, "labels": labels}


def sums(pairs, wording):
    return sequence(ADD, wording, pairs, pairs.sum(1, keepdim=True) % MODULUS)


def strings(task, wording, generator):
    numbers = torch.randint(MODULUS, (len(wording), LENGTH), generator=generator)
    return sequence(task, wording, numbers, numbers if task == COPY else numbers.flip(1))


def pretrained(known, n_steps=500):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBER + MODULUS, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=32, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = (
            2e-3 * min(1, (step + 1) / 100) * (1 - 0.9 * step / n_steps)
        )
        wording = torch.randint(WORDINGS, (64, 1), generator=generator)
        chosen = known[torch.randint(len(known), (64,), generator=generator)]
        loss = model(**sums(chosen, wording)).loss
        for task in (COPY, REVERSE):
            loss = loss + model(**strings(task, wording, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def fine_tuned(base, pairs, method, seed, alpha=0.0, weight=1.0, n_steps=120, rate=5e-4):
    model = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    regularizer = LfURegularizer(
        model, alpha=alpha, weight=weight, random_state=seed,
        perturbation="steering" if "steering" in method else "lora",
    )  # fmt: skip
    for step in range(n_steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * cosine
        chosen = pairs[torch.randperm(len(pairs), generator=generator)[:16]]
        inputs = sums(chosen, torch.zeros(16, 1, dtype=torch.long))
        if method == "SFT":
            loss = model(**inputs).loss
        elif method == "NEFTune":
            embedded = model.get_input_embeddings()(inputs["input_ids"])
            noise = 2 * torch.rand(embedded.shape, generator=generator) - 1
            noise = alpha * noise / (embedded.shape[1] * embedded.shape[2]) ** 0.5
            loss = model(inputs_embeds=embedded + noise, labels=inputs["labels"]).loss
        else:
            loss, _ = regularizer(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, data):
    predicted = model(input_ids=data["input_ids"]).logits[:, :-1].argmax(-1)
    labels = data["labels"][:, 1:]
    return ((predicted == labels) | (labels == -100)).all(1).float().mean().item()


def measure(model, unseen):
    """Accuracy on unseen sums, its standard deviation over wordings, accuracy on other tasks."""
    generator = torch.Generator().manual_seed(1)
    wordings = [torch.full((200, 1), i) for i in range(WORDINGS)]
    added = torch.tensor([accuracy(model, sums(unseen, w[: len(unseen)])) for w in wordings])
    kept = [accuracy(model, strings(t, w, generator)) for t in (COPY, REVERSE) for w in wordings]
    return added.mean().item(), added.std().item(), sum(kept) / len(kept)


@pytest.mark.slow
def test_a_small_undesirable_step_does_not_harm_and_a_large_one_does():
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    base = pretrained(pairs[:160])
    rest = pairs[160:]
    print("\nsums, standard deviation over wordings, other tasks; before:", measure(base, rest))
    settings = {
        "SFT": {"method": "SFT"},
        "NEFTune, alpha 0.1": {"method": "NEFTune", "alpha": 0.1},
        "LfU lora, alpha 0.01": {"method": "LfU", "alpha": 0.01},
        "LfU lora, alpha 0.1": {"method": "LfU", "alpha": 0.1},
        "LfU steering, alpha 0.003": {"method": "LfU steering", "alpha": 0.003},
    }
    means = {}
    for name, options in settings.items():
        rows = []
        for seed in range(3):
            order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
            model = fine_tuned(base, rest[order[:64]], seed=seed, **options)
            rows.append(measure(model, rest[order[64:]]))
        means[name] = torch.tensor(rows).mean(0)
        print(f"{name:26}", *(f"{m:.3f}" for m in means[name]), "seeds", rows, flush=True)
    sft, lfu, large = (means[n] for n in ("SFT", "LfU lora, alpha 0.01", "LfU lora, alpha 0.1"))
    assert lfu[0] >= sft[0] - 0.05
    assert lfu[2] >= sft[2] - 0.05
    assert large[2] < lfu[2]
