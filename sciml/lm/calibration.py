"""Measure how well predicted probabilities fit: calibration error, risk-coverage areas, NLL.

All results are fractions. Kim et al. (arXiv:2006.12000) print the calibration error times 100 and
the areas under the risk-coverage curve times 1000.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sciml._check import check_integer

__all__ = ["aurc", "eaurc", "expected_calibration_error", "negative_log_likelihood"]

Array = NDArray[Any]


def expected_calibration_error(
    y_true: ArrayLike, proba: ArrayLike, n_bins: int = 10, *, labels: ArrayLike | None = None
) -> float:
    r"""Average, over bins of confidence, how far accuracy is from the mean confidence.

    ECE = sum_k (n_k / n) \|accuracy_k - confidence_k\| over bins of equal width, where confidence
    is the largest probability of a sample [1]_, [2]_. Bin k holds confidences in (lo, hi].

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        True classes.
    proba : array-like of shape (n_samples, n_classes)
        Predicted probabilities; rows sum to one.
    n_bins : int, default=10
        Number of bins (the PS-KD paper's 10).
    labels : array-like of shape (n_classes,), default=None
        The class of each column. None: classes are the numbers of the columns.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If shapes disagree, a class is unknown, or `proba` holds no probabilities.

    References
    ----------
    .. [1] Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
    .. [2] Kim, Ji, Yoon and Hwang, arXiv:2006.12000, ICCV 2021 (bins and metrics).

    Examples
    --------
    Confident to 80 % and right half the time:

    >>> from sciml.lm import expected_calibration_error
    >>> round(expected_calibration_error([0, 1], [[0.8, 0.2], [0.8, 0.2]]), 12)
    0.3
    """
    check_integer("n_bins", n_bins, 1)
    correct, confidence, _ = _judge(y_true, proba, labels)
    edges = np.linspace(0, 1, n_bins + 1)
    # Rounding may leave a sure prediction a little above one: it belongs to the last bin.
    bins = np.minimum(np.searchsorted(edges, confidence, side="left") - 1, n_bins - 1)
    gap = np.bincount(bins, weights=correct - confidence, minlength=n_bins)
    return float(np.abs(gap).sum() / len(correct))


def aurc(y_true: ArrayLike, proba: ArrayLike, *, labels: ArrayLike | None = None) -> float:
    """Area under the risk-coverage curve: error rate among the k surest samples, averaged over k.

    Samples are sorted by confidence, the largest probability, from high to low; the risk at
    coverage k is the share of errors among the first k [1]_. Equal confidences are put in reversed
    order of the samples: that is a stable ascending sort read backwards, which is what the PS-KD
    authors' evaluation gives whenever its (unstable) sort happens to be stable.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        True classes.
    proba : array-like of shape (n_samples, n_classes)
        Predicted probabilities; rows sum to one.
    labels : array-like of shape (n_classes,), default=None
        The class of each column. None: classes are the numbers of the columns.

    Returns
    -------
    float
        0 without errors, 1 with errors alone.

    Raises
    ------
    ValueError
        If shapes disagree, a class is unknown, or `proba` holds no probabilities.

    References
    ----------
    .. [1] Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
       Classifiers", ICLR 2019, arXiv:1805.08206.

    Examples
    --------
    The least sure of four samples is wrong: risks 0, 0, 0 and 1/4.

    >>> from sciml.lm import aurc
    >>> aurc([0, 0, 0, 0], [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    0.0625
    """
    correct, confidence, _ = _judge(y_true, proba, labels)
    return _area(correct, confidence)


def eaurc(y_true: ArrayLike, proba: ArrayLike, *, labels: ArrayLike | None = None) -> float:
    """Area under the risk-coverage curve in excess of the best order's, which has errors last.

    With e errors among n samples the best order has the area (1/n) sum_j j / (n - e + j), j = 1..e.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        True classes.
    proba : array-like of shape (n_samples, n_classes)
        Predicted probabilities; rows sum to one.
    labels : array-like of shape (n_classes,), default=None
        The class of each column. None: classes are the numbers of the columns.

    Returns
    -------
    float
        0 if every error is less sure than every correct prediction. Ties as in `aurc`.

    Raises
    ------
    ValueError
        If shapes disagree, a class is unknown, or `proba` holds no probabilities.

    References
    ----------
    .. [1] Geifman, Uziel and El-Yaniv, arXiv:1805.08206.

    Examples
    --------
    >>> from sciml.lm import eaurc
    >>> eaurc([0, 0, 0, 0], [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    0.0
    """
    correct, confidence, _ = _judge(y_true, proba, labels)
    n, n_errors = len(correct), int(len(correct) - correct.sum())
    best = _area(np.arange(n) < n - n_errors, -np.arange(n, dtype=float))
    return _area(correct, confidence) - best


def negative_log_likelihood(
    y_true: ArrayLike, proba: ArrayLike, *, labels: ArrayLike | None = None
) -> float:
    """Mean of minus the log-probability of the true classes.

    Nothing is clipped: the result is infinite if a true class has probability zero.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        True classes.
    proba : array-like of shape (n_samples, n_classes)
        Predicted probabilities; rows sum to one.
    labels : array-like of shape (n_classes,), default=None
        The class of each column. None: classes are the numbers of the columns.

    Returns
    -------
    float
        In nats.

    Raises
    ------
    ValueError
        If shapes disagree, a class is unknown, or `proba` holds no probabilities.

    Examples
    --------
    >>> from sciml.lm import negative_log_likelihood
    >>> round(negative_log_likelihood(["no", "yes"], [[0.5, 0.5], [0.0, 1.0]],
    ...                               labels=["no", "yes"]), 6)
    0.346574
    """
    _, _, true_proba = _judge(y_true, proba, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(true_proba).mean())


def _area(correct: Array, confidence: Array) -> float:
    order = np.argsort(confidence, kind="stable")[::-1]
    errors = np.cumsum(~correct[order].astype(bool))
    return float((errors / np.arange(1, len(errors) + 1)).mean())


def _judge(y_true: Any, proba: Any, labels: Any) -> tuple[Array, Array, Array]:
    """Return whether predictions are right, how sure they are, and the true classes' probability.

    If several classes are the most probable the first is predicted.
    """
    y, p = np.asarray(y_true), np.asarray(proba)
    if p.ndim != 2 or len(p) == 0 or p.shape[1] < 2:
        raise ValueError(
            f"proba must have shape (n_samples, n_classes) with one sample and two classes or "
            f"more, got {p.shape}"
        )
    if y.shape != p.shape[:1]:
        raise ValueError(f"y_true must have shape ({len(p)},) as proba has rows, got {y.shape}")
    p = p.astype(float, copy=False)
    sums = p.sum(axis=1)
    if not ((p >= 0).all() and (np.abs(sums - 1) <= 1e-3).all()):  # False for NaN too
        raise ValueError(
            "proba must hold probabilities >= 0 whose rows sum to 1, got values from "
            f"{p.min():.4g} to {p.max():.4g} and sums from {sums.min():.4g} to {sums.max():.4g}"
        )
    classes = np.arange(p.shape[1]) if labels is None else np.asarray(labels)
    if classes.shape != p.shape[1:] or len(np.unique(classes)) != len(classes):
        raise ValueError(
            f"labels must be {p.shape[1]} different classes as proba has columns, got {labels!r}"
        )
    order = np.argsort(classes)
    place = np.searchsorted(classes[order], y).clip(max=len(classes) - 1)
    column = order[place]
    known = classes[column] == y
    if not known.all():
        raise ValueError(
            f"y_true must hold classes among {classes.tolist()}, got {y[~known][0].item()!r}"
        )
    return p.argmax(axis=1) == column, p.max(axis=1), p[np.arange(len(p)), column]
