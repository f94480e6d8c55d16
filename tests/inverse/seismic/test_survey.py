"""Surveys: geometry on the grid, sampling, and the wavelet of the OpenFWI data."""

import numpy as np
import pytest

from sciml.inverse.seismic import Survey, ricker


def test_default_is_the_openfwi_geometry():
    survey = Survey()
    assert survey.source_cells()[:, 1].tolist() == [0, 17, 34, 52, 69]
    assert survey.receiver_cells()[:, 1].tolist() == list(range(70))
    assert set(survey.source_cells()[:, 0]) == set(survey.receiver_cells()[:, 0]) == {1}
    assert (survey.nt, survey.dt, survey.dx) == (1000, 1e-3, 10.0)


def test_ricker_closed_form_and_zero_mean():
    wavelet = ricker(15.0, 1e-3)
    assert wavelet.shape == (147,)
    assert wavelet.argmax() == 73
    assert wavelet[73] == 1.0
    # The first zeros lie where 2 (pi f t)^2 = 1.
    assert np.interp(1 / (np.sqrt(2) * np.pi * 15), np.arange(-73, 74) * 1e-3, wavelet) == (
        pytest.approx(0, abs=2e-3)
    )
    assert abs(wavelet.sum() * 1e-3) < 1e-6


def test_wavelet_is_padded_or_cut():
    assert Survey(nt=200).source_wavelet()[147:].tolist() == [0.0] * 53
    survey = Survey(nt=3, wavelet=(1.0, 2.0, 3.0, 4.0))
    assert survey.source_wavelet().tolist() == [1.0, 2.0, 3.0]


def test_line_spreads_shots_over_the_model():
    survey = Survey.line(32, n_shots=3, dx=20.0)
    assert survey.source_cells()[:, 1].tolist() == [0, 16, 31]
    assert survey.n_receivers == 32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dt": 0.0}, ValueError, "dt .*0.0"),
        ({"dx": -1.0}, ValueError, "dx .*-1.0"),
        ({"nt": 1.5}, TypeError, "nt .*integer.*1.5"),
        ({"source_x": ()}, ValueError, "source_x .*non-empty"),
        ({"receiver_x": (0.0, np.nan)}, ValueError, "receiver_x .*finite"),
        ({"source_x": (5.0,)}, ValueError, "source_x .*multiples of dx = 10.0"),
        ({"source_depth": 3.0}, ValueError, "source_depth .*grid"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Survey(**arguments)


def test_survey_must_lie_in_the_model():
    with pytest.raises(ValueError, match=r"receiver_x .*\[0, 310.0\] m"):
        Survey(source_x=(0.0,)).check_grid((32, 32))
