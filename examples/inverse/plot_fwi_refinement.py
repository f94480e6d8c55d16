"""
A network begins, the wave equation finishes
============================================

A network predicts velocity from shot gathers in milliseconds, roughly. Full-waveform inversion is
exact where it converges, and converges where it starts well. :func:`~sciml.inverse.seismic.refine`
takes the network's answer as its start and fits the recorded data through the wave equation,
from low frequencies to high. At the full bandwidth alone the same number of steps gains nothing:
the start is half a wavelength off.
"""

# %%
# A network that has seen 150 maps, and six that it has not.
from functools import partial

import matplotlib.pyplot as plt
import torch

from sciml.inverse.seismic import (
    AcousticWavePhysics,
    GFIRegressor,
    Survey,
    inversion_net,
    make_openfwi_like,
    plot_velocity,
    refine,
)

survey = Survey.line(32, n_shots=3, dx=20.0, dt=2e-3, nt=400, peak_frequency=8.0)
data = make_openfwi_like("curve_vel_a", 156, survey=survey, shape=(32, 32), random_state=0)
train, test = data.isel(sample=slice(0, 150)), data.isel(sample=slice(150, None))
regressor = GFIRegressor(
    partial(inversion_net, width=4),
    epochs=20,
    batch_size=15,
    learning_rate=2e-3,
    halve_every=8,
    seismic_transform="signed_log",
)
network = regressor.fit(train["seismic"], train["velocity"]).predict(test["seismic"])

# %%
# Eight steps in each of three bands, against the same number of steps at full bandwidth, and
# against starting from the mean map.
physics = AcousticWavePhysics(survey)
seismic = torch.from_numpy(test["seismic"].to_numpy())
true = torch.from_numpy(test["velocity"].to_numpy())[:, None]
mean_map = torch.from_numpy(train["velocity"].mean("sample").to_numpy())[None, None]
starts = {
    "network": torch.from_numpy(network.to_numpy())[:, None],
    "mean map": mean_map.repeat(len(true), 1, 1, 1),
}
refined = {}
for name, start in starts.items():
    before = float((start - true).abs().mean())
    low_to_high = refine(start, seismic, physics, 8)
    full = refine(start, seismic, physics, 24, cutoffs=[None])
    refined[name] = low_to_high.velocity
    print(
        f"{name:9s} MAE {before:4.0f} m/s; refined from low to high "
        f"{float((low_to_high.velocity - true).abs().mean()):4.0f}, at full bandwidth "
        f"{float((full.velocity - true).abs().mean()):4.0f}"
    )

# %%
fig, axes = plt.subplots(2, 4, figsize=(13, 5.5))
for row, sample in zip(axes, (0, 3), strict=True):
    images = {
        "true": true,
        "network": starts["network"],
        "network, refined": refined["network"],
        "mean map, refined": refined["mean map"],
    }
    for ax, (name, velocity) in zip(row, images.items(), strict=True):
        plot_velocity(velocity[sample, 0].numpy(), ax, dx=survey.dx)
        ax.set_title(name)
fig.tight_layout()
fig.savefig("fwi_refinement.png")
plt.show()
