"""Data sets: the same however they are made, and whole after a kill."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sciml.inverse.seismic import OPENFWI_STATISTICS, Survey, make_openfwi_like, open_openfwi

SURVEY = Survey.line(16, n_shots=2, dx=20.0, dt=2e-3, nt=100, peak_frequency=10.0)
SMALL = {"survey": SURVEY, "shape": (16, 16), "random_state": 3}


@pytest.fixture(scope="module")
def expected():
    return make_openfwi_like("curve_vel_b", 7, **SMALL)


def test_dataset_is_described(expected):
    assert expected["seismic"].dtype == np.float32
    assert expected.attrs["kind"] == "curve_vel_b"
    assert expected.attrs["seed"] == 3
    assert expected.attrs["n_absorbing"] == 20
    assert expected.attrs["generator"].startswith("sciml-kit")
    assert expected["velocity"].attrs["units"] == "m s-1"
    for name, unit in (("time", "s"), ("receiver_x", "m"), ("source_x", "m"), ("depth", "m")):
        assert expected[name].attrs["units"] == unit
    assert float(np.abs(expected["seismic"]).max()) > 1


@pytest.mark.parametrize(("format", "shard_size"), [("netcdf", 3), ("zarr", 4)])
def test_shards_hold_the_same_data(tmp_path, expected, format, shard_size):
    made = make_openfwi_like(
        "curve_vel_b", 7, path=tmp_path, format=format, shard_size=shard_size, **SMALL
    )
    assert made.sizes == expected.sizes
    np.testing.assert_array_equal(made["velocity"], expected["velocity"])
    np.testing.assert_allclose(made["seismic"], expected["seismic"], atol=1e-5)
    reopened = open_openfwi(tmp_path)
    np.testing.assert_array_equal(reopened["sample"], np.arange(7))


def test_processes_make_the_same_data(expected):
    made = make_openfwi_like("curve_vel_b", 7, shard_size=2, n_jobs=2, **SMALL)
    np.testing.assert_array_equal(made["seismic"], expected["seismic"])


def test_missing_shards_are_made_and_others_kept(tmp_path, expected):
    make_openfwi_like("curve_vel_b", 7, path=tmp_path, shard_size=2, **SMALL).close()
    kept = tmp_path / "samples-0000000.nc"
    before = kept.stat().st_mtime_ns
    (tmp_path / "samples-0000004.nc").unlink()
    (tmp_path / "samples-0000004.nc.123.part").write_bytes(b"half a shard")
    with pytest.raises(ValueError, match="lacks 1 of 4 shards, first samples-0000004.nc"):
        open_openfwi(tmp_path)
    made = make_openfwi_like("curve_vel_b", 7, path=tmp_path, shard_size=2, **SMALL)
    np.testing.assert_array_equal(made["velocity"], expected["velocity"])
    assert kept.stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*.part"))


def test_survives_kill(tmp_path):
    n = 60
    code = (
        "from sciml.inverse.seismic import Survey, make_openfwi_like\n"
        "survey = Survey.line(16, n_shots=2, dx=20.0, dt=2e-3, nt=100, peak_frequency=10.0)\n"
        f"make_openfwi_like('curve_vel_b', {n}, survey=survey, shape=(16, 16), random_state=3,\n"
        f"    path={str(tmp_path)!r}, shard_size=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 300
    while (
        not list(tmp_path.glob("*.nc")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = list(tmp_path.glob("*.nc"))
    assert 0 < len(written) < n
    before = {file: file.stat().st_mtime_ns for file in written}
    made = make_openfwi_like("curve_vel_b", n, path=tmp_path, shard_size=1, **SMALL)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    expected = make_openfwi_like("curve_vel_b", n, shard_size=1, **SMALL)
    np.testing.assert_array_equal(made["velocity"], expected["velocity"])
    np.testing.assert_array_equal(made["seismic"], expected["seismic"])


def test_another_data_set_is_refused(tmp_path):
    make_openfwi_like("flat_vel_a", 2, path=tmp_path, **SMALL).close()
    with pytest.raises(ValueError, match="kind is 'flat_vel_a', asked for was 'flat_vel_b'"):
        make_openfwi_like("flat_vel_b", 2, path=tmp_path, **SMALL)


def test_dask_runs_the_shards(expected):
    import joblib
    from distributed import Client

    with (
        Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None),
        joblib.parallel_config("dask"),
    ):
        made = make_openfwi_like("curve_vel_b", 7, shard_size=4, **SMALL)
    np.testing.assert_allclose(made["seismic"], expected["seismic"], atol=1e-5)


@pytest.mark.slow
def test_statistics_are_near_the_published_ones():
    seismic = make_openfwi_like("flat_vel_a", 40, random_state=0, n_jobs=2, shard_size=5)["seismic"]
    assert float(seismic.std()) == pytest.approx(OPENFWI_STATISTICS["flat_vel_a"].std, rel=0.15)
    assert abs(float(seismic.mean())) < 0.01
    assert -40 < float(seismic.min()) < -15
    assert 35 < float(seismic.max()) < 75
