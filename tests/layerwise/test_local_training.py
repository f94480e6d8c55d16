"""The engine equals a loop written by hand, and stops, restores and complains as promised."""

import copy
import math

import pytest
import torch
from torch import nn

from sciml.layerwise import train_locally

X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1).double()


def squared_error(module, batch=None):
    x, y = (X, Y) if batch is None else batch
    return (module(x)[:, 0] - y).square().mean()


def sgd(module, lr=0.1):
    return torch.optim.SGD(module.parameters(), lr=lr)


class Steps(nn.Module):
    """A module whose parameter counts the steps taken: the gradient is -1, the rate 1."""

    def __init__(self):
        super().__init__()
        self.n = nn.Parameter(torch.zeros(()))

    def train_on(self, scores, **options):
        def validate(module):
            return scores[round(module.n.item()) - 1]

        return train_locally(
            self,
            lambda module, batch: -module.n,
            optimizer=sgd(self, lr=1.0),
            validate=validate,
            **{"max_epochs": len(scores), **options},
        )


def test_full_batch_equals_a_loop():
    ours, theirs = linear(), linear()
    history = train_locally(ours, squared_error, optimizer=sgd(ours), max_epochs=5)
    losses, optimizer = [], sgd(theirs)
    for _ in range(5):
        optimizer.zero_grad()
        loss = squared_error(theirs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5]
    assert [entry["loss"] for entry in history] == pytest.approx(losses, rel=1e-6)


def test_batches_schedule_and_clipping_equal_a_loop():
    ours, theirs = linear(), linear()
    batches = [(X[i : i + 5], Y[i : i + 5]) for i in (0, 5, 10)]
    optimizer = sgd(ours)
    history = train_locally(
        ours,
        squared_error,
        batches,
        optimizer=optimizer,
        max_epochs=4,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        grad_clip=0.3,
    )
    for epoch in range(4):
        optimizer, losses = sgd(theirs, lr=0.1 * 0.5**epoch), []
        for batch in batches:
            optimizer.zero_grad()
            loss = squared_error(theirs, batch)
            loss.backward()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters()))
            for p in theirs.parameters():
                p.grad *= min(1.0, 0.3 / (norm + 1e-6))
            optimizer.step()
            losses.append(loss.item())
        assert history[epoch]["loss"] == pytest.approx(sum(losses) / 3)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_several_losses_are_backpropagated_one_by_one():
    """A generator's losses give the gradient of their sum, with one graph alive at a time."""
    ours, theirs = linear(), linear()
    alive, most = 0, 0

    def pack(tensor):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return tensor

    def unpack(tensor):
        nonlocal alive
        alive -= 1
        return tensor

    def one_by_one(module, batch):
        for i in range(4):
            yield (module(X[3 * i : 3 * i + 3])[:, 0] - Y[3 * i : 3 * i + 3]).square().mean() / 4

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        history = train_locally(ours, one_by_one, optimizer=sgd(ours), max_epochs=1)
    most_of_four = most
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        alive = most = 0
        next(one_by_one(theirs, None)).backward()
        theirs.zero_grad()
    assert most_of_four == most > 0
    expected = train_locally(theirs, squared_error, optimizer=sgd(theirs), max_epochs=1)
    assert history[0]["loss"] == pytest.approx(expected[0]["loss"])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_patience_counts_validations_and_the_first_best_state_returns():
    module = Steps()
    scores = [9.0, 1.0, 9.0, 3.0, 9.0, 3.0, 9.0, 2.0, 9.0, 4.0]  # validated: 1, 3, 3, 2
    history = module.train_on(scores, val_every=2, n_iter_no_change=2)
    assert len(history) == 8
    assert [entry.get("val_score") for entry in history[1::2]] == [1.0, 3.0, 3.0, 2.0]
    assert all("val_score" not in entry for entry in history[::2])
    assert module.n == 4
    assert not module.training
    assert module.n.grad is None


@pytest.mark.parametrize(("restore_best", "steps"), [(True, 2), (False, 4)])
def test_restore_best(restore_best, steps):
    module = Steps()
    assert len(module.train_on([1.0, 5.0, 2.0, 3.0], restore_best=restore_best)) == 4
    assert module.n == steps


def test_tol_is_for_patience_alone():
    module = Steps()
    history = module.train_on([0.0, 0.4, 0.45, 1.0], tol=0.5, n_iter_no_change=2)
    assert len(history) == 3
    assert module.n == 3  # the best state, although no improvement by more than tol


def test_buffers_are_restored():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    seen = []

    def validate(module):
        assert not module.training
        seen.append(copy.deepcopy(module.state_dict()))
        return -len(seen)

    train_locally(module, squared_error, optimizer=sgd(module), max_epochs=3, validate=validate)
    assert not torch.equal(seen[0]["0.running_mean"], seen[2]["0.running_mean"])
    torch.testing.assert_close(dict(module.state_dict()), dict(seen[0]), rtol=0, atol=0)


def test_loss_may_use_the_forward_pass_of_validate():
    """One forward pass an epoch trains the same module as two."""
    ours, theirs = linear(), linear()
    kept, calls = {}, 0

    def forward(module):
        nonlocal calls
        calls += 1
        return module(X)[:, 0]

    def loss(module, batch):
        output = kept.pop("output", None)
        return ((forward(module) if output is None else output) - Y).square().mean()

    def validate(module):
        kept["output"] = forward(module)
        return -float((kept["output"].detach() - Y).square().mean())

    options = {"max_epochs": 6}
    train_locally(ours, loss, optimizer=sgd(ours), validate=validate, **options)
    assert calls == 7
    train_locally(theirs, squared_error, optimizer=sgd(theirs), **options)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_no_epoch_trains_nothing():
    module, untouched = linear(), linear()
    assert train_locally(module, squared_error, optimizer=sgd(module), max_epochs=0) == []
    torch.testing.assert_close(module.state_dict(), untouched.state_dict(), rtol=0, atol=0)


def test_progress_shows_label_and_loss(capsys):
    module = linear()
    train_locally(module, squared_error, optimizer=sgd(module), max_epochs=2, progress="layer 1/3")
    assert "layer 1/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "max_epochs.*-1", {"max_epochs": -1}),
        (TypeError, "max_epochs.*2.5", {"max_epochs": 2.5}),
        (ValueError, "val_every.*0", {"val_every": 0}),
        (ValueError, "n_iter_no_change.*0", {"n_iter_no_change": 0, "validate": lambda m: 0.0}),
        (ValueError, "n_iter_no_change.*without validate", {"n_iter_no_change": 3}),
        (ValueError, "tol.*-1", {"tol": -1}),
        (ValueError, "grad_clip.*0", {"grad_clip": 0}),
        (ValueError, "batches.*none", {"batches": []}),
        (TypeError, "batches.*generator", {"batches": ((X, Y) for _ in range(2))}),
        (ValueError, "validate.*nan", {"validate": lambda m: math.nan}),
        (
            FloatingPointError,
            "loss is nan in epoch 1",
            {"loss": lambda m, b: m(X).sum() * math.nan},
        ),
    ],
)
def test_bad_input(error, match, options):
    module = linear()
    options = {"max_epochs": 2, "loss": squared_error, **options}
    with pytest.raises(error, match=match):
        train_locally(module, optimizer=sgd(module), **options)
