"""Figures carry metres and seconds."""

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("agg")
import matplotlib.pyplot as plt

from sciml.inverse.seismic import (
    Survey,
    plot_gather,
    plot_velocity,
    plot_velocity_difference,
    seismic_dataset,
)

SURVEY = Survey.line(16, n_shots=2, dx=20.0, nt=50)
VELOCITY = np.linspace(1500, 4500, 256).reshape(1, 16, 16)
SEISMIC = np.random.default_rng(0).standard_normal((1, 2, 50, 16))


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_velocity_axes_are_metres_with_depth_downwards(ax):
    assert plot_velocity(VELOCITY[0], ax, dx=20.0) is ax
    assert ax.images[0].get_extent() == [-10.0, 310.0, 310.0, -10.0]
    assert ax.get_ylabel() == "depth (m)"


def test_data_array_brings_its_coordinates(ax):
    dataset = seismic_dataset(SEISMIC, VELOCITY, SURVEY)
    plot_velocity(dataset["velocity"][0], ax)
    assert ax.images[0].get_extent() == [-10.0, 310.0, 310.0, -10.0]


def test_gather_axes(ax):
    plot_gather(SEISMIC[0, 0], ax, survey=SURVEY, limit=2.0)
    assert ax.images[0].get_extent() == [0.0, 300.0, pytest.approx(0.049), 0.0]
    assert ax.images[0].get_clim() == (-2.0, 2.0)
    plot_gather(seismic_dataset(SEISMIC, VELOCITY, SURVEY)["seismic"][0, 1], ax)
    assert ax.images[1].get_extent() == [0.0, 300.0, pytest.approx(0.049), 0.0]


def test_difference_is_symmetric(ax):
    plot_velocity_difference(VELOCITY[0] + 100, VELOCITY[0], ax)
    assert ax.images[0].get_clim() == pytest.approx((-100.0, 100.0))


def test_bad_input_is_named(ax):
    with pytest.raises(ValueError, match="velocity .*two-dimensional"):
        plot_velocity(VELOCITY, ax)
    with pytest.raises(ValueError, match=r"\(1000, 70\).*\(50, 16\)"):
        plot_gather(SEISMIC[0, 0], ax)
    with pytest.raises(ValueError, match="gather .*finite"):
        plot_gather(SEISMIC[0, 0] * np.nan, ax, survey=SURVEY)
    with pytest.raises(ValueError, match="same shape"):
        plot_velocity_difference(VELOCITY[0], VELOCITY[0, :8], ax)
