"""Check the rows that an estimator is given, whatever library they come from."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from sciml._check import check_finite
from sciml.kernels.arrays import Array, array_library

__all__ = ["validate_rows"]


def validate_rows(
    estimator: BaseEstimator, X: Any, *, reset: bool, dtype: Any = (np.float64, np.float32)
) -> Array:
    """Return finite rows in floating point, and set or check the estimator's `n_features_in_`.

    Parameters
    ----------
    estimator : BaseEstimator
        Estimator.
    X : array of shape (n, n_features)
        What `sklearn.utils.validation.validate_data` takes, or a torch or CuPy matrix.
    reset : bool
        Whether `n_features_in_` is set.
    dtype : sequence of dtypes or None
        Dtypes that NumPy rows may keep; None leaves them as they are.

    Returns
    -------
    array of shape (n, n_features)

    Raises
    ------
    ValueError
        If dtype or shape do not fit, or a value is not finite.
    """
    if array_library(X) == "numpy":
        dtype = None if dtype is None else list(dtype)
        return validate_data(estimator, X, dtype=dtype, reset=reset)
    if X.ndim != 2 or not str(X.dtype).endswith(("float32", "float64")):
        raise ValueError(
            f"X must be a float32 or float64 matrix, got {X.dtype} of shape {tuple(X.shape)}"
        )
    check_finite("X", X)
    if reset:
        estimator.n_features_in_ = int(X.shape[1])
    elif X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input"
        )
    return X
