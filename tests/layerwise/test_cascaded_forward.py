"""Cascaded Forward: heads against Ridge and written gradients, feedback against backpropagation."""

import numpy as np
import pytest
import torch
from scipy.linalg import LinAlgWarning
from scipy.special import softmax
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.nn import functional

from sciml.layerwise import (
    BackwardMemoryMonitor,
    CascadedForwardClassifier,
    direct_feedback_losses,
    ridge_weights,
    sparsemax,
)

X, Y = load_digits(return_X_y=True)
X, Y = X[:300] / 16, Y[:300]
IMAGES = X.reshape(-1, 1, 8, 8)
ONE_HOT = np.eye(10)[Y]


def features(model, x=IMAGES):
    """Features of every block, by functions, with statistics of these very samples."""
    found, x = [], torch.from_numpy(x)
    for conv, _, _, norm in model.blocks_:
        x = functional.max_pool2d(functional.conv2d(x, conv.weight, conv.bias, padding=1).relu(), 2)
        center = x - x.mean(dim=(0, 2, 3), keepdim=True)
        x = center / (center.square().mean(dim=(0, 2, 3), keepdim=True) + 1e-4).sqrt()
        assert norm.eps == 1e-4
        found.append(x.flatten(1).numpy())
    return found


@parametrize_with_checks(
    [
        CascadedForwardClassifier((16, 16)),
        CascadedForwardClassifier((16, 16), head="sparsemax", learning_rate_init=0.2, max_iter=30),
        CascadedForwardClassifier(16, head="ce", solver="adam", learning_rate_init=0.1, max_iter=3),
        CascadedForwardClassifier((16, 16), block_training="dfa", block_max_iter=2),
    ]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("ridge", [1.0, 30.0])
@pytest.mark.parametrize("blocks", [(2, 3), (32, 64)])  # more samples than features, and fewer
def test_squared_error_heads_equal_ridge(blocks, ridge):
    model = CascadedForwardClassifier(blocks, image_shape=(1, 8, 8), ridge=ridge, random_state=0)
    scores = model.fit(X, Y).layer_scores(X)
    for Z, W, score in zip(features(model), model.coefs_, scores, strict=True):
        expected = Ridge(alpha=ridge, fit_intercept=False, solver="svd").fit(Z, ONE_HOT).coef_.T
        np.testing.assert_allclose(W, expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(score, Z @ W, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(model.predict_proba(X), softmax(scores, axis=2).mean(0))
    logits = model.set_params(aggregate="logits").predict_proba(X)
    np.testing.assert_allclose(logits, softmax(scores.sum(0), axis=1))
    np.testing.assert_array_equal(model.predict(X), scores.sum(0).argmax(1))


@pytest.mark.parametrize("shape", [(9000, 5), (5, 9000)])
def test_gram_matrix_in_chunks(shape):
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(*shape, generator=generator, dtype=torch.float64)
    T = torch.randn(shape[0], 2, generator=generator, dtype=torch.float64)
    W = ridge_weights(Z, T, 0.5)
    torch.testing.assert_close(Z.T @ (T - Z @ W), 0.5 * W)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_features_give_the_least_norm_with_a_warning(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(shape[0], 3, generator=generator, dtype=dtype)
    Z = Z @ torch.randn(3, shape[1], generator=generator, dtype=dtype)
    T = torch.randn(shape[0], 2, generator=generator, dtype=dtype)
    with pytest.warns(LinAlgWarning, match="least norm"):
        W = ridge_weights(Z, T, 0.0)
    expected = np.linalg.lstsq(Z.double().numpy(), T.double().numpy(), rcond=1e-5)[0]
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    np.testing.assert_allclose(W, expected, rtol=tolerance, atol=tolerance)


def test_interpolation_of_least_norm_without_ridge():
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    T = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ridge_weights(Z, T, 0.0), torch.linalg.pinv(Z) @ T)


@pytest.mark.parametrize("head", ["ce", "sparsemax"])
def test_descent_heads_equal_steps_written_by_hand(head):
    model = CascadedForwardClassifier(
        (3, 4), image_shape=(1, 8, 8), head=head, ridge=2.0, learning_rate_init=0.1, max_iter=7,
        random_state=0,
    ).fit(X, Y)  # fmt: skip
    for Z, ours, history in zip(features(model), model.coefs_, model.history_, strict=True):
        W, n = np.ones((Z.shape[1], 10)), len(Z)
        for _ in range(7):
            P = softmax(Z @ W, axis=1) if head == "ce" else sparsemax(torch.tensor(Z @ W)).numpy()
            W -= 0.1 * (Z.T @ (P - ONE_HOT) + 2.0 * W) / n
        np.testing.assert_allclose(ours, W, rtol=1e-8)
        penalty = 2.0 / (2 * n) * Z.shape[1] * 10
        first = np.log(10) if head == "ce" else 0.5 * 10 * (0 - (-0.1) ** 2) + 0.5
        if head == "ce":  # equal scores for all classes
            assert history[0]["loss"] == pytest.approx(first + penalty, rel=1e-5)
    np.testing.assert_array_equal(model.n_iter_, [7, 7])
    scores = model.layer_scores(X)
    expected = softmax(scores, axis=2) if head == "ce" else sparsemax(torch.tensor(scores)).numpy()
    np.testing.assert_allclose(model.predict_proba(X), expected.mean(0))


def test_prediction_does_not_depend_on_the_other_samples():
    model = CascadedForwardClassifier((4, 4), image_shape=(1, 8, 8), random_state=0).fit(X, Y)
    np.testing.assert_allclose(model.predict_proba(X[:3]), model.predict_proba(X)[:3], atol=1e-12)


def linear_cascade(n_blocks=3, sizes=(6, 5, 7, 4), n_classes=3):
    torch.manual_seed(0)
    blocks = [nn.Linear(sizes[i], sizes[i + 1], bias=False).double() for i in range(n_blocks)]
    auxiliary = nn.Linear(sizes[n_blocks], n_classes).double()
    return blocks, auxiliary, torch.randn(10, 6).double(), torch.randint(3, (10,))


def test_feedback_by_the_downstream_maps_is_backpropagation_times_the_batch_size():
    blocks, auxiliary, x, y = linear_cascade()
    downstream = auxiliary.weight @ blocks[2].weight
    feedback = [(downstream @ blocks[1].weight).detach(), downstream.detach()]
    parameters = [p for module in (*blocks, auxiliary) for p in module.parameters()]
    loss = functional.cross_entropy(auxiliary(blocks[2](blocks[1](blocks[0](x)))), y)
    expected = torch.autograd.grad(loss, parameters)
    values = []
    for term in direct_feedback_losses(blocks, auxiliary, feedback, x, y):
        term.backward()
        values.append(term.item())
    assert values == [pytest.approx(loss.item()), 0, 0]
    for i, (parameter, gradient) in enumerate(zip(parameters, expected, strict=True)):
        torch.testing.assert_close(parameter.grad, gradient * (10 if i < 2 else 1))


def test_feedback_through_a_nonlinear_block_is_its_vector_jacobian_product():
    blocks, auxiliary, x, y = linear_cascade(2)
    blocks[0] = nn.Sequential(blocks[0], nn.Tanh())
    matrix = torch.randn(3, 5).double()
    scores = auxiliary(blocks[1](blocks[0](x))).detach()
    error = scores.softmax(1) - functional.one_hot(y, 3)
    W = blocks[0][0].weight
    expected = ((error @ matrix) * (1 - torch.tanh(x @ W.T) ** 2)).T @ x
    for term in direct_feedback_losses(blocks, auxiliary, [matrix], x, y):
        term.backward()
    torch.testing.assert_close(W.grad, expected)


def test_feedback_holds_one_block_for_backward():
    peaks = []
    for n_blocks in (2, 4, 8):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(n_blocks)]
        feedback = [torch.ones(2, 6)] * (n_blocks - 1)
        x, y = torch.randn(5, 6), torch.zeros(5, dtype=torch.long)
        with BackwardMemoryMonitor() as memory:
            for term in direct_feedback_losses(blocks, nn.Linear(6, 2), feedback, x, y):
                term.backward()
        peaks.append(memory.peak_bytes)
    assert len(set(peaks)) == 1


def test_feedback_aligned_blocks_learn_and_random_ones_stay():
    options = {"image_shape": (1, 8, 8), "block_learning_rate": 1e-2, "random_state": 0}
    random = CascadedForwardClassifier((4, 8), **options).fit(X, Y)
    dfa = CascadedForwardClassifier((4, 8), block_training="dfa", **options).fit(X, Y)
    assert random.block_history_ == []
    losses = [entry["loss"] for entry in dfa.block_history_]
    assert len(losses) == 10
    assert losses[-1] < 0.6 * losses[0]
    for i in range(2):
        assert not torch.equal(random.blocks_[i][0].weight, dfa.blocks_[i][0].weight)
        assert not dfa.blocks_[i].training
        assert not any(p.requires_grad for p in dfa.blocks_.parameters())
    rows = CascadedForwardClassifier((4, 8), block_training="dfa", **options).fit(X, Y)
    np.testing.assert_array_equal(dfa.predict_proba(X), rows.predict_proba(X))


def test_given_modules_are_used_as_they_are():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 20), nn.Tanh()), nn.Sequential(nn.Linear(20, 9))]
    before = [p.clone() for block in blocks for p in block.parameters()]
    model = clone(CascadedForwardClassifier(blocks, block_training="dfa")).fit(X, Y)
    assert model.layer_scores(X).shape == (2, 300, 10)
    assert all(map(torch.equal, before, [p for b in blocks for p in b.parameters()]))
    model = CascadedForwardClassifier(blocks).fit(X.astype(np.float32), Y)
    z = torch.from_numpy(X.astype(np.float32))
    for block, W, score in zip(blocks, model.coefs_, model.layer_scores(X), strict=True):
        z = block(z)
        np.testing.assert_allclose(score, z.detach().numpy() @ W, atol=1e-5)
        assert score.dtype == np.float32


def test_learns_from_images_of_either_form():
    model = CascadedForwardClassifier((8, 16), random_state=0).fit(IMAGES[::3], Y[::3])
    assert model.score(IMAGES[1::3], Y[1::3]) > 0.85
    rows = CascadedForwardClassifier((8, 16), image_shape=(1, 8, 8), random_state=0)
    np.testing.assert_array_equal(
        rows.fit(X[::3], Y[::3]).predict_proba(X), model.predict_proba(IMAGES)
    )


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("block_training.*'bp'", {"block_training": "bp"}),
        ("head.*'hinge'", {"head": "hinge"}),
        ("aggregate.*'softmax'", {"aggregate": "softmax"}),
        ("solver.*'lbfgs'", {"solver": "lbfgs"}),
        ("ridge.*-1", {"ridge": -1}),
        ("max_iter.*0", {"max_iter": 0}),
        ("block_max_iter.*0", {"block_max_iter": 0}),
        ("batch_size.*0", {"batch_size": 0}),
        ("block_learning_rate", {"block_learning_rate": 0.0}),
        ("blocks", {"blocks": ()}),
        ("height and width must be 16", {"blocks": (2,) * 4, "image_shape": (1, 8, 8)}),
    ],
)
def test_bad_parameters(match, options):
    with pytest.raises(ValueError, match=match):
        CascadedForwardClassifier(**options).fit(X, Y)


def test_bad_data():
    with pytest.raises(TypeError, match="blocks.*integer.*ReLU"):
        CascadedForwardClassifier((4, nn.ReLU())).fit(X, Y)
    with pytest.raises(NotFittedError):
        CascadedForwardClassifier().predict_proba(X)
    with pytest.raises(ValueError, match="feedback.*1 blocks.*got 0"):
        list(direct_feedback_losses([nn.ReLU()] * 2, nn.Linear(2, 2), [], torch.ones(3, 2), None))
    with pytest.raises(ValueError, match="ridge"):
        ridge_weights(torch.ones(2, 2), torch.ones(2, 1), float("nan"))
    with pytest.raises(ValueError, match="same length"):
        ridge_weights(torch.ones(2, 2), torch.ones(3, 1), 1.0)
