"""
Whose prefixes, and which direction of the divergence
=====================================================

A student that cannot be its teacher must give something up. Forward KL makes it cover all that the
teacher does, reverse KL makes it do what the teacher does most; and it learns either on the
teacher's text or on its own. Here the truth is known: the teacher is a Markov chain of order 2, the
student one of order 1.
"""

# %%
# Models as tables of logits
# --------------------------
# The state is the last two tokens; the student looks at the last one only.
import matplotlib.pyplot as plt
import numpy as np
import torch

from sciml.lm import mixed_kl

VOCABULARY, LENGTH, BATCH, STEPS = 8, 32, 64, 500


def sample(logits, n_sequences, generator):
    """Sequences of a chain of order 2, and the states before each token."""
    states = torch.randint(VOCABULARY, (n_sequences, 2), generator=generator)
    columns = [states[:, 0], states[:, 1]]
    p = logits.softmax(-1)
    for _ in range(LENGTH):
        rows = p[columns[-2], columns[-1]]
        columns.append(torch.multinomial(rows, 1, generator=generator)[:, 0])
    text = torch.stack(columns, 1)
    return text[:, :-2], text[:, 1:-1], text[:, 2:]


def distil(teacher, prefix, reverse_weight, seed):
    """Logits of a student of order 1 after 500 steps of Adam."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(STEPS):
        writer = teacher if prefix == "teacher" else student.detach().expand_as(teacher)
        before, last, _ = sample(writer, BATCH, generator)
        loss = mixed_kl(student[last], teacher[before, last], reverse_weight=reverse_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.detach()


def evaluate(teacher, student, seed):
    """Teacher's log-probability of student text, entropy, on-policy reverse KL, NLL of teacher."""
    generator = torch.Generator().manual_seed(1000 + seed)
    log_p = teacher.log_softmax(-1)
    log_q = student.log_softmax(-1)
    before, last, drawn = sample(student.expand_as(teacher), 2000, generator)
    entropy = -(log_q.exp() * log_q).sum(-1)[last].mean()
    teacher_logp = log_p[before, last, drawn].mean()
    _, last_t, drawn_t = sample(teacher, 2000, generator)
    nll = -log_q[last_t, drawn_t].mean()
    return [float(v) for v in (teacher_logp, entropy, -entropy - teacher_logp, nll)]


# %%
# Six recipes, three seeds
# ------------------------
columns = ["teacher log p of student text", "student entropy", "on-policy reverse KL", "NLL"]
results = {}
print(f"{'prefix':>8} {'reverse':>8}   " + "  ".join(columns))
for prefix in ("teacher", "student"):
    for weight in (0.0, 0.2, 1.0):
        rows = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            teacher = 2.5 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
            rows.append(evaluate(teacher, distil(teacher, prefix, weight, seed), seed))
        results[prefix, weight] = np.mean(rows, axis=0)
        print(
            f"{prefix:>8} {weight:8.1f}   "
            + "  ".join(
                f"{value:{len(name)}.3f}"
                for name, value in zip(columns, results[prefix, weight], strict=True)
            ),
            flush=True,
        )

# %%
# The trade
# ---------
# Entropy kept against text that the teacher finds likely. A weight of 0.2 on reverse KL buys part
# of the second for little of the first.
fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for prefix, marker in (("teacher", "s"), ("student", "o")):
    points = np.array([results[prefix, weight] for weight in (0.0, 0.2, 1.0)])
    axes[0].plot(points[:, 1], points[:, 0], marker + "-", label=f"{prefix}'s prefixes")
    axes[1].plot(points[:, 3], points[:, 2], marker + "-", label=f"{prefix}'s prefixes")
    for weight, point in zip((0.0, 0.2, 1.0), points, strict=True):
        axes[0].annotate(f" {weight:g}", (point[1], point[0]))
        axes[1].annotate(f" {weight:g}", (point[3], point[2]))
axes[0].set(xlabel="student entropy, nats", ylabel="teacher's log p of student text")
axes[1].set(xlabel="NLL of the teacher's text", ylabel="on-policy reverse KL")
axes[0].set_title("numbers: weight of reverse KL")
axes[1].legend()
fig.savefig("kl_direction.png")
plt.show()
