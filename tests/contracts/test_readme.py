"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_is_code_for_every_domain():
    code = "".join(BLOCKS)
    for domain in ("kernels", "layerwise", "graphs", "inverse", "inverse.seismic", "lm"):
        assert f"from sciml.{domain} import" in code


@pytest.mark.slow
def test_code_runs_from_top_to_bottom(capsys):
    names: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    machine, radius, layerwise, graph = (float(line) for line in printed[:4])
    assert machine > 0.99
    assert radius > 0.01
    assert layerwise > 0.85
    assert graph > 0.7
    assert printed[4] == "('sample', 'depth', 'x') m s-1"
