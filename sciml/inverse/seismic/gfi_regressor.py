"""scikit-learn style estimator around the GFI framework, with arrays or DataArrays at the surface.

References
----------
.. [1] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.utils.data import TensorDataset

from ..._check import check_choice, check_finite, check_interval, check_same_length
from .gfi_loss import GFILoss
from .gfi_model import GFIModel, latent_unet
from .gfi_training import train_gfi
from .metrics import velocity_metrics
from .openfwi import denormalize_velocity, normalize_velocity

__all__ = ["GFIRegressor"]

_DIMS = {
    "seismic": ("sample", "shot", "time", "receiver"),
    "velocity": ("sample", "depth", "x"),
}
_UNITS = {"velocity": ("m s-1", "m/s", "m s^-1")}


class GFIRegressor(RegressorMixin, BaseEstimator):
    """Learn seismic data to velocity, or back, and predict in physical units.

    The estimator scales both sides, builds the model for their shapes, trains it with
    `train_gfi` on all samples but a validation share, and undoes the scaling in `predict`.

    Parameters
    ----------
    model : callable or GFIModel, optional
        Called as ``model(seismic_shape=..., velocity_shape=...)`` and returns a `GFIModel`,
        such as ``functools.partial(latent_unet, width=16, latent_size=32)``; or a model, which
        is copied. By default `latent_unet`, at its published size.
    loss : GFILoss, optional
        By default ``GFILoss()``.
    epochs, batch_size, learning_rate, halve_every
        As in `train_gfi`.
    seismic_transform : {"standardize", "signed_log"}, default="standardize"
        Scaling of the recordings. "signed_log" applies ``sign(p) log(1 + |p|)`` first, which
        makes late, weak arrivals count.
    seismic_center : {"gather", "mean"}, default="gather"
        What is subtracted from the recordings: the mean gather of the training samples, or, as
        published, their overall mean. Convolutions do not know where they are, so a forward
        network must first learn the mean gather from the borders of its images; subtracting it
        spares that.
    velocity_range : (float, float), default=(1500.0, 4500.0)
        Velocities in m/s that are mapped to -1 and 1.
    validation_fraction : float, default=0.1
        Share of the samples that chooses the best epoch; 0 for none.
    checkpoint_dir, resume_from : path, optional
        As in `train_gfi`.
    random_state : int, default=0
        Seeds the initial weights, the validation share and the training.
    verbose : int, default=0
        With 1, show a progress bar.

    Attributes
    ----------
    model_ : GFIModel
        The trained model, in evaluation mode.
    history_ : list of dict
        As `train_gfi` returns.
    seismic_mean_ : float or ndarray of shape (n_shots, nt, n_receivers)
        What is subtracted from the (transformed) recordings, see `seismic_center`.
    seismic_std_ : float
        Standard deviation of the training recordings after that.

    Notes
    -----
    Samples are images, so scikit-learn's ``check_estimator``, which feeds tables, does not
    apply; `clone`, `get_params` and cross-validation over samples do.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> from functools import partial
    >>> from sciml.inverse.seismic import (GFIRegressor, Survey, inversion_net,
    ...                                    make_openfwi_like)
    >>> survey = Survey.line(16, n_shots=2, dx=20.0, dt=2e-3, nt=100, peak_frequency=10.0)
    >>> data = make_openfwi_like(n_samples=8, survey=survey, shape=(16, 16), random_state=0)
    >>> regressor = GFIRegressor(partial(inversion_net, width=2), epochs=1, batch_size=4)
    >>> predicted = regressor.fit(data["seismic"], data["velocity"]).predict(data["seismic"])
    >>> predicted.dims, predicted.attrs["units"]
    (('sample', 'depth', 'x'), 'm s-1')
    """

    def __init__(
        self,
        model: Callable[..., GFIModel] | GFIModel | None = None,
        *,
        loss: GFILoss | None = None,
        epochs: int = 100,
        batch_size: int = 50,
        learning_rate: float = 1e-3,
        halve_every: int | None = None,
        seismic_transform: str = "standardize",
        seismic_center: str = "gather",
        velocity_range: tuple[float, float] = (1500.0, 4500.0),
        validation_fraction: float = 0.1,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.loss = loss
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.halve_every = halve_every
        self.seismic_transform = seismic_transform
        self.seismic_center = seismic_center
        self.velocity_range = velocity_range
        self.validation_fraction = validation_fraction
        self.checkpoint_dir = checkpoint_dir
        self.resume_from = resume_from
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, seismic: Any, velocity: Any) -> GFIRegressor:
        """Train a new model.

        Parameters
        ----------
        seismic : array or DataArray of shape (n_samples, n_shots, nt, n_receivers)
            Recordings. The dims of a DataArray are matched by name.
        velocity : array or DataArray of shape (n_samples, nz, nx)
            Velocity in m/s; (n_samples, 1, nz, nx) is accepted too.

        Returns
        -------
        GFIRegressor
            Itself.

        Raises
        ------
        ValueError
            If shapes, dims, units or values are not as expected.
        """
        check_choice("seismic_transform", self.seismic_transform, ("standardize", "signed_log"))
        check_choice("seismic_center", self.seismic_center, ("gather", "mean"))
        check_interval("validation_fraction", self.validation_fraction, 0, 0.9)
        recorded = self._transform(_plain("seismic", seismic))
        true = _plain("velocity", velocity)
        check_same_length(seismic=recorded, velocity=true)
        _warn_outside(true, *self.velocity_range)
        gather = self.seismic_center == "gather"
        self.seismic_mean_ = recorded.mean(axis=0) if gather else float(recorded.mean())
        centred = recorded - self.seismic_mean_
        self.seismic_std_ = float(centred.std())
        check_interval("standard deviation of seismic", self.seismic_std_, 0, closed="neither")
        p = torch.from_numpy(centred / self.seismic_std_)
        v = torch.from_numpy(normalize_velocity(true, *self.velocity_range))[:, None]

        with torch.random.fork_rng():
            torch.manual_seed(self.random_state)
            model = self._build(tuple(p.shape[1:]), tuple(v.shape[2:]))
        order = np.random.default_rng(self.random_state).permutation(len(p))
        self._shapes = {"seismic": recorded.shape[1:], "velocity": true.shape[1:]}
        held_out = round(self.validation_fraction * len(p))
        # TensorDataset is typed for any number of tensors.
        pairs: list[Any] = [TensorDataset(p[i], v[i]) for i in (order[held_out:], order[:held_out])]
        self.history_ = train_gfi(
            model,
            pairs[0],
            pairs[1] if held_out else None,
            loss=self.loss,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            halve_every=self.halve_every,
            checkpoint_dir=self.checkpoint_dir,
            resume_from=self.resume_from,
            random_state=self.random_state,
            verbose=self.verbose,
        )
        self.model_ = model.cpu().eval()
        self._coordinates = {
            "velocity": _coordinates(velocity, ("depth", "x")),
            "seismic": _coordinates(seismic, ("shot", "time", "receiver")),
        }
        return self

    def predict(self, X: Any) -> Any:
        """Velocity in m/s from recordings; for a forward model, recordings from velocity.

        Parameters
        ----------
        X : array or DataArray
            Recordings of shape (n_samples, n_shots, nt, n_receivers), or for a model with
            ``direction="forward"`` velocity of shape (n_samples, nz, nx).

        Returns
        -------
        ndarray or DataArray
            A DataArray if `X` is one, with the samples of `X` and the coordinates of `fit`.
        """
        check_is_fitted(self, "model_")
        forward = self.model_.direction == "forward"
        return self._predict(X, "velocity" if forward else "seismic")

    def predict_seismic(self, velocity: Any) -> Any:
        """Recordings from velocity, for a model with ``direction="both"`` or "forward".

        Parameters
        ----------
        velocity : array or DataArray of shape (n_samples, nz, nx)
            Velocity in m/s.

        Returns
        -------
        ndarray or DataArray of shape (n_samples, n_shots, nt, n_receivers)
        """
        check_is_fitted(self, "model_")
        return self._predict(velocity, "velocity")

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Negative mean absolute error in physical units: larger is better.

        Parameters
        ----------
        X, y : array or DataArray
            Input of `predict` and what it should be.
        sample_weight : array of shape (n_samples,), optional
            Weights of the samples.

        Returns
        -------
        float
        """
        output = "seismic" if self.model_.direction == "forward" else "velocity"
        error = np.abs(np.asarray(self.predict(X)) - _plain(output, y))
        per_sample = error.reshape(len(error), -1).mean(axis=1)
        return -float(np.average(per_sample, weights=sample_weight))

    def metrics(self, seismic: Any, velocity: Any) -> dict[str, float]:
        """Errors of predicted velocity, as `velocity_metrics` names them.

        Parameters
        ----------
        seismic, velocity : array or DataArray
            As in `fit`.

        Returns
        -------
        dict
        """
        predicted = torch.from_numpy(np.asarray(self.predict(seismic), dtype=np.float32))
        target = torch.from_numpy(_plain("velocity", velocity))
        low, high = self.velocity_range
        normalized = [normalize_velocity(v, low, high)[:, None] for v in (predicted, target)]
        return velocity_metrics(*normalized, low=low, high=high)

    def _predict(self, X: Any, source: str) -> Any:
        values = _plain(source, X)
        if values.shape[1:] != self._shapes[source]:
            raise ValueError(
                f"{source} must have the shape of fit, (n_samples, "
                f"{', '.join(map(str, self._shapes[source]))}), got {values.shape}"
            )
        self._check_coordinates(source, X)
        if source == "seismic":
            values = (self._transform(values) - self.seismic_mean_) / self.seismic_std_
            call = self.model_.predict_velocity
        else:
            values = normalize_velocity(values, *self.velocity_range)[:, None]
            call = self.model_.predict_seismic
        inputs = torch.from_numpy(values.astype(np.float32))
        with torch.no_grad():
            parts: list[Tensor] = [call(batch) for batch in inputs.split(self.batch_size)]
        out = torch.cat(parts).numpy()
        if source == "seismic":
            out = denormalize_velocity(out[:, 0], *self.velocity_range)
        else:
            out = self._untransform(out * self.seismic_std_ + self.seismic_mean_)
        return self._wrap(out, X, "velocity" if source == "seismic" else "seismic")

    def _wrap(self, values: NDArray[Any], X: Any, kind: str) -> Any:
        if not hasattr(X, "dims"):
            return values
        import xarray as xr

        coords = dict(self._coordinates[kind])
        coords |= {n: c for n, c in X.coords.items() if c.dims == ("sample",)}
        attrs = {"units": "m s-1" if kind == "velocity" else "1"}
        return xr.DataArray(values, dims=_DIMS[kind], coords=coords, attrs=attrs, name=kind)

    def _check_coordinates(self, kind: str, X: Any) -> None:
        """A network has learned one sampling and one geometry; others would give wrong answers."""
        for name, fitted in self._coordinates[kind].items():
            is_number = np.issubdtype(fitted.dtype, np.number)
            if is_number and hasattr(X, "coords") and name in X.coords:
                given = X.coords[name]
                if given.shape != fitted.shape or not np.allclose(given, fitted):
                    raise ValueError(
                        f"{name} of {kind} must be that of fit, from {float(fitted[0]):g} to "
                        f"{float(fitted[-1]):g}, got {float(given[0]):g} to {float(given[-1]):g}"
                    )

    def _build(self, seismic_shape: Any, velocity_shape: Any) -> GFIModel:
        if isinstance(self.model, GFIModel):
            return copy.deepcopy(self.model)
        make = latent_unet if self.model is None else self.model
        return make(seismic_shape=seismic_shape, velocity_shape=velocity_shape)

    def _transform(self, seismic: NDArray[Any]) -> NDArray[Any]:
        if self.seismic_transform == "signed_log":
            return np.sign(seismic) * np.log1p(np.abs(seismic))
        return seismic

    def _untransform(self, seismic: NDArray[Any]) -> NDArray[Any]:
        if self.seismic_transform == "signed_log":
            return np.sign(seismic) * np.expm1(np.abs(seismic))
        return seismic


def _plain(kind: str, values: Any) -> NDArray[Any]:
    """Array in the order of `_DIMS`, checked."""
    dims = _DIMS[kind]
    if hasattr(values, "dims"):
        if set(values.dims) != set(dims):
            raise ValueError(f"{kind} must have the dims {dims}, got {tuple(values.dims)}")
        units = values.attrs.get("units")
        if kind in _UNITS and units is not None and units not in _UNITS[kind]:
            raise ValueError(f"{kind} must have units 'm s-1', got {units!r}")
        values = values.transpose(*dims).to_numpy()
    array = np.asarray(values, dtype=np.float32)
    if kind == "velocity" and array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != len(dims):
        raise ValueError(
            f"{kind} must have shape ({', '.join(dims)}), got an array of shape {array.shape}"
        )
    check_finite(kind, array)
    if kind == "velocity" and array.max() < 100:
        raise ValueError(
            f"velocity must be in m/s, got a maximum of {array.max()}, which looks like km/s"
        )
    return array


def _warn_outside(velocity: NDArray[Any], low: float, high: float) -> None:
    slack = 0.2 * (high - low)
    if velocity.min() < low - slack or velocity.max() > high + slack:
        warnings.warn(
            f"velocity lies in [{velocity.min()}, {velocity.max()}] m/s, far outside "
            f"velocity_range [{low}, {high}]: are the units right?",
            stacklevel=3,
        )


def _coordinates(values: Any, dims: tuple[str, ...]) -> dict[str, Any]:
    if not hasattr(values, "coords"):
        return {}
    return {n: c for n, c in values.coords.items() if c.dims and set(c.dims) <= set(dims)}
