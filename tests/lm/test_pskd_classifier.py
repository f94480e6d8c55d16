"""The PS-KD estimator: contract of scikit-learn, loop written out, resumption, the experiment."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from sciml.lm import (
    ProgressiveSelfKDLoss,
    PSKDClassifier,
    aurc,
    expected_calibration_error,
    negative_log_likelihood,
)

X, Y = load_digits(return_X_y=True)
X = X / 16


class BatchNormalised:
    """A module factory whose repr is the same in every worker, as names of tests must be."""

    def __call__(self, n_features, n_classes):
        return nn.Sequential(
            nn.Linear(n_features, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(32, n_classes),
        )  # fmt: skip

    def __repr__(self):
        return "batch_normalised"


batch_normalised = BatchNormalised()


@parametrize_with_checks(
    [
        PSKDClassifier(hidden_layer_sizes=(16,), max_iter=8, batch_size=16),
        PSKDClassifier(batch_normalised, max_iter=8, batch_size=16),
    ]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_equals_a_loop():
    model = PSKDClassifier(hidden_layer_sizes=(12,), max_iter=4, batch_size=64, random_state=3)
    model.fit(X[:200], Y[:200])
    seed = int(np.random.RandomState(3).randint(2**31 - 1))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).double()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    criterion = ProgressiveSelfKDLoss(200, 10, 4, dtype=torch.float64)
    inputs, target = torch.from_numpy(X[:200]), torch.from_numpy(Y[:200])
    for epoch, rate in enumerate((0.1, 0.1, 0.01, 0.001)):
        torch.manual_seed(seed + epoch + 1)
        criterion.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = rate
        for index in torch.randperm(200).split(64):
            optimizer.zero_grad()
            criterion(net(inputs[index]), target[index], index).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
    expected = net(inputs).softmax(1).detach().numpy()
    np.testing.assert_allclose(model.predict_proba(X[:200]), expected, rtol=1e-9, atol=1e-12)
    assert model.n_iter_ == len(model.loss_curve_) == 4


def test_a_module_of_your_own_is_trained_reproducibly():
    state = torch.get_rng_state()
    single = X[:300].astype(np.float32)
    kept = single.copy()
    models = [
        PSKDClassifier(batch_normalised, max_iter=12, batch_size=32, random_state=0).fit(
            single, Y[:300]
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(single, kept)
    probability = models[0].predict_proba(single)
    assert probability.dtype == np.float32
    np.testing.assert_array_equal(probability, models[1].predict_proba(single))
    assert models[0].score(X[300:], Y[300:]) > 0.8
    assert not models[0].module_.training


class _Kill(KeyboardInterrupt):
    pass


def test_a_killed_fit_resumes_to_the_same_weights(tmp_path, monkeypatch):
    options = {"module": batch_normalised, "max_iter": 6, "random_state": 5}
    whole = PSKDClassifier(**options).fit(X[:200], Y[:200])
    path, calls = tmp_path / "fit.safetensors", []
    set_epoch = ProgressiveSelfKDLoss.set_epoch

    def kill(self, epoch):
        calls.append(epoch)
        if epoch == 3:
            raise _Kill
        set_epoch(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressiveSelfKDLoss, "set_epoch", kill)
        with pytest.raises(_Kill):
            PSKDClassifier(checkpoint=path, **options).fit(X[:200], Y[:200])
    assert calls == [0, 1, 2, 3]
    # Another seed: that of the checkpoint counts.
    resumed = PSKDClassifier(resume_from=path, **options | {"random_state": 9}).fit(
        X[:200], Y[:200]
    )
    np.testing.assert_array_equal(resumed.predict_proba(X), whole.predict_proba(X))
    assert resumed.loss_curve_ == whole.loss_curve_
    with pytest.raises(ValueError, match="differs in data"):
        PSKDClassifier(resume_from=path, **options).fit(X[:201], Y[:201])
    with pytest.raises(ValueError, match="differs in alpha_T"):
        PSKDClassifier(resume_from=path, alpha_T=0.5, **options).fit(X[:200], Y[:200])
    with pytest.raises(ValueError, match="module must be of the checkpoint's layers"):
        PSKDClassifier(resume_from=path, max_iter=6).fit(X[:200], Y[:200])
    with pytest.raises(FileNotFoundError):
        PSKDClassifier(resume_from=tmp_path / "none").fit(X[:200], Y[:200])


def test_progress_and_last_batch_of_one(capsys):
    model = PSKDClassifier(batch_normalised, max_iter=1, batch_size=50, verbose=True)
    model.fit(X[:101], Y[:101])  # a batch of one would be refused by batch normalisation
    assert "epoch" in capsys.readouterr().err


def returns_tensor(n_features, n_classes):
    return torch.zeros(n_features, n_classes)


def wrong_width(n_features, n_classes):
    return nn.Linear(n_features, n_classes + 1)


@pytest.mark.parametrize(
    ("match", "error", "options"),
    [
        ("alpha_T", ValueError, {"alpha_T": 1.2}),
        ("max_iter", ValueError, {"max_iter": 0}),
        ("batch_size", ValueError, {"batch_size": 0}),
        ("learning_rate_init", ValueError, {"learning_rate_init": 0}),
        ("momentum must be in .0, 1.", ValueError, {"momentum": 0}),
        ("weight_decay", ValueError, {"weight_decay": -1}),
        ("max_grad_norm", ValueError, {"max_grad_norm": 0}),
        ("hidden_layer_sizes", ValueError, {"hidden_layer_sizes": (0,)}),
        (
            "hidden_layer_sizes has no effect",
            ValueError,
            {"module": batch_normalised, "hidden_layer_sizes": (3,)},
        ),
        ("module must be callable", TypeError, {"module": "mlp"}),
        ("module must return a torch module", TypeError, {"module": returns_tensor}),
        ("module must return logits of shape .*10.*11", ValueError, {"module": wrong_width}),
        ("diverged", FloatingPointError, {"learning_rate_init": 1e300}),
    ],
)
def test_bad_parameters(match, error, options):
    with pytest.raises(error, match=match):
        PSKDClassifier(**options).fit(X[:100], Y[:100])


def test_bad_data():
    with pytest.raises(NotFittedError):
        PSKDClassifier().predict(X)
    with pytest.raises(ValueError, match="1 class"):
        PSKDClassifier().fit(X[:50], np.zeros(50))


def train_network(X_train, y_train, seed, method, epochs=60):
    """Cross entropy, label smoothing 0.1 or PS-KD in one loop, from the same weights and orders."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, 3 * epochs // 4])
    progressive = ProgressiveSelfKDLoss(len(X_train), 10, epochs)
    for epoch in range(epochs):
        progressive.set_epoch(epoch)
        for index in torch.randperm(len(X_train)).split(64):
            logits = net(X_train[index])
            if method == "PS-KD":
                loss = progressive(logits, y_train[index], index)
            else:
                loss = nn.functional.cross_entropy(
                    logits, y_train[index], label_smoothing=0.1 * (method == "LS")
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval()


@pytest.mark.slow
def test_digits_with_wrong_labels():
    """500 samples, a fifth of them with a random label: PS-KD has the best likelihood."""
    seeds, methods = range(5), ("CE", "LS", "PS-KD")
    scores = {method: [] for method in methods}
    for seed in seeds:
        X_train, X_test, y_train, y_test = train_test_split(
            X.astype(np.float32), Y, train_size=500, stratify=Y, random_state=seed
        )
        rng = np.random.default_rng(seed)
        wrong = rng.choice(500, 100, replace=False)
        y_train[wrong] = rng.integers(10, size=100)
        for method in methods:
            net = train_network(torch.from_numpy(X_train), torch.from_numpy(y_train), seed, method)
            proba = net(torch.from_numpy(X_test)).softmax(1).detach().numpy()
            scores[method].append(
                [
                    100 * (proba.argmax(1) != y_test).mean(),
                    negative_log_likelihood(y_test, proba),
                    100 * expected_calibration_error(y_test, proba),
                    1000 * aurc(y_test, proba),
                ]
            )
    mean = {method: np.mean(rows, axis=0) for method, rows in scores.items()}
    for method in methods:
        error, nll, ece, area = mean[method]
        spread = np.std(scores[method], axis=0)
        print(
            f"{method:6} error {error:5.2f} ± {spread[0]:.2f} %  NLL {nll:.3f} ± {spread[1]:.3f}  "
            f"ECE {ece:5.2f} ± {spread[2]:.2f} %  AURC {area:5.1f} ± {spread[3]:.1f}",
            flush=True,
        )
    assert mean["PS-KD"][1] <= mean["CE"][1] - 0.03
    assert mean["PS-KD"][1] <= mean["LS"][1]
    assert mean["PS-KD"][0] <= mean["CE"][0] - 0.5
