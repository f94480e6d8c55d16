"""Time of an EKSFT step against the official code's three forward passes; ratios are printed.

The official form, written here from its description: a pass of model and reference without
gradients scores the tokens, a second pass of the model is differentiated; softmax, logarithm and
products of the size of the logits each stand on their own. The same loss (``variant="official"``)
is computed by both.

    python benchmarks/lm/bench_eksft.py
"""

import copy
import statistics
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sciml.lm import eksft_loss, hidden_logits, reference

VOCABULARY, BATCH, TOKENS, REPEATS = 32_000, 2, 192, 5


def official_step(model, ref_model, ids, labels, ratio=0.2, lambda_entropy=0.05, lambda_kl=0.05):
    with reference(model, ref_model) as frozen:
        ref_logits = frozen(input_ids=ids).logits
    valid = labels != -100
    with torch.no_grad():
        scoring = model(input_ids=ids).logits
        logp = F.log_softmax(scoring, dim=-1)
        p = F.softmax(scoring, dim=-1)
        ref_logp = F.log_softmax(ref_logits, dim=-1)
        entropy = -(p * logp).sum(-1)
        kl = (p * (logp - ref_logp).clamp(-1e10, 1e10)).sum(-1)
        k = int(ratio * int(valid.sum()))
        selected = []
        for score in (entropy, kl):
            flat = score.masked_fill(~valid, -torch.inf).flatten()
            chosen = torch.zeros_like(flat, dtype=torch.bool)
            chosen[flat.topk(k).indices] = True
            selected.append(chosen.view_as(valid))
    by_entropy, by_kl = selected
    logits = model(input_ids=ids).logits
    masked = labels.masked_fill(by_entropy | by_kl, -100)
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), masked[:, 1:].flatten())
    p = F.softmax(logits, dim=-1)
    entropy = -(p * torch.log(p + 1e-12)).sum(-1)
    entropy = (entropy * by_entropy).sum() / by_entropy.sum() / torch.log(torch.tensor(VOCABULARY))
    kl = ((p * (p - F.log_softmax(ref_logits, dim=-1))).sum(-1) * by_kl).sum() / by_kl.sum()
    lambda_entropy *= 1.05 if entropy < 0.5 else 0.95
    lambda_kl *= 1.05 if kl > 2.0 else 0.95
    return ce - lambda_entropy * entropy + lambda_kl * kl


def logits_step(model, ref_model, ids, labels, variant="official"):
    with reference(model, ref_model) as frozen:
        ref_logits = frozen(input_ids=ids).logits
    return eksft_loss(model(input_ids=ids).logits, labels, ref_logits=ref_logits, variant=variant)


def hidden_step(model, ref_model, ids, labels, variant="official"):
    with reference(model, ref_model) as frozen:
        ref_logits = hidden_logits(frozen, input_ids=ids)
    logits = hidden_logits(model, input_ids=ids)
    return eksft_loss(logits, labels, ref_logits=ref_logits, variant=variant)


def fine_tuning_step(model, ref_model, ids, labels):
    return model(input_ids=ids, labels=labels).loss


STEPS = {
    "official, three forward passes": official_step,
    "eksft_loss of logits": logits_step,
    "eksft_loss of hidden states": hidden_step,
    "plain fine-tuning": fine_tuning_step,
}


def measure(step, model, ref_model, ids, labels):
    """Median seconds of forward and backward passes, and the loss."""
    seconds = []
    for _ in range(REPEATS + 1):
        model.zero_grad()
        start = time.perf_counter()
        loss = step(model, ref_model, ids, labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), loss.item()


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=8,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
    labels = ids.clone()
    labels[:, : TOKENS // 4] = -100
    ref_model = copy.deepcopy(base)
    with torch.no_grad():  # a model that has drifted
        for parameter in base.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    lora = get_peft_model(
        copy.deepcopy(ref_model),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    print(f"Llama of 8 x 256, {VOCABULARY} tokens, batch {BATCH} x {TOKENS}, float32, CPU")
    for title, model, ref in (("all weights", base, ref_model), ("LoRA", lora, None)):
        print(f"\n{title:32} s a step   official / this   loss")
        official = None
        for name, step in STEPS.items():
            seconds, loss = measure(step, model, ref, ids, labels)
            official = official or seconds
            print(f"{name:32} {seconds:8.3f} {official / seconds:17.2f}   {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
