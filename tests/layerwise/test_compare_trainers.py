"""The same budget for all, resumption after an interruption, honest columns."""

from importlib import import_module

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from sciml.layerwise import BackpropClassifier, MonoForwardClassifier, compare_trainers

X, Y = load_iris(return_X_y=True)


class Constant(ClassifierMixin, BaseEstimator):
    """Predicts a class; scores are highest for label 1, and it can be made to fail."""

    fits: list = []  # noqa: RUF012
    stop_after = None

    def __init__(self, label=0, other=0.0, random_state=None):
        self.label = label
        self.other = other
        self.random_state = random_state

    def fit(self, X, y):
        if len(self.fits) == self.stop_after:
            raise KeyboardInterrupt
        self.fits.append((self.label, self.other, self.random_state, len(X)))
        if self.label == 7:
            raise FloatingPointError("diverged")
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        return np.full(len(X), self.label)


@pytest.fixture(autouse=True)
def forget():
    Constant.fits, Constant.stop_after = [], None


LABELS = {"label": IntDistribution(0, 7), "other": FloatDistribution(1e-5, 1e-2, log=True)}


def power():
    return 10.0


def test_rows_without_search():
    trainers = {
        "mf": MonoForwardClassifier(8, max_iter=2),
        "bp": BackpropClassifier(8, max_iter=2),
        "knn": KNeighborsClassifier(),
    }
    rows = compare_trainers(trainers, X, Y, cv=3, power=power)
    assert [row["trainer"] for row in rows] == list(trainers)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    for row, model in zip(rows[1:], list(trainers.values())[1:], strict=True):
        scores = []
        for i, (train, test) in enumerate(folds.split(X, Y)):
            if "random_state" in model.get_params():
                model.set_params(random_state=i)
            scores.append(model.fit(X[train], Y[train]).score(X[test], Y[test]))
        assert row["score"] == pytest.approx(np.mean(scores))
        assert row["score_std"] == pytest.approx(np.std(scores, ddof=1))
        assert [fold["score"] for fold in row["folds"]] == pytest.approx(scores)
    assert rows[0]["peak_backward_bytes"] > 0
    assert rows[2]["peak_backward_bytes"] is None
    for row in rows:
        assert row["n_trials"] == row["n_failed"] == row["search_seconds"] == 0
        # 10 W during the training and the moments around it.
        assert row["energy_joules"] >= 9.999 * row["seconds"] > 0
        assert set(row["folds"][0]["params"]) == set()


def test_every_trainer_gets_the_same_budget_and_the_best_settings_win():
    trainers = {"a": Constant(), "b": Constant(label=2)}
    spaces = {"a": LABELS, "b": {"label": CategoricalDistribution([1, 7])}}
    rows = compare_trainers(trainers, X, Y, cv=2, search=12, search_spaces=spaces, power=power)
    # Two folds, two trainers, twelve trials and two trainings (time, memory) of the best.
    assert len(Constant.fits) == 2 * 2 * (12 + 2)
    sizes = [n for *_, n in Constant.fits]
    assert sizes[:14] == [60] * 12 + [75] * 2
    assert {seed for *_, seed, _ in Constant.fits} == {0, 1}
    for row in rows:
        assert row["n_trials"] == 12
        assert row["search_seconds"] > 0
        assert row["score"] == pytest.approx(1 / 3, abs=0.02)
    failed = sum(label == 7 for label, *_ in Constant.fits)
    assert sum(row["n_failed"] for row in rows) == failed > 0


@pytest.mark.parametrize(
    ("stop_after", "n_trials"), [(1, 2), (3, 12), (11, 12), (13, 12), (20, 12), (29, 12)]
)
def test_an_interrupted_search_resumes_as_if_it_had_not_been(tmp_path, stop_after, n_trials):
    def compare(storage):
        return compare_trainers(
            {"a": Constant(), "b": Constant()}, X, Y, cv=2, search=n_trials,
            search_spaces={"a": LABELS, "b": LABELS}, storage=storage, power=power,
        )  # fmt: skip

    # SQLite syncs the disk many times for each trial; the long searches stay in memory.
    storage = tmp_path / "trials.db" if n_trials == 2 else InMemoryStorage()
    whole = compare(InMemoryStorage())
    fits, Constant.fits = Constant.fits, []
    Constant.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        compare(storage)
    Constant.stop_after = None
    before = len(Constant.fits)
    resumed = compare(storage)
    assert before == stop_after
    for one, other in zip(whole, resumed, strict=True):
        assert one["score"] == other["score"]
        for fold, again in zip(one["folds"], other["folds"], strict=True):
            assert fold["params"] == again["params"]
    # Nothing is trained twice but the final training, if that was interrupted.
    assert len(fits) <= len(Constant.fits) <= len(fits) + 1
    Constant.fits = []
    assert compare(storage) == resumed
    assert Constant.fits == []


def test_storage_of_another_comparison_is_refused(tmp_path):
    options = {"cv": 2, "storage": f"sqlite:///{tmp_path / 'a.db'}", "power": power}
    compare_trainers({"a": Constant()}, X, Y, **options)
    for match, trainer, samples in [
        ("different are: settings", Constant(label=1), X),
        ("different are: data", Constant(), X + 1),
        ("different are: class", LogisticRegression(), X),
    ]:
        with pytest.raises(ValueError, match=match):
            compare_trainers({"a": trainer}, samples, Y, **options)


def test_without_nvml_energy_is_none(monkeypatch):
    module = import_module("sciml.layerwise.compare_trainers")
    monkeypatch.setattr(module, "nvml_sources", lambda device: None)
    with pytest.warns(UserWarning, match="NVML") as record:
        [row] = compare_trainers({"a": Constant()}, X, Y, cv=2, scoring="accuracy")
    assert len(record) == 1
    assert row["energy_joules"] is None


def test_all_trials_diverge():
    with pytest.raises(RuntimeError, match="all 2 trials of 'a' diverged"):
        compare_trainers(
            {"a": Constant()}, X, Y, cv=2, search=2, power=power,
            search_spaces={"a": {"label": IntDistribution(7, 7)}},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "trainers", {"trainers": {}}),
        (TypeError, "trainers.*estimator", {"trainers": {"a": 3}}),
        (ValueError, "search.*-1", {"search": -1}),
        (ValueError, "search_spaces must have parameters of 'a'", {"search": 2}),
        (ValueError, "search must be 1", {"search_spaces": {"a": LABELS}}),
        (ValueError, "not among trainers", {"search": 1, "search_spaces": {"b": LABELS}}),
        (ValueError, "no parameters", {"search": 1, "search_spaces": {"a": {"depth": 1}}}),
        (ValueError, "validation_fraction", {"validation_fraction": 1.5}),
        (ValueError, "random_state.*storage", {"random_state": None, "storage": "a.db"}),
        (ValueError, "inconsistent", {"y": Y[:-1]}),
    ],
)
def test_bad_input(error, match, options):
    options = {"trainers": {"a": Constant()}, "y": Y, "cv": 2, "power": power, **options}
    with pytest.raises(error, match=match):
        compare_trainers(options.pop("trainers"), X, options.pop("y"), **options)
