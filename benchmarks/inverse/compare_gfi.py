"""Latent U-Net, Invertible X-Net and their baselines on small OpenFWI-like data.

Curved-layer maps of 32 x 32 cells, three shots, 16 receivers, 256 time samples. Every model has
about 160,000 parameters on its way, sees the same batches for the same number of epochs, and
keeps its best epoch on validation data. Prints the normalised mean absolute error on test data,
one line a model and seed as it is done, then means over seeds; "before" and "refined" are the
errors on a few test maps before and after full-waveform inversion.

A model takes about a minute of one CPU core. ``--train 2000 --epochs 100`` is for a GPU.

    python benchmarks/inverse/compare_gfi.py --data gfi.npz
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from sciml.inverse.seismic import (
    AcousticWavePhysics,
    GFILoss,
    GFIModel,
    Survey,
    denormalize_velocity,
    fno,
    inversion_net,
    invertible_xnet,
    latent_unet,
    make_openfwi_like,
    normalize_velocity,
    refine,
    train_gfi,
    waveform_net,
)

N_SHOTS, NT, N_RECEIVERS = 3, 256, 16
SURVEY = Survey(
    source_x=(0.0, 320.0, 620.0),
    receiver_x=tuple(20.0 + 40.0 * i for i in range(N_RECEIVERS)),
    source_depth=20.0,
    receiver_depth=20.0,
    dx=20.0,
    dt=2.4e-3,
    nt=NT,
    peak_frequency=8.0,
)
SEISMIC = {"seismic_shape": (N_SHOTS, NT, N_RECEIVERS)}
SHAPES = SEISMIC | {"velocity_shape": (32, 32)}
N_VALIDATION, N_TEST, N_REFINED = 100, 100, 4

# 16 of 32 cells are about what 32 of 70 are: hence the layer table of latent 32, and so on. To
# and from gathers of 256 x 16 samples that table goes by way of 8 x 8.
unet = partial(latent_unet, repeats=1, width=12, **SHAPES)
inverse_unet = partial(unet, latent_size=16, layout=32)
forward_unet = partial(unet, "forward", latent_size=8, layout=32)
xnet = partial(
    invertible_xnet, latent_size=8, layout=32, width=22, architecture=(3, 3, 3), **SHAPES
)
waves = partial(waveform_net, width=4, **SEISMIC)


def one_way(direction):
    """The invertible network with its encoder and decoder, for one direction only."""
    both = xnet()
    parts = (both.encoder_v, both.encoder_p, both.translation, both.decoder_v, both.decoder_p)
    return GFIModel(*parts, direction=direction)


# Without skips the networks get one more channel, which makes them as large as those with skips.
MODELS = {
    "inverse Latent U-Net": inverse_unet,
    "inverse Latent U-Net, published alignment": partial(inverse_unet, legacy_alignment=True),
    "inverse Latent U-Net 8": partial(unet, latent_size=8, layout=16),
    "inverse Latent U-Net 8, no skips": partial(
        unet, latent_size=8, layout=16, skip=False, width=13
    ),
    "inverse Latent U-Net 4": partial(unet, latent_size=4, layout=8),
    "inverse Latent U-Net 4, no skips": partial(
        unet, latent_size=4, layout=8, skip=False, width=13
    ),
    "inverse InversionNet": partial(inversion_net, width=3, **SHAPES),
    "forward Latent U-Net": forward_unet,
    "forward WaveformNet": waves,
    "Invertible X-Net": xnet,
    "inverse invertible U-Net": partial(one_way, "inverse"),
    "forward invertible U-Net": partial(one_way, "forward"),
    # Not among the defaults; name them with --only.
    "inverse Latent U-Net, no skips": partial(inverse_unet, skip=False, width=13),
    "inverse Latent U-Net, not centred": inverse_unet,
    "forward Latent U-Net, published alignment": partial(forward_unet, legacy_alignment=True),
    "forward Latent U-Net, not centred": forward_unet,
    "forward WaveformNet, not centred": waves,
    "forward FNO": partial(fno, width=8, modes=16, **SEISMIC),
    "Invertible X-Net, weights 1:10": xnet,
    "Invertible X-Net, cycle": xnet,
}
DEFAULTS = list(MODELS)[:12]


def loss_of(name, epochs):
    """Loss of a model: published weights where its name says so."""
    if name.endswith("weights 1:10"):
        return GFILoss(seismic_weight=10.0)
    if name.endswith("cycle"):
        return GFILoss(cycle_seismic_weight=1.0, cycle_warmup=epochs // 4)
    return GFILoss()


def load_data(path, n_train):
    """Raw recordings and velocity; read from an npz file or made and written there."""
    n = n_train + N_VALIDATION + N_TEST
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["seismic"][:n]), torch.from_numpy(file["velocity"][:n])
    dataset = make_openfwi_like(
        "curve_vel_a", n, survey=SURVEY, shape=(32, 32), random_state=0, verbose=1
    )
    seismic, velocity = dataset["seismic"].to_numpy(), dataset["velocity"].to_numpy()
    if path is not None:
        np.savez(path, seismic=seismic, velocity=velocity)
    return torch.from_numpy(seismic), torch.from_numpy(velocity)


def scaled_parts(seismic, velocity, n_train):
    """Training, validation and test pairs: signed logarithm, standardised; velocity in [-1, 1]."""
    p = torch.sign(seismic) * torch.log1p(seismic.abs())
    p = (p - p[:n_train].mean()) / p[:n_train].std()
    v = normalize_velocity(velocity)[:, None]
    ends = np.cumsum([n_train, N_VALIDATION, N_TEST])
    return [(p[a:b], v[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def centred(name, parts):
    """Subtract the training samples' mean gather, unless the name says that it is not."""
    if name.endswith("not centred"):
        return parts
    mean = parts[0][0].mean(dim=0)
    return [(p - mean, v) for p, v in parts]


def used_parameters(model):
    """Parameters on the way of the model's direction; the other half is never trained."""
    names = {
        "inverse": ("encoder_p", "translation", "decoder_v"),
        "forward": ("encoder_v", "translation", "decoder_p"),
        "both": ("encoder_v", "encoder_p", "translation", "decoder_v", "decoder_p"),
    }[model.direction]
    return sum(p.numel() for name in names for p in getattr(model, name).parameters())


def train_one(name, seed, parts, *, epochs, batch_size, learning_rate):
    """Train a model; return it, its test errors and what there is to say of the training."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    start = time.perf_counter()
    history = train_gfi(
        model,
        TensorDataset(*parts[0]),
        TensorDataset(*parts[1]),
        loss=loss_of(name, epochs),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        halve_every=max(1, epochs // 4),
        random_state=seed,
    )
    p, v = (part.to(next(model.parameters()).device) for part in parts[2])
    model.eval()
    errors = {}
    with torch.no_grad():
        if model.direction != "forward":
            predicted = torch.cat([model.predict_velocity(batch) for batch in p.split(50)])
            errors["inverse"] = float((predicted - v).abs().mean())
        if model.direction != "inverse":
            guessed = torch.cat([model.predict_seismic(batch) for batch in v.split(50)])
            errors["forward"] = float((guessed - p).abs().mean())
    curve = [entry["validation"] for entry in history]
    about = {
        "parameters": used_parameters(model),
        "seconds": round(time.perf_counter() - start),
        "best epoch": int(np.argmin(curve)),
        # What the last third of the budget still gained: small means converged.
        "late gain": 1 - min(curve) / min(curve[: -(epochs // 3)]) if epochs >= 3 else np.nan,
    }
    return model, errors, about


def refined_errors(model, parts, raw_test, n_iter):
    """Error on a few test maps before and after full-waveform inversion from the prediction."""
    truth = parts[2][1][:N_REFINED]
    model.cpu()
    with torch.no_grad():
        start = model.predict_velocity(parts[2][0][:N_REFINED])
    physics = AcousticWavePhysics(SURVEY)
    result = refine(denormalize_velocity(start), raw_test[:N_REFINED], physics, n_iter)
    refined = normalize_velocity(result.velocity)
    return {
        "before": float((start - truth).abs().mean()),
        "refined": float((refined - truth).abs().mean()),
    }


def line(name, seed, errors, about):
    """One line a model and seed."""
    listed = "  ".join(f"{kind} {value:.4f}" for kind, value in errors.items())
    return (
        f"{name:42s} seed {seed}  {listed}  {about['parameters']} parameters, best epoch "
        f"{about['best epoch']}, late gain {about['late gain']:.1%}, {about['seconds']} s"
    )


def summary(results):
    """Mean and standard deviation over seeds, a line a model and direction."""
    lines = ["", "mean over seeds (standard deviation)"]
    for name, runs in results.items():
        for kind in runs[0]:
            values = np.array([errors[kind] for errors in runs if kind in errors])
            lines.append(
                f"{name:42s} {kind:8s} {values.mean():.4f} ({values.std():.4f}), "
                f"{len(values)} seeds"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="npz file to keep the data in")
    parser.add_argument("--train", type=int, default=500, help="training maps")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--refine", type=int, default=8, help="FWI steps a band; 0 for none")
    parser.add_argument("--only", nargs="*", help="names of models; default the first dozen")
    arguments = parser.parse_args()

    seismic, velocity = load_data(arguments.data, arguments.train)
    parts = scaled_parts(seismic, velocity, arguments.train)
    train, _, test = parts
    print(f"mean map     MAE {float((test[1] - train[1].mean(0)).abs().mean()):.4f}")
    print(f"mean gather  MAE {float((test[0] - train[0].mean(0)).abs().mean()):.4f}", flush=True)
    results = {}
    for seed in arguments.seeds:
        for name in arguments.only or DEFAULTS:
            own = centred(name, parts)
            model, errors, about = train_one(
                name,
                seed,
                own,
                epochs=arguments.epochs,
                batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
            )
            if arguments.refine and "inverse" in errors:
                raw_test = seismic[arguments.train + N_VALIDATION :]
                errors |= refined_errors(model, own, raw_test, arguments.refine)
            results.setdefault(name, []).append(errors)
            print(line(name, seed, errors, about), flush=True)
    print(summary(results))


if __name__ == "__main__":
    main()
