import pytest
import torch

from sciml.lm import byte_language_model, precompute_reference_logps, reference, token_logps
from sciml.lm.reference_model import unwrap_model


def lora(model, dropout=0.0):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=dropout,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


@pytest.fixture
def base():
    return byte_language_model(16, 1, 2)


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


class Wrapper(torch.nn.Module):
    """As DDP: the model is an attribute `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("wrap", [False, True])
def test_peft_model_is_its_own_reference(base, ids, wrap):
    expected = base(input_ids=ids).logits.detach().clone()
    model = lora(base, dropout=0.5).train()
    model.base_model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    outer = Wrapper(model) if wrap else model
    with reference(outer) as frozen:
        logits = frozen(input_ids=ids).logits
        assert not logits.requires_grad
        assert not any(module.training for module in model.modules())
    assert torch.equal(logits, expected)
    assert [module.training for module in model.modules()] == modes
    assert not torch.allclose(model(input_ids=ids).logits, expected)
    assert unwrap_model(outer) is base


def test_modes_come_back_after_an_error(base):
    model = lora(base).train()
    with pytest.raises(RuntimeError), reference(model):
        raise RuntimeError
    assert all(module.training for module in model.modules())
    assert model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.requires_grad


def test_a_given_reference_is_used(base, ids):
    other = byte_language_model(16, 1, 2, random_state=1).train()
    with reference(base, other) as frozen:
        assert frozen is other
        assert not frozen.training
        assert not frozen(input_ids=ids).logits.requires_grad
    assert other.training


def test_no_reference_is_an_error(base):
    with pytest.raises(ValueError, match="give ref_model.*LlamaForCausalLM"), reference(base):
        pass


def items(n=7):
    generator = torch.Generator().manual_seed(1)
    result = []
    for i in range(n):
        ids = torch.randint(0, 256, (3 + i % 4,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        result.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return result


def direct(model, item):
    ids, labels = (torch.tensor([item[name]]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        return token_logps(model(input_ids=ids).logits, labels)[0][0]


def test_precomputed_equals_direct_and_is_reused(base, tmp_path):
    data, path = items(), tmp_path / "ref.safetensors"
    model = lora(base)
    logps = precompute_reference_logps(model, data, path, batch_size=3)
    with model.disable_adapter():
        for item, got in zip(data, logps, strict=True):
            torch.testing.assert_close(got, direct(model, item), rtol=1e-4, atol=1e-5)
    stamp = path.stat().st_mtime_ns
    calls = []
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    again = precompute_reference_logps(model, data, path, batch_size=3)
    handle.remove()
    assert len(calls) == 1  # the check of the first item
    assert path.stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(logps, again, strict=True))


def test_an_interrupted_run_is_continued(base, tmp_path):
    data, path = items(), tmp_path / "ref.safetensors"
    whole = precompute_reference_logps(base, data, tmp_path / "whole", ref_model=base, batch_size=2)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = base.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        precompute_reference_logps(base, data, path, ref_model=base, batch_size=2, save_every=1)
    handle.remove()
    calls.clear()
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    logps = precompute_reference_logps(base, data, path, ref_model=base, batch_size=2)
    handle.remove()
    assert len(calls) == 1 + 2  # the check, then items 4-5 and 6
    for a, b in zip(logps, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_other_data_or_another_model_is_refused(base, tmp_path):
    data, path = items(), tmp_path / "ref.safetensors"
    precompute_reference_logps(base, data, path, ref_model=base)
    with pytest.raises(ValueError, match="made from other data"):
        precompute_reference_logps(base, data[:-1], path, ref_model=base)
    other = byte_language_model(16, 1, 2, random_state=5)
    with pytest.raises(ValueError, match="made by another model"):
        precompute_reference_logps(base, data, path, ref_model=other)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"input_ids": [1, 2]}, r"dataset\[0\] must have labels, got \['input_ids'\]"),
        ({"input_ids": [1, 2], "labels": [1]}, r"same shape \(n_tokens,\), got \(2,\) and \(1,\)"),
    ],
)
def test_bad_items(base, tmp_path, item, message):
    with pytest.raises(ValueError, match=message):
        precompute_reference_logps(base, [item], tmp_path / "x", ref_model=base)
