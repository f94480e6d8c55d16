"""Compute the neural tangent kernel (NTK) and the NNGP kernel of infinitely wide ReLU networks.

For the fully connected network with H = `depth` hidden layers of width m,

    z_1 = w_std W_1 x / sqrt(d) + b_std b_1,
    z_{l+1} = w_std W_{l+1} relu(z_l) / sqrt(m) + b_std b_{l+1},

all entries of W and b drawn from N(0, 1), the covariance S of the outputs (NNGP kernel) and the
inner product T of their gradients with respect to all parameters (NTK) converge, as m grows, to

    S_0 = w_std^2 <x, y> / d + b_std^2,  T_0 = S_0,  q_0(x) = w_std^2 ||x||^2 / d + b_std^2,
    c = sqrt(q_l(x) q_l(y)),  t = arccos(S_l / c),
    S_{l+1} = w_std^2 c (sin t + (pi - t) cos t) / (2 pi) + b_std^2,
    T_{l+1} = S_{l+1} + w_std^2 (pi - t) / (2 pi) T_l,
    q_{l+1} = w_std^2 q_l / 2 + b_std^2,

for l = 0, ..., H - 1. This is the kernel of `neural_tangents` with H pairs of ``Dense, Relu`` and
a final ``Dense``. The Gaussian expectations are the arc-cosine kernels of Cho and Saul.

References
----------
A. Jacot, F. Gabriel, C. Hongler, "Neural Tangent Kernel: Convergence and Generalization in
Neural Networks", NeurIPS 2018, arXiv:1806.07572.
J. Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient
Descent", NeurIPS 2019, arXiv:1902.06720.
Y. Cho, L. K. Saul, "Kernel Methods for Deep Learning", NeurIPS 2009.
"""

from typing import Any

import numpy as np
from sklearn.gaussian_process.kernels import Kernel

from sciml._check import check_choice, check_integer, check_interval
from sciml.kernels.pairwise import kernel_diag, pairwise_kernel

__all__ = ["NNGP", "NTK", "ntk"]


def ntk(
    X: Any,
    Y: Any = None,
    *,
    depth: int = 1,
    w_std: float = 1.0,
    b_std: float = 0.0,
    kind: str = "ntk",
    out: Any = None,
) -> Any:
    """Compute the NTK or NNGP matrix of an infinitely wide ReLU network.

    Parameters
    ----------
    X : array of shape (n_X, n_features)
        NumPy array (or what `numpy.asarray` accepts), torch tensor or CuPy array.
    Y : array of shape (n_Y, n_features), default=None
        Same library and device as X. None, or X itself, computes the symmetric matrix with an
        exact diagonal at about half the cost.
    depth : int, default=1
        Number of hidden layers, >= 1. Papers that count layers with the output layer call
        ``depth=1`` a two-layer network.
    w_std : float, default=1.0
        Standard deviation of the weights, > 0. 1 is the choice of Jacot et al.; sqrt(2)
        (He initialisation) keeps the variance constant from layer to layer.
    b_std : float, default=0.0
        Standard deviation of the biases, >= 0. With 0 the kernel is positively homogeneous,
        ``K(a x, y) = a K(x, y)`` for a >= 0, and vanishes at zero rows.
    kind : {"ntk", "nngp"}, default="ntk"
        Tangent kernel, or covariance of the outputs.
    out : array of shape (n_X, n_Y), default=None
        Where to write the result, see `pairwise_kernel`.

    Returns
    -------
    array of shape (n_X, n_Y)
        In the library, dtype and device of X. Differentiable for torch tensors that require
        gradients; at parallel x and y the NTK has a kink and the subgradient there is the
        symmetric one, so gradients are finite everywhere.

    Raises
    ------
    TypeError
        If X and Y are of different libraries or a parameter is not a number.
    ValueError
        If a shape, dtype or parameter does not fit, or an array holds NaN or infinity.

    Notes
    -----
    float64 results are exact to rounding except where x and y are nearly parallel: an angle can
    be known from an inner product only to ``sqrt(eps)``, so there the relative error of the NTK
    reaches 1e-8 (float64) or 3e-4 (float32). The diagonal of ``ntk(X)`` does not suffer: it is
    written from its closed form.

    References
    ----------
    Jacot et al., arXiv:1806.07572; Lee et al., arXiv:1902.06720.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import ntk
    >>> ntk(np.eye(2), depth=1).round(4)
    array([[0.5   , 0.0796],
           [0.0796, 0.5   ]])
    """
    check_choice("kind", kind, ("ntk", "nngp"))
    kernel = (NTK if kind == "ntk" else NNGP)(depth, w_std, b_std)
    return pairwise_kernel(X, Y, kernel, out=out)


class _NetworkKernel(Kernel):
    """What NTK and NNGP share: everything but the `tangent` flag."""

    _tangent: bool

    def __init__(self, depth: int = 1, w_std: float = 1.0, b_std: float = 0.0) -> None:
        self.depth = depth
        self.w_std = w_std
        self.b_std = b_std

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Compute the kernel matrix.

        Parameters
        ----------
        X : array of shape (n_X, n_features)
            NumPy array, torch tensor or CuPy array.
        Y : array of shape (n_Y, n_features), default=None
            None means X.
        eval_gradient : bool, default=False
            Also return the gradient with respect to the hyperparameters, of which there are
            none. Only for Y = None.

        Returns
        -------
        K : array of shape (n_X, n_Y)
            Kernel matrix in the library, dtype and device of X.
        K_gradient : ndarray of shape (n_X, n_X, 0)
            Only if `eval_gradient`.

        Raises
        ------
        ValueError
            If `eval_gradient` and Y is given, and as in `ntk`.
        """
        if eval_gradient and Y is not None:
            raise ValueError("eval_gradient must be False if Y is given, got True")
        K = pairwise_kernel(X, Y, self)
        return (K, np.empty((*K.shape, 0))) if eval_gradient else K

    def diag(self, X: Any) -> Any:
        """Compute the diagonal of the kernel matrix.

        Parameters
        ----------
        X : array of shape (n, n_features)
            NumPy array, torch tensor or CuPy array.

        Returns
        -------
        array of shape (n,)
            Equal to the diagonal of ``self(X)``.
        """
        return kernel_diag(X, self)

    def is_stationary(self) -> bool:
        """Return False: the kernel depends on more than ``x - y``."""
        return False

    def epilogue(self, n_features: int) -> tuple[str, tuple[Any, ...]]:
        """Return the name and parameters of the scalar epilogue for `pairwise_kernel`.

        Parameters
        ----------
        n_features : int
            Number of columns of X.

        Returns
        -------
        name : str
            Name of the epilogue.
        params : tuple
            Its parameters.

        Raises
        ------
        TypeError, ValueError
            If a parameter of the kernel is no number in its range.
        """
        check_integer("depth", self.depth, 1)
        check_interval("w_std", self.w_std, 0, np.inf, closed="neither")
        check_interval("b_std", self.b_std, 0, np.inf, closed="left")
        w2, b2 = float(self.w_std) ** 2, float(self.b_std) ** 2
        return "network", (w2 / n_features, w2, b2, int(self.depth), self._tangent)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(depth={self.depth!r}, w_std={self.w_std!r}, "
            f"b_std={self.b_std!r})"
        )


class NTK(_NetworkKernel):
    """Neural tangent kernel of an infinitely wide ReLU network, as a scikit-learn kernel.

    Usable as `kernel` in `SVC`, `KernelRidge`, `Nystroem` and `GaussianProcessRegressor`, each of
    which evaluates it once a matrix, and with ``+``, ``*`` and ``**`` of other kernels.

    Parameters
    ----------
    depth : int, default=1
        Number of hidden layers.
    w_std : float, default=1.0
        Standard deviation of the weights (Jacot et al.).
    b_std : float, default=0.0
        Standard deviation of the biases.

    See Also
    --------
    ntk : The same as a function.
    NNGP : Kernel of the network at initialisation.

    Notes
    -----
    None of the parameters is a `Hyperparameter` that a Gaussian process would optimise: `depth`
    is an integer, and with ``b_std=0`` a change of `w_std` only rescales the kernel, which
    ``ConstantKernel() * NTK()`` does with a tunable amplitude. Choose them by a grid search over
    ``kernel__depth``, ``kernel__w_std``, ``kernel__b_std``.

    References
    ----------
    Jacot et al., arXiv:1806.07572; Lee et al., arXiv:1902.06720.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.svm import SVC
    >>> from sciml.kernels import NTK
    >>> X, y = load_digits(return_X_y=True)
    >>> bool(SVC(kernel=NTK(depth=2)).fit(X[:900], y[:900]).score(X[900:], y[900:]) > 0.9)
    True
    """

    _tangent = True


class NNGP(_NetworkKernel):
    """Output covariance of an infinitely wide random ReLU network, as a scikit-learn kernel.

    A Gaussian process with this kernel is the network's prior at initialisation, equivalently the
    network of which only the last layer is trained.

    Parameters
    ----------
    depth : int, default=1
        Number of hidden layers.
    w_std : float, default=1.0
        Standard deviation of the weights.
    b_std : float, default=0.0
        Standard deviation of the biases.

    See Also
    --------
    ntk : The same as a function, with ``kind="nngp"``.
    NTK : Kernel of the network trained in all layers.

    References
    ----------
    Lee et al., arXiv:1902.06720; Cho and Saul, NeurIPS 2009.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import NNGP
    >>> NNGP(depth=1)(np.eye(2)).round(4)
    array([[0.25  , 0.0796],
           [0.0796, 0.25  ]])
    """

    _tangent = False
