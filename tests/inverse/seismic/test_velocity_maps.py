"""Velocity models: in range, reproducible, and of the family they are named after."""

import numpy as np
import pytest

from sciml.inverse.seismic import VELOCITY_KINDS, make_velocity_maps


@pytest.mark.parametrize("kind", VELOCITY_KINDS)
def test_range_shape_and_seed(kind):
    maps = make_velocity_maps(kind, 5, random_state=0)
    assert maps.shape == (5, 70, 70)
    assert maps.dtype == np.float32
    assert maps.min() >= 1500
    assert maps.max() <= 4500
    assert (make_velocity_maps(kind, 5, random_state=0) == maps).all()
    assert (make_velocity_maps(kind, 5, random_state=1) != maps).any()
    # A sample depends on its index alone.
    assert (make_velocity_maps(kind, 2, random_state=0, first_sample=3) == maps[3:]).all()


def test_flat_layers_are_flat_and_a_grows_with_depth():
    easy = make_velocity_maps("flat_vel_a", 50, random_state=0)
    assert (easy == easy[:, :, :1]).all()
    assert (np.diff(easy, axis=1) >= 0).all()
    hard = make_velocity_maps("flat_vel_b", 50, random_state=0)
    assert (np.diff(hard, axis=1) < 0).any()
    layers = [len(np.unique(velocity)) for velocity in easy]
    assert min(layers) >= 2
    assert max(layers) <= 7


def test_curved_interfaces_do_not_cross():
    maps = make_velocity_maps("curve_vel_a", 50, random_state=0)
    assert (np.diff(maps, axis=1) >= 0).all()
    assert (maps != maps[:, :, :1]).any()


def test_faults_break_layers():
    maps = make_velocity_maps("flat_fault_a", 20, random_state=0)
    jumps = (maps[:, :, 1:] != maps[:, :, :-1]).any(axis=(1, 2))
    assert jumps.mean() > 0.9


def test_rough_textures_are_rougher():
    smooth, rough = (make_velocity_maps(f"style_{x}", 10, random_state=0) for x in "ab")
    assert np.abs(np.diff(rough, axis=1)).mean() > 2 * np.abs(np.diff(smooth, axis=1)).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "marmousi"}, "kind .*'flat_vel_a'.*'marmousi'"),
        ({"n_samples": 0}, "n_samples .*0"),
        ({"shape": (4, 70)}, r"shape\[0\] .*4"),
        ({"velocity_range": (3000.0, 2000.0)}, r"velocity_range\[1\] .*2000"),
        ({"random_state": -1}, "random_state .*-1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_velocity_maps(**arguments)
