"""Time and peak memory of TRACE's loss: divergence on a quarter of the tokens, and GRPO's part.

First the clipped forward KL with its gradient at a vocabulary of 50,000, on all tokens and on the
marked quarter, as its definition under autograd ("plain torch", from logits that are formed for
all tokens or, where marked, for those rows only) and as `pointwise_clipped_kl`. Then GRPO's loss
from hidden states: TRL's arithmetic (all logits, log-probabilities, clip) against `TraceLoss`.
Each case runs in a process of its own; memory is the peak above the inputs (hidden states and
output layers, or logits), gradients included.

    python benchmarks/lm/bench_trace.py [--device cuda] [--rows 512]
"""

import argparse
import json
import subprocess
import sys
import time

import torch

VOCABULARY, CLIP = 50_000, 0.05


def plain_kl(student, teacher):
    """Definition under autograd, on rows that are all marked."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).clamp(max=CLIP).sum(-1).mean()


def plain_grpo(logits, labels, advantages):
    """TRL's arithmetic on one response a row of the batch, loss_type 'grpo'."""
    logps = logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logps - logps.detach())
    clipped = ratio.clamp(0.8, 1.28)
    advantages = advantages.unsqueeze(1)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def case(who, what, rows, device, dtype, repeats):
    """Seconds (best) and peak bytes of one loss with its gradient."""
    from sciml.lm import HiddenLogits, TraceLoss, pointwise_clipped_kl

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    shape = (4, rows // 4)
    if what == "KL of logits":
        leaves = [draw(*shape, VOCABULARY).requires_grad_()]
        teacher = draw(*shape, VOCABULARY)
    else:
        leaves = [draw(*shape, 256).requires_grad_(), draw(VOCABULARY, 256).requires_grad_()]
        teacher = draw(*shape, 384), draw(VOCABULARY, 384) / 384**0.5
        with torch.no_grad():
            leaves[1] /= 16
    labels = torch.randint(VOCABULARY, shape, generator=generator, device=device)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    if "quarter" in who:
        mask[:, shape[1] // 4 :] = False

    def loss(n):
        marked = mask[:, :n]
        if what == "GRPO":
            hidden = leaves[0][:, :n]
            if "sciml" in who:
                value, _ = TraceLoss()(
                    HiddenLogits(hidden, leaves[1]), None, labels[:, :n], advantages, step=0
                )
            else:
                value = plain_grpo(hidden @ leaves[1].T, labels[:, :n], advantages)
        elif what == "KL of logits":
            first, second = leaves[0][:, :n], teacher[:, :n]
            if "sciml" in who:
                value = pointwise_clipped_kl(first, second, mask=marked, clip=CLIP)
            else:
                value = plain_kl(first[marked], second[marked])
        elif "sciml" in who:
            first = HiddenLogits(leaves[0][:, :n], leaves[1])
            second = HiddenLogits(teacher[0][:, :n], teacher[1])
            value = pointwise_clipped_kl(first, second, mask=marked, clip=CLIP)
        else:
            first = leaves[0][:, :n][marked] @ leaves[1].T
            with torch.no_grad():
                second = teacher[0][:, :n][marked] @ teacher[1].T
            value = plain_kl(first, second)
        value.backward()
        gradient = float(leaves[0].grad.float().norm())
        for leaf in leaves:
            leaf.grad = None
        return float(value.detach()), gradient

    loss(8)  # imports and kernels
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value, gradient = loss(rows)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resident_bytes("VmRSS")
        value, gradient = loss(rows)
        peak = resident_bytes("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss(rows)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": peak, "value": value, "gradient": gradient}


def resident_bytes(kind):
    """Memory of this process now ("VmRSS") or at its peak ("VmHWM"); Linux only.

    Not getrusage, whose maximum a child process inherits from its parent.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case")
    args = parser.parse_args()
    if args.case:
        who, what = args.case.split(",")
        dtype = getattr(torch, args.dtype)
        print(json.dumps(case(who, what, args.rows, args.device, dtype, args.repeats)))
        return

    def run(who, what):
        command = [sys.executable, __file__, f"--case={who},{what}", f"--dtype={args.dtype}"]
        command += [f"--device={args.device}", f"--rows={args.rows}", f"--repeats={args.repeats}"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return json.loads(out.strip().splitlines()[-1])

    print(f"{args.rows} tokens, vocabulary {VOCABULARY}, {args.dtype} on {args.device}")
    tolerance = 1e-4 if args.dtype == "float32" else 3e-2
    for what, kinds in (
        ("KL of logits", ("all tokens", "a quarter")),
        ("KL of hidden states", ("all tokens", "a quarter")),
        ("GRPO", ("all tokens",)),
    ):
        base, expected = None, {}
        for who in ("plain torch", "sciml"):
            for kind in kinds:
                found = run(f"{who}; {kind}", what)
                base = base or found
                for name in ("value", "gradient"):
                    wanted = expected.setdefault(kind, found)[name]
                    assert abs(found[name] - wanted) <= tolerance * max(abs(wanted), 1e-3)
                print(
                    f"{what:>20}, {kind:>10}, {who:>11}: {1e3 * found['seconds']:7.0f} ms, "
                    f"{found['bytes'] / 2**20:6.0f} MiB "
                    f"({base['seconds'] / found['seconds']:5.2f} x as fast, "
                    f"{found['bytes'] / base['bytes']:.2f} x the memory of plain torch on all)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
