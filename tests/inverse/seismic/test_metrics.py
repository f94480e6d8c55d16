"""Metrics: OpenFWI's SSIM against a direct sum and a library that crops the border."""

import numpy as np
import pytest
import torch

from sciml.inverse.seismic import (
    SeismicStatistics,
    openfwi_ssim,
    seismic_metrics,
    velocity_metrics,
)


def noisy_pair(size=24):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 1, size, size, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return (target + 0.3 * noise).clamp(-1, 1), target


def direct_ssim_map(a, b):
    """Loop over pixels of one zero-padded map with values in [0, 1]."""
    offset = np.arange(11) - 5
    line = np.exp(-(offset**2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    a, b = np.pad(a, 5), np.pad(b, 5)
    out = np.empty((a.shape[0] - 10, a.shape[1] - 10))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * p**2).sum() - mp**2, (window * q**2).sum() - mq**2
            c = (window * p * q).sum() - mp * mq
            out[i, j] = ((2 * mp * mq + 1e-4) * (2 * c + 9e-4)) / (
                (mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)
            )
    return out


def test_ssim_equals_a_direct_sum():
    a, b = noisy_pair()
    for i in range(2):
        expected = direct_ssim_map(a[i, 0].numpy() / 2 + 0.5, b[i, 0].numpy() / 2 + 0.5).mean()
        assert openfwi_ssim(a, b)[i].item() == pytest.approx(expected, abs=1e-12)


def test_ssim_differs_from_scikit_image_by_the_border_only():
    from skimage.metrics import structural_similarity

    a, b = noisy_pair(64)
    ours = direct_ssim_map(a[0, 0].numpy() / 2 + 0.5, b[0, 0].numpy() / 2 + 0.5)
    theirs = structural_similarity(
        a[0, 0].numpy() / 2 + 0.5,
        b[0, 0].numpy() / 2 + 0.5,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ours[5:-5, 5:-5].mean() == pytest.approx(theirs, abs=1e-10)
    assert ours.mean() != pytest.approx(theirs, abs=1e-4)


def test_ssim_of_equal_maps_is_one():
    _, target = noisy_pair()
    torch.testing.assert_close(openfwi_ssim(target, target), torch.ones(2, dtype=torch.float64))


def test_errors_in_both_units():
    a, b = noisy_pair()
    metrics = velocity_metrics(a, b)
    assert metrics["mae"] == pytest.approx((a - b).abs().mean().item())
    assert metrics["mae_m_s"] == pytest.approx(1500 * metrics["mae"])
    assert metrics["rmse_m_s"] == pytest.approx(1500 * metrics["rmse"])


def test_seismic_metrics_in_both_units():
    a, b = noisy_pair()
    statistics = SeismicStatistics(0.25, 1.5)
    metrics = seismic_metrics(a, b, statistics)
    raw_a, raw_b = (statistics.std * x + statistics.mean for x in (a, b))
    assert metrics["mae"] == pytest.approx((a - b).abs().mean().item())
    assert metrics["mae_pressure"] == pytest.approx((raw_a - raw_b).abs().mean().item())
    assert metrics["rmse_pressure"] == pytest.approx(1.5 * metrics["rmse"])
    assert metrics["relative"] == pytest.approx(((raw_a - raw_b).norm() / raw_b.norm()).item())
    assert metrics["ssim"] == pytest.approx(openfwi_ssim(a, b).mean().item())
    assert seismic_metrics(b, b, statistics)["mae"] == 0


def test_ssim_differs_from_torchmetrics_and_by_the_border_only():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = noisy_pair(64)
    theirs = structural_similarity_index_measure(
        a / 2 + 0.5, b / 2 + 0.5, kernel_size=11, sigma=1.5, data_range=1.0
    ).item()
    ours = openfwi_ssim(a, b).mean().item()
    assert ours != pytest.approx(theirs, abs=1e-4)
    assert ours == pytest.approx(theirs, abs=0.02)


def test_bad_input_is_named():
    a, b = noisy_pair()
    with pytest.raises(ValueError, match="same shape"):
        openfwi_ssim(a, b[:1])
    with pytest.raises(ValueError, match="prediction .*finite"):
        openfwi_ssim(a * np.nan, b)
    with pytest.raises(ValueError, match="high .*1000"):
        velocity_metrics(a, b, high=1000.0)
    with pytest.raises(ValueError, match=r"statistics.std .*0"):
        seismic_metrics(a, b, SeismicStatistics(0.0, 0.0))
