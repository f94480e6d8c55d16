"""Chunks by byte ends against dynamic programming on tokens, and against TRL's groups.

English text is cut by two byte-pair tokenizers trained on it, one of which splits digits. The
dynamic programming is the note's: without anchors it fills the whole table, with anchors only
between runs of three tokens that occur once on both sides. TRL groups given offsets in a Python
loop. All give the same chunks, which is checked. Times are the best of a few.

    python benchmarks/lm/bench_span_alignment.py
"""

import time

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl.experimental.gold.gold_trainer import ULDLoss

from sciml.lm import align_offsets, align_spans, english_text, token_bytes


def bpe(text, vocab_size, digits):
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def best(function, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main():
    text = english_text()
    tokenizers = bpe(text[:100_000], 2000, False), bpe(text[:100_000], 1200, True)
    tables = [token_bytes(tokenizer) for tokenizer in tokenizers]
    print("tokens      offsets    dp, whole table     dp, anchors     TRL's loop (offsets given)")
    for n_characters in (400, 1600, 6400):
        part = text[20_000 : 20_000 + n_characters]
        sides = [
            [table[i] for i in tokenizer(part)["input_ids"]]
            for tokenizer, table in zip(tokenizers, tables, strict=True)
        ]
        spans = []
        for tokens in sides:
            ends = np.cumsum([len(token) for token in tokens]).tolist()
            spans.append(list(zip([0, *ends[:-1]], ends, strict=True)))
        want = align_spans(*sides)
        times = {"offsets": best(lambda s=sides: align_spans(*s), 20)}
        whole = n_characters <= 1600
        for anchors in (False, True) if whole else (True,):

            def aligned(s=sides, a=anchors):
                return align_spans(*s, method="dp", anchors=a)

            assert all(torch.equal(a, b) for a, b in zip(aligned(), want, strict=True))
            times["anchors" if anchors else "whole"] = best(aligned, 2)
        assert all(torch.equal(a, b) for a, b in zip(align_offsets(*spans), want, strict=True))
        times["trl"] = best(lambda s=spans: ULDLoss._align_by_byte_offsets(*s), 20)
        times["given"] = best(lambda s=spans: align_offsets(*s), 20)
        base = times["offsets"]
        table = (
            f"{times['whole'] * 1e3:9.1f} ms ({times['whole'] / base:5.0f}x)" if whole else " " * 19
        )
        print(
            f"{len(sides[0]):4} / {len(sides[1]):4} {base * 1e3:6.2f} ms {table} "
            f"{times['anchors'] * 1e3:7.1f} ms ({times['anchors'] / base:4.0f}x) "
            f"{times['trl'] * 1e3:6.2f} ms ({times['trl'] / times['given']:.1f}x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
