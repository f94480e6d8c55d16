"""The published claims in small: what the examples measure, over their seeds."""

import runpy
from pathlib import Path

import matplotlib
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "lm"


def run_example(name, tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(EXAMPLES / name))["results"]


@pytest.mark.slow
def test_reverse_kl_trades_entropy_for_likely_text(tmp_path, monkeypatch):
    results = run_example("plot_kl_direction.py", tmp_path, monkeypatch)
    logp, entropy, on_policy, nll = range(4)
    rows = np.array(list(results.values()))
    reverse = results["student", 1.0]
    assert reverse[entropy] == rows[:, entropy].min()
    assert reverse[on_policy] == rows[:, on_policy].min()
    assert reverse[logp] == rows[:, logp].max()
    for prefix in ("teacher", "student"):
        forward, mixed, reverse = (results[prefix, weight] for weight in (0.0, 0.2, 1.0))
        for column in (entropy, on_policy):
            assert forward[column] > mixed[column] > reverse[column]
        assert forward[nll] < mixed[nll] < reverse[nll]
    assert results["student", 0.0][entropy] - results["student", 1.0][entropy] > 0.3
    # The student's own prefixes lower what is measured on them.
    for weight in (0.2, 1.0):
        assert results["student", weight][on_policy] < results["teacher", weight][on_policy]


@pytest.mark.slow
def test_paced_profits_where_intractable_items_interfere(tmp_path, monkeypatch):
    results = run_example("plot_paced.py", tmp_path, monkeypatch)
    mean = {name: np.mean(rows, axis=0) for name, rows in results.items()}
    everything, known, _ = range(3)
    assert mean["PACED"][everything] >= mean["uniform"][everything] + 3
    lost = {n: mean["base"][known] - mean[n][known] for n in ("PACED", "uniform")}
    assert lost["PACED"] <= lost["uniform"] / 2
    assert mean["PACED"][everything] > mean["hard filter"][everything]


@pytest.mark.slow
def test_length_curriculum_spends_fewer_tokens(tmp_path, monkeypatch):
    results = run_example("plot_length_curriculum.py", tmp_path, monkeypatch)
    fixed, curriculum = (
        np.mean([curve[-1] for curve in results[name]], axis=0) for name in ("fixed", "curriculum")
    )
    tokens, accuracy = 1, 2
    assert curriculum[tokens] < 0.85 * fixed[tokens]
    assert curriculum[accuracy] > fixed[accuracy] - 0.1
