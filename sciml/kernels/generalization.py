"""Bound the error of a kernel machine on new data from its training data alone.

With probability 1 - delta over n independent training samples, all functions f of norm at most B
in the reproducing kernel Hilbert space of K satisfy

    E ramp(y f(x)) <= (1/n) sum_i ramp(y_i f(x_i))
                      + 2 B sqrt(tr K) / n + 3 sqrt(ln(2 / delta) / (2 n)),

where ramp(z) = min(1, max(0, 1 - z)) is the hinge loss clipped to [0, 1]: it is 1-Lipschitz, as
the bound requires, and at least the 0-1 loss, so that the error rate is bounded too. For an
infinitely wide network, K is its NTK.

Where paper and code differ: the official script takes ``delta = 0.99`` where a confidence of 0.99
is meant (which makes the last term a third of what it is), and bounds the unclipped hinge loss,
which is not bounded. Here delta is the probability that the bound fails.

References
----------
Y. Chen, W. Huang, L. M. Nguyen, T.-W. Weng, "On the Equivalence between Neural Network and
Support Vector Machine", NeurIPS 2021, arXiv:2111.06063.
P. L. Bartlett, S. Mendelson, "Rademacher and Gaussian Complexities: Risk Bounds and Structural
Results", Journal of Machine Learning Research 3, 2002.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils.validation import check_is_fitted

from sciml._check import check_interval
from sciml.kernels.kernel_machine import KernelMachineClassifier
from sciml.kernels.pairwise import kernel_diag, kernel_matmul

__all__ = ["GeneralizationBound", "generalization_bound"]


class GeneralizationBound(NamedTuple):
    """Terms of a generalisation bound; ``total = empirical + complexity + confidence``.

    Attributes
    ----------
    empirical : float
        Mean ramp loss on the training samples.
    complexity : float
        ``2 B sqrt(tr K) / n``, twice the Rademacher complexity of the ball of radius B.
    confidence : float
        ``3 sqrt(ln(2 / delta) / (2 n))``.
    total : float
        Bound of the expected ramp loss, and so of the error rate; vacuous from 1 on.
    norm : float
        Norm B of the machine in the reproducing kernel Hilbert space.
    """

    empirical: float
    complexity: float
    confidence: float
    total: float
    norm: float


def generalization_bound(
    machine: KernelMachineClassifier, delta: float = 0.01
) -> GeneralizationBound:
    """Bound the expected ramp loss, and so the error rate, of a fitted two-class machine.

    Parameters
    ----------
    machine : KernelMachineClassifier
        Machine of two classes, any kernel that is not precomputed, any loss, fitted without
        weights of samples or classes. Its training samples must be independent draws from the
        distribution that the bound is about.
    delta : float, default=0.01
        Probability that the bound fails, in (0, 1).

    Returns
    -------
    GeneralizationBound
        Named tuple ``(empirical, complexity, confidence, total, norm)``.

    Raises
    ------
    TypeError
        If the machine is of another kind.
    ValueError
        If it has more than two classes, a precomputed kernel or, with the squared loss, weighted
        samples, or `delta` is outside (0, 1).
    sklearn.exceptions.NotFittedError
        If the machine is not fitted.

    Notes
    -----
    The norm B is taken from the fitted machine, hence from the data. To claim the bound rigorously
    either fix B before seeing the data and check that the machine's norm is below, or apply it to
    ``B = 2^k`` for all k at once, dividing delta among them. The same holds for a kernel or a C
    chosen on the same data.

    The training labels are read off the machine's optimality condition: the coefficient of a
    sample has the sign of its label, or the sample is outside the margin.

    References
    ----------
    Chen et al., arXiv:2111.06063; Bartlett and Mendelson, JMLR 2002.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.kernels import NTK, KernelMachineClassifier, generalization_bound
    >>> X, y = load_digits(n_class=2, return_X_y=True)
    >>> machine = KernelMachineClassifier(NTK(), C=1.0).fit(X / 16, y)
    >>> generalization_bound(machine).total < 1
    True
    """
    if not isinstance(machine, KernelMachineClassifier):
        raise TypeError(f"machine must be a KernelMachineClassifier, got {type(machine).__name__}")
    check_is_fitted(machine)
    check_interval("delta", delta, 0, 1, closed="neither")
    if len(machine.classes_) != 2:
        raise ValueError(
            f"machine must have two classes for this bound, got {len(machine.classes_)}"
        )
    if machine.X_fit_ is None:
        raise ValueError("machine must keep its training samples, got kernel='precomputed'")
    kernel: dict[str, Any] = {
        "gamma": machine.gamma,
        "degree": machine.degree,
        "coef0": machine.coef0,
    }
    X = machine.X_fit_.astype(np.float64)
    dual = machine.dual_coef_.astype(np.float64)
    n = len(X)
    f = kernel_matmul(X, None, dual, machine.kernel_, **kernel)
    norm = math.sqrt(max(0.0, float(dual @ f)))
    ramp = np.clip(1 - _labels(machine, dual, f) * f, 0, 1)
    trace = float(kernel_diag(X, machine.kernel_, **kernel).sum())
    empirical = float(ramp.mean())
    complexity = 2 * norm * math.sqrt(trace) / n
    confidence = 3 * math.sqrt(math.log(2 / delta) / (2 * n))
    total = empirical + complexity + confidence
    return GeneralizationBound(empirical, complexity, confidence, total, norm)


def _labels(machine: KernelMachineClassifier, dual: Any, f: Any) -> Any:
    """Return the training labels -1 and +1 from ``dual = -C loss'(f, y)``."""
    if machine.loss != "squared":
        return np.where(dual == 0, np.sign(f), np.sign(dual))
    y = f + dual / (2 * machine.C)
    if np.abs(np.abs(y) - 1).max() > 0.01:
        raise ValueError(
            "machine must be fitted without weights of samples or classes, got coefficients that "
            "no labels -1 and +1 explain"
        )
    return np.sign(y)
