"""Time and memory of an LfU step against three forward passes with a copy of the model.

The naive form: the model's own pass for loss and hidden states; a deep copy with low-rank pairs,
whose pass and backward pass give the undesirable step; another pass of the copy for its hidden
states, whose gradient is added to the model's. Time is a median within one process; memory is the
growth of the peak resident size of a process that takes one step, over the model's own.

    python benchmarks/lm/bench_lfu.py
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sciml.lm import LfURegularizer, consistency_loss

VOCABULARY, BATCH, TOKENS, REPEATS = 16_000, 4, 192, 5


class Pair(nn.Module):
    def __init__(self, linear, rank=8):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


def collect(model):
    """Outputs of the decoder blocks of the next pass, and how to stop."""
    outputs = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handles = [
        block.register_forward_hook(lambda m, a, out: outputs.append(out))
        for block in base.model.layers
    ]
    return outputs, handles


def naive_step(model, inputs, alpha=0.1, weight=1.0):
    hidden, handles = collect(model)
    loss = model(**inputs).loss
    for handle in handles:
        handle.remove()
    aux = copy.deepcopy(model)
    names = [n for n, _ in aux.named_modules() if n.rpartition(".")[2] in ("q_proj", "v_proj")]
    pairs = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        pairs.append(Pair(aux.get_submodule(name)))
        setattr(aux.get_submodule(parent), leaf, pairs[-1])
    psi = [p for pair in pairs for p in (pair.a, pair.b)]
    gradients = torch.autograd.grad(aux(**inputs).loss, psi)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(psi, gradients, strict=True):
            p.add_(alpha * g / norm)
    aux_hidden, _ = collect(aux)
    aux(**inputs)
    consistency = weight * consistency_loss(hidden, aux_hidden)
    parameters = dict(model.named_parameters())
    of_copy = [
        (n.replace(".linear.", "."), p) for n, p in aux.named_parameters() if "proj.a" not in n
    ]
    of_copy = [(n, p) for n, p in of_copy if not n.endswith("proj.b") and p.requires_grad]
    gradients = torch.autograd.grad(consistency, [p for _, p in of_copy], allow_unused=True)
    loss.backward()
    for (name, _), g in zip(of_copy, gradients, strict=True):
        if g is not None:
            parameters[name].grad.add_(g)
    return loss.item() + consistency.item()


def this_step(model, inputs, alpha=0.1, perturbation="lora"):
    loss, _ = LfURegularizer(model, alpha=alpha, perturbation=perturbation)(model, inputs)
    loss.backward()
    return loss.item()


def steering_step(model, inputs):
    return this_step(model, inputs, perturbation="steering")


def fine_tuning_step(model, inputs):
    loss = model(**inputs).loss
    loss.backward()
    return loss.item()


STEPS = {
    "naive": naive_step, "lora": this_step, "steering": steering_step, "plain": fine_tuning_step
}  # fmt: skip
NAMES = {
    "naive": "copy, three forward passes", "lora": "LfURegularizer, lora",
    "steering": "LfURegularizer, steering", "plain": "plain fine-tuning",
}  # fmt: skip


def setting(adapters):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=8,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
    return model.train(), {"input_ids": ids, "labels": ids}


def peak_megabytes():
    # Linux only; not getrusage, whose maximum a child process inherits from its parent.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=STEPS, help="take one step and print its memory")
    parser.add_argument("--adapters", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        model, inputs = setting(arguments.adapters)
        small = {name: value[:1, :8] for name, value in inputs.items()}
        STEPS[arguments.one](model, small)  # what is allocated once
        before = peak_megabytes()
        STEPS[arguments.one](model, inputs)
        print(peak_megabytes() - before)
        return
    print(f"Llama of 8 x 256, {VOCABULARY} tokens, batch {BATCH} x {TOKENS}, float32, CPU")
    for adapters in (False, True):
        model, inputs = setting(adapters)
        print(f"\n{'LoRA' if adapters else 'all weights':28} s a step  naive / this   MB  / naive")
        naive_time = naive_memory = 0.0
        for name, step in STEPS.items():
            seconds = []
            for _ in range(REPEATS):
                model.zero_grad()
                start = time.perf_counter()
                step(model, inputs)
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds[1:])
            command = [sys.executable, __file__, "--one", name]
            command += ["--adapters"] if adapters else []
            memory = float(subprocess.run(command, capture_output=True, text=True).stdout)
            if name == "naive":
                naive_time, naive_memory = median, memory
            print(
                f"{NAMES[name]:28} {median:8.3f} {naive_time / median:13.2f} {memory:6.0f} "
                f"{memory / naive_memory:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
