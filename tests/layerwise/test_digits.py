"""The digits experiment: layer-local training against backpropagation, five seeds."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sciml.layerwise import (
    BackpropClassifier,
    CascadedForwardClassifier,
    ForwardForwardClassifier,
    MonoForwardClassifier,
)

SEEDS = range(5)


def mean_accuracy(make, validates=True):
    """Accuracy in percent; 60 % of the digits train, 20 % test, the rest validates if used."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    scores = []
    for seed in SEEDS:
        train, test, y_train, y_test = train_test_split(
            X, y, test_size=0.2, stratify=y, random_state=seed
        )
        if not validates:
            train, y_train = train[: len(train) * 3 // 4], y_train[: len(train) * 3 // 4]
        scores.append(100 * make(seed).fit(train, y_train).score(test, y_test))
    print(f"{np.mean(scores):.2f} +- {np.std(scores, ddof=1):.2f}", np.round(scores, 2))
    return np.mean(scores)


@pytest.mark.slow
def test_mono_forward_is_on_a_par_with_backpropagation():
    options = {"max_iter": 100, "validation_fraction": 0.25}
    backprop = mean_accuracy(lambda seed: BackpropClassifier(random_state=seed, **options))
    ours = mean_accuracy(lambda seed: MonoForwardClassifier(random_state=seed, **options))
    assert ours >= backprop - 0.7


@pytest.mark.slow
def test_forward_forward():
    ours = mean_accuracy(
        lambda seed: ForwardForwardClassifier(validation_fraction=0.25, random_state=seed)
    )
    assert ours >= 93


@pytest.mark.slow
def test_cascaded_forward_with_ridge_heads():
    ours = mean_accuracy(
        lambda seed: CascadedForwardClassifier((32, 128), image_shape=(1, 8, 8), random_state=seed),
        validates=False,
    )
    assert ours >= 97
