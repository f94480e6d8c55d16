"""Mono-Forward: gradients of a stage, independence of the stages, memory flat in depth."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.nn import functional

from sciml.layerwise import (
    BackpropClassifier,
    BackwardMemoryMonitor,
    MonoForwardClassifier,
    MonoForwardStage,
)
from sciml.layerwise.mono_forward import local_losses

X, Y = load_digits(return_X_y=True)
X, Y = X[:600] / 16, Y[:600]  # the digits come in order: stride 3 has all of them
IMAGES = X.reshape(-1, 1, 8, 8)


@parametrize_with_checks(
    [
        MonoForwardClassifier(16, max_iter=6, batch_size=20, learning_rate_init=3e-2),
        MonoForwardClassifier(
            16, schedule="joint", predict_from="sum", max_iter=6, batch_size=20,
            learning_rate_init=1e-2,
        ),
        BackpropClassifier(16, max_iter=6, batch_size=20, learning_rate_init=3e-2),
    ]
)  # fmt: skip
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_one_layer_is_the_network_with_one_hidden_layer():
    """Its local loss is softmax regression on the hidden features, with the gradients of both."""
    model = MonoForwardClassifier(12, max_iter=1, random_state=0).fit(X, Y)
    stage, x, y = model.stages_[0], torch.from_numpy(X), torch.from_numpy(Y).long()
    W, b, M = (p.detach().clone().requires_grad_() for p in stage.parameters())
    hidden = (x @ W.T + b).clamp(min=0)
    loss = -(hidden @ M.T).log_softmax(1)[torch.arange(len(y)), y].mean()
    expected = torch.autograd.grad(loss, (W, b, M))
    [ours] = local_losses(model.stages_, x, y)
    ours.backward()
    torch.testing.assert_close(ours, loss)
    for parameter, gradient in zip(stage.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_no_gradient_leaves_a_stage():
    torch.manual_seed(0)
    stages = torch.nn.ModuleList(
        MonoForwardStage(
            torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU()), torch.nn.Linear(5, 3)
        )
        for _ in range(3)
    )
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 0])
    *_, last = local_losses(stages, x, y)
    last.backward()
    assert x.grad is None
    assert all(p.grad is None for stage in stages[:2] for p in stage.parameters())
    assert all(p.grad is not None for p in stages[2].parameters())


def test_layers_do_not_change_after_their_stage():
    """A deeper network trains the same lower layers, bit by bit."""
    shallow = MonoForwardClassifier((16,), max_iter=3, random_state=0)
    deep = MonoForwardClassifier((16, 8, 8), max_iter=3, random_state=0)
    # The same first layer needs the same draws: later layers are drawn after it, but the order of
    # the batches has a seed of its own.
    shallow.fit(X, Y)
    deep.fit(X, Y)
    np.testing.assert_array_equal(shallow.coefs_[0], deep.coefs_[0])
    np.testing.assert_array_equal(shallow.projections_[0], deep.projections_[0])
    assert shallow.history_[0] == deep.history_[0]


def test_joint_and_sequential_train_the_first_layer_alike():
    """Its loss depends on no other layer; without early stopping the epochs are the same."""
    options = {"max_iter": 2, "early_stopping": False, "random_state": 0}
    one = MonoForwardClassifier((16, 8), schedule="joint", **options).fit(X, Y)
    other = MonoForwardClassifier((16, 8), schedule="sequential", **options).fit(X, Y)
    np.testing.assert_array_equal(one.coefs_[0], other.coefs_[0])
    assert not np.allclose(one.coefs_[1], other.coefs_[1])
    np.testing.assert_array_equal(one.n_iter_, [2, 2])
    np.testing.assert_array_equal(other.n_iter_, [2, 2])
    assert len(one.history_) == 1
    assert len(other.history_) == 2


def test_scores_and_prediction():
    model = MonoForwardClassifier((16, 8), max_iter=3, random_state=0).fit(X, Y)
    scores, a = model.layer_scores(X), X
    for score, W, b, M in zip(
        scores, model.coefs_, model.intercepts_, model.projections_, strict=True
    ):
        a = np.maximum(a @ W + b, 0)
        np.testing.assert_allclose(score, a @ M, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(model.predict_proba(X), softmax(scores[-1], axis=1))
    np.testing.assert_array_equal(model.predict(X), scores[-1].argmax(1))
    total = model.set_params(predict_from="sum").predict_proba(X)
    np.testing.assert_allclose(total, softmax(scores.sum(0), axis=1))


def test_initial_weights_are_uniform_within_the_inverse_root_of_fan_in():
    model = MonoForwardClassifier((500, 300), learning_rate_init=1e-12, max_iter=1).fit(X, Y)
    for W, b, M in zip(model.coefs_, model.intercepts_, model.projections_, strict=True):
        for weight in (W, M):
            bound = len(weight) ** -0.5
            assert np.abs(weight).max() == pytest.approx(bound, rel=0.01)
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert np.abs(b).max() < 1e-9


@pytest.mark.parametrize("restore_best", [True, False])
def test_best_or_last_weights(restore_best):
    """The validation loss of the weights kept is the least, or the last, of the history."""
    model = MonoForwardClassifier(
        16, max_iter=40, n_iter_no_change=3, learning_rate_init=0.1, restore_best=restore_best,
        random_state=0,
    )  # fmt: skip
    kept = {}
    split = "sciml.layerwise.mono_forward.split"
    from sciml.layerwise.torch_classifier import split as real

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, lambda *args: kept.setdefault("places", real(*args)))
        model.fit(X, Y)
    places = kept["places"][1].numpy()
    score = torch.from_numpy(model.layer_scores(X[places])[-1])
    loss = functional.cross_entropy(score, torch.from_numpy(Y[places]).long()).item()
    seen = [-entry["val_score"] for entry in model.history_[0]]
    assert len(seen) < 40
    assert seen[-1] > min(seen)
    assert loss == pytest.approx(min(seen) if restore_best else seen[-1])


def peak(model):
    with BackwardMemoryMonitor() as memory:
        model.fit(X.astype(np.float32), Y)
    return memory.peak_bytes


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_memory_for_backward_is_flat_in_depth(schedule):
    options = {"max_iter": 1, "early_stopping": False, "batch_size": 100, "random_state": 0}
    depths = (2, 4, 8, 16)
    ours = [peak(MonoForwardClassifier((64,) * L, schedule=schedule, **options)) for L in depths]
    assert max(ours) <= 1.01 * min(ours)
    twin = [peak(BackpropClassifier((64,) * L, **options)) for L in depths]
    slopes = np.diff(twin) / np.diff(depths)
    # A layer saves its activation, which the next layer reads: 100 x 64 numbers of 4 bytes.
    np.testing.assert_allclose(slopes, 100 * 64 * 4, rtol=1e-9)


def test_convolutions_equal_a_network_written_by_hand():
    model = MonoForwardClassifier(
        8, conv_channels=(4, 6), image_shape=(1, 8, 8), max_iter=2, random_state=0
    ).fit(X, Y)
    x, scores = torch.from_numpy(IMAGES), model.layer_scores(X)
    for i in range(2):
        W, b = (torch.from_numpy(a[i]) for a in (model.coefs_, model.intercepts_))
        x = functional.max_pool2d(functional.conv2d(x, W, b, padding=1).clamp(min=0), 2)
        np.testing.assert_allclose(
            scores[i], x.flatten(1).numpy() @ model.projections_[i], atol=1e-12
        )
    assert x.shape[1:] == (6, 2, 2)
    a = np.maximum(x.flatten(1).numpy() @ model.coefs_[2] + model.intercepts_[2], 0)
    np.testing.assert_allclose(scores[2], a @ model.projections_[2], atol=1e-12)
    four = MonoForwardClassifier(8, conv_channels=(4, 6), max_iter=2, random_state=0).fit(IMAGES, Y)
    np.testing.assert_array_equal(four.layer_scores(IMAGES), scores)
    np.testing.assert_array_equal(four.layer_scores(X), scores)
    only = MonoForwardClassifier((), conv_channels=4, max_iter=1).fit(IMAGES, Y)
    assert only.layer_scores(IMAGES).shape == (1, 600, 10)


@pytest.mark.parametrize("classifier", [MonoForwardClassifier, BackpropClassifier])
def test_learns_reproducibly_and_leaves_data_alone(classifier):
    samples = X.copy()
    model = classifier((32,), max_iter=20, batch_size=16, random_state=0).fit(X[::3], Y[::3])
    assert model.score(X[1::3], Y[1::3]) > 0.75
    again = classifier((32,), max_iter=20, batch_size=16, random_state=0).fit(X[::3], Y[::3])
    np.testing.assert_array_equal(model.predict_proba(X), again.predict_proba(X))
    np.testing.assert_array_equal(X, samples)
    single = classifier((8,), max_iter=1).fit(X.astype(np.float32), Y)
    assert single.predict_proba(X).dtype == np.float32


@pytest.mark.parametrize("batch_norm", [True, False])
def test_backprop_convolutions(batch_norm):
    model = BackpropClassifier(
        8, conv_channels=(4, 6), batch_norm=batch_norm, max_iter=1, batch_size=599,
        early_stopping=False,
    ).fit(IMAGES, Y)  # fmt: skip
    kinds = [type(layer).__name__ for layer in model.network_]
    block = ["Conv2d", "ReLU", "MaxPool2d"] + (["BatchNorm2d"] if batch_norm else [])
    assert kinds == ["Unflatten", *block, *block, "Flatten", "Linear", "ReLU", "Linear"]
    assert model.predict_proba(IMAGES).shape == (600, 10)


def test_progress(capsys):
    MonoForwardClassifier((4, 4), max_iter=1, verbose=True).fit(X, Y)
    assert "layer 2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("schedule.*'both'", {"schedule": "both"}),
        ("predict_from.*'first'", {"predict_from": "first"}),
        ("max_iter.*0", {"max_iter": 0}),
        ("batch_size.*0", {"batch_size": 0}),
        ("learning_rate_init", {"learning_rate_init": float("inf")}),
        ("weight_decay", {"weight_decay": -1}),
        ("hidden_layer_sizes", {"hidden_layer_sizes": ()}),
        ("conv_channels.*needs images", {"conv_channels": (4,)}),
        ("image_shape.*63 and 64", {"image_shape": (1, 7, 9)}),
        ("image_shape", {"image_shape": (8, 8)}),
        ("height and width must be 16", {"conv_channels": (2,) * 4, "image_shape": (1, 8, 8)}),
        ("n_iter_no_change.*0", {"n_iter_no_change": 0}),
    ],
)
def test_bad_parameters(match, options):
    with pytest.raises(ValueError, match=match):
        MonoForwardClassifier(**options).fit(X, Y)


def test_bad_data():
    with pytest.raises(NotFittedError):
        MonoForwardClassifier().layer_scores(X)
    with pytest.raises(ValueError, match="1 class"):
        MonoForwardClassifier().fit(X, np.zeros(600))
    with pytest.raises(ValueError, match="X must hold images of shape"):
        MonoForwardClassifier(image_shape=(1, 4, 16)).fit(IMAGES, Y)
    with pytest.raises(ValueError, match="dim 3"):
        MonoForwardClassifier().fit(IMAGES[:, 0], Y)
    with pytest.raises(FloatingPointError, match="loss"):
        MonoForwardClassifier(8, learning_rate_init=1e300, early_stopping=False).fit(X, Y)
