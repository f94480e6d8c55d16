"""Find the exponential tilt of a model under which features have the means one asks for.

Of all distributions p with E_p[phi] = mu the one nearest to the model pi_0 in KL(p || pi_0) is

    p(x) = pi_0(x) exp(lambda . phi(x)) / Z,

the target of "generation with distributional control" [1]_. Its coefficients lambda minimise the
convex function log E_{pi_0}[exp(lambda . phi)] - lambda . mu, whose gradient is E_p[phi] - mu and
whose Hessian is the covariance of phi under p. The paper takes up to 1000 gradient steps until the
means are within 0.01; here Newton's method takes some ten, to rounding.

References
----------
.. [1] Khalifa, Elsahar and Dymetman, "A Distributional Approach to Controlled Text Generation",
   ICLR 2021, arXiv:2012.11635.
"""

import torch
from torch import Tensor

from sciml._check import check_finite, check_integer, check_interval, check_shape

__all__ = ["fit_moment_coefficients"]


def fit_moment_coefficients(
    features: Tensor,
    moments: Tensor,
    log_weights: Tensor | None = None,
    *,
    tol: float = 1e-6,
    max_iter: int = 200,
) -> Tensor:
    """Find lambda such that samples weighted by exp(lambda . phi) have the given feature means.

    The fit is on samples: x_j from the model (or from q, with `log_weights`), weights
    w_j(lambda) = w_j exp(lambda . phi(x_j)), means sum w_j phi(x_j) / sum w_j. So the coefficients
    carry the sampling error of the samples; rare features want many (the paper takes 4096 or more).

    Use them by ``target_log_score(ref_logps, features @ coefficients, beta=1.0)``.

    Parameters
    ----------
    features : Tensor of shape (n_samples, n_features)
        phi(x_j).
    moments : Tensor of shape (n_features,)
        Means to reach.
    log_weights : Tensor of shape (n_samples,), default=None
        log(pi_0(x_j) / q(x_j)) of samples drawn from q, up to a constant; -inf excludes a sample
        (a hard constraint besides). None: samples are from pi_0.
    tol : float, default=1e-6
        The largest deviation of a mean, in units of the feature's range over the samples. (The
        paper stops at 0.01.)
    max_iter : int, default=200
        Most Newton steps.

    Returns
    -------
    Tensor of shape (n_features,)
        lambda, in the dtype of `features` (float64 if those are integers or bools). Features that
        depend on each other (one-hot groups) get the coefficients of least norm.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, a feature that is to change never varies, or no
        coefficients reach the moments within `tol`: they must lie inside the hull of the samples'
        features.

    References
    ----------
    .. [1] Khalifa, Elsahar and Dymetman, arXiv:2012.11635, section 2.1.

    Examples
    --------
    A feature that occurs in a tenth of the samples is to occur in half: its odds grow ninefold.

    >>> import torch
    >>> from sciml.lm import fit_moment_coefficients
    >>> features = (torch.arange(100) % 10 == 0).double()[:, None]
    >>> fit_moment_coefficients(features, torch.tensor([0.5])).exp()
    tensor([9.0000], dtype=torch.float64)
    """
    check_interval("tol", tol, 0, closed="neither")
    check_integer("max_iter", max_iter, 1)
    check_shape("features", features, (None, None))
    n, n_features = features.shape
    if n == 0 or n_features == 0:
        raise ValueError(f"features must hold a sample and a feature, got shape {(n, n_features)}")
    check_shape("moments", moments, (n_features,))
    check_finite("features", features)
    check_finite("moments", moments)
    dtype = features.dtype if features.is_floating_point() else torch.float64
    phi = features.detach().double()
    mu = moments.detach().to(phi)
    if log_weights is None:
        logw = phi.new_zeros(n)
    else:
        check_shape("log_weights", log_weights, (n,))
        logw = log_weights.detach().to(phi)
        if bool((logw.isnan() | (logw == torch.inf)).any()):
            raise ValueError("log_weights must be finite or -inf, got NaN or +inf")
    inside = logw > -torch.inf
    if not bool(inside.any()):
        raise ValueError("log_weights must leave a sample, got -inf for all")
    phi, logw = phi[inside], logw[inside].log_softmax(0)

    low, high = phi.amin(0), phi.amax(0)
    for k in range(n_features):
        lo, hi, want = float(low[k]), float(high[k]), float(mu[k])
        if not (lo < want < hi or lo == want == hi):
            raise ValueError(
                f"moments[{k}] must lie strictly between the least and the largest value of its "
                f"feature among the samples, {lo:.6g} and {hi:.6g}, got {want:.6g}"
            )
    # In units of each feature's range, so that one tolerance fits all.
    scale = torch.where(high > low, high - low, 1.0)
    phi, mu = (phi - mu) / scale, torch.zeros_like(mu)

    # The minimum is minus the least KL from the weights of any reweighting that has the moments,
    # and no KL exceeds -log of the smallest weight: a lower value proves that there is none.
    floor = float(logw.min()) - 1.0
    lam = torch.zeros_like(mu)
    value = (logw + phi @ lam).logsumexp(0)
    for _ in range(max_iter):
        weights = (logw + phi @ lam).softmax(0)
        mean = weights @ phi
        if float(mean.abs().max()) <= tol:
            return (lam / scale).to(dtype)
        if float(value) < floor:
            break
        centred = phi - mean
        covariance = (weights[:, None] * centred).T @ centred
        # Without the directions in which nothing varies (any more): features that depend.
        step = -torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True) @ mean
        slope, length = float(mean @ step), 1.0
        if not slope < -1e-30:  # the deviation is orthogonal to what varies: no step can help
            break
        while length > 1e-12:
            tried = (logw + phi @ (lam + length * step)).logsumexp(0)
            # Rounding of the value must not refuse the last steps, whose gain is below it.
            if float(tried - value) <= 1e-4 * length * slope + 1e-14 * max(1.0, abs(float(value))):
                break
            length /= 2
        lam, value = lam + length * step, tried
    raise ValueError(
        "moments must be attainable: no finite coefficients give the samples these means together "
        f"(after the fit the largest deviation is {float(mean.abs().max()):.3g} of a feature's "
        f"range, the largest coefficient {float((lam / scale).abs().max()):.3g})"
    )
