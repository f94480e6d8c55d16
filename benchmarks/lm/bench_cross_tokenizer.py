"""Cross-tokenizer losses against TRL's ULDLoss: time and memory of a loss with its gradient.

Logits of a student with 32,000 and a teacher with 50,000 tokens, one token in four with a partner,
a third of the chunks of two tokens on one side. TRL gets logits; the losses here get logits, and
hidden states with output layers as models give them ("hidden"). Each runs in a process of its own;
memory is the growth of the peak resident size over the inputs, and ratios are TRL's over ours.

    python benchmarks/lm/bench_cross_tokenizer.py
"""

import argparse
import subprocess
import sys
import tempfile
import time

import torch

N_STUDENT, N_TEACHER, WIDTH, BATCH, LENGTH, REPEATS = 32_000, 50_000, 256, 1, 64, 2
CASES = ("TRL uld", "uld", "uld hidden", "TRL gold", "hybrid_uld", "hybrid_uld hidden",
         "gold hidden", "p-kl", "p-kl hidden")  # fmt: skip


ALIVE = []  # what is freed before the measured part would hide its growth


def inputs(hidden):
    from sciml.lm import HiddenLogits

    generator = torch.Generator().manual_seed(0)
    sides = []
    for n in (N_STUDENT, N_TEACHER):
        states = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
        weight = torch.randn(n, WIDTH, generator=generator) / WIDTH**0.5
        ALIVE.append(weight)
        sides.append(HiddenLogits(states, weight) if hidden else states @ weight.T)
    return sides


def chunks():
    """Two student tokens, then one of the student for two of the teacher, then one for one."""
    student, teacher = [], []
    number = 0
    while len(student) < LENGTH - 2 and len(teacher) < LENGTH - 2:
        ours, theirs = ((2, 1), (1, 2), (1, 1), (1, 1))[number % 4]
        student += [number] * ours
        teacher += [number] * theirs
        number += 1
    padded = [side + [-1] * (LENGTH - len(side)) for side in (student, teacher)]
    return [torch.tensor([side] * BATCH) for side in padded]


def offsets(numbers):
    """Bytes of tokens: each chunk is ten long."""
    result = torch.zeros(*numbers.shape, 2, dtype=torch.long)
    for b, row in enumerate(numbers.tolist()):
        for t, number in enumerate(row):
            if number >= 0:
                last = t + 1 == len(row) or row[t + 1] != number
                result[b, t] = torch.tensor([10 * number, 10 * number + (10 if last else 5)])
    return result


class Vocabulary:
    def __init__(self, prefix, n):
        self.tokens = {f"both{i}" if i % 4 == 0 and i < N_STUDENT else f"{prefix}{i}": i
                       for i in range(n)}  # fmt: skip

    def get_vocab(self):
        return self.tokens


def step_of(case):
    from sciml.lm import (
        TokenProjection,
        hybrid_kl_loss,
        hybrid_uld_loss,
        projected_kl_loss,
        uld_loss,
    )

    student, teacher = inputs("hidden" in case)
    ours, theirs = chunks()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(n, (BATCH, LENGTH), generator=generator) for n in (N_STUDENT, N_TEACHER)]
    leaf = (student.hidden if "hidden" in case else student).requires_grad_()
    leaves = [leaf, student.weight.requires_grad_()] if "hidden" in case else [leaf]
    if case.startswith("TRL"):
        from trl.experimental.gold.gold_config import GOLDConfig
        from trl.experimental.gold.gold_trainer import ULDLoss

        config = GOLDConfig(
            output_dir=tempfile.mkdtemp(), use_uld_loss=True, bf16=False, use_cpu=True,
            uld_use_hybrid_loss=case == "TRL gold", uld_token_merge_strategy="bayesian",
            uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        )  # fmt: skip
        peer = ULDLoss(config, Vocabulary("s", N_STUDENT), Vocabulary("t", N_TEACHER))
        arguments = {
            "student_labels": torch.where(ours >= 0, ids[0], -100),
            "teacher_labels": torch.where(theirs >= 0, ids[1], -100),
            "student_input_ids": ids[0], "teacher_input_ids": ids[1],
            "student_byte_offsets": offsets(ours), "teacher_byte_offsets": offsets(theirs),
        }  # fmt: skip
        return leaves, lambda: peer(student, teacher, **arguments)
    index = torch.arange(N_STUDENT)[:, None].expand(-1, 2).clone()
    weight = torch.tensor([[1.0, 0.0]]).repeat(N_STUDENT, 1)
    split = index[:, 0] % 4 != 0
    index[split, 1] = (index[split, 1] + 7) % N_TEACHER
    weight[split] = torch.tensor([0.5, 0.5])
    index[~split, 1] = -1
    projection = TokenProjection(index, weight, N_TEACHER)
    named = {"student_ids": ids[0], "teacher_ids": ids[1]}
    if case.startswith("uld"):
        return leaves, lambda: uld_loss(student, teacher, ours, theirs, **named)
    if case.startswith("hybrid"):
        return leaves, lambda: hybrid_uld_loss(student, teacher, ours, theirs, projection, **named)
    if case.startswith("gold"):
        return leaves, lambda: hybrid_kl_loss(
            student, teacher, ours, theirs, projection, threshold=1.0
        )
    return leaves, lambda: projected_kl_loss(student, teacher, ours, theirs, projection)


def peak_megabytes():
    # Linux only; not getrusage, whose maximum a child process inherits from its parent.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def one(case):
    leaves, loss = step_of(case)
    before = peak_megabytes()
    seconds, values = [], 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        value = loss()
        torch.autograd.grad(value, leaves)
        seconds.append(time.perf_counter() - start)
        values = float(value.detach())
    print(min(seconds), peak_megabytes() - before, values)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=CASES, help="one loss; prints seconds, MB and the value")
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    print(f"{BATCH} x {LENGTH} tokens, vocabularies {N_STUDENT} and {N_TEACHER}, float32, CPU")
    print("loss                    seconds   TRL/ours       MB   TRL/ours     value")
    peer = {}
    for case in CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--one", case]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds, memory, value = (float(x) for x in output.split()[-3:])
        if case.startswith("TRL"):
            peer = {"seconds": seconds, "memory": memory}
        print(
            f"{case:20} {seconds:10.3f} {peer['seconds'] / seconds:10.2f} {memory:8.0f} "
            f"{peer['memory'] / max(memory, 1):10.2f} {value:9.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
