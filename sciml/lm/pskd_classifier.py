"""A scikit-learn classifier over any torch module, trained by progressive self-distillation."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._check import check_integer, check_interval
from .._checkpoint import load_checkpoint, load_optimizer, optimizer_state, save_checkpoint
from .pskd import ProgressiveSelfKDLoss, linear_alpha

__all__ = ["PSKDClassifier"]


class PSKDClassifier(ClassifierMixin, BaseEstimator):
    """Neural network that learns from labels and, ever more, from its own earlier predictions.

    PS-KD [1]_: the target of an epoch mixes the one-hot label with the softmax the network gave
    the sample in the epoch before, with a weight that grows linearly to `alpha_T`; see
    `ProgressiveSelfKDLoss`. Probabilities become better calibrated than with one-hot targets
    (``alpha_T=0``). Trained by SGD with Nesterov momentum for a fixed number of epochs, since the
    weight depends on it: there is no early stopping and no `partial_fit`.

    Parameters
    ----------
    module : callable, default=None
        ``module(n_features, n_classes)`` makes the network: a torch module from samples of shape
        (batch, n_features) to logits of shape (batch, n_classes). Reshape inside for images, and
        augment inside when ``self.training``. None: a perceptron with ReLU.
    hidden_layer_sizes : tuple of int, default=(256, 256)
        Layers of the perceptron; unused with `module`, where only the default is accepted.
    alpha_T : float, default=0.8
        Weight of the earlier prediction in the last epoch (the paper's); 0 is plain cross entropy.
    max_iter : int, default=60
        Number of epochs (the paper: 300 on CIFAR-100).
    batch_size : int, default=128
        Samples a step (the paper's). A last batch of one is joined to the one before.
    learning_rate_init : float, default=0.1
        The paper's. It is divided by ten after half and again after three quarters of the epochs
        (the paper's 150 and 225 of 300).
    momentum : float, default=0.9
        The paper's.
    weight_decay : float, default=5e-4
        The paper's.
    max_grad_norm : float or None, default=10.0
        Gradients of a larger norm are scaled down to it; not in the paper. It keeps the large rate
        from diverging on features that are not standardised.
    checkpoint : path, default=None
        File to write weights, optimiser, predictions and random state to after every epoch.
    resume_from : path, default=None
        Checkpoint to go on from; the result equals that of the uninterrupted run.
    device : str or torch.device, default="cpu"
        Where to train.
    random_state : int, RandomState or None, default=None
        Draws initial weights, the order of the samples and what the module draws itself.
    verbose : bool, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    module_ : nn.Module
        The network, in evaluation mode.
    classes_ : ndarray of shape (n_classes,)
    n_features_in_ : int
    n_iter_ : int
        Number of epochs.
    loss_curve_ : list of float
        Mean loss of each epoch.

    References
    ----------
    .. [1] Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of
       Targets", ICCV 2021, arXiv:2006.12000.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sciml.lm import PSKDClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X / 16
    >>> model = PSKDClassifier(max_iter=20, random_state=0).fit(X[:1000], y[:1000])
    >>> model.score(X[1000:], y[1000:]) > 0.9
    True
    """

    def __init__(
        self,
        module: Callable[[int, int], nn.Module] | None = None,
        *,
        hidden_layer_sizes: Sequence[int] = (256, 256),
        alpha_T: float = 0.8,
        max_iter: int = 60,
        batch_size: int = 128,
        learning_rate_init: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        max_grad_norm: float | None = 10.0,
        checkpoint: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.module = module
        self.hidden_layer_sizes = hidden_layer_sizes
        self.alpha_T = alpha_T
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.checkpoint = checkpoint
        self.resume_from = resume_from
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> "PSKDClassifier":
        """Train the network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training samples. float32 trains in float32, everything else in float64.
        y : array-like of shape (n_samples,)
            Classes.

        Returns
        -------
        PSKDClassifier

        Raises
        ------
        ValueError
            If a parameter is out of range, there is one class only, the module's output has another
            shape, or the checkpoint is of other data or settings.
        FloatingPointError
            If training diverges.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold two classes or more, got 1 class: {self.classes_[0]!r}")
        device = torch.device(self.device)
        samples = torch.from_numpy(X if X.flags.writeable else X.copy()).to(device)
        target = torch.from_numpy(labels.astype(np.int64)).to(device)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        # The module may draw from torch's global generator: it is seeded here, and put back after.
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self.module_ = self._network(X.shape[1], len(self.classes_)).to(samples)
            self._train(samples, target, seed)
        self.n_iter_ = self.max_iter
        return self

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Compute the probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the dtype of training.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        parameter = next(self.module_.parameters())
        samples = torch.from_numpy(X if X.flags.writeable else X.copy()).to(parameter)
        self.module_.eval()
        with torch.no_grad():
            parts = [self.module_(part).softmax(1) for part in samples.split(1024)]
        return torch.cat(parts).cpu().numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict the class of each sample.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples,)
            The most probable classes.
        """
        probability = self.predict_proba(X)
        return self.classes_[probability.argmax(axis=1)]

    def _check_parameters(self) -> None:
        check_integer("max_iter", self.max_iter, 1)
        linear_alpha(0, self.max_iter, self.alpha_T)
        check_integer("batch_size", self.batch_size, 1)
        check_interval("learning_rate_init", self.learning_rate_init, 0, np.inf, closed="neither")
        check_interval("momentum", self.momentum, 0, 1, closed="neither")
        check_interval("weight_decay", self.weight_decay, 0, np.inf, closed="left")
        if self.max_grad_norm is not None:
            check_interval("max_grad_norm", self.max_grad_norm, 0, np.inf, closed="neither")
        for size in self.hidden_layer_sizes:
            check_integer("hidden_layer_sizes", size, 1)
        if self.module is not None:
            if not callable(self.module):
                raise TypeError(
                    "module must be callable as module(n_features, n_classes), got "
                    f"{type(self.module).__name__}"
                )
            if tuple(self.hidden_layer_sizes) != (256, 256):
                raise ValueError(
                    "hidden_layer_sizes has no effect on a module of your own, got "
                    f"{self.hidden_layer_sizes!r}"
                )

    def _network(self, n_features: int, n_classes: int) -> nn.Module:
        if self.module is not None:
            network = self.module(n_features, n_classes)
            if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
                raise TypeError(
                    "module must return a torch module with parameters, got "
                    f"{type(network).__name__}"
                )
            return network
        sizes = [n_features, *self.hidden_layer_sizes]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))

    def _train(self, X: Tensor, y: Tensor, seed: int) -> None:
        network, n_classes = self.module_, len(self.classes_)
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=self.learning_rate_init,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=True,
        )
        criterion = ProgressiveSelfKDLoss(
            len(X), n_classes, self.max_iter, alpha_T=self.alpha_T, dtype=X.dtype
        )
        settings = self._settings(X, y)
        self.loss_curve_: list[float] = []
        if self.resume_from is not None:
            seed = self._resume(network, optimizer, criterion, settings)
        start = len(self.loss_curve_)
        progress = tqdm(total=self.max_iter, initial=start, disable=not self.verbose, unit="epoch")
        try:
            for epoch in range(start, self.max_iter):
                # One seed an epoch: a resumed run draws what the uninterrupted one drew.
                torch.manual_seed(seed + epoch + 1)
                drops = sum(2 * epoch >= k * self.max_iter for k in (1, 1.5))
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate_init * 0.1**drops
                criterion.set_epoch(epoch)
                self.loss_curve_.append(self._epoch(X, y, optimizer, criterion))
                progress.update()
                progress.set_postfix(loss=self.loss_curve_[-1], refresh=False)
                if self.checkpoint is not None:
                    self._save(network, optimizer, criterion, settings, seed)
        finally:
            progress.close()
            network.eval()
        optimizer.zero_grad(set_to_none=True)

    def _epoch(
        self,
        X: Tensor,
        y: Tensor,
        optimizer: torch.optim.Optimizer,
        criterion: ProgressiveSelfKDLoss,
    ) -> float:
        network = self.module_.train()
        batches = list(torch.randperm(len(X)).split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation needs two
            batches[-2:] = [torch.cat(batches[-2:])]
        total = 0.0
        for index in batches:
            place = index.to(X.device)
            logits = network(X[place])
            if logits.shape != (len(index), len(self.classes_)):
                raise ValueError(
                    "module must return logits of shape (batch, n_classes) = "
                    f"{(len(index), len(self.classes_))}, got {tuple(logits.shape)}"
                )
            if not bool(logits.isfinite().all()):
                raise FloatingPointError(
                    f"training diverged in epoch {criterion.epoch}: logits are not finite; "
                    "lower learning_rate_init or standardise the features"
                )
            loss = criterion(logits, y[place], index)
            optimizer.zero_grad()
            loss.backward()
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
            optimizer.step()
            total += len(index) * float(loss.detach())
        return total / len(X)

    def _settings(self, X: Tensor, y: Tensor) -> dict[str, Any]:
        """Return what a checkpoint must agree in."""
        digest = hashlib.sha256(X.cpu().numpy().tobytes() + y.cpu().numpy().tobytes())
        names = (
            "alpha_T", "max_iter", "batch_size", "learning_rate_init", "momentum", "weight_decay",
            "max_grad_norm",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names} | {"data": digest.hexdigest()}
        result: dict[str, Any] = json.loads(json.dumps(settings, default=float))
        return result

    def _save(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: ProgressiveSelfKDLoss,
        settings: dict[str, Any],
        seed: int,
    ) -> None:
        assert self.checkpoint is not None
        tensors, values = optimizer_state(optimizer)
        tensors |= {f"module.{name}": value for name, value in network.state_dict().items()}
        tensors |= {f"criterion.{name}": value for name, value in criterion.state_dict().items()}
        metadata = {"optimizer": values, "settings": settings, "seed": seed}
        save_checkpoint(self.checkpoint, tensors, metadata | {"loss_curve": self.loss_curve_})

    def _resume(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: ProgressiveSelfKDLoss,
        settings: dict[str, Any],
    ) -> int:
        assert self.resume_from is not None
        tensors, metadata = load_checkpoint(self.resume_from)
        found = metadata.get("settings")
        if found != settings:
            wrong = [k for k, v in settings.items() if not found or found.get(k) != v]
            raise ValueError(
                "resume_from must be a checkpoint of the same data and settings, got "
                f"{os.fspath(self.resume_from)!r}, which differs in {', '.join(wrong)}"
            )
        states: dict[str, dict[str, Tensor]] = {"module": {}, "criterion": {}}
        for name, value in tensors.items():
            owner, _, rest = name.partition(".")
            if owner in states:
                states[owner][rest] = value
        try:
            network.load_state_dict(states["module"])
        except RuntimeError as error:
            raise ValueError(f"module must be of the checkpoint's layers: {error}") from error
        criterion.load_state_dict(states["criterion"])
        load_optimizer(optimizer, tensors, metadata["optimizer"])
        self.loss_curve_ = list(metadata["loss_curve"])
        return int(metadata["seed"])
