"""The table of predictions reads what was written; files resume from their last state dict."""

import numpy as np
import pytest
import torch

from sciml.lm import PredictionStore

FIELDS = {"value": (3, torch.float32), "token": (2, torch.int32)}


def rows(seed, n=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        "value": torch.randn(n, 3, generator=generator),
        "token": torch.randint(100, (n, 2), generator=generator, dtype=torch.int32),
    }


def same(store, index, expected):
    fields, seen = store.read(torch.tensor(index))
    assert seen.all()
    for name, value in expected.items():
        torch.testing.assert_close(fields[name], value)


@pytest.mark.parametrize("in_files", [False, True])
def test_reads_what_was_written_last(tmp_path, in_files):
    store = PredictionStore(10, FIELDS, path=tmp_path / "table" if in_files else None)
    _, seen = store.read(torch.arange(10))
    assert not seen.any()
    store.write(torch.tensor([7, 2, 0, 9]), **rows(0))
    same(store, [7, 2, 0, 9], rows(0))
    assert store.read(torch.tensor([1, 7]))[1].tolist() == [False, True]
    store.write(torch.tensor([2, 3, 4, 7]), **rows(1))
    same(store, [2, 3, 4, 7], rows(1))
    same(store, [0, 9], {name: value[2:] for name, value in rows(0).items()})
    assert store.value.shape[0] == 1 if not in_files else store._files["value"].shape[0] == 2


@pytest.mark.parametrize("in_files", [False, True])
def test_killed_run_resumes_from_its_state_dict(tmp_path, in_files):
    """Rows written after the state dict was taken, twice even, are forgotten."""
    path = tmp_path / "table" if in_files else None
    store = PredictionStore(10, FIELDS, path=path)
    store.write(torch.tensor([0, 1, 2, 3]), **rows(0))
    state = {name: value.clone() for name, value in store.state_dict().items()}
    store.write(torch.tensor([2, 3, 4, 5]), **rows(1))
    store.write(torch.tensor([2, 3, 4, 6]), **rows(2))
    same(store, [2, 3, 4, 6], rows(2))
    del store
    resumed = PredictionStore(10, FIELDS, path=path)
    resumed.load_state_dict(state)
    same(resumed, [0, 1, 2, 3], rows(0))
    assert resumed.read(torch.arange(10))[1].tolist() == [True] * 4 + [False] * 6
    resumed.write(torch.tensor([2, 3, 4, 5]), **rows(1))
    resumed.load_state_dict(state)
    same(resumed, [0, 1, 2, 3], rows(0))
    # On, and again.
    resumed.write(torch.tensor([2, 3, 4, 5]), **rows(1))
    state = {name: value.clone() for name, value in resumed.state_dict().items()}
    resumed.write(torch.tensor([5, 4, 3, 0]), **rows(2))
    resumed.load_state_dict(state)
    same(resumed, [2, 3, 4, 5], rows(1))


def test_files_written_over_are_refused(tmp_path):
    store = PredictionStore(10, FIELDS, path=tmp_path)
    store.write(torch.arange(4), **rows(0))
    old = store.state_dict()
    again = store.state_dict()  # nothing was written in between: both may be loaded
    assert torch.equal(old["generation"], again["generation"])
    store.load_state_dict(old)
    store.write(torch.arange(4), **rows(1))
    new = store.state_dict()
    with pytest.raises(ValueError, match="written over since"):
        store.load_state_dict(old)
    store.load_state_dict(new)
    # A new run in the same folder writes over it too.
    fresh = PredictionStore(10, FIELDS, path=tmp_path)
    assert not fresh.read(torch.arange(10))[1].any()
    fresh.write(torch.arange(4), **rows(2))
    with pytest.raises(ValueError, match="written over since"):
        PredictionStore(10, FIELDS, path=tmp_path).load_state_dict(new)


def test_stays_where_it_is_and_keeps_its_dtypes():
    holder = torch.nn.Sequential(PredictionStore(5, FIELDS)).double().half().to("meta")
    assert holder[0].value.dtype == torch.float32
    assert holder[0].value.device.type == "cpu"
    assert not holder[0].read(torch.tensor([0], device="cpu"))[1].any()
    assert "5 rows, value=3, token=2" in repr(holder[0])


def test_files_are_plain_arrays(tmp_path):
    store = PredictionStore(6, {"value": (2, torch.float16)}, path=tmp_path / "a" / "b")
    store.write(torch.tensor([5]), value=torch.tensor([[0.25, 0.75]]))
    store.state_dict()
    array = np.load(tmp_path / "a" / "b" / "value.npy", allow_pickle=False)
    assert array.shape == (2, 6, 2)
    assert array.dtype == np.float16
    assert array[0, 5].tolist() == [0.25, 0.75]


def test_bad_input(tmp_path):
    PredictionStore(10, FIELDS, path=tmp_path)
    with pytest.raises(ValueError, match=r"must hold float32 of shape \(2, 11, 3\)"):
        PredictionStore(11, FIELDS, path=tmp_path)
    (tmp_path / "value.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or no .npy"):
        PredictionStore(10, FIELDS, path=tmp_path)
    with pytest.raises(ValueError, match="n_rows"):
        PredictionStore(0, FIELDS)
    with pytest.raises(ValueError, match="dtype"):
        PredictionStore(1, {"value": (1, torch.bfloat16)})
    with pytest.raises(ValueError, match="width of value"):
        PredictionStore(1, {"value": (0, torch.float32)})
    with pytest.raises(ValueError, match="device must be 'cpu'"):
        PredictionStore(1, FIELDS, device="meta", path=tmp_path)
