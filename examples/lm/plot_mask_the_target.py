"""
Fine-tune without forgetting: mask the target
=============================================

Fine-tuning by LoRA on text that is far from what a model was trained on makes it forget that.
:class:`~sciml.lm.TargetMaskedKL` (arXiv:2605.29498) adds a divergence from the base model to the
cross-entropy, over all tokens but the one to be learned. That needs none of the old text, and it
does not push against what is being learned. Its rival is the full KL divergence.
"""

# %%
# The base model: a tiny Llama over bytes, trained on the documentation of Python. The new text is
# source code.
import argparse
import copy
import inspect
import math
import typing

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model

from sciml.lm import (
    TargetMaskedKL,
    byte_language_model,
    combine,
    encode_bytes,
    english_text,
    forward_kl,
    label_logp,
    perplexity,
    reference,
    sum_rows,
    supervised_labels,
    token_weights,
    train_byte_language_model,
)

text = english_text()
base = byte_language_model(hidden_size=64, num_layers=2, random_state=0)
losses = train_byte_language_model(base, text[:-20_000], n_steps=500, learning_rate=5e-3)

code = encode_bytes(inspect.getsource(typing) + inspect.getsource(argparse))
task, task_test, english_test = code[:-20_000], code[-20_000:], text[-20_000:]


def evaluate(model):
    """Nats per byte on code and on English."""
    return [math.log(perplexity(model, test)) for test in (task_test, english_test)]


start = evaluate(base)
print(f"base: code {start[0]:.3f}, English {start[1]:.3f} nats per byte")


# %%
# The rival, in the library's own terms: one reduction of the logits with two columns.
def full_kl(weight):
    columns = combine((label_logp, [1]), (forward_kl, [0]))

    def objective(logits, labels, *, ref_logits):
        labels, mask = supervised_labels(logits, labels)
        weights = token_weights(mask)
        weights = torch.stack([-weights, weight * weights], dim=-1)
        loss, _ = sum_rows(columns, logits, ref_logits, labels, weights=weights, mask=mask)
        return loss

    return objective


# %%
# Fine-tuning: the reference is the same model with its adapters off. With a Trainer this loop is
# ``class MyTrainer(TargetMaskedKLTrainerMixin, Trainer)``.
def finetune(objective, random_state=0, n_steps=100):
    torch.manual_seed(random_state)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    model.train()
    for _ in range(n_steps):
        starts = torch.randint(len(task) - 128, (8, 1))
        batch = task[starts + torch.arange(128)]
        with reference(model) as frozen:
            ref_logits = frozen(input_ids=batch).logits
        loss = objective(model(input_ids=batch).logits, batch, ref_logits=ref_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluate(model.eval())


weights = (0.3, 1.0, 3.0)
cross_entropy = finetune(TargetMaskedKL(0.0))
masked = [finetune(TargetMaskedKL(weight)) for weight in weights]
full = [finetune(full_kl(weight)) for weight in weights]

rise = cross_entropy[1] - start[1]
print("\n                      code  English  forgetting avoided")
print(f"cross-entropy     {cross_entropy[0]:8.3f} {cross_entropy[1]:8.3f}")
for name, results in (("target-masked KL", masked), ("full KL", full)):
    for weight, (new, old) in zip(weights, results, strict=True):
        avoided = 100 * (1 - (old - start[1]) / rise)
        print(f"{name:16s} {weight:3} {new:6.3f} {old:8.3f} {avoided:10.0f} %")

# %%
# Lower left is better. Both divergences buy retention with learning, and the weight decides how
# much; the masked one, whose gradient on the target is exactly zero, pays a little less for it.
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, results, marker in (("target-masked KL", masked, "o"), ("full KL", full, "s")):
    curve = [cross_entropy, *results]
    axes.plot([new for new, _ in curve], [old for _, old in curve], marker=marker, label=name)
    for weight, point in zip(weights, results, strict=True):
        axes.annotate(f" {weight}", point, fontsize=8)
axes.plot(*cross_entropy, "k*", markersize=12, label="cross-entropy alone")
axes.axhline(start[1], color="grey", linestyle=":", label="base model")
axes.set(xlabel="code (nats per byte)", ylabel="English (nats per byte)")
axes.legend()
plt.show()
