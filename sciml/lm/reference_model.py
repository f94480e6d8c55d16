"""The frozen model that an objective compares with: found, or scored once and kept on disk."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._check import check_integer
from .._checkpoint import load_checkpoint, save_checkpoint
from .token_reduction import IGNORE_INDEX, token_logps

__all__ = ["precompute_reference_logps", "reference", "unwrap_model"]


@contextmanager
def reference(model: nn.Module, ref_model: nn.Module | None = None) -> Iterator[nn.Module]:
    """The reference model, in evaluation mode and without gradients, while the context lasts.

    Parameters
    ----------
    model : torch.nn.Module
        The model being trained. If it is a PEFT model, possibly wrapped by DDP, and no
        `ref_model` is given, its adapters are switched off and it is its own reference.
    ref_model : torch.nn.Module, optional
        A frozen copy, or any other model over the same tokens.

    Yields
    ------
    torch.nn.Module
        To be called like the model. Training modes are put back afterwards.

    Raises
    ------
    ValueError
        If there is neither a reference model nor an adapter to switch off.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import reference
    >>> layer = torch.nn.Linear(2, 2)
    >>> with reference(layer, ref_model=layer) as frozen:
    ...     frozen(torch.ones(1, 2)).requires_grad
    False
    """
    if ref_model is None:
        peft_model = _peft_model(model)
        if peft_model is None:
            raise ValueError(
                "a reference is needed: give ref_model, a frozen copy of the model, or train "
                f"adapters by peft.get_peft_model; got a {type(unwrap_model(model)).__name__} "
                "and no ref_model"
            )
        with peft_model.disable_adapter(), _frozen(model):
            yield model
    else:
        with _frozen(ref_model):
            yield ref_model


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP and PEFT wrappers, with its adapters still at work.

    Parameters
    ----------
    model : torch.nn.Module
    """
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _peft_model(model: nn.Module) -> Any:
    while not hasattr(model, "disable_adapter"):
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def precompute_reference_logps(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    ref_model: nn.Module | None = None,
    batch_size: int = 8,
    save_every: int = 100,
    verbose: bool = False,
) -> list[Tensor]:
    """Log-probabilities of the labels under the reference model, computed once and kept on disk.

    Where the file exists it is read instead, after a check that it belongs to these data and this
    model; where it holds the beginning only, because a run was interrupted, the rest is computed.

    Parameters
    ----------
    model, ref_model
        As for `reference`.
    dataset : sequence of mappings
        Items with `input_ids` and `labels` (-100 where nothing is to be predicted), lists or
        tensors of shape (n_tokens,), unpadded. A `datasets.Dataset` will do.
    path : path
        A safetensors file.
    batch_size : int, default=8
        Items a forward pass, padded on the right.
    save_every : int, default=100
        Batches between two writes of the file; each is atomic.
    verbose : bool, default=False
        Show a progress bar.

    Returns
    -------
    list of Tensor of shape (n_tokens,)
        One per item, float32, on the CPU: entry t is log p(label t + 1 | tokens up to t), 0 where
        there is no label. Its sum is the `ref_logps` of the sequence.

    Raises
    ------
    ValueError
        If the file was made from other data, or by a model that scores the first item
        differently.
    """
    check_integer("batch_size", batch_size, 1)
    check_integer("save_every", save_every, 1)
    items = [_item(dataset[i], i) for i in range(len(dataset))]
    checksum = _checksum(items)
    done: list[Tensor] = []
    with reference(model, ref_model) as frozen:
        if Path(path).exists():
            tensors, metadata = load_checkpoint(path)
            if metadata.get("data_sha256") != checksum:
                raise ValueError(f"{path} was made from other data; delete it to compute it again")
            done = list(tensors["logps"].split([len(ids) for ids, _ in items][: metadata["n"]]))
            if done:
                (again,) = _score(frozen, items[:1])
                exact = next(frozen.parameters()).dtype in (torch.float32, torch.float64)
                tolerance = 1e-4 if exact else 5e-2  # padding and kernels change the rounding
                if not torch.allclose(again, done[0], rtol=tolerance, atol=tolerance):
                    raise ValueError(
                        f"{path} was made by another model: the first item's log-probability is "
                        f"{float(done[0].sum()):.4f} there and {float(again.sum()):.4f} here; "
                        "delete it to compute it again"
                    )
        starts = range(len(done), len(items), batch_size)
        for i, start in enumerate(tqdm(starts, desc="reference", disable=not verbose), start=1):
            done += _score(frozen, items[start : start + batch_size])
            if i % save_every == 0 or start + batch_size >= len(items):
                save_checkpoint(
                    path,
                    {"logps": torch.cat(done)},
                    {"data_sha256": checksum, "n": len(done)},
                )
    return done


def _item(item: Mapping[str, Any], position: int) -> tuple[Tensor, Tensor]:
    for name in ("input_ids", "labels"):
        if name not in item:
            raise ValueError(f"dataset[{position}] must have {name}, got {sorted(item)}")
    ids, labels = (torch.as_tensor(item[name]).long() for name in ("input_ids", "labels"))
    if ids.dim() != 1 or ids.shape != labels.shape:
        raise ValueError(
            f"input_ids and labels of dataset[{position}] must have the same shape (n_tokens,), "
            f"got {tuple(ids.shape)} and {tuple(labels.shape)}"
        )
    return ids.cpu(), labels.cpu()


def _checksum(items: Sequence[tuple[Tensor, Tensor]]) -> str:
    digest = hashlib.sha256()
    for ids, labels in items:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def _score(model: nn.Module, items: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    device = next(model.parameters()).device

    def pad(rows: Sequence[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

    ids = pad([ids for ids, _ in items], 0).to(device)
    labels = pad([labels for _, labels in items], IGNORE_INDEX).to(device)
    attention = pad([torch.ones_like(ids) for ids, _ in items], 0).to(device)
    logps, _ = token_logps(model(input_ids=ids, attention_mask=attention).logits, labels)
    if not bool(logps.isfinite().all()):
        raise ValueError("the reference model gives NaN or infinite log-probabilities")
    return [row[: len(ids)].float().cpu() for row, (ids, _) in zip(logps, items, strict=True)]
