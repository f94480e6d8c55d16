"""Distil SmolLM2-135M into a student of a few of its layers, against plain cross entropy.

The student keeps every k-th layer, the embeddings and the final norm, and both runs start from the
same weights and see the same windows of the same text in the same order: one learns the teacher's
distributions (`--objective`), the other the text itself. Held-out perplexity is what is compared.

    python examples/lm/distill_smollm2.py                       # 2 cores, under 20 minutes
    python examples/lm/distill_smollm2.py --device cuda --steps 1000 --batch-size 16 --length 256

The text is Python's own documentation, which every Python has; `--text FILE` takes another. The
model comes from `sciml.lm.load_smollm2`, or from a local folder by `--model-dir`.
"""

import argparse
import copy
import time

import torch
from torch import nn

from sciml.lm import Distiller, english_text, load_smollm2, perplexity, token_logps


class CrossEntropy(Distiller):
    """The baseline: the labels of the text, and no teacher."""

    def teacher_logits(self, batch):
        return None

    def compute_loss(self, batch, student_logits, teacher_logits, num_items_in_batch):
        logps, _ = token_logps(student_logits, batch.labels, shift=False)
        return -logps.sum() / num_items_in_batch


def cut(model, n_layers):
    """A copy with `n_layers` of the model's layers, evenly spaced, first and last among them."""
    total = len(model.model.layers)
    kept = [round(i * (total - 1) / max(n_layers - 1, 1)) for i in range(n_layers)]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    student = type(model)(config)
    student.to(next(model.parameters()).dtype)
    student.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    student.model.norm.load_state_dict(model.model.norm.state_dict())
    for new, old in enumerate(kept):
        student.model.layers[new].load_state_dict(model.model.layers[old].state_dict())
    if not config.tie_word_embeddings:
        student.lm_head.load_state_dict(model.lm_head.state_dict())
    return student, kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens a window")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--objective", default=["forward_kl", "cross_entropy"], nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", help="text file; the last tenth is held out")
    parser.add_argument("--model-dir", help="folder of a causal language model and its tokenizer")
    parser.add_argument("--teacher-cache", help="folder for the teacher's top-k log-probabilities")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    if args.model_dir:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        teacher = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    else:
        teacher, tokenizer = load_smollm2()
    teacher = teacher.to(args.device).eval()
    text = english_text()
    if args.text:
        with open(args.text, encoding="utf-8") as file:
            text = file.read()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    n_train = int(0.9 * len(ids))
    windows = ids[: n_train // args.length * args.length].reshape(-1, args.length)
    held_out = ids[n_train:][: 64 * args.length]
    student, kept = cut(teacher, args.layers)
    student = student.to(args.device)
    start = copy.deepcopy(student.state_dict())
    print(
        f"{len(windows)} windows of {args.length} tokens, {len(held_out)} held out; layers {kept}; "
        f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} -> "
        f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} million parameters",
        flush=True,
    )

    def score(model: nn.Module) -> float:
        return perplexity(model, held_out, length=args.length)

    print(f"held-out perplexity: teacher {score(teacher):.1f}, student cut {score(student):.4g}")

    def schedule(step):
        warm = min(1.0, (step + 1) / max(1, args.steps // 20))
        return warm * (1 - 0.9 * step / args.steps)

    for name in args.objective:
        student.load_state_dict(start)
        kind = CrossEntropy if name == "cross_entropy" else Distiller
        distiller = kind(
            student,
            teacher,
            prefix="teacher",  # which here is the text
            objective="forward_kl" if kind is CrossEntropy else name,
            max_new_tokens=args.length,
            learning_rate=args.learning_rate,
            lr_schedule=schedule,
            random_state=args.seed,
        )
        cache = args.teacher_cache if kind is Distiller else None
        began = time.perf_counter()
        distiller.fit(
            list(windows[:, :1]),
            responses=list(windows[:, 1:]),
            n_steps=args.steps,
            batch_size=args.batch_size,
            teacher_cache=cache,
            verbose=not args.quiet,
        )
        minutes = (time.perf_counter() - began) / 60
        print(
            f"{name:>14}: {args.steps} steps of {args.batch_size * args.length} tokens in "
            f"{minutes:.1f} minutes, held-out perplexity {score(student):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
