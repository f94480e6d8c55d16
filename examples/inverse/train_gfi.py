"""Train a network of the GFI framework on OpenFWI files from the command line.

    python examples/inverse/train_gfi.py --train train.txt --validation val.txt \\
        --subset flat_vel_a --model latent_unet --checkpoint-dir run

The annotation files have a line "data.npy<TAB>model.npy" a file pair, as OpenFWI publishes them.
An interrupted run goes on with ``--resume``. For several GPUs start it with ``accelerate launch``.
Without ``--train`` it makes 200 small maps, to try the script out, in a minute on a CPU:

    python examples/inverse/train_gfi.py --model inversion_net --width 4 --epochs 5
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import TensorDataset, random_split

from sciml.inverse.seismic import (
    OPENFWI_STATISTICS,
    GFILoss,
    OpenFWIDataset,
    Survey,
    fno,
    inversion_net,
    invertible_xnet,
    latent_unet,
    make_openfwi_like,
    normalize_velocity,
    train_gfi,
    waveform_net,
)

MODELS = (
    "latent_unet",
    "latent_unet_forward",
    "invertible_xnet",
    "inversion_net",
    "waveform_net",
    "fno",
)


def build(name, seismic_shape, velocity_shape, width, latent_size):
    """A network at its published size, unless `width` or `latent_size` says otherwise."""
    sizes = {"seismic_shape": seismic_shape}
    if width is not None:
        sizes["width"] = width
    if name == "waveform_net":
        return waveform_net(**sizes)
    if name == "fno":
        return fno(**sizes)
    sizes["velocity_shape"] = velocity_shape
    if name == "inversion_net":
        return inversion_net(**sizes)
    if latent_size is not None:
        sizes["latent_size"] = latent_size
    if name == "invertible_xnet":
        return invertible_xnet(**sizes)
    return latent_unet("forward" if name.endswith("forward") else "inverse", **sizes)


def small_pairs():
    survey = Survey.line(32, n_shots=3, dx=20.0, dt=2e-3, nt=500, peak_frequency=10.0)
    data = make_openfwi_like("curve_vel_a", 200, survey=survey, shape=(32, 32), random_state=0)
    seismic = torch.from_numpy(data["seismic"].to_numpy())
    velocity = normalize_velocity(torch.from_numpy(data["velocity"].to_numpy()))[:, None]
    pairs = TensorDataset((seismic - seismic.mean()) / seismic.std(), velocity)
    return random_split(pairs, [180, 20], generator=torch.Generator().manual_seed(0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", help="annotation file; default: make small maps")
    parser.add_argument("--validation", help="annotation file")
    parser.add_argument("--subset", default="flat_vel_a", choices=list(OPENFWI_STATISTICS))
    parser.add_argument("--model", default="latent_unet", choices=MODELS)
    parser.add_argument("--width", type=int, help="channels; default: as published")
    parser.add_argument("--latent-size", type=int, help="default: 70, for the X-Net 64")
    parser.add_argument("--epochs", type=int, default=450)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--halve-every", type=int, default=150)
    parser.add_argument("--cycle", type=float, default=0.0, help="weight of the seismic cycle")
    parser.add_argument("--cycle-warmup", type=int, default=100)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("gfi"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()

    if arguments.train is None:
        train, validation = small_pairs()
    else:
        train = OpenFWIDataset(arguments.train, statistics=arguments.subset)
        validation = None
        if arguments.validation is not None:
            validation = OpenFWIDataset(arguments.validation, statistics=arguments.subset)
    seismic, velocity = train[0]
    torch.manual_seed(arguments.seed)
    model = build(
        arguments.model,
        tuple(seismic.shape),
        tuple(velocity.shape[1:]),
        arguments.width,
        arguments.latent_size,
    )
    last = arguments.checkpoint_dir / "last.safetensors"
    history = train_gfi(
        model,
        train,
        validation,
        loss=GFILoss(
            seismic_weight=10.0 if model.direction == "both" else 1.0,
            cycle_seismic_weight=arguments.cycle,
            cycle_warmup=arguments.cycle_warmup,
        ),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        halve_every=arguments.halve_every,
        checkpoint_dir=arguments.checkpoint_dir,
        resume_from=last if arguments.resume else None,
        accelerator=Accelerator(mixed_precision=arguments.mixed_precision),
        random_state=arguments.seed,
        verbose=1,
    )
    best = min(history, key=lambda entry: entry.get("validation", entry["loss"]))
    print(f"best epoch: {best}")
    print(f"weights: {arguments.checkpoint_dir / 'best.safetensors'}")


if __name__ == "__main__":
    main()
