"""Train a `GFIModel`: on Hugging Face Accelerate, with atomic checkpoints and exact resume.

References
----------
.. [1] N. Gupta et al., "A Unified Framework for Forward and Inverse Problems in Subsurface
   Imaging using Latent Space Translations", ICLR 2025. arXiv:2410.11247
.. [2] I. Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017.
   arXiv:1704.00028
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ..._check import check_integer, check_interval
from ..._checkpoint import load_checkpoint, load_optimizer, optimizer_state, save_checkpoint
from .gfi_loss import GFILoss
from .gfi_model import GFIModel

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["critic_loss", "train_gfi"]


def critic_loss(
    critic: nn.Module,
    real: Tensor,
    generated: Tensor,
    *,
    gradient_penalty: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Wasserstein loss of a critic with gradient penalty.

    Parameters
    ----------
    critic : torch.nn.Module
        Scores maps, one number each.
    real, generated : Tensor of shape (batch, 1, nz, nx)
        True maps, and the generator's (detached here).
    gradient_penalty : float, default=10.0
        Weight of ``(||gradient|| - 1)^2`` at random points between real and generated maps.
    generator : torch.Generator, optional
        Draws those points.

    Returns
    -------
    Tensor
        Scalar.

    References
    ----------
    .. [1] I. Gulrajani et al., 2017. arXiv:1704.00028
    """
    generated = generated.detach()
    share = torch.rand(len(real), 1, 1, 1, generator=generator).to(real)
    between = (share * real + (1 - share) * generated).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(generated).mean() - critic(real).mean() + gradient_penalty * penalty


def train_gfi(
    model: GFIModel,
    dataset: Dataset[tuple[Tensor, Tensor]],
    validation: Dataset[tuple[Tensor, Tensor]] | None = None,
    *,
    loss: GFILoss | None = None,
    epochs: int = 100,
    batch_size: int = 50,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    halve_every: int | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    labelled_fraction: float = 1.0,
    critic: nn.Module | None = None,
    critic_steps: int = 5,
    adversarial_weight: float = 0.01,
    restore_best: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    random_state: int = 0,
    verbose: int = 0,
) -> list[dict[str, float]]:
    """Train a model in place on pairs of recordings and velocity maps.

    Parameters
    ----------
    model : GFIModel
        Model to train; its direction decides which terms of the loss there are.
    dataset : torch.utils.data.Dataset
        Yields (standardised seismic data, normalised velocity), such as `OpenFWIDataset` with
        ``statistics`` or a ``TensorDataset``.
    validation : torch.utils.data.Dataset, optional
        Held-out pairs. The model keeps the weights of the epoch with the least validation
        error, mean absolute plus mean square.
    loss : GFILoss, optional
        By default ``GFILoss()``.
    epochs : int, default=100
        Passes over the data. Published: 450.
    batch_size : int, default=50
        Samples a step, on each device. Published: 50.
    learning_rate : float, default=1e-3
        Published for the Latent U-Net; 2e-3 (Adamax, weight decay 1e-4) for the X-Net.
    weight_decay : float, default=0.0
        Passed to the optimiser.
    halve_every : int, optional
        Halve the learning rate after so many epochs. Published: 150.
    optimizer : type, default=torch.optim.Adam
        Class of the optimiser.
    labelled_fraction : float, default=1.0
        Share of the training samples whose labels count; the others take part in cycle and
        reconstruction terms only.
    critic : torch.nn.Module, optional
        `VelocityCritic` for adversarial training of an inverse model with the Wasserstein
        loss: a step of the model after every `critic_steps` steps of the critic.
    critic_steps : int, default=5
        Published for VelocityGAN. At most the number of batches.
    adversarial_weight : float, default=0.01
        Weight of the adversarial term; published: 1 to 100 of the square error.
    restore_best : bool, default=True
        Whether the model ends with the best weights on `validation` rather than the last.
    checkpoint_dir : path, optional
        Folder for ``last.safetensors`` after every epoch and ``best.safetensors``.
    resume_from : path, optional
        A ``last.safetensors`` to go on from. Training then ends as if it had not been
        interrupted, bit for bit on the same machine.
    accelerator : accelerate.Accelerator, optional
        Decides device, mixed precision, gradient accumulation and processes. By default one
        process on the accelerator's own choice of device.
    random_state : int, default=0
        Seeds the order of samples, the choice of labelled ones and the gradient penalty. The
        initial weights are those of `model`.
    verbose : int, default=0
        With 1, show a progress bar.

    Returns
    -------
    list of dict
        One entry an epoch: ``epoch``, ``learning_rate``, ``loss`` and its terms averaged over
        batches, and ``validation``.

    Raises
    ------
    ValueError
        If an argument is out of range or the checkpoint is of another run.
    FloatingPointError
        If the loss is not finite; the last checkpoint is from before.

    References
    ----------
    .. [1] N. Gupta et al., ICLR 2025. arXiv:2410.11247

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> from sciml.inverse.seismic import inversion_net, train_gfi
    >>> _ = torch.manual_seed(0)
    >>> pairs = TensorDataset(torch.randn(8, 2, 100, 16), torch.zeros(8, 1, 16, 16))
    >>> model = inversion_net(width=2, seismic_shape=(2, 100, 16), velocity_shape=(16, 16))
    >>> history = train_gfi(model, pairs, epochs=2, batch_size=4)
    >>> len(history), history[1]["loss"] < history[0]["loss"]
    (2, True)
    """
    check_integer("epochs", epochs, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("random_state", random_state, 0)
    check_interval("learning_rate", learning_rate, 0, closed="neither")
    check_interval("labelled_fraction", labelled_fraction, 0, 1)
    if halve_every is not None:
        check_integer("halve_every", halve_every, 1)
    if len(cast(Sized, dataset)) == 0:
        raise ValueError("dataset must hold at least one pair, got none")
    if critic is not None and model.direction != "inverse":
        raise ValueError(f"critic needs a model with direction='inverse', got {model.direction!r}")
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator()

    step = _TrainingStep(model, GFILoss() if loss is None else loss, critic, adversarial_weight)
    own = list(model.parameters())
    model_optimizer = optimizer(own, lr=learning_rate, weight_decay=weight_decay)  # type: ignore[call-arg]
    optimizers = [model_optimizer]
    if critic is not None:
        optimizers.append(torch.optim.Adam(critic.parameters(), lr=learning_rate))
    run = {
        "epochs": epochs,
        "batch_size": batch_size,
        "random_state": random_state,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "halve_every": halve_every,
        "optimizer": optimizer.__name__,
        "labelled_fraction": labelled_fraction,
        "critic_steps": critic_steps if critic is not None else None,
        "samples": len(cast(Sized, dataset)),
        "parameters": sum(p.numel() for p in own),
    }
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] | None = None
    if resume_from is not None:
        history, best = _resume(Path(resume_from), step, optimizers, run)

    order = _EpochOrder(len(cast(Sized, dataset)), random_state)
    labelled = _labelled(len(cast(Sized, dataset)), labelled_fraction, random_state)
    loader = DataLoader(_Labelled(dataset, labelled), batch_size=batch_size, sampler=order)
    if critic is not None:
        check_integer("critic_steps", critic_steps, 1, len(loader))
    step, loader, *optimizers = accelerator.prepare(step, loader, *optimizers)
    with tqdm(
        total=epochs,
        initial=len(history),
        unit="epoch",
        disable=not verbose or not accelerator.is_main_process,
    ) as progress:
        for epoch in range(len(history), epochs):
            rate = learning_rate * 0.5 ** (epoch // halve_every if halve_every else 0)
            for each in optimizers:
                for group in each.param_groups:
                    group["lr"] = rate
            order.epoch = epoch
            entry = {"epoch": epoch, "learning_rate": rate}
            entry |= _train_epoch(
                step, loader, optimizers, accelerator, epoch, critic_steps, random_state
            )
            if validation is not None:
                entry["validation"] = _validate(model, validation, batch_size, accelerator.device)
                others = [e["validation"] for e in history]
                if not others or entry["validation"] < min(others):
                    best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            history.append(entry)
            if checkpoint_dir is not None and accelerator.is_main_process:
                _save(
                    Path(checkpoint_dir),
                    accelerator.unwrap_model(step),
                    [getattr(each, "optimizer", each) for each in optimizers],
                    best,
                    {"run": run, "history": history},
                )
            progress.set_postfix(loss=f"{entry['loss']:.4g}")
            progress.update()
    if restore_best and best is not None:
        model.load_state_dict(best)
    return history


class _TrainingStep(nn.Module):
    """Model and loss as one module, so that distributed wrappers see a single forward."""

    def __init__(
        self, model: GFIModel, loss: GFILoss, critic: nn.Module | None, weight: float
    ) -> None:
        super().__init__()
        self.model, self.loss, self.critic = model, loss, critic
        self.adversarial_weight = weight

    def forward(
        self, seismic: Tensor, velocity: Tensor, mask: Tensor, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = self.loss(self.model, seismic, velocity, mask, epoch)
        if self.critic is not None:
            adversarial = -self.critic(self.model.predict_velocity(seismic)).mean()
            total = total + self.adversarial_weight * adversarial
            terms["adversarial"] = self.adversarial_weight * adversarial.detach()
        return total, terms


class _EpochOrder(Sampler[int]):
    """A permutation that depends on the seed and the epoch alone, so a resume needs no state."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.n, generator=generator).tolist())


class _Labelled(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pairs together with whether their label counts."""

    def __init__(self, dataset: Dataset[tuple[Tensor, Tensor]], labelled: Tensor) -> None:
        self.dataset, self.labelled = dataset, labelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        seismic, velocity = self.dataset[index]
        return seismic, velocity, self.labelled[index]


def _labelled(n: int, fraction: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(n)
    mask[torch.randperm(n, generator=generator)[: round(fraction * n)]] = 1
    return mask


def _train_epoch(
    step: Any,
    loader: Any,
    optimizers: list[Any],
    accelerator: Accelerator,
    epoch: int,
    critic_steps: int,
    seed: int,
) -> dict[str, float]:
    step.train()
    inner = accelerator.unwrap_model(step)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for i, (seismic, velocity, mask) in enumerate(loader):
        if inner.critic is not None:
            with torch.no_grad():
                generated = inner.model.predict_velocity(seismic)
            cost = critic_loss(inner.critic, velocity, generated, generator=generator)
            optimizers[1].zero_grad()
            accelerator.backward(cost)
            optimizers[1].step()
            _add(sums, counts, {"critic": cost.detach()}, epoch)
            if (i + 1) % critic_steps:
                continue
        with accelerator.accumulate(step):
            total, terms = step(seismic, velocity, mask, epoch)
            _add(sums, counts, {"loss": total.detach(), **terms}, epoch)
            accelerator.backward(total)
            optimizers[0].step()
            optimizers[0].zero_grad()
    return {name: value / counts[name] for name, value in sums.items()}


def _add(
    sums: dict[str, float], counts: dict[str, int], terms: dict[str, Tensor], epoch: int
) -> None:
    for name, term in terms.items():
        value = float(term)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} became {value} in epoch {epoch}: lower learning_rate, or look for "
                "outliers in the data; the last checkpoint is from the epoch before"
            )
        sums[name] = sums.get(name, 0.0) + value
        counts[name] = counts.get(name, 0) + 1


@torch.no_grad()
def _validate(
    model: GFIModel,
    dataset: Dataset[tuple[Tensor, Tensor]],
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean absolute plus mean square error of what the model predicts."""
    model.eval()
    total, count = 0.0, 0
    for seismic, velocity in DataLoader(dataset, batch_size=batch_size):
        seismic, velocity = seismic.to(device), velocity.to(device)
        pairs = []
        if model.direction != "forward":
            pairs.append((model.predict_velocity(seismic), velocity))
        if model.direction != "inverse":
            pairs.append((model.predict_seismic(velocity), seismic))
        for prediction, target in pairs:
            error = prediction - target
            total += len(error) * float(error.abs().mean() + error.square().mean())
        count += len(seismic)
    return total / count


def _save(
    folder: Path,
    step: _TrainingStep,
    optimizers: list[torch.optim.Optimizer],
    best: dict[str, Tensor] | None,
    metadata: dict[str, Any],
) -> None:
    tensors = {f"step.{name}": tensor for name, tensor in step.state_dict().items()}
    values = []
    for i, each in enumerate(optimizers):
        state, value = optimizer_state(each)
        tensors |= {f"optimizers.{i}.{name}": tensor for name, tensor in state.items()}
        values.append(value)
    if best is not None:
        tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
        save_checkpoint(folder / "best.safetensors", best, {"history": metadata["history"]})
    save_checkpoint(folder / "last.safetensors", tensors, {**metadata, "optimizers": values})


def _resume(
    path: Path, step: _TrainingStep, optimizers: list[torch.optim.Optimizer], run: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, Tensor] | None]:
    tensors, metadata = load_checkpoint(path)
    for name, value in run.items():
        begun = metadata.get("run", {}).get(name)
        if begun != value and name != "epochs":
            raise ValueError(f"{path} is of another run: its {name} is {begun!r}, not {value!r}")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    step.load_state_dict(part("step."))
    for i, (each, values) in enumerate(zip(optimizers, metadata["optimizers"], strict=True)):
        load_optimizer(each, part(f"optimizers.{i}."), values)
    return metadata["history"], part("best.") or None
