"""`import sciml` is quick and pulls in no heavy library."""

import subprocess
import sys

HEAVY = ("transformers", "cupy", "deepwave", "deepinv", "torch_geometric", "torch", "numba")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_pulls_in_nothing_heavy():
    loaded = run(f"import sys, sciml; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_import_takes_less_than_300_ms():
    code = "import time; t = time.perf_counter(); import sciml; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_every_subpackage_is_reachable():
    code = "import sciml; print([getattr(sciml, name).__name__ for name in sciml.__all__[1:]])"
    for name in ("kernels", "layerwise", "graphs", "inverse"):
        assert f"sciml.{name}" in run(code)
