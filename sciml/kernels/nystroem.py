"""Nyström features whose landmarks are chosen by ridge leverage, in one pass or many pieces.

A Nyström approximation is as good as its landmarks. Uniform ones miss small clusters; ridge
leverage scores find them. `RidgeLeverageNystroem` takes the place of scikit-learn's `Nystroem`,
learns from streams, from several machines, and from landmarks of your own.

References
----------
.. [1] D. Calandriello, A. Lazaric, M. Valko, "Distributed adaptive sampling for kernel matrix
   approximation" (SQUEAK), AISTATS 2017. arXiv:1803.10172
.. [2] D. Calandriello, A. Lazaric, M. Valko, "Analysis of Nyström method with sequential ridge
   leverage scores" (INK-Estimate), UAI 2016. arXiv:2604.20077
.. [3] A. Rudi et al., "On fast leverage score sampling and optimal learning" (BLESS), NeurIPS
   2018. arXiv:1810.13258
.. [4] C. Musco, C. Musco, "Recursive sampling for the Nyström method", NeurIPS 2017.
   arXiv:1605.07583
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from sciml._check import check_choice, check_finite, check_integer, check_interval
from sciml.kernels.arrays import (
    Array,
    cast_like,
    concatenate,
    copy_rows,
    take,
    take_block,
    to_double,
    to_numpy,
)
from sciml.kernels.ink_estimate import INKStream
from sciml.kernels.leverage_sampling import (
    bless_sample,
    exact_leverage_sample,
    own_landmarks,
    recursive_leverage_sample,
    uniform_sample,
)
from sciml.kernels.merge_tree import chunks_of, is_dask, merge_chunks, merge_dask
from sciml.kernels.nystroem_map import nystroem_features, nystroem_map
from sciml.kernels.pairwise import KernelLike, kernel_diag, pairwise_kernel
from sciml.kernels.ridge_leverage import check_kernel_matrix
from sciml.kernels.rows import validate_rows
from sciml.kernels.squeak import (
    Dictionary,
    expand,
    keep_to_limit,
    merge_dictionaries,
    shrink,
    squeak_scores,
)

__all__ = ["RidgeLeverageNystroem", "merge"]

METHODS = ("squeak", "ink", "bless", "recursive", "exact", "uniform")
_BLOCK = 256  # arrivals at once, or half the dictionary: there the cost a row is least
_STREAM_PARAMETERS = (
    "method",
    "kernel",
    "gamma",
    "degree",
    "coef0",
    "ridge",
    "n_components",
    "budget",
    "eps",
)  # those that must not change within a stream, nor differ between merged dictionaries
_DEFAULT_BUDGET = {"squeak": 20, "ink": 600, "bless": 2}


def _streams(estimator: "RidgeLeverageNystroem") -> bool:
    if estimator.method in ("squeak", "ink", "uniform") and estimator.landmarks is None:
        return not _is_precomputed(estimator.kernel)
    raise AttributeError(
        "partial_fit needs method='squeak', 'ink' or 'uniform', a kernel that is not "
        "precomputed, and no landmarks of your own"
    )


class RidgeLeverageNystroem(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Approximate a kernel map from landmarks chosen by ridge leverage scores.

    Parameters
    ----------
    kernel : str, Kernel or callable, default="rbf"
        As in `pairwise_kernel`, or "precomputed".
    gamma : float, default=None
        Scale of the kernels that have one; None means ``1 / n_features``.
    degree : float, default=3
        Power of the polynomial kernel.
    coef0 : float, default=1.0
        Constant of the polynomial kernel.
    ridge : float, default=1.0
        Ridge of the scores. A good choice is the `alpha` of the regression that follows.
    method : str, default="squeak"
        How landmarks are chosen:

        - "squeak": one pass, scores from the landmarks alone; streams and merges [1]_;
        - "ink": one pass, scores from all columns; O(n) a row, and keeps all points [2]_;
        - "bless": from coarse to fine ridges, for n that fits in memory [3]_;
        - "recursive": from few points to all, exactly `n_components` landmarks [4]_;
        - "exact": exact scores, O(n^3);
        - "uniform": the landmarks of scikit-learn's `Nystroem` for the same `random_state`.
    landmarks : array, default=None
        Landmarks of your own: positions, an integer array of shape (m,), or points of shape
        (m, n_features). `method` is then not used.
    n_components : int, default=None
        For "uniform", "exact" and "recursive" the number of landmarks; None means 100, 100 and
        ``ceil(sqrt(n))``. For the others a limit. That of "squeak" holds at every moment of a
        stream, by a budget that falls, to ``2/(1 - eps)`` at least, and then by a ridge that
        rises as the effective dimension grows: it bounds time a row and memory.
    budget : int, default=None
        For "squeak" and "ink" the copies q of a point, None meaning 20 and 600; for "bless"
        the oversampling factor, None meaning 2. More copies keep more landmarks. Guarantees
        need q of order ``log(n)/eps^2``, which is far more than practice does.
    eps : float in (0, 1), default=0.5
        Accuracy that "squeak" and "ink" assume.
    regularized : bool, default=False
        Whether the features of "squeak", "ink", "bless" and "exact" are those of the weighted,
        regularised matrix that the papers analyse, rather than of ``C K_mm^{-1} C'`` on the
        same landmarks, which is closer to K.
    random_state : int, RandomState instance or None, default=None
        Seed of the sampling.
    n_jobs : int, default=None
        Threads of the matrix products and factorisations; None leaves them as they are, -1
        means all processors.
    verbose : int, default=0
        With 1, show a progress bar over the blocks of a fit.

    Attributes
    ----------
    components_ : array of shape (m, n_features)
        Landmarks.
    component_indices_ : ndarray of shape (m,)
        Their positions among the rows seen; -1 for landmarks given as points.
    weights_ : ndarray of shape (m,)
        Importance weights: 1 for landmarks of your own and for "recursive".
    leverage_scores_ : ndarray of shape (m,)
        Estimated ridge leverage scores, for `ridge_`; NaN where none were estimated.
    ridge_ : float
        Ridge that the landmarks were chosen for: `ridge`, unless a limit made "squeak" raise it.
    effective_dimension_ : float
        Estimate of ``trace(K (K + ridge I)^{-1})`` from the weighted landmarks; for "recursive"
        and landmarks of your own that of the landmarks alone, which is a lower bound.
    normalization_ : array of shape (m, m)
        Features are ``K(X, components_) @ normalization_.T``.
    n_features_in_ : int
        Number of features seen in fit.
    n_samples_seen_ : int
        Number of rows seen.

    See Also
    --------
    merge : two fitted estimators into one.
    sciml.kernels.NystroemRidge : ridge regression on these features.

    Notes
    -----
    Features Z satisfy ``Z Z' = C K_mm^{-1} C'``, as those of `Nystroem` do. With
    ``regularized=True`` and importance weights S they satisfy
    ``Z Z' = K S (S'KS + ridge I)^{-1} S'K``, which for an eps-accurate dictionary is below K and
    within ``ridge / (1 - eps)`` of it in spectral norm. Since the former lies between the latter
    and K, it has the same guarantee and a smaller error, by a factor of 3 to 10 on digits.

    "squeak" takes O(m^2) a row for a dictionary of m points, which grows with the effective
    dimension and not with the rows; "ink" takes a time that grows with the rows seen. On
    homogeneous data all scores are alike, and no method gains over "uniform". Each call of
    `partial_fit` factors an m x m matrix at its end: hand over many rows at once.

    The method follows the effective dimension of *all* rows for a fixed ridge, which for many
    kernels grows like a power of log n; set `n_components` on endless streams.

    `fit` also takes a Dask array, or a list or iterator of two-dimensional chunks: each chunk
    gives a dictionary, and a tree of merges joins them, on the Dask client that is active (or
    here, one after another). A memory-mapped array is read block by block.

    References
    ----------
    .. [1] D. Calandriello et al., 2017. arXiv:1803.10172
    .. [2] D. Calandriello et al., 2016. arXiv:2604.20077
    .. [3] A. Rudi et al., 2018. arXiv:1810.13258
    .. [4] C. Musco, C. Musco, 2017. arXiv:1605.07583

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import RidgeClassifier
    >>> from sklearn.pipeline import make_pipeline
    >>> from sciml.kernels import RidgeLeverageNystroem
    >>> X, y = load_digits(return_X_y=True)
    >>> features = RidgeLeverageNystroem(gamma=0.001, ridge=0.1, random_state=0)
    >>> model = make_pipeline(features, RidgeClassifier(alpha=0.1)).fit(X[:1400], y[:1400])
    >>> model.score(X[1400:], y[1400:]) > 0.9
    True
    """

    # State of a stream; None or empty before the first row.
    _dictionary: Any
    _ink: INKStream | None
    _points: Array
    _reservoir: list[tuple[int, Array]]
    _n_streamed: int
    _started_with: dict[str, Any]  # parameters that may not change within a stream

    def __init__(
        self,
        kernel: KernelLike = "rbf",
        *,
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1.0,
        ridge: float = 1.0,
        method: str = "squeak",
        landmarks: Any = None,
        n_components: int | None = None,
        budget: int | None = None,
        eps: float = 0.5,
        regularized: bool = False,
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.ridge = ridge
        self.method = method
        self.landmarks = landmarks
        self.n_components = n_components
        self.budget = budget
        self.eps = eps
        self.regularized = regularized
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> "RidgeLeverageNystroem":
        """Choose landmarks.

        Parameters
        ----------
        X : array of shape (n, n_features), Dask array, or chunks
            NumPy array, torch tensor, CuPy array, memory map; a kernel matrix of shape (n, n)
            for ``kernel="precomputed"``.
        y : None
            Ignored, as in every transformer.

        Returns
        -------
        RidgeLeverageNystroem
            Itself.

        Raises
        ------
        ValueError
            If an argument is out of range, a value is not finite, or the kernel is not
            positive semidefinite.
        """
        self._check_arguments()
        chunks = chunks_of(X)
        self._forget()
        rng = check_random_state(self.random_state)
        with _threads(self.n_jobs):
            if chunks is not None:
                self._fit_chunks(chunks, rng)
                return self
            X = self._validate(X, reset=True, blockwise=True)
            self.n_samples_seen_ = len(X)
            if _is_precomputed(self.kernel):
                check_kernel_matrix(X)
                self._fit_points(np.arange(len(X))[:, None], rng, precomputed=X)
            else:
                self._fit_points(X, rng)
        return self

    @available_if(_streams)
    def partial_fit(self, X: Any, y: Any = None) -> "RidgeLeverageNystroem":
        """Take in more rows of a stream, after earlier calls or after `fit`.

        Stopped between calls, the estimator can be pickled and goes on bit-identically; an
        interrupt within a call leaves whole blocks done.

        Parameters
        ----------
        X : array of shape (n, n_features)
            New rows.
        y : None
            Ignored.

        Returns
        -------
        RidgeLeverageNystroem
            Itself.

        Raises
        ------
        ValueError
            As in `fit`; also if the number of features changes.
        """
        self._check_arguments()
        first = not hasattr(self, "_rng")
        if not first:
            self._check_unchanged()
        X = self._validate(X, reset=first, blockwise=True)
        if first:
            self._forget()
            # A copy, so that the caller's generator is not shared with the pickled state.
            self._rng = copy.deepcopy(check_random_state(self.random_state))
        with _threads(self.n_jobs):
            self._stream_and_finish(X, self._rng)
        return self

    def transform(self, X: Any) -> Any:
        """Map rows to Nyström features.

        Parameters
        ----------
        X : array of shape (n, n_features)
            Rows; for ``kernel="precomputed"`` their kernel values with the training rows, of
            shape (n, n_train).

        Returns
        -------
        array of shape (n, m)
            Features, in the library, dtype and device of X.

        Raises
        ------
        ValueError
            If the number of features differs from that of fit, or a value is not finite.
        """
        check_is_fitted(self, "normalization_")
        X = self._validate(X, reset=False)
        normalization = cast_like(self.normalization_, X)
        with _threads(self.n_jobs):
            if _is_precomputed(self.kernel):
                return take(X.T, self.component_indices_).T @ normalization.T
            return nystroem_features(
                X,
                cast_like(self.components_, X),
                normalization,
                self.kernel,
                n_threads=None if self.n_jobs is None else effective_n_jobs(self.n_jobs),
                **self._options(),
            )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = _is_precomputed(self.kernel)
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # -------------------------------------------------------------- choosing landmarks

    def _fit_points(
        self, points: Array, rng: np.random.RandomState, precomputed: Array | None = None
    ) -> None:
        """Choose landmarks among points that are all at hand."""
        kernel, diagonal = self._kernel_functions(precomputed)
        n = len(points)
        if self.landmarks is not None:
            chosen, sample = own_landmarks(self.landmarks, points, precomputed is not None)
            self._set_points(chosen, *sample, kernel, plain=True)
        elif self.method in ("squeak", "ink"):
            self._stream_and_finish(points, rng, precomputed)
        elif self.method == "uniform":
            m = 100 if self.n_components is None else self.n_components
            if m > n:
                warnings.warn(
                    f"n_components={m} is more than the {n} rows; all rows are landmarks",
                    stacklevel=3,
                )
            sample = uniform_sample(n, m, rng)
            self._set(points, sample.indices, sample.weights, sample.scores, kernel, plain=True)
            # m rows drawn from n are a reservoir after n rows: partial_fit goes on from it.
            self._reservoir = [(int(i), copy_rows(points[i : i + 1])) for i in sample.indices]
            self._n_streamed, self._rng = n, copy.deepcopy(rng)
        elif self.method == "exact":
            m = 100 if self.n_components is None else self.n_components
            sample = exact_leverage_sample(points, kernel, self.ridge, min(m, n), rng)
            self._set(points, sample.indices, sample.weights, sample.scores, kernel)
        elif self.method == "recursive":
            m = int(np.ceil(np.sqrt(n))) if self.n_components is None else self.n_components
            sample = recursive_leverage_sample(points, kernel, diagonal, min(m, n), rng)
            self._set(points, sample.indices, sample.weights, sample.scores, kernel, plain=True)
        else:
            sample = bless_sample(points, kernel, diagonal, self.ridge, self._copies(), rng)
            indices, weights, scores = sample
            if self.n_components is not None and len(indices) > self.n_components:
                keep = rng.choice(len(indices), self.n_components, replace=False)
                weights = weights[keep] * len(indices) / len(keep)
                indices, scores = indices[keep], scores[keep]
            self._set(points, indices, weights, scores, kernel)

    def _stream_and_finish(
        self, X: Array, rng: np.random.RandomState, precomputed: Array | None = None
    ) -> None:
        """Take in rows; if interrupted, the blocks that are done make a fitted estimator."""
        try:
            self._stream(X, rng, precomputed)
        except KeyboardInterrupt:
            if self._n_rows():
                self._finish_stream(rng, precomputed)
            raise
        finally:
            if rng is not getattr(self, "_rng", None):
                self._rng = copy.deepcopy(rng)  # partial_fit goes on from here
        self._finish_stream(rng, precomputed)

    def _n_rows(self) -> int:
        return self._n_streamed if self._dictionary is None else int(self._dictionary.n_seen)

    def _stream(
        self, X: Array, rng: np.random.RandomState, precomputed: Array | None = None
    ) -> None:
        """Take in rows block by block; `_finish_stream` makes them attributes."""
        if self.method == "squeak":
            kernel, _ = self._kernel_functions(precomputed)
            start, bar = 0, tqdm(total=len(X), disable=not self.verbose, unit="row")
            while start < len(X):
                kept = 0 if self._dictionary is None else len(self._dictionary)
                rows = copy_rows(X[start : start + max(_BLOCK, kept // 2)])
                if precomputed is None and not str(rows.dtype).endswith(("float32", "float64")):
                    rows = rows.astype(np.float64)  # of a memory map
                check_finite("X", rows)
                grown = expand(self._dictionary, rows, self._copies())
                scores = squeak_scores(grown, kernel, self.ridge, self.eps)
                self._dictionary = self._limit(shrink(grown, scores, rng), rng, precomputed)
                start += len(rows)
                bar.update(len(rows))
            bar.close()
        elif self.method == "ink":
            self._stream_ink(X, rng, precomputed)
        else:
            self._stream_uniform(X, rng)

    def _stream_ink(self, X: Array, rng: np.random.RandomState, precomputed: Array | None) -> None:
        if self._ink is None:
            self._ink = INKStream(self.ridge, self._copies(), self.eps, "copies", "safe")
        kernel, diagonal = self._kernel_functions(precomputed)
        # INK-Estimate looks at every past point: all are kept, as the method demands.
        # Rows that an interrupt left beyond n_seen go.
        before = self._ink.n_seen
        self._points = copy_rows(X) if before == 0 else concatenate([self._points[:before], X])
        values = to_numpy(diagonal(X))
        for i in tqdm(range(len(X)), disable=not self.verbose, unit="row"):
            t = self._ink.n_seen
            past = self._points[:t]
            column = to_numpy(kernel(past, X[i : i + 1]))[:, 0] if t else np.empty(0)
            after = copy.copy(self._ink)  # an interrupt within the step leaves no half of it
            after.update(column, float(values[i]), rng)
            self._ink, self._n_streamed = after, after.n_seen

    def _stream_uniform(self, X: Array, rng: np.random.RandomState) -> None:
        """Reservoir sampling: after t rows every set of m rows is as likely as any other."""
        m = 100 if self.n_components is None else self.n_components
        seen, reservoir = self._n_streamed, list(self._reservoir)
        first = min(max(m - len(reservoir), 0), len(X))
        reservoir += [(seen + i, copy_rows(X[i : i + 1])) for i in range(first)]
        places = rng.randint(seen + 1 + np.arange(first, len(X)))
        for i in np.flatnonzero(places < m):
            row = first + int(i)
            reservoir[int(places[i])] = (seen + row, copy_rows(X[row : row + 1]))
        self._reservoir, self._n_streamed = reservoir, seen + len(X)

    def _finish_stream(self, rng: np.random.RandomState, precomputed: Array | None = None) -> None:
        kernel, _ = self._kernel_functions(precomputed)
        self.n_samples_seen_ = self._n_rows()
        if self.method == "squeak":
            dictionary = self._dictionary
            scores = squeak_scores(dictionary, kernel, self.ridge, self.eps) / (1 - self.eps)
            self._set_points(
                dictionary.points,
                dictionary.indices,
                dictionary.weights,
                np.minimum(scores, 1),
                kernel,
            )
        elif self._ink is not None:
            result = self._ink.result()
            indices, weights, scores = result.indices, result.weights, result.leverage_scores
            if self.n_components is not None and len(indices) > self.n_components:
                keep = copy.deepcopy(rng).choice(len(indices), self.n_components, replace=False)
                weights = weights[keep] * len(indices) / len(keep)
                indices, scores = indices[keep], scores[keep]
            self._set(self._points, indices, weights, scores, kernel)
            self.effective_dimension_ = result.effective_dimension
        else:
            points = self._reservoir[0][1]
            for _, row in self._reservoir[1:]:
                points = concatenate([points, row])
            indices = np.array([t for t, _ in self._reservoir])
            m = len(indices)
            weights = np.full(m, self._n_streamed / m)
            self._set_points(points, indices, weights, np.full(m, np.nan), kernel, plain=True)

    def _fit_chunks(self, chunks: Any, rng: np.random.RandomState) -> None:
        """Dictionary a chunk, and a tree of merges."""
        if self.method != "squeak" or self.landmarks is not None:
            raise ValueError(
                "X may be a Dask array or a sequence of chunks with method='squeak' only, "
                f"got method={self.method!r}"
            )
        if _is_precomputed(self.kernel):
            raise ValueError("X must be one matrix for kernel='precomputed', got chunks")
        self.__dict__.pop("n_features_in_", None)  # of an earlier fit
        if is_dask(chunks):
            self._dictionary = merge_dask(chunks, *self._unfitted()._tree(), rng)
            self.n_features_in_ = int(chunks.shape[1])
        else:
            self._dictionary = merge_chunks(chunks, *self._tree(), rng, verbose=self.verbose)
        self._finish_stream(rng)
        self._rng = copy.deepcopy(rng)

    def _tree(self) -> tuple[Any, Any]:
        """What makes a dictionary of a chunk, and what joins two."""
        return self._dictionary_of, self._merge

    def _dictionary_of(self, chunk: Array, seed: int) -> Dictionary:
        """Dictionary of one chunk alone."""
        one = self._unfitted()
        one._forget()
        rows = one._validate(chunk, reset=True, blockwise=True)
        one._stream(rows, check_random_state(seed))
        self.__dict__.setdefault("n_features_in_", one.n_features_in_)
        if one.n_features_in_ != self.n_features_in_:
            raise ValueError(
                f"X must have chunks with {self.n_features_in_} features, got {one.n_features_in_}"
            )
        return one._dictionary

    def _merge(self, a: Dictionary, b: Dictionary, seed: int | np.random.RandomState) -> Dictionary:
        rng = check_random_state(seed)
        kernel, _ = self._kernel_functions(None)
        merged = merge_dictionaries(a, b, kernel, self.ridge, self.eps, rng)
        return self._limit(merged, rng)

    def _limit(
        self,
        dictionary: Dictionary,
        rng: np.random.RandomState,
        precomputed: Array | None = None,
    ) -> Dictionary:
        if self.n_components is None:
            return dictionary
        kernel, _ = self._kernel_functions(precomputed)
        options = (kernel, self.ridge, self.eps, rng)
        return keep_to_limit(dictionary, self.n_components, *options)

    def _unfitted(self) -> "RidgeLeverageNystroem":
        parameters = {**self.get_params(deep=False), "verbose": 0, "random_state": 0}
        return RidgeLeverageNystroem(**parameters)

    # -------------------------------------------------------------- fitted attributes

    def _set(
        self,
        points: Array,
        indices: NDArray[np.int64],
        weights: NDArray[np.float64],
        scores: NDArray[np.float64],
        kernel: Any,
        *,
        plain: bool = False,
    ) -> None:
        chosen = copy_rows(take(points, indices))
        self._set_points(chosen, indices, weights, scores, kernel, plain=plain)

    def _set_points(
        self,
        points: Array,
        indices: NDArray[np.int64],
        weights: NDArray[np.float64],
        scores: NDArray[np.float64],
        kernel: Any,
        *,
        plain: bool = False,
    ) -> None:
        factor = 1.0 if self._dictionary is None else self._dictionary.ridge_factor
        self.ridge_ = self.ridge * factor
        self.component_indices_ = indices
        self.weights_ = weights
        self.leverage_scores_ = scores
        if not _is_precomputed(self.kernel):
            self.components_ = points
        # The m x m algebra is done in float64; features have the dtype of the data.
        K = kernel(to_double(points), None)
        like = K if _is_precomputed(self.kernel) else points
        precision = np.finfo(str(like.dtype).replace("torch.", "")).eps
        options = {"cutoff": float(precision) * len(K), "share": float(weights[0])}
        normalization, self.effective_dimension_ = nystroem_map(
            to_double(K), None if plain else weights, self.ridge, **options
        )
        if not plain and not self.regularized:
            normalization, _ = nystroem_map(to_double(K), None, self.ridge, **options)
        self.normalization_ = cast_like(normalization, like)
        self._n_features_out = len(indices)

    def _kernel_functions(self, precomputed: Array | None) -> tuple[Any, Any]:
        if precomputed is None:
            options = self._options()

            def kernel(X: Array, Y: Array | None) -> Array:
                return pairwise_kernel(X, Y, self.kernel, **options)

            def diagonal(X: Array) -> Array:
                return kernel_diag(X, self.kernel, **options)

        else:
            # Points are rows of positions, and the kernel looks their values up.
            def kernel(X: Array, Y: Array | None) -> Array:
                return take_block(precomputed, X[:, 0], (X if Y is None else Y)[:, 0])

            def diagonal(X: Array) -> Array:
                return take(precomputed.diagonal(), X[:, 0])

        return kernel, diagonal

    def _options(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}

    def _copies(self) -> int:
        return _DEFAULT_BUDGET[self.method] if self.budget is None else self.budget

    def _forget(self) -> None:
        """Drop what a previous fit or stream left."""
        for name in [n for n in vars(self) if n.endswith("_") and not n.startswith("_")]:
            if name not in ("n_features_in_", "feature_names_in_"):
                delattr(self, name)
        self.__dict__.pop("_rng", None)
        self._dictionary = None
        self._ink = None
        self._points = None
        self._reservoir = []
        self._n_streamed = 0
        self._started_with = {name: getattr(self, name) for name in _STREAM_PARAMETERS}

    def _validate(self, X: Any, *, reset: bool, blockwise: bool = False) -> Array:
        """Check X; a memory map that goes through `_stream` in blocks is only read there."""
        blockwise &= self.method == "squeak" and self.landmarks is None
        if blockwise and isinstance(X, np.memmap) and X.dtype.kind in "fiub":
            return validate_data(self, X, dtype=None, ensure_all_finite=False, reset=reset)
        return validate_rows(self, X, reset=reset)

    def _check_unchanged(self) -> None:
        for name in _STREAM_PARAMETERS:
            before, now = self._started_with[name], getattr(self, name)
            if before is not now and before != now:
                raise ValueError(
                    f"{name} must stay {before!r} in the middle of a stream, got {now!r}; "
                    "fit starts a new one"
                )

    def _check_arguments(self) -> None:
        check_choice("method", self.method, METHODS)
        check_interval("ridge", self.ridge, 0, closed="neither")
        check_interval("eps", self.eps, 0, 1, closed="neither")
        if self.n_components is not None:
            check_integer("n_components", self.n_components, 1)
        if self.budget is not None:
            check_integer("budget", self.budget, 1)


def merge(
    a: RidgeLeverageNystroem,
    b: RidgeLeverageNystroem,
    *,
    random_state: int | np.random.RandomState | None = None,
) -> RidgeLeverageNystroem:
    """Merge two estimators that were fitted on disjoint data into one for all of it.

    The guarantee [1]_: let both dictionaries be eps-accurate for their data. Then the scores
    estimated from their union, with ridge ``(1 + eps) ridge`` inside and the factor
    ``(1 - eps)/ridge``, lie between ``tau / alpha`` and ``tau`` with ``alpha = (1 + 3 eps)/(1 -
    eps)``, and the thinned union is again eps-accurate for all the data, with probability ``1 -
    delta`` over a whole tree of merges of n rows if ``budget >= 39 alpha log(2 n/delta) /
    eps^2``. Any tree over any number of pieces will do; the order of the data does not matter.

    Parameters
    ----------
    a, b : RidgeLeverageNystroem
        Fitted with ``method="squeak"`` and the same parameters, but for `random_state`.
    random_state : int, RandomState instance or None, default=None
        Seed of the sampling.

    Returns
    -------
    RidgeLeverageNystroem
        New estimator; `component_indices_` of b follow those of a. It can go on with
        `partial_fit`.

    Raises
    ------
    ValueError
        If an estimator was not fitted by SQUEAK, or a parameter differs.

    References
    ----------
    .. [1] D. Calandriello, A. Lazaric, M. Valko, AISTATS 2017. arXiv:1803.10172

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.kernels import RidgeLeverageNystroem, merge
    >>> X = np.random.default_rng(0).standard_normal((400, 3))
    >>> a, b = (RidgeLeverageNystroem(random_state=0).fit(half) for half in (X[:200], X[200:]))
    >>> merge(a, b, random_state=0).n_samples_seen_
    400
    """
    for name, one in (("a", a), ("b", b)):
        check_is_fitted(one, "normalization_")
        if one.method != "squeak" or one.landmarks is not None or one._dictionary is None:
            raise ValueError(f"{name} must be fitted with method='squeak', got {one!r}")
        if _is_precomputed(one.kernel):
            raise ValueError(f"{name} must have a kernel that is not precomputed")
    for name in _STREAM_PARAMETERS:
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"{name} of a and b must be the same, got {getattr(a, name)!r} and "
                f"{getattr(b, name)!r}"
            )
    if a.n_features_in_ != b.n_features_in_:
        raise ValueError(
            f"a and b must have as many features, got {a.n_features_in_} and {b.n_features_in_}"
        )
    merged = RidgeLeverageNystroem(**a.get_params(deep=False))
    merged._forget()
    rng = copy.deepcopy(check_random_state(random_state))
    merged._dictionary = merged._merge(a._dictionary, b._dictionary, rng)
    merged.n_features_in_ = a.n_features_in_
    merged._rng = rng
    merged._finish_stream(rng)
    return merged


def _is_precomputed(kernel: Any) -> bool:
    return isinstance(kernel, str) and kernel == "precomputed"


@contextmanager
def _threads(n_jobs: int | None) -> Iterator[None]:
    if n_jobs is None:
        yield
        return
    with threadpool_limits(limits=effective_n_jobs(n_jobs)):
        yield
