"""Energy of known power curves, honest None without a source, and codecarbon when asked for."""

import math
import sys
import threading
import time
import types
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sciml.layerwise import EnergyMonitor, trapezoid_energy


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=30).map(sorted),
    st.floats(0, 500),
    st.floats(0, 50),
)
def test_linear_power_is_integrated_exactly(times, start, slope):
    watts = [start + slope * t for t in times]
    first, last = times[0], times[-1]
    exact = start * (last - first) + slope * (last**2 - first**2) / 2
    assert trapezoid_energy(times, watts) == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_equals_numpy_and_fills_gaps():
    rng = np.random.default_rng(0)
    times, watts = np.sort(rng.random(20)), rng.random(20)
    assert trapezoid_energy(times, watts) == pytest.approx(np.trapezoid(watts, times))
    assert trapezoid_energy([0, 1, 2], [100, 100, 100]) == 200
    assert trapezoid_energy([0, 1, 2, 3], [None, 10, None, 30]) == 10 + 10 + 20
    assert trapezoid_energy([0, 1, 2], [None, 10, None]) is None
    assert trapezoid_energy([], []) is None


@pytest.mark.parametrize(
    ("match", "times", "watts"),
    [
        ("same length", [0, 1], [1]),
        ("backwards", [1, 0], [1, 1]),
        ("watts.*nan", [0, 1], [1, math.nan]),
        ("watts.*-1", [0, 1], [1, -1]),
    ],
)
def test_bad_samples(match, times, watts):
    with pytest.raises(ValueError, match=match):
        trapezoid_energy(times, watts)


def test_constant_power():
    used = iter([5, 9, 7, *[1] * 1000])
    with EnergyMonitor(0.01, power=lambda: 100.0, memory=lambda: next(used)) as monitor:
        time.sleep(0.1)
    assert monitor.energy_joules == pytest.approx(100 * monitor.duration)
    assert 0.1 <= monitor.duration < 5
    assert monitor.peak_memory_bytes == 9
    assert not any(thread.name == "EnergyMonitor" for thread in threading.enumerate())


def test_rising_power(monkeypatch):
    """By a clock that moves 1/8 s whenever it is read, power is 10 W a second."""
    now = [0.0]

    def clock():
        now[0] += 0.125
        return now[0]

    module = import_module("sciml.layerwise.energy")
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=clock))
    with EnergyMonitor(0.002, power=lambda: 10 * (now[0] + 0.125)) as monitor:
        time.sleep(0.1)
    end = 0.125 + monitor.duration
    assert monitor.duration >= 0.25
    assert monitor.energy_joules == pytest.approx(5 * (end**2 - 0.125**2))


def test_samples_end_and_begin_with_the_block():
    """A block shorter than the interval still has the two samples that an integral needs."""
    with EnergyMonitor(10.0, power=lambda: 50.0) as monitor:
        time.sleep(0.02)
    assert monitor.energy_joules == pytest.approx(50 * monitor.duration)
    assert monitor.duration < 5


@pytest.mark.parametrize("count", [0, 1])
def test_nvml_read_or_honestly_absent(monkeypatch, count):
    class NVMLError(Exception):
        pass

    def handle(number):
        if number >= count:
            raise NVMLError
        return "gpu"

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetPowerUsage=lambda gpu: 250_000,
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monitor = EnergyMonitor(0.01)
    if count:
        with monitor:
            time.sleep(0.02)
        assert monitor.energy_joules == pytest.approx(250 * monitor.duration)
        assert monitor.peak_memory_bytes == 2**30
    else:
        with pytest.warns(UserWarning, match="NVML is not available") as record, monitor:
            pass
        assert len(record) == 1
        assert monitor.energy_joules is None
        assert monitor.peak_memory_bytes is None


def test_missing_package_is_honest_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    with pytest.warns(UserWarning, match="energy_joules is None"), EnergyMonitor() as monitor:
        pass
    assert monitor.energy_joules is None
    assert monitor.duration > 0


def test_error_of_a_source_reaches_the_caller():
    values = iter([1.0])

    def power():
        return next(values, "broken") / 1

    with pytest.raises(TypeError), EnergyMonitor(0.005, power=power):
        time.sleep(0.1)


def test_emissions(monkeypatch):
    seen = {}

    class OfflineEmissionsTracker:
        def __init__(self, **options):
            seen.update(options)

        def start(self):
            seen["started"] = True

        def stop(self):
            return 0.25

    module = types.SimpleNamespace(OfflineEmissionsTracker=OfflineEmissionsTracker)
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    with EnergyMonitor(power=lambda: 1.0, country_iso_code="POL") as monitor:
        pass
    assert monitor.emissions_kg == 0.25
    assert seen["started"]
    assert seen["country_iso_code"] == "POL"
    assert seen["save_to_file"] is False
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ImportError, match=r"sciml-kit\[energy\]"):
        EnergyMonitor(power=lambda: 1.0, country_iso_code="POL").__enter__()


@pytest.mark.parametrize("interval", [0, -1, math.nan, math.inf])
def test_bad_interval(interval):
    with pytest.raises(ValueError, match="interval"):
        EnergyMonitor(interval)


def test_bad_device():
    with pytest.raises(ValueError, match="device.*-1"):
        EnergyMonitor(device=-1)
