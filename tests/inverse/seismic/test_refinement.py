"""Refinement: the misfit falls, velocity improves, the truth is a fixed point."""

import math

import pytest
import torch

from sciml.inverse import LearnedProximalNetwork, ProximalMatchingSchedule, train_lpn
from sciml.inverse.seismic import (
    AcousticWavePhysics,
    Survey,
    make_velocity_maps,
    normalize_velocity,
    refine,
)
from sciml.inverse.seismic.refinement import _low_pass

SURVEY = Survey.line(24, n_shots=3, dx=20.0, dt=2e-3, nt=250, peak_frequency=8.0)


@pytest.fixture(scope="module")
def problem():
    physics = AcousticWavePhysics(SURVEY)
    true = torch.as_tensor(make_velocity_maps("curve_vel_a", 2, shape=(24, 24), random_state=0))
    true = true[:, None]
    smooth = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(true, (3, 3, 3, 3), mode="replicate"), 7, 1
    )
    with torch.no_grad():
        return physics, true, smooth, physics.A(true)


def test_refinement_lowers_misfit_and_error(problem):
    physics, true, start, seismic = problem
    result = refine(start, seismic, physics, 6)
    assert result.misfit.shape == (4, 2)
    assert (result.misfit[-1] < 0.3 * result.misfit[0]).all()
    before, after = ((v - true).abs().mean(dim=(1, 2, 3)) for v in (start, result.velocity))
    assert (after < before).all()
    with torch.no_grad():
        again = (physics.A(result.velocity) - seismic).flatten(1).square().sum(1)
    again /= seismic.flatten(1).square().sum(1)
    torch.testing.assert_close(again, result.misfit[-1], rtol=1e-3, atol=0)


def test_low_pass_keeps_low_and_drops_high_frequencies():
    t = torch.arange(1000, dtype=torch.float64) * 1e-3
    slow, fast = (torch.sin(2 * torch.pi * f * t)[None, None, :, None] for f in (2.0, 40.0))
    kept = _low_pass(slow + fast, 8.0, 1e-3)
    expected = slow * math.exp(-0.5 * (2 / 8) ** 2) + fast * math.exp(-0.5 * (40 / 8) ** 2)
    torch.testing.assert_close(kept, expected)
    assert _low_pass(slow, None, 1e-3) is slow


def test_truth_stays(problem):
    physics, true, _, seismic = problem
    result = refine(true, seismic, physics, 2, cutoffs=[4.0, None])
    assert result.misfit[0].max() < 1e-8
    torch.testing.assert_close(result.velocity, true, rtol=1e-4, atol=0.5)


def test_prior_is_applied(problem):
    physics, _, start, seismic = problem
    calls = []

    def prior(x):
        calls.append(x.abs().max().item())
        return torch.zeros_like(x)

    result = refine(start, seismic, physics, 1, prior=prior, prior_weight=1.0)
    assert len(calls) == 3
    assert max(calls) <= 1.1
    torch.testing.assert_close(result.velocity, torch.full_like(start, 3000.0))


@pytest.mark.slow
def test_learned_proximal_network_as_prior_improves_velocity(problem):
    physics, true, start, seismic = problem
    maps = torch.as_tensor(make_velocity_maps("curve_vel_a", 600, shape=(24, 24), random_state=1))
    prior = LearnedProximalNetwork(
        1,
        image_size=24,
        width=16,
        beta=10.0,
        strong_convexity=0.01,
        generator=torch.Generator().manual_seed(0),
    )
    schedule = ProximalMatchingSchedule(n_features=24 * 24, n_steps=600)
    train_lpn(
        prior,
        normalize_velocity(maps)[:, None],
        sigma=0.1,
        schedule=schedule,
        batch_size=32,
        random_state=0,
    )
    plain = refine(start, seismic, physics, 6)
    learned = refine(start, seismic, physics, 6, prior=prior, prior_weight=0.05)
    before, after, with_prior = (
        float((v - true).abs().mean()) for v in (start, plain.velocity, learned.velocity)
    )
    assert after < before
    assert with_prior < after
    assert (learned.misfit[-1] < 0.3 * learned.misfit[0]).all()


def test_caller_is_left_alone(problem):
    physics, _, start, seismic = problem
    copy = start.clone()
    refine(start, seismic, physics, 1)
    assert torch.equal(start, copy)
    assert not start.requires_grad


def test_bad_input_is_named(problem):
    physics, _, start, seismic = problem
    with pytest.raises(ValueError, match=r"seismic must have shape \(2, 3, 250, 24\)"):
        refine(start, seismic[:1], physics)
    with pytest.raises(ValueError, match="seismic must not be zero"):
        refine(start, seismic * 0, physics)
    with pytest.raises(ValueError, match="n_iter .*0"):
        refine(start, seismic, physics, 0)
    with pytest.raises(ValueError, match="prior_weight .*2"):
        refine(start, seismic, physics, 1, prior_weight=2.0)
    with pytest.raises(ValueError, match="cutoffs .*-1"):
        refine(start, seismic, physics, 1, cutoffs=[-1.0])
    with pytest.raises(ValueError, match="cutoffs must name at least one"):
        refine(start, seismic, physics, 1, cutoffs=[])
