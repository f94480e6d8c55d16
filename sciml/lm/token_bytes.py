"""The bytes that each token of a tokenizer spells, whatever its way of writing them.

Byte-level vocabularies (GPT-2's, Llama 3's, Qwen's) write a space as "Ġ" and every byte as one
character; SentencePiece vocabularies write "▁" and "<0x0A>". In bytes both can be compared.
"""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["is_special_token", "special_token_ids", "token_bytes", "token_text_bytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_TOKEN = re.compile(r"<\|.*\|>|</?(s|eos|bos|pad|unk|mask|endoftext)>", re.DOTALL)
_MARKERS = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r"})


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves, the rest follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def token_text_bytes(token: str) -> bytes:
    """Bytes of one token, read without its vocabulary.

    Markers of spaces and line ends become what they mark and "<0x0A>" the byte it names. Bytes
    above 127 of a byte-level vocabulary cannot be told from characters here; `token_bytes`, which
    sees the vocabulary, can. An underscore stays one: it is common in code.

    Parameters
    ----------
    token : str

    Returns
    -------
    bytes
    """
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.translate(_MARKERS).encode()


def token_bytes(tokenizer: Any) -> list[bytes]:
    r"""Bytes of every token of a tokenizer.

    Parameters
    ----------
    tokenizer : object
        With ``get_vocab``, as tokenizers of transformers have it.

    Returns
    -------
    list of bytes
        By token id; empty for special tokens and for ids without a token.

    Examples
    --------
    >>> from sciml.lm import token_bytes
    >>> class Tokenizer:
    ...     def get_vocab(self):
    ...         return {"Ġcaf": 0, "Ã©": 1, "<|end|>": 2}
    >>> token_bytes(Tokenizer())
    [b' caf', b'\xc3\xa9', b'']
    """
    vocabulary = _vocabulary(tokenizer)
    special = special_token_ids(tokenizer)
    marked = any("Ġ" in token or "Ċ" in token for token in vocabulary)
    byte_level = marked and not any("▁" in token for token in vocabulary)
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if byte_level and all(character in _ALPHABET for character in token):
            result[index] = bytes(_ALPHABET[character] for character in token)
        elif byte_level:  # added to the vocabulary as plain text
            result[index] = token.encode()
        else:  # here "Ġ" is a letter of Maltese
            byte = _BYTE_TOKEN.fullmatch(token)
            result[index] = bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    return result


def special_token_ids(tokenizer: Any) -> set[int]:
    """Ids of tokens that stand for no text: those the tokenizer names, and ``<|...|>``."""
    named = set(getattr(tokenizer, "all_special_ids", None) or ())
    return named | {i for token, i in _vocabulary(tokenizer).items() if is_special_token(token)}


def is_special_token(token: str) -> bool:
    """Whether a token is written like a special one."""
    return _SPECIAL_TOKEN.fullmatch(token) is not None


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise ValueError("tokenizer must have a token or more, got an empty vocabulary")
    return vocabulary
