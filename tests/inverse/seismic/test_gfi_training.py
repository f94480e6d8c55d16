"""Training of GFI models: the loss's closed forms, exact resume, and the estimator's surface."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.utils.data import TensorDataset

from sciml.inverse.seismic import (
    AcousticWavePhysics,
    GFILoss,
    GFIModel,
    GFIRegressor,
    Survey,
    VelocityCritic,
    critic_loss,
    cycle_warmup_factor,
    inversion_net,
    invertible_xnet,
    latent_unet,
    make_openfwi_like,
    masked_error,
    refine,
    train_gfi,
    waveform_net,
)

SHAPES = {"seismic_shape": (2, 100, 16), "velocity_shape": (16, 16)}
SURVEY = Survey.line(16, n_shots=2, dx=20.0, dt=2e-3, nt=100, peak_frequency=10.0)


def pairs(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    velocity = torch.rand(n, 1, 16, 16, generator=generator) * 2 - 1
    return TensorDataset(torch.randn(n, 2, 100, 16, generator=generator), velocity)


def small_net(seed=0):
    torch.manual_seed(seed)
    return inversion_net(width=2, **SHAPES)


def small_xnet(seed=0):
    torch.manual_seed(seed)
    return invertible_xnet(latent_size=16, width=4, architecture=(1, 1), **SHAPES)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_masked_error_closed_forms():
    a, b = (torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    plain = (a - b).abs().mean() + (a - b).square().mean()
    torch.testing.assert_close(masked_error(a, b), 5 / 6 * plain)
    assert masked_error(a, b, torch.zeros(5)) == 0
    kept = torch.tensor([1.0, 0, 0, 1, 0])
    torch.testing.assert_close(masked_error(a, b, kept), masked_error(a[[0, 3]], b[[0, 3]]))


def test_warmup():
    assert [cycle_warmup_factor(e, 4) for e in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert cycle_warmup_factor(0, -1) == 1


def test_loss_terms_and_weights():
    model = small_xnet().eval()
    p, v = pairs().tensors
    loss = GFILoss(
        velocity_weight=2,
        seismic_weight=10,
        cycle_velocity_weight=3,
        cycle_seismic_weight=5,
        cycle_warmup=10,
        reconstruction_weight=7,
        perceptual=lambda x: 2 * x,
    )
    mask = torch.tensor([1.0] * 4 + [0.0] * 4)
    total, terms = loss(model, p, v, mask, epoch=5)
    with torch.no_grad():
        v_hat, p_hat = model.predict_velocity(p), model.predict_seismic(v)
        expected = {
            "velocity": 2 * masked_error(v_hat, v, mask),
            "seismic": 10 * masked_error(p_hat, p, mask),
            "perceptual_velocity": 0.1 * masked_error(2 * v_hat, 2 * v, mask),
            "perceptual_seismic": 0.1 * masked_error(2 * p_hat, 2 * p, mask),
            "cycle_velocity": 1.5 * masked_error(model.predict_velocity(p_hat), v),
            "cycle_seismic": 2.5 * masked_error(model.predict_seismic(v_hat), p),
            "reconstruction": 7
            * (
                (model.reconstruct_velocity(v) - v).square().mean()
                + (model.reconstruct_seismic(p) - p).square().mean()
            ),
        }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(total.detach(), sum(expected.values()))


def test_masked_labels_do_not_matter():
    p, v = pairs().tensors
    mask = torch.tensor([1.0] * 4 + [0.0] * 4)
    other = v.clone()
    other[4:] = 0
    model = small_net().eval()
    torch.testing.assert_close(GFILoss()(model, p, v, mask)[0], GFILoss()(model, p, other, mask)[0])


def test_training_fits_and_is_reproducible():
    histories = []
    nets = []
    for _ in range(2):
        net = small_net()
        histories.append(train_gfi(net, pairs(), pairs(4, 1), epochs=3, batch_size=4))
        nets.append(net)
    assert histories[0] == histories[1]
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert histories[0][-1]["loss"] < histories[0][0]["loss"]


@pytest.mark.parametrize("make", [small_net, small_xnet])
def test_resume_is_bit_identical(tmp_path, make):
    arguments = {"batch_size": 4, "halve_every": 2, "optimizer": torch.optim.Adamax}
    whole = make()
    history = train_gfi(whole, pairs(), pairs(4, 1), epochs=4, **arguments)
    part = make()
    train_gfi(part, pairs(), pairs(4, 1), epochs=2, checkpoint_dir=tmp_path, **arguments)
    again = make(seed=5)
    resumed = train_gfi(
        again,
        pairs(),
        pairs(4, 1),
        epochs=4,
        resume_from=tmp_path / "last.safetensors",
        **arguments,
    )
    assert resumed == history
    assert torch.equal(weights(again), weights(whole))


def test_killed_training_resumes(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_gfi_training as t
t.train_gfi(t.small_net(), t.pairs(), epochs=100000, batch_size=4, checkpoint_dir={str(tmp_path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    last = tmp_path / "last.safetensors"
    deadline = time.monotonic() + 300
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    from sciml._checkpoint import load_checkpoint

    done = len(load_checkpoint(last)[1]["history"])
    resumed, whole = small_net(seed=3), small_net()
    train_gfi(resumed, pairs(), epochs=done + 2, batch_size=4, resume_from=last)
    train_gfi(whole, pairs(), epochs=done + 2, batch_size=4)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


class Zero(torch.nn.Module):
    def forward(self, x):
        return 0 * x


def linear_model():
    """Flattened recordings to a map, with no batch normalisation."""

    class ToMap(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2 * 100 * 16, 256)

        def forward(self, x):
            return self.linear(x.flatten(1)).reshape(-1, 1, 16, 16)

    torch.manual_seed(0)
    identity = torch.nn.Identity()
    return GFIModel(None, identity, identity, ToMap(), None)


def test_gradients_accumulate_as_by_hand():
    from accelerate import Accelerator

    trained, by_hand = linear_model(), linear_model()
    data = pairs(8)
    train_gfi(
        trained,
        data,
        epochs=1,
        batch_size=2,
        learning_rate=0.1,
        optimizer=torch.optim.SGD,
        accelerator=Accelerator(gradient_accumulation_steps=2, cpu=True),
    )
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    p, v = (tensor[order] for tensor in data.tensors)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for half in (slice(0, 4), slice(4, 8)):
        optimizer.zero_grad()
        for a, b in zip(p[half].split(2), v[half].split(2), strict=True):
            (masked_error(by_hand(a), b) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(weights(trained), weights(by_hand))


def test_mixed_precision_keeps_float32_weights():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    exact, mixed = small_net(), small_net()
    train_gfi(exact, pairs(), epochs=2, batch_size=4)
    AcceleratorState._reset_state()
    train_gfi(
        mixed,
        pairs(),
        epochs=2,
        batch_size=4,
        accelerator=Accelerator(mixed_precision="bf16", cpu=True),
    )
    AcceleratorState._reset_state()
    assert weights(mixed).dtype == torch.float32
    assert not torch.equal(weights(mixed), weights(exact))
    torch.testing.assert_close(weights(mixed), weights(exact), atol=0.02, rtol=0.1)


def _train_in_two_processes(folder):
    net = linear_model()
    train_gfi(
        net,
        pairs(8),
        epochs=2,
        batch_size=2,
        optimizer=torch.optim.SGD,
        checkpoint_dir=folder,
    )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    from accelerate import debug_launcher

    from sciml._checkpoint import load_checkpoint

    debug_launcher(_train_in_two_processes, (str(tmp_path),), num_processes=2)
    tensors, _ = load_checkpoint(tmp_path / "last.safetensors")
    # Two processes with batches of 2 average their gradients: one process that accumulates two.
    from accelerate import Accelerator

    alone = linear_model()
    train_gfi(
        alone,
        pairs(8),
        epochs=2,
        batch_size=2,
        optimizer=torch.optim.SGD,
        accelerator=Accelerator(gradient_accumulation_steps=2, cpu=True),
    )
    together = torch.cat(
        [tensors[f"step.model.{name}"].flatten() for name, _ in alone.named_parameters()]
    )
    torch.testing.assert_close(together, weights(alone), atol=1e-6, rtol=1e-5)


def test_best_weights_are_restored(tmp_path):
    net = small_net()
    history = train_gfi(
        net,
        pairs(),
        pairs(4, 1),
        epochs=6,
        batch_size=4,
        learning_rate=0.1,
        checkpoint_dir=tmp_path,
    )
    best = min(entry["validation"] for entry in history)
    p, v = pairs(4, 1).tensors
    with torch.no_grad():
        error = net.eval()(p) - v
    assert float(error.abs().mean() + error.square().mean()) == pytest.approx(best, rel=1e-5)
    assert (tmp_path / "best.safetensors").exists()


def test_critic_loss_of_a_linear_critic():
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 1, bias=False)).double()
    real, fake = (
        torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
        for s in (0, 1)
    )
    weight = critic[1].weight
    expected = (fake - real).flatten(1).mean(0) @ weight[0] + 10 * (weight.norm() - 1) ** 2
    got = critic_loss(critic, real, fake, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, expected)


def test_adversarial_training_updates_both():
    net, critic = small_net(), VelocityCritic(2, (16, 16))
    before = weights(net), weights(critic)
    history = train_gfi(
        net, pairs(), epochs=2, batch_size=2, critic=critic, critic_steps=2, random_state=1
    )
    assert {"loss", "critic", "adversarial", "velocity"} <= set(history[0])
    assert (weights(net) != before[0]).any()
    assert (weights(critic) != before[1]).any()


def test_training_bad_input_is_named():
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 0"):
        train_gfi(
            small_net(),
            TensorDataset(torch.full((4, 2, 100, 16), math.nan), torch.zeros(4, 1, 16, 16)),
        )
    with pytest.raises(ValueError, match="epochs .*0"):
        train_gfi(small_net(), pairs(), epochs=0)
    with pytest.raises(ValueError, match="labelled_fraction .*2"):
        train_gfi(small_net(), pairs(), labelled_fraction=2.0)
    with pytest.raises(ValueError, match="critic needs .*'forward'"):
        train_gfi(
            waveform_net(width=2, seismic_shape=(2, 100, 16)), pairs(), critic=VelocityCritic(2)
        )
    with pytest.raises(ValueError, match="cycle weights .*'inverse'"):
        train_gfi(small_net(), pairs(), loss=GFILoss(cycle_seismic_weight=1.0))
    with pytest.raises(ValueError, match="velocity_weight .*-1"):
        GFILoss(velocity_weight=-1.0)


def test_another_run_is_refused(tmp_path):
    train_gfi(small_net(), pairs(), epochs=1, batch_size=4, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another run: its batch_size is 4, not 2"):
        train_gfi(
            small_net(), pairs(), epochs=2, batch_size=2, resume_from=tmp_path / "last.safetensors"
        )


@pytest.fixture(scope="module")
def data():
    return make_openfwi_like("flat_vel_a", 12, survey=SURVEY, shape=(16, 16), random_state=0)


def test_regressor_on_data_arrays(data):
    regressor = GFIRegressor(partial(inversion_net, width=2), epochs=2, batch_size=4)
    fitted = clone(regressor).fit(data["seismic"], data["velocity"])
    shuffled = data["seismic"].transpose("receiver", "sample", "time", "shot")
    predicted = fitted.predict(shuffled.isel(sample=slice(3, 5)))
    assert predicted.dims == ("sample", "depth", "x")
    assert predicted["sample"].values.tolist() == [3, 4]
    np.testing.assert_array_equal(predicted["depth"], data["depth"])
    assert predicted["depth"].attrs["units"] == "m"
    arrays = fitted.predict(data["seismic"].values[3:5])
    np.testing.assert_allclose(predicted, arrays, rtol=1e-5)
    assert 1000 < arrays.mean() < 5000
    metrics = fitted.metrics(data["seismic"], data["velocity"])
    assert fitted.score(data["seismic"], data["velocity"]) == pytest.approx(-metrics["mae_m_s"])


def test_regressor_refuses_another_geometry(data):
    fitted = GFIRegressor(partial(inversion_net, width=2), epochs=1, batch_size=4)
    fitted.fit(data["seismic"], data["velocity"])
    with pytest.raises(ValueError, match=r"seismic must have the shape of fit, .*2, 100, 16\)"):
        fitted.predict(data["seismic"][:, :1])
    finer = data["seismic"].assign_coords(time=data["time"] / 2)
    with pytest.raises(ValueError, match=r"time of seismic must be that of fit, .* 0.198, got .*"):
        fitted.predict(finer)
    kilometres = data["seismic"].assign_coords(receiver_x=data["receiver_x"] / 1000)
    with pytest.raises(ValueError, match="receiver_x of seismic must be that of fit"):
        fitted.predict(kilometres)


@pytest.mark.parametrize("center", ["gather", "mean"])
@pytest.mark.parametrize("transform", ["standardize", "signed_log"])
def test_regressor_forward(data, transform, center):
    regressor = GFIRegressor(
        lambda seismic_shape, velocity_shape: waveform_net(width=2, seismic_shape=seismic_shape),
        epochs=1,
        batch_size=4,
        seismic_transform=transform,
        seismic_center=center,
    ).fit(data["seismic"], data["velocity"])
    predicted = regressor.predict(data["velocity"])
    assert predicted.dims == data["seismic"].dims
    np.testing.assert_array_equal(predicted["time"], data["time"])
    # A network that answers 0 gives what was subtracted.
    regressor.model_.decoder_p = torch.nn.Sequential(regressor.model_.decoder_p, Zero())
    zero = regressor.predict(data["velocity"]).values
    p = data["seismic"].values
    logged = np.sign(p) * np.log1p(np.abs(p)) if transform == "signed_log" else p
    mean = logged.mean(axis=0 if center == "gather" else None)
    if transform == "signed_log":
        mean = np.sign(mean) * np.expm1(np.abs(mean))
    np.testing.assert_allclose(zero, np.broadcast_to(mean, p.shape), atol=1e-4)
    with pytest.raises(ValueError, match="'forward' cannot predict velocity"):
        regressor.model_.predict_velocity(torch.zeros(1, 2, 100, 16))


def test_regressor_copies_a_model(data):
    model = small_net()
    before = weights(model)
    fitted = GFIRegressor(model, epochs=1).fit(data["seismic"].values, data["velocity"].values)
    assert torch.equal(weights(model), before)
    assert not torch.equal(weights(fitted.model_), before)


def test_regressor_bad_input_is_named(data):
    regressor = GFIRegressor(partial(inversion_net, width=2), epochs=1)
    p, v = data["seismic"], data["velocity"]
    cases = [
        ((p, v / 1000), "m/s.*km/s"),
        ((p.rename(shot="source"), v), r"seismic must have the dims .*'source'"),
        ((p, v.assign_attrs(units="km/s")), "units 'm s-1', got 'km/s'"),
        ((p.values[:5], v), "seismic has 5, velocity has 12"),
        ((p.values[:, 0], v), r"seismic must have shape \(sample, shot, time, receiver\)"),
        ((p * np.nan, v), "seismic .*finite"),
        ((p * 0, v), "standard deviation of seismic"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            regressor.fit(*arguments)
    with pytest.warns(UserWarning, match="far outside velocity_range"):
        regressor.fit(p, v * 3)
    with pytest.raises(ValueError, match="seismic_center .*'median'"):
        GFIRegressor(seismic_center="median").fit(p, v)
    with pytest.raises(ValueError, match="seismic_transform .*'log'"):
        GFIRegressor(seismic_transform="log").fit(p, v)


def test_default_model_is_the_latent_unet():
    net = GFIRegressor()._build((5, 1000, 70), (70, 70))
    assert sum(p.numel() for p in net.parameters()) == sum(
        p.numel() for p in latent_unet().parameters()
    )


@pytest.mark.slow
def test_latent_unet_inverts_and_waveform_inversion_improves_on_it():
    """The small experiment: under 0.6 of the mean map's error, less after the wave equation."""
    survey = Survey(
        source_x=(0.0, 320.0, 620.0),
        receiver_x=range(20, 640, 40),
        source_depth=20.0,
        receiver_depth=20.0,
        dx=20.0,
        dt=2.4e-3,
        nt=256,
        peak_frequency=8.0,
    )
    data = make_openfwi_like("curve_vel_a", 700, survey=survey, shape=(32, 32), random_state=0)
    train, test = data.isel(sample=slice(0, 640)), data.isel(sample=slice(640, None))
    regressor = GFIRegressor(
        partial(latent_unet, latent_size=16, layout=32, width=12, repeats=1),
        epochs=16,
        batch_size=20,
        learning_rate=5e-3,
        halve_every=4,
        seismic_transform="signed_log",
    ).fit(train["seismic"], train["velocity"])
    predicted = regressor.predict(test["seismic"])
    error = float(abs(predicted - test["velocity"]).mean())
    constant = float(abs(train["velocity"].mean("sample") - test["velocity"]).mean())
    assert error < 0.6 * constant
    few = slice(0, 4)
    true = torch.from_numpy(test["velocity"].values[few])[:, None]
    start = torch.from_numpy(predicted.values[few])[:, None]
    recorded = torch.from_numpy(test["seismic"].values[few])
    refined = refine(start, recorded, AcousticWavePhysics(survey), 8).velocity
    assert (refined - true).abs().mean() < 0.95 * (start - true).abs().mean()
