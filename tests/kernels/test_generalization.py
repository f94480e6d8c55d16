"""Generalisation bound: reference numbers, its terms from their definition, bad input."""

import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.svm import SVC

from sciml.kernels import NTK, KernelMachineClassifier, generalization_bound


def digits(n_class=2, n_train=260):
    data = load_digits(n_class=n_class)
    order = np.random.RandomState(0).permutation(len(data.target))
    X, y = data.data[order] / 16, data.target[order]
    return X[:n_train], y[:n_train], X[n_train:], y[n_train:]


def test_bound_of_the_svm_on_digits():
    X, y, _, _ = digits()
    bound = generalization_bound(KernelMachineClassifier(NTK(), C=1 / 0.064).fit(X, y))
    np.testing.assert_allclose(bound[:4], [0.0002, 0.6921, 0.3028, 0.995], atol=6e-4)
    np.testing.assert_allclose(bound.norm, 11.41, atol=0.02)


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "logistic", "squared"])
@pytest.mark.parametrize("C", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kernel", [NTK(2), "rbf"], ids=repr)
def test_terms_from_their_definition(loss, C, kernel):
    # Labels flipped at random leave samples on the wrong side, where reading labels off is hard.
    X, y, _, _ = digits(n_train=80)
    y = np.where(np.random.default_rng(1).random(80) < 0.2, 1 - y, y)
    machine = KernelMachineClassifier(kernel, loss=loss, C=C, gamma=0.1).fit(X, y)
    bound = generalization_bound(machine, delta=0.05)
    f = machine.decision_function(X)
    if kernel == "rbf":
        K = np.exp(-0.1 * ((X[:, None] - X) ** 2).sum(2))
    else:
        K = NTK(2)(X)
    ramp = np.clip(1 - np.where(y == 1, 1, -1) * f, 0, 1)
    np.testing.assert_allclose(bound.empirical, ramp.mean(), atol=1e-4)
    norm = math.sqrt(machine.dual_coef_ @ K @ machine.dual_coef_)
    np.testing.assert_allclose(bound.norm, norm, rtol=1e-8)
    np.testing.assert_allclose(bound.complexity, 2 * norm * math.sqrt(np.trace(K)) / 80)
    np.testing.assert_allclose(bound.confidence, 3 * math.sqrt(math.log(40) / 160))
    assert bound.total == bound.empirical + bound.complexity + bound.confidence


def test_bound_holds_on_the_rest_of_the_data():
    X, y, X_test, y_test = digits()
    machine = KernelMachineClassifier(NTK(), C=1.0).fit(X, y)
    margin = np.where(y_test == 1, 1, -1) * machine.decision_function(X_test)
    assert np.clip(1 - margin, 0, 1).mean() <= generalization_bound(machine).total


def test_a_smaller_delta_costs_more():
    X, y, _, _ = digits(n_train=60)
    machine = KernelMachineClassifier(NTK()).fit(X, y)
    totals = [generalization_bound(machine, delta).total for delta in (0.5, 0.1, 0.01, 1e-6)]
    assert totals == sorted(totals)


def test_rejects():
    X, y, _, _ = digits(n_train=60)
    machine = KernelMachineClassifier(NTK()).fit(X, y)
    with pytest.raises(TypeError, match="machine must be a KernelMachineClassifier, got SVC"):
        generalization_bound(SVC())
    with pytest.raises(NotFittedError):
        generalization_bound(KernelMachineClassifier())
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            generalization_bound(machine, delta)
    X3, y3, _, _ = digits(3, 60)
    with pytest.raises(ValueError, match="two classes for this bound, got 3"):
        generalization_bound(KernelMachineClassifier(NTK()).fit(X3, y3))
    with pytest.raises(ValueError, match="got kernel='precomputed'"):
        generalization_bound(KernelMachineClassifier("precomputed").fit(NTK()(X), y))
    weighted = KernelMachineClassifier(NTK(), loss="squared")
    weighted.fit(X, y, sample_weight=np.linspace(0.1, 5, 60))
    with pytest.raises(ValueError, match="fitted without weights"):
        generalization_bound(weighted)
