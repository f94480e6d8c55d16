"""Chunked reductions of logits against plain torch: time and peak extra memory.

Each case runs forward and backward of a summed loss over n rows, in a process of its own, once for
the peak of resident memory (Linux, reset before the run) and a few times for the clock. "Extra" is
what a run takes beyond its inputs; "beyond gradients" leaves out the gradients it has to return.

    python benchmarks/lm/bench_vocabulary_rows.py [--rows 4096] [--vocabulary 50000] [--width 576]
"""

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from sciml.lm import (
    HiddenLogits,
    entropy,
    forward_kl,
    label_logp,
    sum_rows,
    target_masked_kl,
)

CASES = ("cross-entropy", "entropy", "KL", "target-masked KL")
MB = 2**20


def plain(case, logits, labels, ref_logits):
    if case == "cross-entropy":
        return F.cross_entropy(logits, labels, reduction="sum")
    if case == "entropy":
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum()
    if case == "KL":
        return F.kl_div(logits.log_softmax(-1), ref_logits.softmax(-1), reduction="sum")
    index = labels.unsqueeze(-1)
    logq = logits.scatter(-1, index, -1e30).log_softmax(-1)
    logp = ref_logits.scatter(-1, index, -1e30).log_softmax(-1)
    return F.kl_div(logq, logp, reduction="sum", log_target=True)


def chunked(case, logits, labels, ref_logits):
    if case == "target-masked KL":
        return target_masked_kl(logits, labels, ref_logits=ref_logits, shift=False, reduction="sum")
    reduction, sides, sign = {
        "cross-entropy": (label_logp, (labels,), -1.0),
        "entropy": (entropy, (), 1.0),
        "KL": (forward_kl, (ref_logits,), 1.0),
    }[case]
    return sum_rows(reduction, logits, *sides, weights=torch.full((len(labels),), sign))[0]


def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def measure(case, form, ours, n, n_vocabulary, width, repeats):
    """Peak extra bytes, bytes of the gradients, best seconds, loss."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    needs_ref = case in ("KL", "target-masked KL")
    labels = torch.randint(0, n_vocabulary, (n,), generator=generator)
    if form == "logits":
        leaves = [normal(n, n_vocabulary).mul_(3).requires_grad_()]
        ref = normal(n, n_vocabulary).mul_(3) if needs_ref else None
    else:
        leaves = [normal(n, width).requires_grad_(), normal(n_vocabulary, width).mul_(0.1)]
        leaves[1].requires_grad_()
        ref = normal(n, width) if needs_ref else None

    def run(rows):
        for leaf in leaves:
            leaf.grad = None
        side = None if ref is None else ref[:rows]
        if form == "logits":
            arguments = leaves[0][:rows] if rows < n else leaves[0], labels[:rows], side
        elif ours:
            side = None if side is None else HiddenLogits(side, leaves[1].detach())
            arguments = HiddenLogits(leaves[0][:rows], leaves[1]), labels[:rows], side
        else:
            side = None if side is None else side @ leaves[1].detach().T
            arguments = leaves[0][:rows] @ leaves[1].T, labels[:rows], side
        loss = (chunked if ours else plain)(case, *arguments)
        loss.backward()
        return loss.item()

    run(8)  # libraries and thread pools
    for leaf in leaves:
        leaf.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = status("VmRSS")
    start = time.perf_counter()
    loss = run(n)
    seconds = [time.perf_counter() - start]
    peak = status("VmHWM") - before
    for _ in range(repeats - 1):
        start = time.perf_counter()
        run(n)
        seconds.append(time.perf_counter() - start)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    return {"peak": peak, "gradients": gradients, "seconds": min(seconds), "loss": loss}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--forms", default="logits,hidden")
    parser.add_argument("--one", nargs=3, help="case, form, ours (0 or 1): print JSON")
    args = parser.parse_args()
    sizes = args.rows, args.vocabulary, args.width, args.repeats
    if args.one:
        case, form, ours = args.one
        print(json.dumps(measure(case, form, ours == "1", *sizes)))
        return
    print(f"{args.rows} rows, {args.vocabulary} tokens, float32, {torch.get_num_threads()} threads")
    print("case                     time plain  chunked  ratio   extra plain  chunked  ratio")
    for form in args.forms.split(","):
        for case in args.cases.split(","):
            pair = []
            for ours in ("0", "1"):
                command = [sys.executable, __file__, "--one", case, form, ours]
                for name, value in zip(
                    ("rows", "vocabulary", "width", "repeats"), sizes, strict=True
                ):
                    command += [f"--{name}", str(value)]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                pair.append(json.loads(result.stdout))
            a, b = pair
            if abs(a["loss"] - b["loss"]) > 1e-3 * abs(a["loss"]):
                raise SystemExit(f"{case}: {a['loss']} is not {b['loss']}")
            net = [max(r["peak"] - r["gradients"], 0) for r in pair]
            print(
                f"{case:17s}{form:7s}{a['seconds']:8.2f} s{b['seconds']:7.2f} s"
                f"{a['seconds'] / b['seconds']:6.2f}x{a['peak'] / MB:11.0f} MB"
                f"{b['peak'] / MB:6.0f} MB {b['peak'] / a['peak']:6.3f}"
                f"  (beyond gradients {net[0] / MB:.0f} and {net[1] / MB:.0f} MB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
