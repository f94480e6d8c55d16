"""The wave equation: equal to a plain scheme, physical, differentiable, and strict on input."""

import numpy as np
import pytest
import torch

from sciml.inverse.seismic import AcousticWavePhysics, Survey, make_velocity_maps, ricker

SMALL = Survey.line(32, n_shots=3, dx=20.0, dt=2e-3, nt=300, peak_frequency=10.0)


def openfwi_scheme(velocity, survey, n_absorbing=120):
    """Plain NumPy: second order in time, fourth in space, with a sponge around the model."""
    pad = n_absorbing
    dx, dt = survey.dx, survey.dt
    v = np.pad(velocity.astype(float), pad, mode="edge")
    width = (pad - 1) * dx
    strength = 3 * v.min() * np.log(1e7) / (2 * width)
    depth_in_sponge = np.maximum.outer(
        *(
            np.concatenate([np.arange(pad)[::-1], np.zeros(n), np.arange(pad)])
            for n in velocity.shape
        )
    )
    kappa = strength * (depth_in_sponge * dx / width) ** 2 * dt
    alpha = (v * dt / dx) ** 2
    wavelet = survey.source_wavelet()
    records = np.zeros((survey.n_shots, survey.nt, survey.n_receivers))
    rz, rx = (survey.receiver_cells() + pad).T
    for shot, (sz, sx) in enumerate(survey.source_cells() + pad):
        old, now = np.zeros_like(v), np.zeros_like(v)
        for t in range(survey.nt):
            near = sum(np.roll(now, s, axis) for axis in (0, 1) for s in (-1, 1))
            far = sum(np.roll(now, s, axis) for axis in (0, 1) for s in (-2, 2))
            new = (2 - 5 * alpha - kappa) * now - (1 - kappa) * old
            new += alpha * (4 / 3 * near - far / 12)
            new[sz, sx] += (v[sz, sx] * dt) ** 2 * wavelet[t]
            records[shot, t] = new[rz, rx]
            old, now = now, new
    return records


def record(velocity, survey):
    return AcousticWavePhysics(survey).A(torch.as_tensor(velocity)[None, None])[0].numpy()


@pytest.mark.parametrize("kind", ["flat_vel_a", "curve_fault_b"])
def test_equals_the_openfwi_scheme(kind):
    velocity = make_velocity_maps(kind, 1, random_state=1)[0]
    survey = Survey(source_x=(170.0,), nt=700)
    expected = openfwi_scheme(velocity, survey)
    got = record(velocity, survey)
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.9999
    # One sample early or late would already fail.
    shifted = np.roll(got, 1, axis=1)
    assert np.corrcoef(shifted.ravel(), expected.ravel())[0, 1] < 0.999


def test_batches_equal_single_models():
    velocity = torch.as_tensor(make_velocity_maps("curve_vel_a", 3, shape=(32, 32), random_state=0))
    physics = AcousticWavePhysics(SMALL)
    together = physics.A(velocity[:, None])
    assert together.shape == (3, 3, 300, 32)
    for i in range(3):
        # A few ulps of the largest value: blocks of another size are summed in another order.
        torch.testing.assert_close(
            together[i], physics.A(velocity[i : i + 1, None])[0], rtol=1e-4, atol=1e-4
        )


def test_reciprocity():
    velocity = make_velocity_maps("style_a", 1, shape=(32, 32), random_state=2)[0]
    ends = ((100.0,), (500.0,))
    geometry = {"dx": 20.0, "dt": 2e-3, "nt": 300, "source_depth": 20.0, "receiver_depth": 20.0}
    there = record(velocity, Survey(*ends, peak_frequency=10.0, **geometry))
    back = record(velocity, Survey(*ends[::-1], peak_frequency=10.0, **geometry))
    assert np.abs(there - back).max() < 1e-3 * np.abs(there).max()


def test_direct_wave_arrives_on_time():
    survey = Survey.line(32, n_shots=1, dx=20.0, dt=2e-3, nt=300, peak_frequency=10.0)
    gather = record(np.full((32, 32), 2000.0, np.float32), survey)[0]
    wavelet_peak = len(ricker(10.0, 2e-3)) // 2 * survey.dt
    near, far = (survey.time[np.abs(gather[:, r]).argmax()] for r in (5, 25))
    assert far - near == pytest.approx(20 * 20.0 / 2000.0, abs=0.01)
    assert near == pytest.approx(wavelet_peak + 5 * 20.0 / 2000.0, abs=0.02)


def test_vjp_equals_finite_differences():
    velocity = torch.as_tensor(make_velocity_maps("curve_vel_a", 1, shape=(32, 32), random_state=0))
    velocity = velocity[:, None].double()
    physics = AcousticWavePhysics(SMALL)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(velocity.shape, generator=generator, dtype=torch.float64)
    residual = torch.randn(1, 3, 300, 32, generator=generator, dtype=torch.float64)
    step = 1e-2
    difference = physics.A(velocity + step * direction) - physics.A(velocity - step * direction)
    numeric = (difference * residual).sum() / (2 * step)
    analytic = (physics.A_vjp(velocity, residual) * direction).sum()
    assert analytic.item() == pytest.approx(numeric.item(), rel=1e-4)
    assert not velocity.requires_grad


def test_gradient_of_the_data_term_of_deepinv():
    from deepinv.optim import L2

    velocity = torch.as_tensor(make_velocity_maps("curve_vel_a", 1, shape=(32, 32), random_state=0))
    velocity = velocity[:, None]
    physics = AcousticWavePhysics(SMALL)
    seismic = physics.A(velocity)
    start = torch.full_like(velocity, 2500.0)
    expected = physics.A_vjp(start, physics.A(start) - seismic)
    torch.testing.assert_close(L2().grad(start, seismic, physics), expected)
    # A small step against it lowers the misfit: full-waveform inversion by gradient descent.
    descended = start - 1.0 * expected / expected.abs().max()
    assert L2()(descended, seismic, physics) < L2()(start, seismic, physics)


def test_noise_model_acts_in_forward_only():
    from deepinv.physics import GaussianNoise

    velocity = torch.full((1, 1, 32, 32), 2000.0)
    physics = AcousticWavePhysics(SMALL, noise_model=GaussianNoise(sigma=1.0))
    clean = physics.A(velocity)
    torch.testing.assert_close(physics.A(velocity), clean)
    assert (physics(velocity) - clean).std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("velocity", "error", "message"),
    [
        (torch.full((1, 1, 32, 32), 2.5), ValueError, "m/s.*2.5.*km/s"),
        (torch.full((1, 32, 32), 2500.0), ValueError, r"\(batch, 1, nz, nx\).*\(1, 32, 32\)"),
        (torch.full((1, 1, 32, 32), -2500.0), ValueError, "positive.*-2500"),
        (torch.full((1, 1, 32, 32), float("nan")), ValueError, "velocity .*finite"),
        (torch.full((1, 1, 32, 32), 2500), TypeError, "floating"),
        (torch.full((1, 1, 32, 32), 9000.0), ValueError, "dt = 0.002 s .*9000 m/s"),
        (torch.full((1, 1, 32, 16), 2500.0), ValueError, "source_x .*300.0"),
    ],
)
def test_bad_velocities_are_named(velocity, error, message):
    with pytest.raises(error, match=message):
        AcousticWavePhysics(SMALL).A(velocity)
