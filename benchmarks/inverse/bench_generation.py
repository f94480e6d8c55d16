"""Time the making of OpenFWI-like data: one core, threads against processes, and scaling.

70 x 70 cells, 5 shots, 1000 steps of a millisecond, as in OpenFWI. Prints models a second for

1. one process with 1 thread and with 2, called through `AcousticWavePhysics`, and with one
   thread through `deepwave.scalar` as its documentation calls it (it then splits the time step);
2. two programs with one thread each at the same time: what the two cores can do at all, less
   than twice one core where they share caches or are two threads of one;
3. `make_openfwi_like` with 1 process and with 2, each process with one thread.

Run it on a machine that does nothing else: threads that wait for a busy core cost most.

    python benchmarks/inverse/bench_generation.py
"""

import argparse
import os
import subprocess
import sys
import time

import numpy as np
import torch

from sciml.inverse.seismic import (
    AcousticWavePhysics,
    Survey,
    make_openfwi_like,
    make_velocity_maps,
)


def plain_deepwave(velocity, survey):
    """One model as the documentation of deepwave calls it."""
    import deepwave

    shots = survey.n_shots
    return deepwave.scalar(
        torch.from_numpy(velocity),
        survey.dx,
        survey.dt,
        source_amplitudes=torch.as_tensor(survey.source_wavelet(), dtype=torch.float32).expand(
            shots, 1, -1
        ),
        source_locations=torch.as_tensor(survey.source_cells())[:, None],
        receiver_locations=torch.as_tensor(survey.receiver_cells()).expand(shots, -1, -1),
        pml_freq=survey.peak_frequency,
    )[-1]


def one_process(n, plain):
    """Models a second in this process, after one to warm up."""
    maps = make_velocity_maps("curve_vel_a", n + 1, random_state=0)
    survey = Survey()
    physics = AcousticWavePhysics(survey)
    start = 0.0
    with torch.no_grad():
        for i, velocity in enumerate(maps):
            if i == 1:
                start = time.perf_counter()
            if plain:
                plain_deepwave(velocity, survey)
            else:
                physics.A(torch.from_numpy(velocity)[None, None])
    return n / (time.perf_counter() - start)


def in_subprocess(n, threads, plain=False):
    """`one_process` in a fresh process, since the thread count is fixed at import."""
    return float(_start(n, threads, plain).communicate()[0])


def two_programs(n):
    """Models a second of two processes that know nothing of each other."""
    return sum(float(p.communicate()[0]) for p in [_start(n, 1, False) for _ in range(2)])


def _start(n, threads, plain):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--models", str(n), "--child"] + ["--plain"] * plain
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)


def generated(n, n_jobs):
    """Models a second of `make_openfwi_like`, with the workers started before."""
    small = Survey.line(16, n_shots=1, nt=20)
    make_openfwi_like(
        n_samples=2 * n_jobs, survey=small, shape=(16, 16), shard_size=1, n_jobs=n_jobs
    )
    start = time.perf_counter()
    make_openfwi_like("curve_vel_a", n, random_state=0, shard_size=4, n_jobs=n_jobs)
    return n / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    n = arguments.models
    if arguments.child:
        print(one_process(n, arguments.plain))
        return
    calls = {
        "1 process, 1 thread": lambda: in_subprocess(n, 1),
        "1 process, 2 threads": lambda: in_subprocess(n, 2),
        "deepwave as documented, 1 thread": lambda: in_subprocess(n, 1, plain=True),
        "2 programs, 1 thread each": lambda: two_programs(n),
        "make_openfwi_like, 1 process": lambda: generated(n, 1),
        "make_openfwi_like, 2 processes": lambda: generated(2 * n, 2),
    }
    rates = {name: [] for name in calls}
    for _ in range(arguments.repeats):  # taking turns, so that all see the same machine
        for name, call in calls.items():
            rates[name].append(call())
    median = {name: float(np.median(values)) for name, values in rates.items()}
    for name, rate in median.items():
        listed = " ".join(f"{value:.2f}" for value in rates[name])
        print(f"{name:34s} {rate:5.2f} models a second  ({listed})")
    one, two = (median[f"make_openfwi_like, {k}"] for k in ("1 process", "2 processes"))
    print(f"two processes over one: {two / one:.2f}x")
    programs = median["2 programs, 1 thread each"] / median["1 process, 1 thread"]
    print(f"two programs over one: {programs:.2f}x")
    ratio = median["1 process, 1 thread"] / median["deepwave as documented, 1 thread"]
    print(f"this library over deepwave as documented: {ratio:.2f}x")


if __name__ == "__main__":
    main()
