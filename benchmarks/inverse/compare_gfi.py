"""Latent U-Net, Invertible X-Net and their baselines on small OpenFWI-like data.

Curved-layer maps of 32 x 32 cells, three shots. Every model has about as many parameters, sees
the same batches for the same number of epochs, and keeps its best epoch on validation data.
Prints the normalised mean absolute error on test data, one line a model and seed, then means;
"before" and "refined" are the errors on 16 test maps before and after waveform inversion.

    python benchmarks/inverse/compare_gfi.py --seeds 3 --epochs 30
"""

import argparse
import json
import time
from functools import partial

import numpy as np
import torch
from torch.utils.data import TensorDataset

from sciml.inverse.seismic import (
    AcousticWavePhysics,
    GFILoss,
    Survey,
    denormalize_velocity,
    inversion_net,
    invertible_xnet,
    latent_unet,
    make_openfwi_like,
    normalize_velocity,
    refine,
    train_gfi,
    waveform_net,
)

SURVEY = Survey.line(32, n_shots=3, dx=20.0, dt=2e-3, nt=500, peak_frequency=10.0)
SHAPES = {"seismic_shape": (3, 500, 32), "velocity_shape": (32, 32)}
N_TRAIN, N_VALIDATION, N_TEST, N_REFINED = 400, 40, 80, 16

unet = partial(latent_unet, repeats=1, **SHAPES)
MODELS = {
    # inverse
    "latent_unet": partial(unet, latent_size=16, width=16),
    "latent_unet legacy alignment": partial(unet, latent_size=16, width=16, legacy_alignment=True),
    "latent_unet no skip": partial(unet, latent_size=16, width=16, skip=False),
    "latent_unet latent 8": partial(unet, latent_size=8, layout=16, width=16),
    "latent_unet latent 8 no skip": partial(unet, latent_size=8, layout=16, width=16, skip=False),
    "inversion_net": partial(inversion_net, width=4, **SHAPES),
    # forward
    "forward latent_unet": partial(unet, "forward", latent_size=16, width=16),
    "forward latent_unet legacy alignment": partial(
        unet, "forward", latent_size=16, width=16, legacy_alignment=True
    ),
    "forward waveform_net": partial(waveform_net, width=5, seismic_shape=(3, 500, 32)),
    # both
    "invertible_xnet": partial(
        invertible_xnet, latent_size=16, width=32, architecture=(3, 3, 3), **SHAPES
    ),
}


def load_data():
    dataset = make_openfwi_like(
        "curve_vel_a",
        N_TRAIN + N_VALIDATION + N_TEST,
        survey=SURVEY,
        shape=(32, 32),
        random_state=0,
    )
    raw = torch.from_numpy(dataset["seismic"].to_numpy())
    p = torch.sign(raw) * torch.log1p(raw.abs())
    p = (p - p[:N_TRAIN].mean()) / p[:N_TRAIN].std()
    v = normalize_velocity(torch.from_numpy(dataset["velocity"].to_numpy()))[:, None]
    ends = np.cumsum([N_TRAIN, N_VALIDATION, N_TEST])
    parts = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return [(p[s], v[s]) for s in parts], raw[parts[2]]


def used_parameters(model):
    """Parameters on the way of the model's direction; the other half is never trained."""
    names = {
        "inverse": ("encoder_p", "translation", "decoder_v"),
        "forward": ("encoder_v", "translation", "decoder_p"),
        "both": ("encoder_v", "encoder_p", "translation", "decoder_v", "decoder_p"),
    }[model.direction]
    return sum(p.numel() for name in names for p in getattr(model, name).parameters())


@torch.no_grad()
def test_errors(model, p, v):
    model.eval()
    errors = {}
    if model.direction != "forward":
        errors["inverse"] = float((model.predict_velocity(p) - v).abs().mean())
    if model.direction != "inverse":
        errors["forward"] = float((model.predict_seismic(v) - p).abs().mean())
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--refine", type=int, default=15, help="steps of waveform inversion")
    parser.add_argument("--only", nargs="*", help="names of models; default all")
    arguments = parser.parse_args()

    (train, validation, test), raw = load_data()
    mean_map = train[1].mean(0, keepdim=True)
    mean_gather = train[0].mean(0, keepdim=True)
    print(f"mean map     MAE {float((test[1] - mean_map).abs().mean()):.4f}")
    print(f"mean gather  MAE {float((test[0] - mean_gather).abs().mean()):.4f}", flush=True)
    results = {}
    for name in arguments.only or MODELS:
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            model = MODELS[name]()
            start = time.perf_counter()
            history = train_gfi(
                model,
                TensorDataset(*train),
                TensorDataset(*validation),
                loss=GFILoss(),
                epochs=arguments.epochs,
                batch_size=20,
                learning_rate=arguments.learning_rate,
                halve_every=max(1, arguments.epochs // 3),
                random_state=seed,
            )
            seconds = time.perf_counter() - start
            errors = test_errors(model, *test)
            best = int(np.argmin([entry["validation"] for entry in history]))
            if arguments.refine and "inverse" in errors:
                with torch.no_grad():
                    predicted = model.predict_velocity(test[0][:N_REFINED])
                    truth = test[1][:N_REFINED]
                    errors["before"] = float((predicted - truth).abs().mean())
                refined = refine(
                    denormalize_velocity(predicted),
                    raw[:N_REFINED],
                    AcousticWavePhysics(SURVEY),
                    arguments.refine,
                ).velocity
                errors["refined"] = float((normalize_velocity(refined) - truth).abs().mean())
            results.setdefault(name, []).append(errors)
            listed = "  ".join(f"{k} {value:.4f}" for k, value in errors.items())
            print(
                f"{name:38s} seed {seed}  {used_parameters(model):7d} parameters  {listed}  "
                f"best epoch {best}  {seconds:.0f} s",
                flush=True,
            )
    print("\nmean over seeds (standard deviation)")
    for name, errors in results.items():
        for kind in errors[0]:
            values = np.array([e[kind] for e in errors])
            print(f"{name:38s} {kind:8s} {values.mean():.4f} ({values.std():.4f})")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
