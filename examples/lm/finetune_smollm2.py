"""Fine-tune SmolLM2-135M-Instruct by LoRA with any of the token objectives.

    python examples/lm/finetune_smollm2.py --objective tmkl --steps 30
    python examples/lm/finetune_smollm2.py --objective eksft --data my.jsonl --output adapter

A line of the data holds `prompt` and `completion` (only the completion is learned) or `text`, and
for chipo also `rejected`, a worse completion. Without `--data` the task is generated: sums,
answered by their digits in words. Printed are the loss on held-out items and the perplexity on
Python's documentation before and after: what was learned and what it cost. With `--output` the run
leaves checkpoints, continues from the last one when it is started again, and saves the adapter.

The objectives: sft (cross-entropy), tmkl (target-masked KL), full_kl (its rival, KL to the base
model over all tokens), eksft (entropy-KL token masking), lfu (consistency under an undesirable
step), mir (masked inputs), pskd (its own predictions of the last epoch; wants several epochs,
hence few `--items`), chipo (chi-squared preference optimisation, with a tenth of the rate; the
package's extra `trl`). The model comes from `sciml.lm.load_smollm2`, or from a local folder by
`--model-dir`.
"""

import argparse
import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from sciml.lm import (
    EKSFTTrainerMixin,
    LfURegularizer,
    LfUTrainerMixin,
    MIRTrainerMixin,
    ProgressiveSelfKDTokenLoss,
    ReferenceLossMixin,
    TargetMaskedKLTrainerMixin,
    combine,
    eksft_loss,
    english_text,
    forward_kl,
    hidden_logits,
    label_logp,
    load_smollm2,
    perplexity,
    sequence_logps,
    sum_rows,
    supervised_labels,
    token_logps,
    token_weights,
)

OBJECTIVES = ("sft", "tmkl", "full_kl", "eksft", "lfu", "mir", "pskd", "chipo")
# A token of SmolLM2 that occurs in no text: it hides inputs from the masked-input objective.
MASK_TOKEN = "<empty_output>"


class TargetMaskedKLTrainer(TargetMaskedKLTrainerMixin, Trainer):
    pass


class ReferenceLossTrainer(ReferenceLossMixin, Trainer):
    pass


class EKSFTTrainer(EKSFTTrainerMixin, Trainer):
    pass


class LfUTrainer(LfUTrainerMixin, Trainer):
    pass


class MIRTrainer(MIRTrainerMixin, Trainer):
    pass


class PSKDTrainer(Trainer):
    """Mixes each item's prediction of the last epoch into its targets."""

    loss_is_scaled_for_ga = True  # the loss divides by the tokens of the whole step

    def __init__(self, *args, progressive_loss, **kwargs):
        super().__init__(*args, **kwargs)
        self.progressive_loss = progressive_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, index = inputs.pop("labels"), inputs.pop("index")
        epoch = min(int(self.state.epoch or 0), self.progressive_loss.total_epochs - 1)
        self.progressive_loss.set_epoch(epoch)
        logits = hidden_logits(model, **inputs)
        return self.progressive_loss(logits, labels, index, num_items_in_batch=num_items_in_batch)


def pskd_trainer(train, n_epochs, weight, output):
    """PS-KD with its predictions in files beside the checkpoints, if there are any."""
    if n_epochs < 2:
        raise SystemExit("pskd learns from the last epoch: take fewer --items or more --steps")
    for index, item in enumerate(train):
        item["index"] = index
    loss = ProgressiveSelfKDTokenLoss(
        len(train),
        max(len(item["input_ids"]) for item in train),
        n_epochs,
        path=output and Path(output) / "predictions",
        **({} if weight is None else {"alpha_T": weight}),
    )
    return partial(PSKDTrainer, progressive_loss=loss)


def chipo_trainer(rows, tokenizer, model, weight, length, options):
    """TRL's trainer with the loss of chi-squared preference optimisation."""
    from datasets import Dataset

    from sciml.lm import ChiPOConfig, ChiPOTrainer

    if not all({"prompt", "completion", "rejected"} <= set(row) for row in rows):
        raise SystemExit("chipo needs lines with prompt, completion and rejected")
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["completion"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    beta = {} if weight is None else {"beta": weight}
    return ChiPOTrainer(
        model,
        args=ChiPOConfig(**options, max_length=length, bf16=False, **beta),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


def full_kl(logits, labels, *, ref_logits, num_items_in_batch=None, weight=1.0):
    """Cross-entropy plus `weight` times KL(base || model), by the library's reductions."""
    labels, mask = supervised_labels(logits, labels)
    weights = token_weights(mask, num_items_in_batch=num_items_in_batch)
    weights = torch.stack([-weights, weight * weights], dim=-1)
    columns = combine((label_logp, [1]), (forward_kl, [0]))
    loss, _ = sum_rows(columns, logits, ref_logits, labels, weights=weights, mask=mask)
    return loss


def trainer_of(objective, weight, tokenizer):
    """The trainer's class with the objective's options; `weight` None leaves the default."""
    if objective == "tmkl":
        options = {} if weight is None else {"weight": weight}
        return partial(TargetMaskedKLTrainer, from_hidden_states=True, **options)
    if objective == "full_kl":
        loss = partial(full_kl, weight=1.0 if weight is None else weight)
        return partial(ReferenceLossTrainer, objective=loss, from_hidden_states=True)
    if objective == "eksft":
        options = {} if weight is None else {"lambda_kl": weight}
        loss = partial(eksft_loss, return_parts=True, **options)
        return partial(EKSFTTrainer, objective=loss, from_hidden_states=True)
    if objective == "lfu":
        options = {} if weight is None else {"weight": weight}
        return partial(LfUTrainer, regularizer=partial(LfURegularizer, **options))
    if objective == "mir":
        options = {} if weight is None else {"mir_weight": weight}
        mask = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
        if mask is None or mask == tokenizer.unk_token_id:
            raise SystemExit(f"the tokenizer has no {MASK_TOKEN} to hide inputs with")
        return partial(MIRTrainer, mask_token_id=mask, from_hidden_states=True, **options)
    return Trainer


def generated_rows(n=1200):
    """Sums whose answers are spelled digit by digit, and not written in figures."""
    words = "zero one two three four five six seven eight nine".split()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for a, b in torch.randint(10, 500, (n, 2), generator=generator).tolist():
        spelled = " ".join(words[int(digit)] for digit in str(a + b))
        rows.append(
            {
                "prompt": f"What is {a} + {b}?",
                "completion": f"{spelled}.",
                "rejected": f"{a + b}.",
            }
        )
    return rows


def encode(row, tokenizer, length):
    """Token ids and labels of one line of the data."""
    if "text" in row:
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"][:length]
        return {"input_ids": ids, "labels": list(ids)}
    user = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    ids = (prompt_ids + answer)[:length]
    return {"input_ids": ids, "labels": ([-100] * len(prompt_ids) + answer)[:length]}


def collate(items, pad_token_id):
    width = max(len(item["input_ids"]) for item in items)

    def pad(name, value):
        return torch.tensor([item[name] + [value] * (width - len(item[name])) for item in items])

    attention = [[1] * len(x["input_ids"]) + [0] * (width - len(x["input_ids"])) for x in items]
    batch = {
        "input_ids": pad("input_ids", pad_token_id),
        "labels": pad("labels", -100),
        "attention_mask": torch.tensor(attention),
    }
    if "index" in items[0]:
        batch["index"] = torch.tensor([item["index"] for item in items])
    return batch


@torch.no_grad()
def held_out_loss(model, items, pad_token_id, batch_size=8):
    """Nats per supervised token."""
    model.eval()
    device = next(model.parameters()).device
    total = count = 0.0
    for start in range(0, len(items), batch_size):
        batch = collate(items[start : start + batch_size], pad_token_id)
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        logps, mask = token_logps(model(**batch).logits, labels)
        total -= float(logps.sum())
        count += float(mask.sum())
    return total / count


@torch.no_grad()
def preference_accuracy(model, rows, tokenizer, length):
    """Share of rows whose completion is likelier than the rejected one."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for row in rows:
        pair = [row, row | {"completion": row["rejected"]}]
        batch = collate([encode(x, tokenizer, length) for x in pair], tokenizer.pad_token_id)
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        better, worse = sequence_logps(model(**batch).logits, labels)
        right += bool(better > worse)
    return right / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--objective", choices=OBJECTIVES, default="tmkl")
    parser.add_argument("--weight", type=float, help="of the regulariser (default: the method's)")
    parser.add_argument("--data", help="jsonl with prompt and completion, or text")
    parser.add_argument("--items", type=int, help="train on so many items of the data")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--length", type=int, default=256, help="longest item, in tokens")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3, for chipo 1e-4")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", help="folder for checkpoints and the adapter")
    parser.add_argument("--model-dir", help="folder of a causal language model and its tokenizer")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.model_dir:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    else:
        base, tokenizer = load_smollm2()
    rows = generated_rows()
    if args.data:
        with open(args.data, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    items = [encode(row, tokenizer, args.length) for row in rows]
    labelled = [any(label != -100 for label in item["labels"][1:]) for item in items]
    rows, items = ([x for x, kept in zip(y, labelled, strict=True) if kept] for y in (rows, items))
    n_test = min(64, len(items) // 10)
    if n_test == 0:
        raise SystemExit(f"the data hold {len(items)} items with labels; 10 are needed")
    n_train = min(args.items or len(items), len(items) - n_test)
    train, test = items[:n_train], items[-n_test:]
    rate = args.learning_rate or (1e-4 if args.objective == "chipo" else 1e-3)
    documentation = tokenizer(english_text()[-40_000:], add_special_tokens=False)["input_ids"]
    documentation = torch.tensor(documentation[: 16 * 128])

    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    pad = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "output_dir": args.output or scratch,
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch_size,
            "gradient_accumulation_steps": args.accumulate,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, args.steps // 20),
            "logging_steps": max(1, args.steps // 10),
            "save_strategy": "steps" if args.output else "no",
            "save_steps": max(1, args.steps // 5),
            "save_total_limit": 2,
            "use_cpu": args.cpu,
            "remove_unused_columns": False,
            "report_to": [],
            "seed": args.seed,
        }
        if args.objective == "chipo":
            trainer = chipo_trainer(
                rows[:n_train], tokenizer, model, args.weight, args.length, options
            )
        else:
            if args.objective == "pskd":
                n_epochs = math.ceil(args.steps * args.batch_size * args.accumulate / n_train)
                trainer_class = pskd_trainer(train, n_epochs, args.weight, args.output)
            else:
                trainer_class = trainer_of(args.objective, args.weight, tokenizer)
            trainer = trainer_class(
                model=model,
                args=TrainingArguments(**options),
                train_dataset=train,
                data_collator=partial(collate, pad_token_id=pad),
            )

        def report(when):
            new = held_out_loss(model, test, pad)
            old = perplexity(model.eval(), documentation, batch_size=4)
            print(
                f"{when}: held-out loss {new:.3f} (perplexity {math.exp(new):.2f}), "
                f"perplexity on documentation {old:.2f}",
                flush=True,
            )
            if args.objective == "chipo":
                share = preference_accuracy(model, rows[-n_test:], tokenizer, args.length)
                print(
                    f"{when}: the better completion is the likelier one for {share:.0%}", flush=True
                )

        with model.disable_adapter():
            report("before")
        started = any(Path(options["output_dir"]).glob("checkpoint-*"))
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=started or None)
        print(f"{args.objective}: {args.steps} steps in {time.perf_counter() - began:.0f} s")
        report("after")
    if args.output:
        model.save_pretrained(args.output)
        print(f"the adapter is in {args.output}")


if __name__ == "__main__":
    main()
