"""Time and peak memory of the divergences against TRL's at a vocabulary of 50,000.

Forward and backward pass of the generalized Jensen-Shannon divergence and its two ends, forward
and reverse KL, from logits that exist and from hidden states. Each case runs in a process of its
own; memory is the peak above the inputs (logits, or hidden states and output layers), gradients
included. Where TRL is not installed the peer is the definition in plain torch.

    python benchmarks/lm/bench_distillation.py [--device cuda] [--rows 512]
"""

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec

import torch

BETAS = {"forward KL": 0.0, "reverse KL": 1.0, "JSD 0.5": 0.5}


def trl_loss(student, teacher, mask, beta):
    from trl.experimental.gkd import GKDTrainer

    labels = torch.where(mask, 0, -100)
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta)


def plain_loss(student, teacher, mask, beta):
    """The definition under autograd."""
    log_q, log_p = (x[mask].float().log_softmax(-1) for x in (student, teacher))
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum() / mask.sum()
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum() / mask.sum()
    q, p = log_q.exp(), log_p.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    teacher_part, student_part = p * (log_p - log_m), q * (log_q - log_m)
    return (beta * teacher_part + (1 - beta) * student_part).sum() / mask.sum()


def our_loss(student, teacher, mask, beta):
    from sciml.lm import generalized_jsd

    return generalized_jsd(student, teacher, mask=mask, beta=beta)


LOSSES = {"trl": trl_loss, "plain torch": plain_loss, "sciml": our_loss}


def case(who, what, beta, rows, device, dtype, repeats, vocabulary=50_000):
    """Seconds (best) and peak bytes of one loss."""
    from sciml.lm import HiddenLogits

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    mask = torch.ones(1, rows, dtype=torch.bool, device=device)
    mask[:, : rows // 8] = False  # a prompt
    if what == "logits":
        leaves = [draw(1, rows, vocabulary).requires_grad_()]
        teacher = draw(1, rows, vocabulary)
    else:
        leaves = [draw(1, rows, 256).requires_grad_(), draw(vocabulary, 256).requires_grad_()]
        teacher = draw(1, rows, 384), draw(vocabulary, 384) / 384**0.5
        with torch.no_grad():
            leaves[1] /= 16

    def loss(n):
        part = mask[:, :n]
        if what == "logits":
            first, second = leaves[0][:, :n], teacher[:, :n]
        elif who == "sciml":
            first = HiddenLogits(leaves[0][:, :n], leaves[1])
            second = HiddenLogits(teacher[0][:, :n], teacher[1])
        else:
            first = leaves[0][:, :n] @ leaves[1].T
            with torch.no_grad():
                second = teacher[0][:, :n] @ teacher[1].T
        value = LOSSES[who](first, second, part, beta)
        value.backward()
        for leaf in leaves:
            leaf.grad = None
        return float(value.detach())

    loss(min(rows, 16))  # imports and kernels
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = loss(rows)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resident_bytes("VmRSS")
        value = loss(rows)
        peak = resident_bytes("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss(rows)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": peak, "value": value}


def resident_bytes(kind):
    """Memory of this process now ("VmRSS") or at its peak ("VmHWM"); Linux only.

    Not getrusage, whose maximum a child process inherits from its parent.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--case", help="used by the script itself")
    args = parser.parse_args()
    if args.case:
        who, what, beta = args.case.split(",")
        dtype = getattr(torch, args.dtype)
        result = case(who, what, float(beta), args.rows, args.device, dtype, args.repeats)
        print(json.dumps(result))
        return
    peer = "trl" if find_spec("trl") else "plain torch"
    print(f"{args.rows} tokens, vocabulary 50000, {args.dtype} on {args.device}")
    for what in ("logits", "hidden"):
        for name, beta in BETAS.items():
            found = {}
            for who in (peer, "sciml"):
                command = [sys.executable, __file__, f"--case={who},{what},{beta}"]
                command += [f"--device={args.device}", f"--rows={args.rows}"]
                command += [f"--repeats={args.repeats}", f"--dtype={args.dtype}"]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[who] = json.loads(out.strip().splitlines()[-1])
            ours, theirs = found["sciml"], found[peer]
            tolerance = 1e-4 if args.dtype == "float32" else 3e-2
            assert abs(ours["value"] - theirs["value"]) < tolerance * abs(theirs["value"])
            print(
                f"{what:>7} {name:>10}: {1e3 * ours['seconds']:7.0f} ms against "
                f"{1e3 * theirs['seconds']:7.0f} ms of {peer} "
                f"({theirs['seconds'] / ours['seconds']:.2f} x as fast), "
                f"{ours['bytes'] / 2**20:6.0f} MiB against {theirs['bytes'] / 2**20:6.0f} MiB "
                f"({ours['bytes'] / theirs['bytes']:.2f} x)",
                flush=True,
            )


if __name__ == "__main__":
    main()
