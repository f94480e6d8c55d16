"""Checkpoints: exact, atomic, and clear about damage."""

import pytest
import torch

from sciml._checkpoint import load_checkpoint, load_optimizer, optimizer_state, save_checkpoint


def trained(optimizer_class, steps, model=None, optimizer=None):
    torch.manual_seed(0)
    model = model or torch.nn.Linear(3, 2)
    optimizer = optimizer or optimizer_class(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.SGD]
)
def test_resumed_training_is_bit_identical(tmp_path, optimizer_class):
    model, optimizer = trained(optimizer_class, 3)
    tensors, values = optimizer_state(optimizer)
    tensors |= {f"model.{name}": t for name, t in model.state_dict().items()}
    save_checkpoint(tmp_path / "deep" / "c.safetensors", tensors, {"optimizer": values, "epoch": 3})

    loaded, metadata = load_checkpoint(tmp_path / "deep" / "c.safetensors")
    assert metadata["epoch"] == 3
    other = torch.nn.Linear(3, 2)
    other.load_state_dict({name: loaded[f"model.{name}"] for name in other.state_dict()})
    fresh = optimizer_class(other.parameters(), lr=0.5)
    load_optimizer(fresh, loaded, metadata["optimizer"])
    for m, o in ((model, optimizer), (other, fresh)):
        trained(optimizer_class, 2, m, o)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_tied_weights_are_saved(tmp_path):
    weight = torch.arange(3.0)
    save_checkpoint(tmp_path / "c", {"a": weight, "b": weight}, {})
    tensors, _ = load_checkpoint(tmp_path / "c")
    assert torch.equal(tensors["a"], tensors["b"])


def test_old_checkpoint_survives_a_failed_write(tmp_path):
    save_checkpoint(tmp_path / "c", {"a": torch.ones(2)}, {"epoch": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "c", {"a": torch.zeros(2)}, {"epoch": object()})
    tensors, metadata = load_checkpoint(tmp_path / "c")
    assert metadata == {"epoch": 1}
    assert torch.equal(tensors["a"], torch.ones(2))


def test_damage_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match="c.safetensors does not exist"):
        load_checkpoint(path)
    save_checkpoint(path, {"a": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="c.safetensors is truncated"):
        load_checkpoint(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no metadata"):
        load_checkpoint(path)
