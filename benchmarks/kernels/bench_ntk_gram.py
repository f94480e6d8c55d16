"""Time and memory of an NTK Gram matrix against straightforward NumPy and neural_tangents.

    python benchmarks/kernels/bench_ntk_gram.py [--n 4000] [--d 784] [--depth 2]
        [--repeats 5] [--neural-tangents-python PATH]

Times are minima over repeats, the competitors taking turns; memory is the peak resident set of a
fresh process for each competitor, less that of the same process before the call, less the result.
neural_tangents is timed in its own Python if one is given (its last release needs an old jax),
else in this one if it can be imported.
"""

import argparse
import json
import subprocess
import sys
import time

NEURAL_TANGENTS = """
import json, sys, time
import jax
import numpy as np
n, d, depth, repeats, dtype, file = sys.argv[1:]
n, d, depth, repeats = int(n), int(d), int(depth), int(repeats)
jax.config.update("jax_enable_x64", dtype == "float64")
from neural_tangents import stax
layers = [stax.Dense(1, 1.0, 0.0), stax.Relu()] * depth + [stax.Dense(1, 1.0, 0.0)]
kernel_fn = jax.jit(stax.serial(*layers)[2], static_argnames="get")
X = jax.numpy.asarray(np.random.default_rng(0).standard_normal((n, d)).astype(dtype))
seconds = []
for _ in range(repeats + 1):
    start = time.perf_counter()
    K = kernel_fn(X, None, get="ntk").block_until_ready()
    seconds.append(time.perf_counter() - start)
np.save(file, np.asarray(K[:50, :50]))
print(json.dumps(min(seconds[1:])))
"""


def straightforward(X, depth):
    """The recursion as one writes it in NumPy, w_std = 1 and b_std = 0."""
    import numpy as np

    S = X @ X.T / X.dtype.type(X.shape[1])
    T, q = S, S.diagonal()
    for _ in range(depth):
        c = np.sqrt(np.outer(q, q))
        u = np.clip(S / c, -1, 1)
        angle = np.pi - np.arccos(u)
        S = c * (np.sqrt(1 - u**2) + u * angle) / (2 * np.pi)
        T = S + angle / (2 * np.pi) * T
        q = q / 2
    return T


def ours(X, depth):
    from sciml.kernels import ntk

    return ntk(X, depth=depth)


def make_data(n, d, dtype):
    import numpy as np

    return np.random.default_rng(0).standard_normal((n, d)).astype(dtype)


def peak_of(name, n, d, depth, dtype):
    """Return the temporary memory of one call in MB, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, "--n", n, "--d", d, "--depth", depth]
    command = [str(part) for part in [*command, "--dtype", dtype]]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_resident_bytes():
    """Return the peak resident set of this process."""
    if sys.platform == "linux":
        # Not ru_maxrss, which a child process inherits from its parent.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if "VmHWM" in line)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_peak(name, n, d, depth, dtype):
    function = {"ours": ours, "straightforward": straightforward}[name]
    X = make_data(n, d, dtype)
    function(X[:300], depth)  # imports, compiled code and thread buffers are not the method's
    before = peak_resident_bytes()
    K = function(X, depth)
    after = peak_resident_bytes()
    print(json.dumps((after - before - K.nbytes) / 2**20))


def neural_tangents_seconds(python, arguments, dtype, K):
    import tempfile
    from pathlib import Path

    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "corner.npy")
        values = [arguments.n, arguments.d, arguments.depth, arguments.repeats, dtype, file]
        command = [python, "-c", NEURAL_TANGENTS, *map(str, values)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr.strip().splitlines()[-1]
        corner = np.load(file, allow_pickle=False)
    error = np.abs(corner - K[:50, :50]).max() / np.abs(corner).max()
    return json.loads(done.stdout.splitlines()[-1]), f"largest difference {error:.1e} of its values"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--d", type=int, default=784)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--neural-tangents-python", default=None)
    parser.add_argument("--peak", choices=("ours", "straightforward"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float64", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    n, d, depth = arguments.n, arguments.d, arguments.depth
    if arguments.peak:
        print_peak(arguments.peak, n, d, depth, arguments.dtype)
        return

    import numpy as np

    print(f"NTK Gram matrix, n={n}, d={d}, {depth} hidden layers")
    for dtype in ("float64", "float32"):
        X = make_data(n, d, dtype)
        ours(X[:300], depth)
        seconds = {"ours": [], "straightforward": [], "X @ X.T": []}
        for _ in range(arguments.repeats):
            for name, function in (("ours", ours), ("straightforward", straightforward)):
                start = time.perf_counter()
                K = function(X, depth)
                seconds[name].append(time.perf_counter() - start)
                if name == "ours":
                    K_ours = K
            start = time.perf_counter()
            np.matmul(X, X.T)
            seconds["X @ X.T"].append(time.perf_counter() - start)
        best = {name: min(times) for name, times in seconds.items()}
        memory = {name: peak_of(name, n, d, depth, dtype) for name in ("ours", "straightforward")}
        off = ~np.eye(n, dtype=bool)
        error = np.abs(K_ours - K)[off].max() / np.abs(K).max()
        print(f"\n{dtype}: largest off-diagonal difference {error:.1e} of the largest value")
        for name, time_s in best.items():
            extra = f"  temporaries {memory[name]:7.1f} MB" if name in memory else ""
            print(f"  {name:16s} {time_s:7.3f} s{extra}")
        # A result without any measurable temporary would make the ratio infinite.
        ratio = max(memory["ours"], 0.0) / memory["straightforward"]
        print(f"  faster than straightforward NumPy: {best['straightforward'] / best['ours']:.1f}x")
        print(f"  temporary memory: {ratio:.3f} of straightforward NumPy")
        python = arguments.neural_tangents_python or sys.executable
        peer, remark = neural_tangents_seconds(python, arguments, dtype, K_ours)
        if peer is None:
            print(f"  neural_tangents could not be run by {python}: {remark}")
        else:
            print(f"  neural_tangents  {peer:7.3f} s  ({remark})")
            print(f"  faster than neural_tangents (compiled, CPU): {peer / best['ours']:.1f}x")


if __name__ == "__main__":
    main()
