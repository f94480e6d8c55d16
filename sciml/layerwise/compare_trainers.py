"""Compare trainers after giving each of them the same budget for the search of its settings.

The umbrella study of layer-local training (Spyra, arXiv:2509.19063) gave its methods unequal
budgets: 50 trials to the layer-local ones, 5 to 10 to backpropagation. Here every trainer gets the
same number of trials by the same sampler, judged on the same validation samples, none pruned.
"""

import contextlib
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import BaseCrossValidator, check_cv, train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_consistent_length
from tqdm import tqdm

from sciml._check import check_integer, check_interval
from sciml.layerwise.backward_memory import BackwardMemoryMonitor
from sciml.layerwise.energy import EnergyMonitor, nvml_sources

__all__ = ["compare_trainers"]


def compare_trainers(
    trainers: Mapping[str, BaseEstimator],
    X: Any,
    y: Any,
    cv: int | BaseCrossValidator = 5,
    *,
    search: int = 0,
    search_spaces: Mapping[str, Mapping[str, Any]] | None = None,
    validation_fraction: float = 0.2,
    scoring: str | Callable[..., float] | None = None,
    storage: Any = None,
    power: Callable[[], float | None] | None = None,
    random_state: int | None = 0,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Search, train, time and test several trainers on the same folds with the same budget.

    In each fold of `cv` every trainer is searched for `search` trials: a trial trains on a part of
    the training samples and is scored on the rest, the same split for all trainers. Then the
    trainer is trained with its best settings on all training samples, which is what seconds,
    memory and energy measure, and scored on the test samples.

    Parameters
    ----------
    trainers : mapping of str to estimator
        Estimators by name. They are cloned; where `random_state` is None it is set.
    X : array-like of shape (n_samples, ...)
        Samples.
    y : array-like of shape (n_samples,)
        Classes or targets.
    cv : int or cross-validator, default=5
        Folds; an integer is shuffled and stratified for classifiers.
    search : int, default=0
        Trials of each trainer in each fold (by Optuna, extra ``search``).
    search_spaces : mapping of str to mapping, default=None
        For every trainer what to search: names of parameters and Optuna distributions, such as
        ``{"learning_rate_init": FloatDistribution(1e-5, 1e-2, log=True)}``.
    validation_fraction : float in (0, 1), default=0.2
        Part of the training samples that scores the trials.
    scoring : str, callable or None, default=None
        Score, as in scikit-learn; None is that of the estimators, accuracy for classifiers.
    storage : path, str, optuna.storages.BaseStorage or None, default=None
        SQLite file, URL of a database, or another storage, for the trials and results. A
        comparison that was interrupted goes on from there, trial by trial, and ends as if it had
        not been; finished folds are not trained again.
    power : callable or None, default=None
        Source of the power for `EnergyMonitor`; None asks NVML.
    random_state : int or None, default=0
        Seed of folds, validation split, sampler and trainers. None draws one, which `storage`
        forbids.
    verbose : bool, default=False
        Whether to show a progress bar over folds and trainers.

    Returns
    -------
    list of dict
        A row for every trainer, in order; `pandas.DataFrame` takes it as it is. "trainer";
        "score" and "score_std" over the folds; means of "seconds" (training), "search_seconds",
        "peak_backward_bytes" (see `BackwardMemoryMonitor`; None for trainers without torch) and
        "energy_joules" (None if not measured in all folds); "n_trials", and "n_failed" of them that
        diverged; "folds", a list of dict with these values and the "params" of each fold.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; if a trainer has no search space, or one for parameters it
        does not have; if `storage` holds another comparison.
    ImportError
        If Optuna is missing for a search or a storage.
    RuntimeError
        If all trials of a trainer diverged.

    References
    ----------
    Spyra, "Beyond Backpropagation: Exploring Innovative Algorithms for Energy-Efficient Deep Neural
    Network Training", arXiv:2509.19063.

    Examples
    --------
    >>> import warnings
    >>> from sklearn.datasets import load_iris
    >>> from sciml.layerwise import BackpropClassifier, MonoForwardClassifier, compare_trainers
    >>> X, y = load_iris(return_X_y=True)
    >>> trainers = {"backprop": BackpropClassifier(16), "mono-forward": MonoForwardClassifier(16)}
    >>> rows = compare_trainers(trainers, X, y, cv=2, power=lambda: 10.0)
    >>> [row["trainer"] for row in rows]
    ['backprop', 'mono-forward']
    """
    spaces = _check(trainers, search, search_spaces)
    check_interval("validation_fraction", validation_fraction, 0, 1, closed="neither")
    if random_state is None:
        if storage is not None:
            raise ValueError("random_state must be an integer with storage, got None")
        random_state = int(check_random_state(None).randint(2**31))
    check_integer("random_state", random_state, 0)
    X = check_array(X, dtype=None, allow_nd=True)
    y = np.asarray(y)
    check_consistent_length(X, y)
    classify = all(is_classifier(trainer) for trainer in trainers.values())
    folds = _folds(cv, X, y, classify, random_state)
    if isinstance(storage, os.PathLike) or (isinstance(storage, str) and "://" not in storage):
        storage = f"sqlite:///{Path(storage).absolute()}"
    if power is None:
        sources = nvml_sources(0)
        power = sources[0] if sources is not None else None
        if power is None:
            warnings.warn(
                "energy is not measured: NVML is not available; energy_joules is None",
                UserWarning,
                stacklevel=2,
            )
    data = _fingerprint(X, y, validation_fraction, str(scoring), random_state)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trainers}
    jobs = [(number, fold, name) for number, fold in enumerate(folds) for name in trainers]
    for number, (training, test), name in tqdm(jobs, desc="compare", disable=not verbose):
        trainer = clone(trainers[name])
        if "random_state" in trainer.get_params() and trainer.get_params()["random_state"] is None:
            trainer.set_params(random_state=random_state + number)
        scorer = cast(Callable[..., float], check_scoring(trainer, scoring=scoring))
        X_fold, y_fold = X[training], y[training]
        record: _Record | None = None
        if search or storage is not None:
            settings = repr(sorted((k, repr(v)) for k, v in trainer.get_params().items()))
            space = repr(sorted(spaces[name].items()))
            identity = [data, type(trainer).__qualname__, settings, space]
            identity.append(_fingerprint(training, test))
            record = _Record(f"{name}, fold {number}", storage, identity)
            if record.result is not None and record.result["n_trials"] == search:
                found[name].append(record.result)
                continue
        params: dict[str, Any] = {}
        failed, search_seconds = 0, 0.0
        if search and record is not None:
            fit_part, validation_part = train_test_split(
                np.arange(len(y_fold)),
                test_size=validation_fraction,
                random_state=random_state + number,
                stratify=y_fold if classify else None,
            )

            def score(
                params: dict[str, Any],
                trainer: Any = trainer,
                scorer: Callable[..., float] = scorer,
                parts: Any = (X_fold, y_fold, fit_part, validation_part),
            ) -> float:
                X_fold, y_fold, fit_part, validation_part = parts
                model = clone(trainer).set_params(**params)
                model.fit(X_fold[fit_part], y_fold[fit_part])
                return float(scorer(model, X_fold[validation_part], y_fold[validation_part]))

            record.search(score, spaces[name], search, random_state + 1000 * number)
            params, failed, search_seconds = record.best(name)
        model = clone(trainer).set_params(**params)
        result = _measure(model, X_fold, y_fold, power)
        result["score"] = float(scorer(model, X[test], y[test]))
        result.update(
            n_trials=search, n_failed=failed, search_seconds=search_seconds, params=params
        )
        if record is not None:
            record.finish(result)
        found[name].append(result)
    return [_row(name, results) for name, results in found.items()]


def _measure(
    model: Any, X: Any, y: Any, power: Callable[[], float | None] | None
) -> dict[str, Any]:
    """Train a model and return what it took.

    Trains twice: the hooks that count bytes take time, so that time is taken without them.
    """
    with EnergyMonitor(power=power) if power is not None else contextlib.nullcontext() as monitor:
        start = time.perf_counter()
        model.fit(X, y)
        seconds = time.perf_counter() - start
    with BackwardMemoryMonitor() as memory:
        clone(model).fit(X, y)
    return {
        "seconds": seconds,
        "peak_backward_bytes": memory.peak_bytes or None,
        "energy_joules": None if monitor is None else monitor.energy_joules,
    }


def _row(name: str, folds: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the folds of a trainer."""
    scores = [fold["score"] for fold in folds]

    def mean(key: str) -> float | None:
        values = [fold[key] for fold in folds]
        return None if None in values else float(np.mean(values))

    return {
        "trainer": name,
        "score": float(np.mean(scores)),
        "score_std": float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan,
        "seconds": mean("seconds"),
        "search_seconds": mean("search_seconds"),
        "peak_backward_bytes": mean("peak_backward_bytes"),
        "energy_joules": mean("energy_joules"),
        "n_trials": folds[0]["n_trials"],
        "n_failed": sum(fold["n_failed"] for fold in folds),
        "folds": folds,
    }


class _Record:
    """The Optuna study of one trainer in one fold, with the result of its final training."""

    def __init__(self, name: str, storage: Any, identity: list[str]) -> None:
        self.optuna = _optuna()
        # Optuna reports every trial otherwise; the level is the caller's afterwards.
        with self._quiet():
            self.study = self.optuna.create_study(
                study_name=name, storage=storage, load_if_exists=True, direction="maximize"
            )
        known = self.study.user_attrs.get("identity")
        if known is None:
            self.study.set_user_attr("identity", identity)
        elif known != identity:
            parts = ("data, folds' settings or random_state", "class", "settings", "space", "folds")
            differs = [part for part, a, b in zip(parts, known, identity, strict=True) if a != b]
            raise ValueError(
                f"storage holds another comparison under the name {name!r}; different are: "
                f"{', '.join(differs)}"
            )

    @property
    def result(self) -> dict[str, Any] | None:
        """Result of the final training, if it is finished."""
        text = self.study.user_attrs.get("result")
        return None if text is None else json.loads(text)

    def finish(self, result: dict[str, Any]) -> None:
        """Store the result of the final training."""
        self.study.set_user_attr("result", json.dumps(result))

    def search(
        self,
        score: Callable[[dict[str, Any]], float],
        space: Mapping[str, Any],
        n_trials: int,
        seed: int,
    ) -> None:
        """Run the trials that are missing."""
        finished = (self.optuna.trial.TrialState.COMPLETE, self.optuna.trial.TrialState.FAIL)
        with self._quiet():
            for number in range(len(self.study.get_trials(states=finished)), n_trials):
                # A sampler of its own for each trial: what is drawn depends on the trials before
                # it and not on whether the search was interrupted.
                self.study.sampler = self.optuna.samplers.TPESampler(seed=seed + number)
                trial = self.study.ask(dict(space))
                start = time.perf_counter()
                value: float | None
                try:
                    value = score(trial.params)
                except FloatingPointError:
                    value = None
                trial.set_user_attr("seconds", time.perf_counter() - start)
                if value is None or not math.isfinite(value):
                    self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
                else:
                    self.study.tell(trial, value)

    def best(self, name: str) -> tuple[dict[str, Any], int, float]:
        """Return the best settings, the number of failed trials and the seconds of all."""
        states = self.optuna.trial.TrialState
        failed = len(self.study.get_trials(states=(states.FAIL,)))
        if not self.study.get_trials(states=(states.COMPLETE,)):
            raise RuntimeError(f"all {failed} trials of {name!r} diverged: narrow its search space")
        seconds = sum(trial.user_attrs.get("seconds", 0.0) for trial in self.study.trials)
        return dict(self.study.best_params), failed, seconds

    @contextlib.contextmanager
    def _quiet(self) -> Any:
        level = self.optuna.logging.get_verbosity()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        try:
            yield
        finally:
            self.optuna.logging.set_verbosity(level)


def _check(
    trainers: Mapping[str, Any], search: int, search_spaces: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """Check trainers and spaces; return a space for every trainer."""
    check_integer("search", search, 0)
    if not trainers:
        raise ValueError("trainers must name one estimator or more, got none")
    spaces = {name: dict((search_spaces or {}).get(name, {})) for name in trainers}
    if unknown := sorted(set(search_spaces or {}) - set(trainers)):
        raise ValueError(f"search_spaces names {unknown}, which are not among trainers")
    if search_spaces and not search:
        raise ValueError("search must be 1 or more with search_spaces, got 0")
    for name, trainer in trainers.items():
        if not hasattr(trainer, "fit") or not hasattr(trainer, "get_params"):
            raise TypeError(f"trainers[{name!r}] must be an estimator, got {trainer!r}")
        if search and not spaces[name]:
            raise ValueError(
                f"search_spaces must have parameters of {name!r}: every trainer is searched"
            )
        if wrong := sorted(set(spaces[name]) - set(trainer.get_params())):
            raise ValueError(f"search_spaces[{name!r}] names {wrong}, which are no parameters")
    return spaces


def _folds(
    cv: Any, X: Any, y: Any, classify: bool, random_state: int
) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    splitter = check_cv(cv, y, classifier=classify)
    if isinstance(cv, (int, np.integer)):
        splitter.shuffle, splitter.random_state = True, random_state
    return list(splitter.split(X, y))


def _fingerprint(*things: Any) -> str:
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, np.ndarray):
            digest.update(repr((thing.shape, thing.dtype.str)).encode())
            text = thing.dtype.hasobject  # whose bytes are addresses
            digest.update(repr(thing.tolist()).encode() if text else thing.tobytes())
        else:
            digest.update(repr(thing).encode())
    return digest.hexdigest()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "search and storage need Optuna: pip install 'sciml-kit[search]'"
        ) from error
    return optuna
