"""Train a proximal network by proximal matching, with the convexity constraint built in.

Each step draws clean samples, adds fresh Gaussian noise, takes the loss of the schedule's
stage and an Adam step, and clamps the constrained weights at zero. Checkpoints are single
safetensors files, whose header holds the rest as JSON; they appear whole or not at all.

References
----------
.. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
   Problems", ICLR 2024, arXiv:2310.14344, Algorithm 1 and Appendix C.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from .._check import check_finite, check_integer, check_interval
from .._checkpoint import load_checkpoint, load_optimizer, optimizer_state, save_checkpoint
from .proximal_matching import ProximalMatchingSchedule, proximal_matching_loss

__all__ = ["TrainingHistory", "project_after_step", "train_lpn"]

Sampler = Callable[[int, torch.Generator], Tensor]


def project_after_step(optimizer: Optimizer, net: nn.Module) -> RemovableHandle:
    """Make an optimizer clamp the network's constrained weights after each of its steps.

    `train_lpn` does this by itself; use it in a training loop of your own, or with deepinv's
    ``Trainer``.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Optimizer of the network's parameters.
    net : nn.Module
        A proximal network, or any module with ``project_()``.

    Returns
    -------
    torch.utils.hooks.RemovableHandle
        Its ``remove()`` ends the constraint.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import FullyConnectedLPN, project_after_step
    >>> net = FullyConnectedLPN(2)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    >>> handle = project_after_step(optimizer, net)
    >>> net(torch.ones(1, 2)).square().sum().backward()
    >>> optimizer.step()
    >>> net.is_convex()
    True
    """
    project = getattr(net, "project_", None)
    if not callable(project):
        raise TypeError(f"net must have a method project_(), got {type(net).__name__}")

    def hook(*_: object) -> None:
        project()

    return optimizer.register_step_post_hook(hook)


@dataclass
class TrainingHistory:
    """What happened in a training run.

    Attributes
    ----------
    loss : list of float
        Training loss of every step, of that step's stage.
    validation : list of dict
        Per evaluation ``step``, ``loss`` (of the stage in force), ``mse`` and ``psnr`` (peak
        1) of the denoised validation samples, at noise that is the same every time.
    stopped_on_nan : bool
        Whether a loss or gradient that was not finite ended the run; the network then has
        the last weights whose loss was finite.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    stopped_on_nan: bool = False

    @property
    def n_steps(self) -> int:
        """Steps taken."""
        return len(self.loss)


def train_lpn(
    net: nn.Module,
    images: np.ndarray | Tensor | Sampler,
    *,
    sigma: float | tuple[float, float] = 0.1,
    schedule: ProximalMatchingSchedule | None = None,
    batch_size: int = 200,
    validation: np.ndarray | Tensor | None = None,
    validation_every: int = 500,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    resume_from: str | os.PathLike[str] | None = None,
    random_state: int | np.random.RandomState | None = None,
    verbose: bool = False,
) -> TrainingHistory:
    """Train a proximal network, in place, to denoise as the prior's proximal operator does.

    Parameters
    ----------
    net : nn.Module
        Proximal network, on the device to train on. It is left in evaluation mode.
    images : ndarray or Tensor of shape (n_samples, ...), or callable
        Clean samples, of the network's input shape. Batches are drawn with replacement. A
        callable ``images(batch_size, generator)`` draws fresh ones instead.
    sigma : float or (float, float), default=0.1
        Standard deviation of the noise (paper: 0.1 on MNIST); a pair gives the range from
        which each batch draws one uniformly.
    schedule : ProximalMatchingSchedule, default=None
        Losses and learning rates; None is the published schedule of 40 000 steps.
    batch_size : int, default=200
        Samples a step (paper: 200 on MNIST, 64 on 128 x 128 images).
    validation : ndarray or Tensor of shape (n_samples, ...), default=None
        Clean samples for the validation curve.
    validation_every : int, default=500
        Steps between evaluations; one more follows the last step.
    checkpoint : path, default=None
        File to write weights, optimiser and random state to, every `checkpoint_every` steps,
        at the end and on interruption.
    checkpoint_every : int, default=1000
        Steps between checkpoints.
    resume_from : path, default=None
        Checkpoint to go on from. The result equals that of the uninterrupted run.
    random_state : int, RandomState or None, default=None
        Source of batches and noise.
    verbose : bool, default=False
        Whether to show a progress bar.

    Returns
    -------
    TrainingHistory
        Losses and validation curve.

    Raises
    ------
    ValueError
        If an argument is out of range, samples are not finite, or the checkpoint belongs to
        another network or schedule.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, arXiv:2310.14344, Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.inverse import FullyConnectedLPN, ProximalMatchingSchedule, train_lpn
    >>> X = np.random.default_rng(0).laplace(size=(100, 1)).astype("float32")
    >>> net = FullyConnectedLPN(1, hidden=8)
    >>> history = train_lpn(
    ...     net, X, sigma=1.0, schedule=ProximalMatchingSchedule(1, n_steps=20), random_state=0
    ... )
    >>> history.n_steps
    20
    """
    parameter = next(net.parameters(), None)
    if parameter is None:
        raise ValueError("net must have parameters to train, got none")
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    check_interval("sigma", low, 0, closed="neither")
    check_interval("sigma", high, low)
    for name, value in (
        ("batch_size", batch_size),
        ("validation_every", validation_every),
        ("checkpoint_every", checkpoint_every),
    ):
        check_integer(name, value, 1)
    data = images if callable(images) else _samples("images", images, parameter)
    held_out = None if validation is None else _samples("validation", validation, parameter)

    generator = torch.Generator(device=parameter.device)
    generator.manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))
    if schedule is None:
        example = data(1, generator) if callable(data) else data[:1]
        schedule = ProximalMatchingSchedule(example[0].numel())
    # Betas, epsilon: torch's defaults, as in the paper. The rate is set anew at each step.
    optimizer = torch.optim.Adam(net.parameters(), lr=schedule(0).learning_rate)
    project_after_step(optimizer, net)
    history = TrainingHistory()
    if resume_from is not None:
        history = _load_checkpoint(resume_from, net, optimizer, generator, schedule)
    validation_noise = None
    if held_out is not None:
        # Noise of its own generator: the same at every evaluation and in resumed runs.
        noise = torch.Generator(device=parameter.device).manual_seed(0)
        validation_noise = torch.randn(
            held_out.shape, dtype=held_out.dtype, device=held_out.device, generator=noise
        )

    def write_checkpoint() -> None:
        if checkpoint is not None:
            _save_checkpoint(checkpoint, net, optimizer, generator, schedule, history)

    net.train()
    cast(Any, net).project_()
    parameters: list[Tensor] = list(net.parameters())
    good = [p.detach().clone() for p in parameters]
    progress = tqdm(total=schedule.n_steps, initial=history.n_steps, disable=not verbose)
    try:
        while history.n_steps < schedule.n_steps:
            stage = schedule(history.n_steps)
            x = _batch(data, batch_size, generator)
            level = low
            if high > low:
                level = low + (high - low) * float(
                    torch.rand((), generator=generator, device=generator.device)
                )
            noise_now = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            loss = _loss(net(x + level * noise_now), x, stage.loss)
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            current = float(loss.detach())
            if not np.isfinite(current + float(nn.utils.get_total_norm(gradients))):
                with torch.no_grad():
                    torch._foreach_copy_(parameters, good)
                history.stopped_on_nan = True
                warnings.warn(
                    f"loss or gradient not finite at step {history.n_steps}: training stopped, "
                    "the last good weights are kept. Lower the learning rate or raise gamma.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                break
            with torch.no_grad():
                torch._foreach_copy_(good, parameters)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate
            optimizer.step()
            history.loss.append(current)
            progress.update()
            done = history.n_steps
            if held_out is not None and (done % validation_every == 0 or done == schedule.n_steps):
                noisy = held_out + high * cast(Tensor, validation_noise)
                scores = _validate(net, held_out, noisy, stage.loss, batch_size)
                history.validation.append({"step": done, **scores})
                progress.set_postfix(loss=current, psnr=scores["psnr"])
            if done % checkpoint_every == 0 or done == schedule.n_steps:
                write_checkpoint()
    except KeyboardInterrupt:
        write_checkpoint()
        raise
    finally:
        progress.close()
        net.eval()
    return history


def _samples(name: str, array: np.ndarray | Tensor, like: Tensor) -> Tensor:
    """Check clean samples and bring them to the network's dtype and device."""
    tensor = torch.as_tensor(array)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating point dtype, got {tensor.dtype}")
    if tensor.dim() < 2 or len(tensor) == 0:
        raise ValueError(f"{name} must have shape (n_samples, ...), got {tuple(tensor.shape)}")
    check_finite(name, tensor)
    return tensor.to(like)


def _batch(data: Tensor | Sampler, batch_size: int, generator: torch.Generator) -> Tensor:
    if callable(data):
        return data(batch_size, generator)
    index = torch.randint(len(data), (batch_size,), generator=generator, device=generator.device)
    return data[index]


def _loss(x_hat: Tensor, x: Tensor, kind: float | str) -> Tensor:
    if kind == "l1":
        return nn.functional.l1_loss(x_hat, x)
    if kind == "l2":
        return nn.functional.mse_loss(x_hat, x)
    return proximal_matching_loss(x_hat, x, float(kind))


def _validate(
    net: nn.Module, clean: Tensor, noisy: Tensor, kind: float | str, batch_size: int
) -> dict[str, float]:
    net.eval()
    with torch.no_grad():
        x_hat = torch.cat([net(part) for part in noisy.split(batch_size)])
    net.train()
    mse = float(nn.functional.mse_loss(x_hat, clean))
    return {
        "loss": float(_loss(x_hat, clean, kind)),
        "mse": mse,
        "psnr": float(-10 * np.log10(max(mse, np.finfo(float).tiny))),
    }


def _save_checkpoint(
    path: str | os.PathLike[str],
    net: nn.Module,
    optimizer: Optimizer,
    generator: torch.Generator,
    schedule: ProximalMatchingSchedule,
    history: TrainingHistory,
) -> None:
    """Write weights, optimiser, random state, schedule and history to one file."""
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    moments, values = optimizer_state(optimizer)
    tensors |= moments
    tensors["generator"] = generator.get_state()
    metadata = {
        "stages": [list(stage) for stage in schedule.stages],
        "loss": history.loss,
        "validation": history.validation,
        "optimizer": values,
    }
    save_checkpoint(path, tensors, metadata)


def _load_checkpoint(
    path: str | os.PathLike[str],
    net: nn.Module,
    optimizer: Optimizer,
    generator: torch.Generator,
    schedule: ProximalMatchingSchedule,
) -> TrainingHistory:
    """Set network, optimiser and random state as they were, and return the history."""
    tensors, metadata = load_checkpoint(path)
    if "stages" not in metadata or "generator" not in tensors:
        raise ValueError(f"resume_from must be written by train_lpn, got {os.fspath(path)!r}")
    stored = ProximalMatchingSchedule.from_stages(metadata["stages"])
    if stored != schedule:
        raise ValueError(f"schedule must be the checkpoint's {stored!r}, got {schedule!r}")
    weights = {name[4:]: value for name, value in tensors.items() if name.startswith("net.")}
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"net must be of the checkpoint's layers: {error}") from error
    load_optimizer(optimizer, tensors, metadata["optimizer"])
    generator.set_state(tensors["generator"])
    return TrainingHistory(loss=metadata["loss"], validation=metadata["validation"])
