"""Measure energy, time and memory of a piece of work on a GPU.

Power is sampled in a thread and integrated by the trapezoid rule, as in the umbrella study of
layer-local training (Spyra, arXiv:2509.19063). What can't be measured is None, never 0.
"""

import itertools
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from sciml._check import check_integer, check_interval, check_same_length

__all__ = ["EnergyMonitor", "trapezoid_energy"]


def trapezoid_energy(times: Sequence[float], watts: Sequence[float | None]) -> float | None:
    """Integrate power over time by the trapezoid rule.

    Parameters
    ----------
    times : sequence of float
        Times of the samples in seconds, in order.
    watts : sequence of float or None
        Power at these times. A missing sample (None) takes the value of the one before it, at the
        beginning that of the first one known.

    Returns
    -------
    float or None
        Energy in joules, or None with fewer than two samples that are known.

    Raises
    ------
    ValueError
        If the lengths differ, times go backwards, or a power is NaN, infinite or negative.

    References
    ----------
    Spyra, "Beyond Backpropagation", arXiv:2509.19063.

    Examples
    --------
    >>> from sciml.layerwise import trapezoid_energy
    >>> trapezoid_energy([0.0, 1.0, 2.0], [100.0, None, 100.0])
    200.0
    """
    check_same_length(times=times, watts=watts)
    for earlier, later in itertools.pairwise(times):
        if not later >= earlier:
            raise ValueError(f"times must not go backwards, got {earlier} before {later}")
    known = [power for power in watts if power is not None]
    for power in known:
        check_interval("watts", power, 0, math.inf, "left")
    if len(known) < 2:
        return None
    last, filled = known[0], []
    for sample in watts:
        last = last if sample is None else sample
        filled.append(last)
    return math.fsum(
        (times[i + 1] - times[i]) * (filled[i] + filled[i + 1]) / 2 for i in range(len(times) - 1)
    )


class EnergyMonitor:
    """Measure what happens inside a ``with`` block: joules, seconds, peak memory.

    Power and memory come from NVML (package ``nvidia-ml-py``, extra ``energy``) and are those of
    the whole GPU, whoever uses it. Without NVML they are None, with one warning.

    Parameters
    ----------
    interval : float, default=0.2
        Seconds from sample to sample (the study's).
    device : int, default=0
        Number of the GPU for NVML.
    power : callable ``() -> float or None`` or None, default=None
        Another source of the power in watts; it may return None where a sample is missing. NVML is
        not asked then, so that memory needs a source of its own.
    memory : callable ``() -> int or None`` or None, default=None
        Another source of the memory in use, in bytes.
    country_iso_code : str or None, default=None
        Three-letter code of a country, such as "POL": then CodeCarbon (extra ``energy``) also
        estimates emissions by that country's electricity, without network.

    Attributes
    ----------
    energy_joules : float or None
        Energy, None if it could not be measured.
    duration : float
        Seconds.
    peak_memory_bytes : int or None
        The largest sample of the memory in use, None if it could not be measured.
    emissions_kg : float or None
        CodeCarbon's estimate in kilograms of CO2, None without `country_iso_code`.

    References
    ----------
    Spyra, "Beyond Backpropagation", arXiv:2509.19063.

    Examples
    --------
    >>> import time
    >>> from sciml.layerwise import EnergyMonitor
    >>> with EnergyMonitor(0.01, power=lambda: 100.0) as monitor:
    ...     time.sleep(0.1)
    >>> round(monitor.energy_joules / monitor.duration, 6)
    100.0
    """

    def __init__(
        self,
        interval: float = 0.2,
        *,
        device: int = 0,
        power: Callable[[], float | None] | None = None,
        memory: Callable[[], int | None] | None = None,
        country_iso_code: str | None = None,
    ) -> None:
        check_interval("interval", interval, 0, math.inf, "neither")
        check_integer("device", device, 0)
        self.interval = interval
        self.device = device
        self.power = power
        self.memory = memory
        self.country_iso_code = country_iso_code
        self.energy_joules: float | None = None
        self.duration = 0.0
        self.peak_memory_bytes: int | None = None
        self.emissions_kg: float | None = None

    def __enter__(self) -> Self:
        self.energy_joules = self.peak_memory_bytes = self.emissions_kg = None
        self._times: list[float] = []
        self._watts: list[float | None] = []
        self._error: Exception | None = None
        self._power, self._memory = self.power, self.memory
        if self.power is None:
            self._nvml = nvml_sources(self.device)
            if self._nvml is None:
                warnings.warn(
                    "energy is not measured: NVML is not available (a CUDA device and the package "
                    "nvidia-ml-py are needed); energy_joules is None",
                    UserWarning,
                    stacklevel=2,
                )
            else:
                self._power = self._nvml[0]
                self._memory = self.memory or self._nvml[1]
        self._tracker = None
        if self.country_iso_code is not None:
            self._tracker = _emissions_tracker(self.country_iso_code, self.interval)
            self._tracker.start()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="EnergyMonitor", daemon=True)
        self._start = self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        end = time.monotonic() if self._error is not None else self._sample()
        self.duration = end - self._start
        if self._tracker is not None:
            self.emissions_kg = self._tracker.stop()
        if self._error is not None:
            if error is None:
                raise self._error
            return
        self.energy_joules = trapezoid_energy(self._times, self._watts)

    def _run(self) -> None:
        while not self._done.wait(self.interval):
            try:
                self._sample()
            except Exception as error:
                self._error = error  # raised by __exit__, in the thread of the user
                return

    def _sample(self) -> float:
        """Take a sample; return its time."""
        power = None if self._power is None else self._power()
        now = time.monotonic()
        self._watts.append(power)
        self._times.append(now)
        if self._memory is not None:
            memory = self._memory()
            if memory is not None:
                self.peak_memory_bytes = max(memory, self.peak_memory_bytes or 0)
        return now


def nvml_sources(
    device: int,
) -> tuple[Callable[[], float | None], Callable[[], int | None]] | None:
    """Return functions that read power and memory of a GPU from NVML, or None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device)
        pynvml.nvmlDeviceGetPowerUsage(handle)
    except pynvml.NVMLError:
        return None

    def power() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000  # from milliwatts
        except pynvml.NVMLError:
            return None

    def memory() -> int | None:
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        except pynvml.NVMLError:
            return None

    return power, memory


def _emissions_tracker(country_iso_code: str, interval: float) -> Any:
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError as error:
        raise ImportError(
            "country_iso_code needs CodeCarbon: pip install 'sciml-kit[energy]'"
        ) from error
    return OfflineEmissionsTracker(
        country_iso_code=country_iso_code,
        measure_power_secs=max(1, round(interval)),
        save_to_file=False,
        log_level="error",
    )
