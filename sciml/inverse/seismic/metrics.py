"""Errors of velocity models and gathers, in normalised and physical units, and OpenFWI's SSIM.

References
----------
.. [1] Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from
   error visibility to structural similarity", IEEE TIP 2004.
.. [2] C. Deng et al., "OpenFWI", NeurIPS 2022. arXiv:2111.02926
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._check import check_finite, check_interval
from .openfwi import SeismicStatistics, denormalize_velocity

__all__ = ["openfwi_ssim", "seismic_metrics", "velocity_metrics"]


def openfwi_ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity as OpenFWI computes it: the border counts.

    An 11 x 11 Gaussian window of width 1.5 slides over zero-padded maps and the index is
    averaged over the whole map, border included [2]_. Other libraries crop the border and give
    a slightly different number. Constants are those of data with range 1.

    Parameters
    ----------
    prediction, target : Tensor of shape (batch, channels, height, width)
        Maps normalised to [-1, 1]; they are mapped to [0, 1] here.

    Returns
    -------
    Tensor of shape (batch,)
        At most 1, and 1 where both are equal.

    Raises
    ------
    ValueError
        If the shapes differ, are not four-dimensional, or a value is not finite.

    References
    ----------
    .. [1] Z. Wang et al., "Image quality assessment", IEEE TIP 2004.
    .. [2] C. Deng et al., "OpenFWI", NeurIPS 2022. arXiv:2111.02926

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import openfwi_ssim
    >>> x = torch.linspace(-1, 1, 70 * 70).reshape(1, 1, 70, 70)
    >>> bool(torch.isclose(openfwi_ssim(x, x), torch.ones(1)).all())
    True
    """
    _check_pair(prediction, target)
    a, b = prediction / 2 + 0.5, target / 2 + 0.5
    offset = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    line = torch.exp(-(offset**2) / (2 * 1.5**2))
    line = line / line.sum()
    channels = a.shape[1]
    window = torch.outer(line, line).expand(channels, 1, 11, 11)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window, padding=5, groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a = mean(a * a) - mean_a**2
    var_b = mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def velocity_metrics(
    prediction: Tensor, target: Tensor, *, low: float = 1500.0, high: float = 4500.0
) -> dict[str, float]:
    """Mean absolute and root mean square error and SSIM of normalised velocity maps.

    Parameters
    ----------
    prediction, target : Tensor of shape (batch, 1, nz, nx)
        Velocity normalised to [-1, 1].
    low, high : float, default=1500.0, 4500.0
        Velocities in m/s that -1 and 1 stand for.

    Returns
    -------
    dict
        ``mae`` and ``rmse`` (normalised), ``mae_m_s`` and ``rmse_m_s`` (m/s), ``ssim``.

    Raises
    ------
    ValueError
        If the shapes differ or a value is not finite.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import velocity_metrics
    >>> metrics = velocity_metrics(torch.zeros(2, 1, 16, 16), torch.full((2, 1, 16, 16), 0.1))
    >>> round(metrics["mae"], 6), round(metrics["mae_m_s"], 3)
    (0.1, 150.0)
    """
    _check_pair(prediction, target)
    check_interval("high", high, low, closed="neither")
    error = prediction - target
    physical = denormalize_velocity(prediction, low, high) - denormalize_velocity(target, low, high)
    return {
        "mae": float(error.abs().mean()),
        "rmse": float(error.square().mean().sqrt()),
        "mae_m_s": float(physical.abs().mean()),
        "rmse_m_s": float(physical.square().mean().sqrt()),
        "ssim": float(openfwi_ssim(prediction, target).mean()),
    }


def seismic_metrics(
    prediction: Tensor, target: Tensor, statistics: SeismicStatistics
) -> dict[str, float]:
    """Mean absolute, root mean square and relative error and SSIM of standardised recordings.

    Parameters
    ----------
    prediction, target : Tensor of shape (batch, n_shots, nt, n_receivers)
        Recordings standardised with `statistics`.
    statistics : SeismicStatistics
        Mean and standard deviation that 0 and 1 stand for.

    Returns
    -------
    dict
        ``mae`` and ``rmse`` (standardised), ``mae_pressure`` and ``rmse_pressure`` (units of the
        recordings), ``relative`` (root mean square error over that of the recordings), and
        ``ssim``: the published one, whose constants are those of maps in [-1, 1] although
        recordings have a wider range.

    Raises
    ------
    ValueError
        If the shapes differ or a value is not finite.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse.seismic import OPENFWI_STATISTICS, seismic_metrics
    >>> target = torch.randn(2, 5, 100, 70, generator=torch.Generator().manual_seed(0))
    >>> metrics = seismic_metrics(target + 0.1, target, OPENFWI_STATISTICS["flat_vel_a"])
    >>> round(metrics["mae"], 4), round(metrics["mae_pressure"], 4)
    (0.1, 0.148)
    """
    _check_pair(prediction, target)
    check_interval("statistics.std", statistics.std, 0, closed="neither")
    error = prediction - target
    mae, rmse = float(error.abs().mean()), float(error.square().mean().sqrt())
    recorded = target * statistics.std + statistics.mean
    return {
        "mae": mae,
        "rmse": rmse,
        "mae_pressure": statistics.std * mae,
        "rmse_pressure": statistics.std * rmse,
        "relative": statistics.std * rmse / float(recorded.square().mean().sqrt()),
        "ssim": float(openfwi_ssim(prediction, target).mean()),
    }


def _check_pair(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(
            "prediction and target must have the same shape (batch, channels, height, width), "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    check_finite("prediction", prediction)
    check_finite("target", target)
