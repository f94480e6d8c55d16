"""PS-KD: equal to cross entropies in its special cases, gradients, schedule, resumption."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.lm import (
    HiddenLogits,
    ProgressiveSelfKDLoss,
    ProgressiveSelfKDTokenLoss,
    linear_alpha,
    pskd_loss,
    pskd_token_loss,
    reduce_rows,
    top_k_predictions,
)


def batch(seed=0, n=6, n_classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, n_classes, generator=generator, dtype=dtype)
    target = torch.randint(n_classes, (n,), generator=generator)
    previous = torch.randn(n, n_classes, generator=generator, dtype=dtype).softmax(1)
    return logits.requires_grad_(), target, previous


def test_schedule():
    assert linear_alpha(0, 300) == pytest.approx(0.8 / 300)
    assert linear_alpha(149, 300) == pytest.approx(0.4)
    assert linear_alpha(299, 300) == 0.8
    assert linear_alpha(0, 1, 0.3) == 0.3
    alphas = [linear_alpha(epoch, 300) for epoch in range(300)]
    assert alphas == sorted(alphas)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_special_cases(reduction):
    logits, target, previous = batch()
    plain = F.cross_entropy(logits, target, reduction=reduction)
    uniform, onehot = torch.full_like(previous, 0.2), F.one_hot(target, 5).double()
    for ours, expected in (
        (pskd_loss(logits, target, previous, 0.0, reduction=reduction), plain),
        (pskd_loss(logits, target, onehot, 0.7, reduction=reduction), plain),
        (
            pskd_loss(logits, target, uniform, 0.3, reduction=reduction),
            F.cross_entropy(logits, target, label_smoothing=0.3, reduction=reduction),
        ),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_gradient_in_closed_form(seed, alpha, shift):
    logits, target, previous = batch(seed)
    (gradient,) = torch.autograd.grad(pskd_loss(logits, target, previous, alpha), logits)
    soft = (1 - alpha) * F.one_hot(target, 5).double() + alpha * previous
    torch.testing.assert_close(soft.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(gradient, (logits.softmax(1) - soft) / 6, atol=1e-12, rtol=0)
    moved = pskd_loss(logits + shift, target, previous, alpha)
    torch.testing.assert_close(moved, pskd_loss(logits, target, previous, alpha))


def test_hard_samples_keep_more_of_their_gradient():
    """Ratio to cross entropy: 1 - alpha (1 - P_before) / (1 - P_now), where that is the case."""
    now = torch.tensor([[0.9, 0.06, 0.04], [0.5, 0.3, 0.2]], dtype=torch.float64)
    before = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
    logits, target, alpha = now.log().requires_grad_(), torch.tensor([0, 0]), 0.2
    ours, plain = (
        torch.autograd.grad(pskd_loss(logits, target, before, a), logits)[0].abs().sum(1)
        for a in (alpha, 0.0)
    )
    ratio = 1 - alpha * (1 - before[:, 0]) / (1 - now[:, 0])
    torch.testing.assert_close((ours / plain)[1], ratio[1])
    torch.testing.assert_close(ratio[1], torch.tensor(0.8, dtype=torch.float64))
    torch.testing.assert_close((ours / plain)[0], ratio[0])
    assert ratio[0] < ratio[1]


def test_half_precision_is_computed_in_float32():
    logits, target, previous = batch(dtype=torch.float32)
    half = logits.detach().bfloat16().requires_grad_()
    loss = pskd_loss(half, target, previous, 0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pskd_loss(half.detach().float(), target, previous, 0.5))
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


def plain_training(model, optimizer, X, y, orders, alpha_T):
    """The authors' loop written out: a table, one-hot in the first epoch."""
    table = torch.zeros(len(X), 3)
    for epoch, order in enumerate(orders):
        alpha = alpha_T * (epoch + 1) / len(orders)
        for index in order.split(4):
            onehot = torch.eye(3)[y[index]]
            if epoch == 0:
                table[index] = onehot
            soft = (1 - alpha) * onehot + alpha * table[index]
            z = model(X[index])
            loss = (-soft * z.log_softmax(1)).mean(0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            table[index] = z.detach().softmax(1)
    return table


def toy(n=10):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, 4, generator=generator)
    y = torch.randint(3, (n,), generator=generator)
    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 4, generator=generator))
        model.bias.zero_()
    orders = [torch.randperm(n, generator=generator) for _ in range(4)]
    return X, y, model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), orders


def train(model, optimizer, criterion, X, y, orders, epochs):
    for epoch in epochs:
        criterion.set_epoch(epoch)
        for index in orders[epoch].split(4):
            optimizer.zero_grad()
            criterion(model(X[index]), y[index], index).backward()
            optimizer.step()


@pytest.mark.parametrize("in_files", [False, True])
def test_equals_the_loop_of_the_authors(tmp_path, in_files):
    X, y, model, optimizer, orders = toy()
    expected_table = plain_training(model, optimizer, X, y, orders, 0.8)
    expected = model.weight.detach().clone()
    X, y, model, optimizer, orders = toy()
    criterion = ProgressiveSelfKDLoss(10, 3, 4, path=tmp_path if in_files else None)
    train(model, optimizer, criterion, X, y, orders, range(4))
    torch.testing.assert_close(model.weight, expected, rtol=1e-5, atol=1e-6)
    fields, seen = criterion.predictions.read(torch.arange(10))
    assert seen.all()
    torch.testing.assert_close(fields["probability"], expected_table, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fields["probability"].sum(1), torch.ones(10))


@pytest.mark.parametrize("in_files", [False, True])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, in_files):
    path = tmp_path if in_files else None
    X, y, model, optimizer, orders = toy()
    train(model, optimizer, ProgressiveSelfKDLoss(10, 3, 4), X, y, orders, range(4))
    X, y, second, optimizer, orders = toy()
    criterion = ProgressiveSelfKDLoss(10, 3, 4, path=path)
    train(second, optimizer, criterion, X, y, orders, range(2))
    saved = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        for state in (second.state_dict(), criterion.state_dict())
    ]
    momentum = optimizer.state_dict()
    momentum["state"] = {
        k: {name: v.clone() for name, v in entry.items()} for k, entry in momentum["state"].items()
    }
    train(second, optimizer, criterion, X, y, orders, [2])  # killed in here
    X, y, third, optimizer, orders = toy()
    criterion = ProgressiveSelfKDLoss(10, 3, 4, path=path)
    third.load_state_dict(saved[0])
    criterion.load_state_dict(saved[1])
    optimizer.load_state_dict(momentum)
    assert criterion.epoch == 1
    train(third, optimizer, criterion, X, y, orders, [2, 3])
    assert torch.equal(third.weight, model.weight)


def test_first_epoch_new_samples_and_evaluation():
    logits, target, _ = batch(dtype=torch.float32)
    criterion = ProgressiveSelfKDLoss(20, 5, 3)
    index = torch.tensor([3, 19, 0, 7, 5, 11])
    plain = F.cross_entropy(logits, target)
    torch.testing.assert_close(criterion(logits, target, index), plain)
    criterion.set_epoch(2)
    other = torch.tensor([3, 1, 2, 7, 5, 4])  # 1, 2 and 4 were never seen
    value = criterion.eval()(logits, target, other)
    soft = F.one_hot(target, 5) * torch.tensor([0.2, 1, 1, 0.2, 0.2, 1])[:, None]
    soft[[0, 3, 4]] += 0.8 * logits.detach().softmax(1)[[0, 3, 4]]
    torch.testing.assert_close(value, F.cross_entropy(logits, soft))
    assert not criterion.predictions.read(torch.tensor([1, 2, 4]))[1].any()
    permuted = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        criterion.predictions.read(index[permuted])[0]["probability"],
        logits.detach().softmax(1)[permuted],
    )
    point = torch.tensor([[60.0, 0, 0, 0, 0]])  # sure and right: a fixed point
    criterion.train()(point, torch.tensor([0]), torch.tensor([8]))
    assert criterion(point.requires_grad_(), torch.tensor([0]), torch.tensor([8])) < 1e-12
    assert "total_epochs=3, alpha_T=0.8" in repr(criterion)


def rank(number, n_ranks, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=n_ranks
    )
    criterion = ProgressiveSelfKDLoss(5, 2, 1)
    index = torch.tensor([[0, 3, 1], [4, 2, 0]][number])[: 3 - number]
    logits = torch.stack([index.float(), torch.zeros(len(index))], 1)
    criterion(logits, torch.zeros(len(index), dtype=torch.long), index)
    fields, seen = criterion.predictions.read(torch.arange(5))
    torch.save({"p": fields["probability"], "seen": seen}, os.path.join(folder, f"{number}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes import torch
def test_processes_share_their_predictions(tmp_path):
    torch.multiprocessing.spawn(rank, (2, str(tmp_path)), nprocs=2)
    expected = torch.sigmoid(torch.arange(5.0))
    for number in range(2):
        saved = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert saved["seen"].all()
        torch.testing.assert_close(saved["p"][:, 0], expected)


# Tokens


def tokens(seed=0, vocabulary=11, k=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, vocabulary, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(vocabulary, (2, 5), generator=generator)
    labels[1, 3:] = -100
    previous = torch.randn(2, 5, vocabulary, generator=generator, dtype=dtype).softmax(-1)
    probability, index = previous.topk(k)
    return logits, labels, probability, index


def dense(probability, index, vocabulary):
    """The whole distribution that a top-k prediction stands for."""
    k = probability.shape[-1]
    rest = (1 - probability.sum(-1, keepdim=True)) / (vocabulary - k)
    return rest.expand(*index.shape[:-1], vocabulary).scatter(-1, index, probability)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_tokens_equal_a_dense_loss(shift, alpha):
    logits, labels, probability, index = tokens()
    ours = pskd_token_loss(logits, labels, probability, index, alpha, shift=shift)
    rows = F.pad(labels[:, 1:], (0, 1), value=-100) if shift else labels
    mask = rows != -100
    expected = pskd_loss(logits[mask], rows[mask], dense(probability, index, 11)[mask], alpha)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    each = pskd_token_loss(
        logits, labels, probability, index, alpha, shift=shift, reduction="none", chunk_size=3
    )
    torch.testing.assert_close(each.sum() / mask.sum(), expected)
    assert (each[~mask] == 0).all()
    total = pskd_token_loss(
        logits, labels, probability, index, alpha, shift=shift, num_items_in_batch=7
    )
    torch.testing.assert_close(total, expected * mask.sum() / 7)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_hidden_states_and_chunks_give_the_same(chunk_size):
    _, labels, probability, index = tokens()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_()
    results = []
    for logits in (hidden @ weight.T, HiddenLogits(hidden, weight)):
        criterion = ProgressiveSelfKDTokenLoss(4, 5, 2, top_k=3)
        criterion.set_epoch(1)
        criterion(logits, labels, torch.tensor([2, 0]))
        loss = criterion(logits, labels, torch.tensor([2, 0]), chunk_size=chunk_size)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    pure = pskd_token_loss(
        HiddenLogits(hidden, weight), labels, probability, index, 0.5, chunk_size=chunk_size
    )
    torch.testing.assert_close(
        pure, pskd_token_loss(hidden @ weight.T, labels, probability, index, 0.5)
    )


@pytest.mark.parametrize("in_files", [False, True])
def test_token_module_reads_the_epoch_before(tmp_path, in_files):
    logits, labels, *_ = tokens(dtype=torch.float32)
    later, *_ = tokens(seed=5, dtype=torch.float32)
    path = tmp_path if in_files else None
    criterion = ProgressiveSelfKDTokenLoss(9, 6, 2, top_k=3, alpha_T=0.6, path=path)
    index = torch.tensor([8, 1])
    rows = F.pad(labels[:, 1:], (0, 1), value=-100)
    mask = rows != -100
    first = criterion(logits, labels, index)
    torch.testing.assert_close(first, F.cross_entropy(logits[mask], rows[mask]))
    criterion.set_epoch(1)
    ours = criterion(later, labels, index)
    probability, kept = logits.detach().softmax(-1).topk(3)
    expected = pskd_token_loss(later, labels, probability.half(), kept, 0.6)
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours, later)
    (expected_gradient,) = torch.autograd.grad(expected, later)
    torch.testing.assert_close(gradient, expected_gradient)
    # Another sequence was not seen; the length may differ from batch to batch.
    single = criterion.eval()(later[:1, :4], labels[:1, :4], torch.tensor([0]))
    torch.testing.assert_close(single, F.cross_entropy(later[0, :3], labels[0, 1:4]))
    values = reduce_rows(top_k_predictions(3), logits)
    torch.testing.assert_close(values[..., :3], probability)
    torch.testing.assert_close(values[..., 3:].long(), kept)


def test_a_language_model_learns():
    """A bigram model on a noisy cycle: the loss falls, and rests above zero as targets are soft."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(8, (16, 1), generator=generator)
    ids = (start + torch.arange(9)) % 8
    table = torch.zeros(8, 8, requires_grad=True)
    criterion = ProgressiveSelfKDTokenLoss(16, 9, 30, top_k=3)
    optimizer = torch.optim.Adam([table], lr=0.1)
    for epoch in range(30):
        criterion.set_epoch(epoch)
        for index in torch.arange(16).split(8):
            optimizer.zero_grad()
            loss = criterion(table[ids[index]], ids[index], index)
            loss.backward()
            optimizer.step()
    assert (table.argmax(1) == (torch.arange(8) + 1) % 8).all()
    assert F.cross_entropy(table[ids[:, :-1]].flatten(0, 1), ids[:, 1:].flatten()) < 0.3


ONE = (torch.zeros(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("match", "error", "call"),
    [
        ("alpha must be in", ValueError, lambda: pskd_loss(*ONE, torch.ones(2, 3) / 3, 1.5)),
        ("previous must have shape", ValueError, lambda: pskd_loss(*ONE, torch.ones(2, 4), 0.5)),
        ("reduction", ValueError, lambda: pskd_loss(*ONE, ONE[0], 0.5, reduction="max")),
        ("target must hold classes from 0 to 2, got 0 to 3", ValueError,
         lambda: pskd_loss(ONE[0], torch.tensor([0, 3]), ONE[0], 0.5)),
        ("target must hold classes", ValueError,
         lambda: pskd_loss(ONE[0], torch.tensor([-1, 0]), ONE[0], 0.5)),
        ("target must have shape .2,", ValueError,
         lambda: pskd_loss(ONE[0], torch.tensor([0]), ONE[0], 0.5)),
        ("target must be an integer tensor, got torch.float32", TypeError,
         lambda: pskd_loss(ONE[0], torch.zeros(2), ONE[0], 0.5)),
        ("logits must be finite", ValueError,
         lambda: pskd_loss(ONE[0] * float("nan"), ONE[1], ONE[0], 0.5)),
        ("logits must be a floating", TypeError,
         lambda: pskd_loss(ONE[0].long(), ONE[1], ONE[0], 0.5)),
        ("logits must have shape", ValueError,
         lambda: pskd_loss(torch.zeros(3), ONE[1], ONE[0], 0.5)),
        ("epoch must be an integer in .0, 2.", ValueError, lambda: linear_alpha(3, 3)),
        ("alpha_T", ValueError, lambda: linear_alpha(0, 3, 1.1)),
        ("total_epochs", ValueError, lambda: linear_alpha(0, 0)),
        ("alpha_T", ValueError, lambda: ProgressiveSelfKDLoss(2, 3, 4, alpha_T=-0.1)),
        ("num_classes", ValueError, lambda: ProgressiveSelfKDLoss(2, 1, 4)),
        ("epoch", ValueError, lambda: ProgressiveSelfKDLoss(2, 3, 4).set_epoch(4)),
        ("index is needed", ValueError, lambda: ProgressiveSelfKDLoss(2, 3, 4)(*ONE)),
        ("index must hold numbers from 0 to 1", ValueError,
         lambda: ProgressiveSelfKDLoss(2, 3, 4)(*ONE, torch.tensor([0, 2]))),
        ("index must hold numbers", ValueError,
         lambda: ProgressiveSelfKDLoss(2, 3, 4)(*ONE, torch.tensor([-1, 1]))),
        ("index must be an integer", TypeError,
         lambda: ProgressiveSelfKDLoss(2, 3, 4)(*ONE, torch.tensor([0.0, 1.0]))),
        ("index must have shape .2,", ValueError,
         lambda: ProgressiveSelfKDLoss(2, 3, 4)(*ONE, torch.tensor([0]))),
        ("logits must have 4 columns", ValueError,
         lambda: ProgressiveSelfKDLoss(2, 4, 4)(*ONE, torch.tensor([0, 1]))),
        ("index is needed", ValueError, lambda: ProgressiveSelfKDTokenLoss(2, 5, 4)(
            torch.zeros(2, 5, 11), torch.zeros(2, 5, dtype=torch.long))),
        ("max_length=4", ValueError, lambda: ProgressiveSelfKDTokenLoss(2, 4, 4)(
            torch.zeros(2, 5, 11), torch.zeros(2, 5, dtype=torch.long), torch.tensor([0, 1]))),
        ("top_k must be less than the vocabulary of 8", ValueError,
         lambda: ProgressiveSelfKDTokenLoss(2, 5, 4)(
             torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.long), torch.tensor([0, 1]))),
        ("probability and tokens must have shape", ValueError, lambda: pskd_token_loss(
            torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 3),
            torch.zeros(1, 2, 2, dtype=torch.long), 0.5)),
        ("tokens must be in .0, 4.", ValueError, lambda: pskd_token_loss(
            torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 2),
            torch.full((1, 2, 2), 4), 0.5)),
        ("from 1 to 3 tokens", ValueError, lambda: pskd_token_loss(
            torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 4),
            torch.zeros(1, 2, 4, dtype=torch.long), 0.5)),
        ("probability must be finite", ValueError, lambda: pskd_token_loss(
            torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long),
            torch.full((1, 2, 2), float("nan")), torch.zeros(1, 2, 2, dtype=torch.long), 0.5)),
    ],
)  # fmt: skip
def test_bad_input(match, error, call):
    with pytest.raises(error, match=match):
        call()
