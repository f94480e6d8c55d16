"""OpenFWI files: read as laid out, lazily, and errors that name the file."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sciml.inverse.seismic import (
    OPENFWI_STATISTICS,
    OpenFWIDataset,
    Survey,
    denormalize_velocity,
    normalize_velocity,
    open_openfwi,
    standardize_seismic,
)

SURVEY = Survey.line(16, n_shots=2, dx=20.0, nt=50)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, n in ((1, 3), (2, 4)):
        np.save(tmp_path / f"data{i}.npy", rng.standard_normal((n, 2, 50, 16), np.float32))
        np.save(tmp_path / f"model{i}.npy", rng.uniform(1500, 4500, (n, 1, 16, 16)).astype("f4"))
    (tmp_path / "train.txt").write_text("data1.npy\tmodel1.npy\n\ndata2.npy\tmodel2.npy\n")
    return tmp_path


def test_dataset_indexes_across_files(folder):
    dataset = OpenFWIDataset(folder / "train.txt")
    assert len(dataset) == 7
    data, model = np.load(folder / "data2.npy"), np.load(folder / "model2.npy")
    for index in (4, 4 - 7):
        seismic, velocity = dataset[index]
        assert (seismic.numpy() == data[1]).all()
        assert (velocity.numpy() == model[1]).all()
    with pytest.raises(IndexError, match="7"):
        dataset[7]


def test_statistics_normalise_both_sides(folder):
    raw = OpenFWIDataset(folder / "train.txt")[0]
    seismic, velocity = OpenFWIDataset(folder / "train.txt", statistics="style_b")[0]
    torch.testing.assert_close(seismic, standardize_seismic(raw[0], OPENFWI_STATISTICS["style_b"]))
    torch.testing.assert_close(denormalize_velocity(velocity), raw[1], rtol=1e-5, atol=1e-2)
    assert velocity.abs().max() <= 1


def test_velocity_normalisation_round_trip():
    velocity = np.linspace(1500, 4500, 7)
    assert normalize_velocity(velocity)[[0, -1]].tolist() == [-1, 1]
    np.testing.assert_allclose(denormalize_velocity(normalize_velocity(velocity)), velocity)


def test_workers_do_not_carry_the_files(folder):
    dataset = OpenFWIDataset(folder / "train.txt")
    assert len(pickle.dumps(dataset)) < 3000
    batches = list(DataLoader(dataset, batch_size=4, num_workers=1))
    assert [len(seismic) for seismic, _ in batches] == [4, 3]


def test_open_folder_as_xarray(folder):
    dataset = open_openfwi(folder, survey=SURVEY)
    assert dataset["seismic"].dims == ("sample", "shot", "time", "receiver")
    assert dataset["velocity"].shape == (7, 16, 16)
    assert dataset["time"].attrs["units"] == "s"
    assert dataset["depth"].attrs == {"units": "m", "positive": "down"}
    assert float(dataset["x"][1]) == 20.0
    lazy = open_openfwi(folder, survey=SURVEY, chunks={"sample": 2})
    assert lazy["seismic"].chunks[0] == (2, 1, 2, 2)
    np.testing.assert_array_equal(lazy["seismic"], dataset["seismic"])


def test_files_are_read_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 2, 1):
        np.save(tmp_path / f"data{i}.npy", np.full((1, 2, 50, 16), i, "f4"))
        np.save(tmp_path / f"model{i}.npy", np.full((1, 1, 16, 16), 2000.0 + i, "f4"))
    dataset = open_openfwi(tmp_path, survey=SURVEY)
    assert dataset["seismic"][:, 0, 0, 0].values.tolist() == [1, 2, 10]
    assert dataset["velocity"][:, 0, 0].values.tolist() == [2001, 2002, 2010]


def test_fault_names_and_separate_folders(tmp_path):
    for sub in ("data", "model"):
        (tmp_path / "vel" / sub).mkdir(parents=True)
    data, model = np.zeros((2, 2, 50, 16), "f4"), np.full((2, 1, 16, 16), 2e3, "f4")
    np.save(tmp_path / "vel" / "data" / "data1.npy", data)
    np.save(tmp_path / "vel" / "model" / "model1.npy", model)
    assert open_openfwi(tmp_path / "vel", survey=SURVEY).sizes["sample"] == 2
    np.save(tmp_path / "seis2_1_0.npy", data)
    np.save(tmp_path / "vel2_1_0.npy", model)
    assert open_openfwi(tmp_path, survey=SURVEY).sizes["sample"] == 2


def test_bad_files_are_named(folder):
    truncated = folder / "data1.npy"
    truncated.write_bytes(truncated.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"data1.npy is truncated.*n_samples, n_shots"):
        OpenFWIDataset(folder / "train.txt")
    np.save(truncated, np.zeros((3, 2, 50), "f4"))
    with pytest.raises(ValueError, match=r"data1.npy .*\(3, 2, 50\)"):
        OpenFWIDataset(folder / "train.txt")
    np.save(truncated, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"data1.npy is truncated or no npy"):
        OpenFWIDataset(folder / "train.txt")
    np.save(truncated, np.zeros((2, 2, 50, 16), "f4"))
    with pytest.raises(ValueError, match=r"as many samples, got 2 and 3"):
        OpenFWIDataset(folder / "train.txt")
    truncated.unlink()
    with pytest.raises(FileNotFoundError, match="data1.npy does not exist"):
        OpenFWIDataset(folder / "train.txt")
    (folder / "bad.txt").write_text("only-one-name.npy\n")
    with pytest.raises(ValueError, match="line 1 of .*bad.txt"):
        OpenFWIDataset(folder / "bad.txt")


def test_nan_is_named(folder):
    data = np.load(folder / "data1.npy")
    data[1, 0, 0, 0] = np.nan
    np.save(folder / "data1.npy", data)
    dataset = OpenFWIDataset(folder / "train.txt")
    dataset[0]
    with pytest.raises(ValueError, match=r"sample 1 of .*data1.npy .*finite"):
        dataset[1]


def test_unknown_statistics_and_survey(folder):
    with pytest.raises(ValueError, match="statistics .*'flat_vel_a'.*'FlatVel-A'"):
        OpenFWIDataset(folder / "train.txt", statistics="FlatVel-A")
    with pytest.raises(ValueError, match=r"seismic must have shape \(n_samples, 5, 1000, 70\)"):
        open_openfwi(folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no data"):
        open_openfwi(folder / "empty")
