"""Training: the constraint, the schedule, checkpoints, interruption, NaN, deepinv's Trainer."""

import json
import os
import signal
import subprocess
import sys
import time

import deepinv
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from sciml._checkpoint import save_checkpoint
from sciml.inverse import (
    FullyConnectedLPN,
    LearnedProximalNetwork,
    ProximalMatchingLoss,
    ProximalMatchingSchedule,
    project_after_step,
    train_lpn,
)

SCHEDULE = ProximalMatchingSchedule(2, n_steps=20, n_stages=2, learning_rate=(1e-2, 1e-3))
X = torch.randn(50, 2, generator=torch.Generator().manual_seed(3))


def network(seed=0):
    return FullyConnectedLPN(2, hidden=6, generator=torch.Generator().manual_seed(seed))


def weights(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_constraint_holds_after_every_step_and_at_the_end(monkeypatch):
    seen = []
    original = FullyConnectedLPN.project_

    def project(self):
        original(self)
        seen.append(self.is_convex())
        return self

    monkeypatch.setattr(FullyConnectedLPN, "project_", project)
    net = network()
    seen.clear()
    train_lpn(net, X, schedule=SCHEDULE, batch_size=4, random_state=0)
    assert len(seen) == 1 + 20
    assert all(seen)
    assert net.is_convex()
    assert not net.training


def test_one_step_equals_adam_and_projection_by_hand():
    schedule = ProximalMatchingSchedule.from_stages([(0.7, 1, 0.05)])
    net, twin = network(), network().train()
    drawn = {}

    def sampler(n, generator):
        drawn["x"] = torch.randn(n, 2, generator=generator)
        drawn["state"] = generator.get_state()
        return drawn["x"]

    history = train_lpn(net, sampler, sigma=0.3, schedule=schedule, batch_size=6, random_state=0)
    generator = torch.Generator()
    generator.set_state(drawn["state"])
    noisy = drawn["x"] + 0.3 * torch.randn(6, 2, generator=generator)
    distance = (twin(noisy) - drawn["x"]).square().sum(1)
    loss = (1 - torch.exp(-distance / 0.49)).mean()
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for weight in twin.constrained_weights().values():
            weight.clamp_(min=0)
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert history.loss == [pytest.approx(float(loss.detach()))]


def test_same_seed_same_weights_and_it_learns():
    nets = [network(), network(), network()]
    seeds = (0, 0, 1)
    histories = [
        train_lpn(
            net,
            X,
            sigma=0.5,
            schedule=ProximalMatchingSchedule.from_stages([("l2", 150, 1e-2)]),
            batch_size=32,
            validation=X[:20],
            validation_every=50,
            random_state=seed,
        )
        for net, seed in zip(nets, seeds, strict=True)
    ]
    assert same(weights(nets[0]), weights(nets[1]))
    assert not same(weights(nets[0]), weights(nets[2]))
    assert histories[0].loss == histories[1].loss
    curve = histories[0].validation
    assert [entry["step"] for entry in curve] == [50, 100, 150]
    assert np.mean(histories[0].loss[-20:]) < 0.7 * np.mean(histories[0].loss[:20])
    assert curve[-1]["psnr"] == pytest.approx(-10 * np.log10(curve[-1]["mse"]))
    assert curve[-1]["mse"] < 0.25  # the variance of the noise: it denoises


def test_noise_range(monkeypatch):
    levels = []
    net = network()
    monkeypatch.setattr(
        net, "check_input", lambda x: levels.append(float((x - 5.0).detach().std()))
    )
    train_lpn(
        net,
        lambda n, generator: torch.full((n, 2), 5.0),
        sigma=(0.1, 0.9),
        schedule=SCHEDULE,
        batch_size=500,
        random_state=0,
    )
    assert 0.08 < min(levels) < 0.3
    assert 0.7 < max(levels) < 0.95


@pytest.mark.parametrize("cut", [7, 14])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, cut):
    whole, part, resumed = network(), network(), network(seed=9)
    options = {"schedule": SCHEDULE, "batch_size": 4, "random_state": 0, "validation": X[:5]}
    expected = train_lpn(whole, X, **options, validation_every=4)
    path = tmp_path / "run.safetensors"

    def stopping(n, generator):
        stopping.calls += 1
        if stopping.calls > cut:
            raise KeyboardInterrupt
        return X[torch.randint(len(X), (n,), generator=generator)]

    stopping.calls = 0
    with pytest.raises(KeyboardInterrupt):
        train_lpn(part, stopping, **options, validation_every=4, checkpoint=path)
    options["random_state"] = 123  # the checkpoint's random state counts
    history = train_lpn(resumed, X, **options, validation_every=4, resume_from=path)
    assert same(weights(whole), weights(resumed))
    assert history.loss == expected.loss
    assert history.validation == expected.validation


def test_checkpoint_is_safetensors_with_json_and_optimizer_state(tmp_path):
    path = tmp_path / "sub" / "run.safetensors"
    net = network()
    train_lpn(net, X, schedule=SCHEDULE, batch_size=4, checkpoint=path, random_state=0)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        state = json.loads(file.metadata()["json"])
        assert torch.equal(file.get_tensor("net.lin.1.weight"), net.lin[1].weight)
    assert {
        "generator",
        "optimizer.0.exp_avg",
        "optimizer.0.exp_avg_sq",
        "optimizer.0.step",
    } <= names
    assert len(state["loss"]) == 20
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    train_lpn(network(), X, schedule=SCHEDULE, batch_size=4, checkpoint=path, random_state=0)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        train_lpn(network(1), X, schedule=SCHEDULE, batch_size=4, checkpoint=path)
    assert path.read_bytes() == before


def test_process_killed_while_writing_leaves_a_checkpoint_to_resume_from(tmp_path):
    path = tmp_path / "run.safetensors"
    script = f"""
import torch
from sciml.inverse import FullyConnectedLPN, ProximalMatchingSchedule, train_lpn
net = FullyConnectedLPN(2, hidden=150, generator=torch.Generator().manual_seed(0))
train_lpn(net, torch.ones(50, 2), schedule=ProximalMatchingSchedule(2, n_steps=100_000),
          batch_size=4, checkpoint={str(path)!r}, checkpoint_every=1, random_state=0)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ})
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.exists()
    net = FullyConnectedLPN(2, hidden=150)
    done = []

    def sampler(n, generator):
        done.append(n)
        raise KeyboardInterrupt

    schedule = ProximalMatchingSchedule(2, n_steps=100_000)
    with pytest.raises(KeyboardInterrupt):
        train_lpn(net, sampler, schedule=schedule, resume_from=path)
    with safe_open(path, framework="pt") as file:
        steps = len(json.loads(file.metadata()["json"])["loss"])
        assert steps >= 1
        assert torch.equal(file.get_tensor("net.lin.0.weight"), net.lin[0].weight)
        assert int(file.get_tensor("optimizer.0.step")) == steps


def test_checkpoint_of_other_schedule_network_or_origin(tmp_path):
    path = tmp_path / "run.safetensors"
    train_lpn(network(), X, schedule=SCHEDULE, batch_size=4, checkpoint=path)
    with pytest.raises(ValueError, match="schedule"):
        train_lpn(network(), X, schedule=ProximalMatchingSchedule(2), resume_from=path)
    with pytest.raises(ValueError, match="net must be of the checkpoint's layers"):
        train_lpn(FullyConnectedLPN(2, hidden=7), X, schedule=SCHEDULE, resume_from=path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train_lpn(network(), X, schedule=SCHEDULE, resume_from=tmp_path / "none")
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, {"a": torch.ones(1)}, {"epoch": 3})
    with pytest.raises(ValueError, match="written by train_lpn"):
        train_lpn(network(), X, schedule=SCHEDULE, resume_from=other)


def test_nan_stops_the_run_and_keeps_the_last_good_weights():
    net, twin = network(), network()
    calls = []

    class Poison(torch.autograd.Function):
        """Passes values on, and at the eighth step turns their gradient into NaN."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.nan if len(calls) > 7 else g

    forward = net.forward

    def poisoned(x, sigma=None):
        calls.append(len(x))
        return Poison.apply(forward(x))

    net.forward = poisoned
    with pytest.warns(RuntimeWarning, match="not finite at step 7"):
        history = train_lpn(net, X, schedule=SCHEDULE, batch_size=4, random_state=0)
    assert history.stopped_on_nan
    assert history.n_steps == 7
    # The last weights whose loss and gradient were finite: those before the seventh step.
    train_lpn(
        twin,
        X,
        schedule=ProximalMatchingSchedule.from_stages([("l1", 6, 1e-2)]),
        batch_size=4,
        random_state=0,
    )
    assert same(weights(net), weights(twin))
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_hook_in_a_loop_of_ones_own():
    net = network().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=50.0)
    handle = project_after_step(optimizer, net)
    (-net(X).square().mean()).backward()
    optimizer.step()
    assert net.is_convex()
    handle.remove()
    with torch.no_grad():
        net.lin[1].weight.grad.fill_(1.0)
    optimizer.step()
    assert not net.is_convex()
    with pytest.raises(TypeError, match="project_"):
        project_after_step(optimizer, torch.nn.Linear(1, 1))


def test_deepinvs_trainer_trains_a_network(tmp_path):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(24, 1, 8, 1, generator=generator)
    images = rows.expand(24, 1, 8, 8).contiguous()  # constant along rows: learnable quickly
    net = LearnedProximalNetwork(
        1, 8, width=6, beta=10.0, strong_convexity=0.1, generator=generator
    )
    physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.3))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    project_after_step(optimizer, net)
    loss = ProximalMatchingLoss(gamma=4.0, reduction="none")
    trainer = deepinv.Trainer(
        model=deepinv.models.ArtifactRemoval(net),
        physics=physics,
        optimizer=optimizer,
        train_dataloader=DataLoader(images, batch_size=12),
        eval_dataloader=DataLoader(images, batch_size=12),
        online_measurements=True,
        epochs=25,
        losses=deepinv.loss.SupLoss(metric=loss),
        metrics=deepinv.metric.MSE(),
        device="cpu",
        save_path=str(tmp_path),
        eval_interval=25,
        verbose=False,
        show_progress_bar=False,
    )

    def error():
        noisy = images + 0.3 * torch.randn(images.shape, generator=generator.manual_seed(1))
        with torch.no_grad():
            return float((net.eval()(noisy) - images).square().mean())

    before = error()
    trainer.train()
    assert error() < 0.5 * before
    assert net.is_convex()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sigma": 0.0}, ValueError, "sigma"),
        ({"sigma": (0.5, 0.1)}, ValueError, "sigma"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"images": X.long()}, TypeError, "images.*torch.int64"),
        ({"images": X * torch.nan}, ValueError, "images must be finite"),
        ({"images": X[:0]}, ValueError, "images"),
        ({"images": torch.zeros(4, 3)}, ValueError, r"\(batch, 2\).*\(200, 3\)"),
        ({"validation": X[0]}, ValueError, "validation"),
        ({"validation_every": 0}, ValueError, "validation_every"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every"),
        ({"net": torch.nn.ReLU()}, ValueError, "parameters"),
        ({"net": torch.nn.Linear(2, 2)}, TypeError, "project_"),
    ],
)
def test_bad_arguments(options, error, match):
    arguments = {"net": network(), "images": X, "schedule": SCHEDULE, **options}
    with pytest.raises(error, match=match):
        train_lpn(**arguments)
