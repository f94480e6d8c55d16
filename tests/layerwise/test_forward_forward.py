"""Forward-Forward: labels, local gradients, prediction by one forward pass for each label."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.nn import functional

from sciml.layerwise import (
    ForwardForwardClassifier,
    embed_label,
    goodness_loss,
    rms_normalize,
    wrong_labels,
)

X, Y = load_digits(n_class=4, return_X_y=True)
X = X / 16


@parametrize_with_checks(
    [ForwardForwardClassifier((16, 16), max_iter=8, batch_size=20, learning_rate_init=2e-2)]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_wrong_labels_are_wrong_and_uniform(n_classes):
    label = torch.arange(n_classes).repeat(2000)
    wrong = wrong_labels(label, n_classes, torch.Generator().manual_seed(0))
    assert not (wrong == label).any()
    counts = torch.stack(
        [torch.bincount(wrong[label == k], minlength=n_classes) for k in range(n_classes)]
    )
    expected = 2000 / (n_classes - 1)
    off = counts[~torch.eye(n_classes, dtype=torch.bool)].double()
    assert ((off - expected).abs() < 5 * expected**0.5).all()
    if n_classes == 2:
        assert torch.equal(wrong, 1 - label)


def test_embedding():
    x, label = torch.arange(8.0).reshape(2, 4), torch.tensor([2, 0])
    appended = embed_label(x, label, 3)
    assert torch.equal(appended, torch.tensor([[0.0, 1, 2, 3, 0, 0, 1], [4.0, 5, 6, 7, 1, 0, 0]]))
    over = embed_label(x, label, 3, "overwrite")
    assert torch.equal(over, torch.tensor([[0.0, 0, 1, 3], [1.0, 0, 0, 7]]))


def losses_by_hand(layers, v, n, activities, options):
    """The sum of local losses with gradients stopped between the layers, and the new activities."""
    positive = torch.cat([torch.ones(n), torch.zeros(n)]).double()
    total, new = 0.0, []
    for layer, kept in zip(layers, activities, strict=True):
        z = layer(rms_normalize(v.detach()))
        a = functional.relu(z)
        if options["straight_through"]:
            a = z + (a - z).detach()
        width = layer.out_features
        logit = (a**2).sum(1) - (options["threshold"] or width)
        total = total + functional.softplus(torch.where(positive == 1, -logit, logit)).mean()
        r = options["peer_momentum"] * kept + (1 - options["peer_momentum"]) * a[:n].mean(0)
        total = total + options["peer_factor"] * ((r.mean() - r) ** 2).mean()
        new.append(r.detach())
        v = a
    return total, new


@pytest.mark.parametrize(
    "options",
    [
        {"straight_through": True, "threshold": None, "peer_momentum": 0.9, "peer_factor": 0.03},
        {"straight_through": False, "threshold": 2.0, "peer_momentum": 0.5, "peer_factor": 1.0},
        {"straight_through": True, "threshold": None, "peer_momentum": 0.0, "peer_factor": 0.0},
    ],
)
def test_gradients_of_a_step_equal_those_written_by_hand(options):
    model = ForwardForwardClassifier((8, 6, 5), max_iter=1, random_state=0, **options).fit(X, Y)
    generator = torch.Generator().manual_seed(1)
    label = torch.from_numpy(Y[:20]).long()
    both = torch.cat([label, wrong_labels(label, 4, generator)])
    v = embed_label(torch.from_numpy(X[:20]).repeat(2, 1), both, 4)
    before = [torch.rand(layer.out_features).double() for layer in model.layers_]
    total, new = losses_by_hand(model.layers_, v, 20, before, options)
    expected = torch.autograd.grad(total, list(model.layers_.parameters()))
    model.layers_.zero_grad()
    activities = list(before)
    for loss in model._losses(v, activities):
        loss.backward()
    for parameter, gradient in zip(model.layers_.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(activities, new)


@pytest.mark.parametrize("encoding", ["append", "overwrite"])
@pytest.mark.parametrize("widths", [7, (7, 9, 5)])
def test_scores_equal_a_forward_pass_for_each_label(encoding, widths):
    model = ForwardForwardClassifier(widths, label_encoding=encoding, max_iter=2, random_state=0)
    x = torch.from_numpy(X)
    scores = model.fit(X, Y).layer_scores(X)
    for c in range(4):
        v = embed_label(x, torch.full((len(x),), c), 4, encoding)
        for score, W, b in zip(scores, model.coefs_, model.intercepts_, strict=True):
            v = np.maximum(rms_normalize(torch.as_tensor(v)).numpy() @ W + b, 0)
            np.testing.assert_allclose(score[:, c], (v**2).sum(1), rtol=1e-9, atol=1e-12)
    total = scores[1:].sum(0) if len(scores) > 1 else scores[0]
    np.testing.assert_array_equal(model.predict(X), total.argmax(1))
    every = model.set_params(skip_first=False).predict(X)
    np.testing.assert_array_equal(every, scores.sum(0).argmax(1))


def test_initial_weights_and_schedule():
    model = ForwardForwardClassifier(
        (400, 300), learning_rate_init=1e-12, weight_decay=0.0, max_iter=2, random_state=0
    ).fit(X, Y)
    for W, b in zip(model.coefs_, model.intercepts_, strict=True):
        assert W.std() == pytest.approx(W.shape[1] ** -0.5, rel=0.02)
        assert np.abs(b).max() < 1e-9


def test_learning_rate_is_constant_and_then_falls_linearly():
    """The largest step of Adam is near the learning rate; here it is read from the optimiser."""
    seen = []
    step = torch.optim.AdamW.step

    class Recorder(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            seen.append(self.param_groups[0]["lr"])
            return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Recorder)
        ForwardForwardClassifier(
            4, max_iter=6, batch_size=1000, learning_rate_init=1.0, early_stopping=False
        ).fit(X, Y)
    # Epochs 1 to 3 are constant, epoch e has 2 (1 + 6 - e) / 6.
    assert seen == pytest.approx([1, 1, 1, 2 * 3 / 6, 2 * 2 / 6, 2 * 1 / 6])


def test_learns_and_is_reproducible():
    model = ForwardForwardClassifier(
        (32, 32), batch_size=10, max_iter=10, learning_rate_init=1e-2, random_state=3
    )
    model.fit(X[::3], Y[::3])
    assert model.score(X[1::3], Y[1::3]) > 0.9
    again = clone(model).fit(X[::3], Y[::3])
    np.testing.assert_array_equal(model.layer_scores(X), again.layer_scores(X))
    assert model.n_iter_ == len(model.history_) <= 10
    assert all(len(a) == 32 for a in model.mean_activities_)


def test_float32_stays_float32_and_global_randomness_untouched():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = ForwardForwardClassifier(8, max_iter=1, random_state=0).fit(X.astype(np.float32), Y)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.predict_proba(X).dtype == model.coefs_[0].dtype == np.float32


def test_loss_of_untrained_silent_layer_is_that_of_zero_goodness():
    loss = goodness_loss(torch.zeros(2, 3), torch.tensor([1.0, 0.0])).item()
    assert loss == pytest.approx((np.log1p(np.exp(3)) + np.log1p(np.exp(-3))) / 2)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("label_encoding.*'prepend'", {"label_encoding": "prepend"}),
        ("threshold", {"threshold": float("nan")}),
        ("peer_factor.*-1", {"peer_factor": -1}),
        ("peer_momentum.*1", {"peer_momentum": 1.0}),
        ("max_iter.*0", {"max_iter": 0}),
        ("batch_size.*0", {"batch_size": 0}),
        ("learning_rate_init", {"learning_rate_init": 0}),
        ("hidden_layer_sizes", {"hidden_layer_sizes": ()}),
        ("hidden_layer_sizes.*0", {"hidden_layer_sizes": (4, 0)}),
        ("validation_fraction", {"validation_fraction": 1.0}),
        ("validation_fraction.*none", {"validation_fraction": 0.9999}),
        ("weight_decay", {"weight_decay": -1.0}),
    ],
)
def test_bad_parameters(match, options):
    with pytest.raises(ValueError, match=match):
        ForwardForwardClassifier(**options).fit(X, Y)


def test_bad_data():
    with pytest.raises(ValueError, match="overwrite.*3 features and 4 classes"):
        ForwardForwardClassifier(label_encoding="overwrite").fit(X[:, :3], Y)
    with pytest.raises(ValueError, match="3 features.*4 classes"):
        embed_label(torch.ones(2, 3), torch.tensor([0, 1]), 4, "overwrite")
    with pytest.raises(ValueError, match="n_classes"):
        wrong_labels(torch.zeros(2, dtype=torch.long), 1, torch.Generator())
    with pytest.raises(ValueError, match="1 class"):
        ForwardForwardClassifier().fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="NaN"):
        ForwardForwardClassifier().fit(np.where(X == 0, np.nan, X), Y)
    with pytest.raises(ValueError, match="inconsistent"):
        ForwardForwardClassifier().fit(X, Y[:-1])
    with pytest.raises(NotFittedError):
        ForwardForwardClassifier().predict(X)
    model = ForwardForwardClassifier(8, max_iter=1).fit(X, Y)
    with pytest.raises(ValueError, match="63 features"):
        model.predict(X[:, :-1])


def test_constant_features_are_fine():
    samples, labels = make_blobs(60, centers=2, random_state=0)
    samples = np.hstack([samples, np.ones((60, 2))])
    model = ForwardForwardClassifier(16, max_iter=3, batch_size=1, random_state=0)
    assert np.isfinite(model.fit(samples, labels).layer_scores(samples)).all()
