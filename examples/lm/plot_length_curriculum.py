"""
Short responses first, longer ones while entropy lasts
======================================================

On-policy distillation lets the student write, and a student that cannot yet write wastes most of
what it writes. A cap on the length that rises only while the student's entropy is high spends the
same number of updates on fewer tokens. The task can be checked: the running sums, modulo 10, of
six digits.
"""

# %%
# The task
# --------
# The prompt is six digits and ``=``, the response their six running sums and the end token. All
# sums after a wrong one are relative to it, so the teacher can go on from a student's mistake.
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sciml.lm import Distiller, EntropyGatedLengthCurriculum

N_DIGITS, EQUALS, EOS, PAD = 6, 10, 11, 12
LENGTHS, STEPS, N_SEEDS = (2, 4, 8), 240, 3


def problems(n, seed):
    digits = np.random.default_rng(seed).integers(10, size=(n, N_DIGITS))
    sums = digits.cumsum(1) % 10
    prompts = np.concatenate([digits, np.full((n, 1), EQUALS)], 1)
    return torch.from_numpy(prompts), torch.from_numpy(sums)


def language_model(hidden_size, n_layers, seed):
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def supervise(model, n_steps, seed, batch_size=64):
    """Cross entropy on right responses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(n_steps):
        prompts, sums = problems(batch_size, [seed, step])
        ids = torch.cat([prompts, sums, torch.full((batch_size, 1), EOS)], 1)
        labels = ids.clone()
        labels[:, : N_DIGITS + 1] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# %%
# Teacher and student
# -------------------
# The smaller student is stopped early: it knows the form, not yet the sums.
held_out, held_out_sums = problems(100, 1)


def accuracy(model):
    """Share of held-out problems whose last sum is right, decoded greedily at the full length."""
    reader = Distiller(model, model, sampling_temperature=0.0)
    responses = reader.generate(model, list(held_out), max_new_tokens=LENGTHS[-1], seed=0)
    right = [
        len(r) == N_DIGITS + 1 and r[-1] == EOS and r[-2] == sums[-1]
        for r, sums in zip(responses, held_out_sums, strict=True)
    ]
    return float(np.mean(right))


def make_pair(seed):
    teacher = language_model(64, 2, seed)
    supervise(teacher, 400, seed)
    student = language_model(48, 2, 100 + seed)
    supervise(student, 80, 100 + seed)
    return teacher, student


# %%
# The same updates at a fixed cap and under the curriculum
# --------------------------------------------------------
# A low entropy is meant to betray a student that repeats itself. Where there is one right answer it
# also falls as the student learns, and the default gate, half of the initial entropy, would freeze
# the cap of a student that has just mastered two tokens. Hence an absolute, small threshold.
results = {name: [] for name in ("fixed", "curriculum")}
for seed in range(N_SEEDS):
    teacher, student = make_pair(seed)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    print(
        f"seed {seed}: teacher {accuracy(teacher):.2f}, student {accuracy(student):.2f}", flush=True
    )
    prompts, _ = problems(2000, [2, seed])
    for name in results:
        student.load_state_dict(start)
        ladder = EntropyGatedLengthCurriculum(LENGTHS, stage_steps=40, min_entropy=0.02)
        distiller = Distiller(
            student,
            teacher,
            objective="mixed_kl",
            max_new_tokens=LENGTHS[-1],
            curriculum=ladder if name == "curriculum" else None,
            learning_rate=3e-3,
            random_state=seed,
        )
        distiller.fit(
            list(prompts),
            n_steps=STEPS,
            batch_size=32,
            validation_prompts=list(held_out),
            validation_every=40,
            metric=lambda prompts, responses, model=student: {"accuracy": accuracy(model)},
        )
        curve = [
            (e["step"], e.get("generated_tokens", 0), e["val_accuracy"], e["val_entropy"])
            for e in distiller.history_
            if "val_accuracy" in e
        ]
        results[name].append(np.array(curve))
        print(
            f"  {name:>10}: {curve[-1][1]:6d} tokens, accuracy {curve[-1][2]:.2f}, entropy "
            f"{curve[-1][3]:.2f}, last cap {distiller.cap}",
            flush=True,
        )

# %%
# Accuracy by updates and by tokens written
# -----------------------------------------
fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for name, curves in results.items():
    mean = np.mean(curves, axis=0)
    axes[0].plot(mean[:, 0], mean[:, 2], "o-", label=name)
    axes[1].plot(mean[:, 1], mean[:, 2], "o-", label=name)
axes[0].set(xlabel="updates", ylabel="accuracy", title=f"mean of {N_SEEDS} seeds")
axes[1].set(xlabel="tokens that the student wrote")
axes[0].legend()
fig.savefig("length_curriculum.png")
plt.show()
