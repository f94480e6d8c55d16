"""A tiny Llama over bytes, trained in seconds: a language model for examples and tests.

It needs no tokeniser and no download: a token is a byte, followed by three special tokens, and
`english_text` gives half a million characters that come with every Python.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._check import check_integer, check_interval
from .token_reduction import next_token_labels, token_logps, token_weights
from .vocabulary_rows import Logits, label_logp, sum_rows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "byte_language_model",
    "decode_bytes",
    "encode_bytes",
    "english_text",
    "perplexity",
    "train_byte_language_model",
]

BOS, EOS, PAD = 256, 257, 258


def encode_bytes(text: str | bytes) -> Tensor:
    """Token ids of a text: its UTF-8 bytes, without special tokens.

    Parameters
    ----------
    text : str or bytes

    Returns
    -------
    LongTensor of shape (n_bytes,)

    Examples
    --------
    >>> from sciml.lm import decode_bytes, encode_bytes
    >>> encode_bytes("Hi")
    tensor([ 72, 105])
    >>> decode_bytes(encode_bytes("Größe"))
    'Größe'
    """
    data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
    if not data:
        return torch.empty(0, dtype=torch.long)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def decode_bytes(ids: Tensor) -> str:
    """Text of token ids; special tokens are left out, broken UTF-8 is replaced.

    Parameters
    ----------
    ids : LongTensor of shape (n_tokens,)
    """
    return bytes(i for i in ids.tolist() if 0 <= i < 256).decode("utf-8", errors="replace")


def english_text() -> str:
    """English documentation text of Python itself, about 470,000 characters.

    These are the help topics of the standard library (`pydoc_data.topics`, PSF licence), the only
    sizeable natural text that every Python has. It differs a little between versions of Python.
    """
    from pydoc_data.topics import topics  # 0.5 MB, needed here only

    return "\n\n".join(topics[name] for name in sorted(topics))


def byte_language_model(
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 512,
    *,
    random_state: int = 0,
) -> "LlamaForCausalLM":
    """An untrained Llama over bytes.

    Parameters
    ----------
    hidden_size : int, default=64
        Width, a multiple of ``2 * num_heads``. The feed-forward layers have three times that.
    num_layers : int, default=2
        Transformer blocks.
    num_heads : int, default=4
        Attention heads.
    max_length : int, default=512
        Longest sequence.
    random_state : int, default=0
        Seed of the weights; the global generator is left alone.

    Returns
    -------
    transformers.LlamaForCausalLM
        In evaluation mode, float32, input and output embeddings tied. Its vocabulary is 256 bytes
        and the ids 256 (begin), 257 (end) and 258 (padding).

    Raises
    ------
    ValueError
        If the heads do not divide the width into even parts.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    check_integer("num_heads", num_heads, 1)
    check_integer("num_layers", num_layers, 1)
    check_integer("hidden_size", hidden_size, 2 * num_heads)
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size must be a multiple of 2 * num_heads = {2 * num_heads}, got {hidden_size}"
        )
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        return LlamaForCausalLM(config).eval()


def train_byte_language_model(
    model: torch.nn.Module,
    text: str | Tensor,
    n_steps: int = 300,
    *,
    batch_size: int = 12,
    length: int = 128,
    learning_rate: float = 3e-3,
    random_state: int = 0,
    verbose: bool = False,
) -> list[float]:
    """Train a causal language model on windows of a text, in place.

    AdamW with weight decay 0.01 on the parameters that require a gradient, gradients clipped to
    norm 1, the rate warmed up over a twentieth of the steps and lowered to a tenth by a cosine.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(input_ids=...)``, returns an object with `logits`. It is left in
        evaluation mode.
    text : str or LongTensor of shape (n_tokens,)
        Windows start anywhere in it, drawn evenly.
    n_steps, batch_size, length : int
        Optimiser steps, windows a step and tokens a window.
    learning_rate : float, default=3e-3
        Highest rate.
    random_state : int, default=0
        Seed of the windows and of dropout; the global generator is left alone.
    verbose : bool, default=False
        Show a progress bar.

    Returns
    -------
    list of float
        Training loss of each step, in nats a token.

    Raises
    ------
    ValueError
        If the text is shorter than a window.
    FloatingPointError
        If the loss is no longer finite.
    """
    ids = _ids(text)
    check_integer("n_steps", n_steps, 0)
    check_integer("batch_size", batch_size, 1)
    check_integer("length", length, 2)
    check_interval("learning_rate", learning_rate, 0, closed="neither")
    if len(ids) < length:
        raise ValueError(f"text must have at least length = {length} tokens, got {len(ids)}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95))
    warmup = max(1, n_steps // 20)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(n_steps, 1)))
        return min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(random_state)
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(random_state)  # dropout
        for step in tqdm(range(n_steps), desc="training", disable=not verbose):
            starts = torch.randint(len(ids) - length + 1, (batch_size, 1), generator=generator)
            batch = ids[starts + torch.arange(length)].to(device)
            loss = _mean_nll(model(input_ids=batch).logits, batch)
            if not bool(loss.isfinite()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, text: str | Tensor, *, length: int = 128, batch_size: int = 16
) -> float:
    """Exponential of the mean negative log-likelihood over a text cut into windows.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(input_ids=...)``, returns an object with `logits`. Put it into
        evaluation mode first.
    text : str or LongTensor of shape (n_tokens,)
        Cut into whole windows; a remainder shorter than a window is left out. The first token
        of a window is not predicted.
    length, batch_size : int
        Tokens a window and windows a forward pass.

    Returns
    -------
    float
        Perplexity per token.
    """
    ids = _ids(text)
    check_integer("length", length, 2)
    if len(ids) < length:
        raise ValueError(f"text must have at least length = {length} tokens, got {len(ids)}")
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    device = next(model.parameters()).device
    total = 0.0
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        output: Any = model(input_ids=batch)
        logps, _ = token_logps(output.logits, batch)
        total -= float(logps.sum(dtype=torch.float64))
    return math.exp(total / (windows.shape[0] * (length - 1)))


def _mean_nll(logits: Logits, ids: Tensor) -> Tensor:
    labels = next_token_labels(ids)
    mask = labels != -100
    total, _ = sum_rows(label_logp, logits, labels, weights=token_weights(mask), mask=mask)
    return -total


def _ids(text: str | Tensor) -> Tensor:
    ids = encode_bytes(text) if isinstance(text, str) else text
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(
            "text must be a string or a one-dimensional tensor of token ids, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}"
        )
    return ids.cpu().long()
