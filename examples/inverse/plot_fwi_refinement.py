"""
A network begins, the wave equation finishes
============================================

A network predicts velocity from shot gathers in milliseconds, roughly. Full-waveform inversion is
exact where it converges, and converges where it starts well. :func:`~sciml.inverse.seismic.refine`
takes the network's answer as its start and fits the recorded data through the wave equation,
from low frequencies to high. A learned proximal network (Fang et al., ICLR 2024,
arXiv:2310.14344), trained on velocity maps alone, can keep the answer among maps that look like
layers.
"""

# %%
# A network that has seen 200 maps with their recordings, and four that it has not.
from functools import partial

import matplotlib.pyplot as plt
import torch

from sciml.inverse import LearnedProximalNetwork, ProximalMatchingSchedule, train_lpn
from sciml.inverse.seismic import (
    AcousticWavePhysics,
    GFIRegressor,
    Survey,
    inversion_net,
    make_openfwi_like,
    make_velocity_maps,
    normalize_velocity,
    plot_velocity,
    refine,
)

survey = Survey(
    source_x=(0.0, 320.0, 620.0),
    receiver_x=range(20, 640, 40),
    source_depth=20.0,
    receiver_depth=20.0,
    dx=20.0,
    dt=2.4e-3,
    nt=256,
    peak_frequency=8.0,
)
data = make_openfwi_like("curve_vel_a", 204, survey=survey, shape=(32, 32), random_state=0)
train, test = data.isel(sample=slice(0, 200)), data.isel(sample=slice(200, None))
regressor = GFIRegressor(
    partial(inversion_net, width=3),
    epochs=16,
    batch_size=15,
    learning_rate=5e-3,
    halve_every=4,
    seismic_transform="signed_log",
)
network = regressor.fit(train["seismic"], train["velocity"]).predict(test["seismic"])

# %%
# A prior needs no recordings: velocity maps are drawn as many as one likes.
maps = torch.from_numpy(make_velocity_maps("curve_vel_a", 1000, shape=(32, 32), random_state=1))
prior = LearnedProximalNetwork(
    1,
    image_size=32,
    width=32,
    beta=10.0,
    strong_convexity=0.01,
    generator=torch.Generator().manual_seed(0),
)
history = train_lpn(
    prior,
    normalize_velocity(maps)[:, None],
    sigma=0.1,
    schedule=ProximalMatchingSchedule(n_features=32 * 32, n_steps=600),
    batch_size=32,
    random_state=0,
)

# %%
# Eight steps in each of three bands, without and with the prior; and from the mean map.
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
    refined[name] = refine(start, seismic, physics, 8).velocity
    refined[f"{name} with prior"] = refine(
        start, seismic, physics, 8, prior=prior, prior_weight=0.05
    ).velocity
    errors = (
        float((velocity - true).abs().mean())
        for velocity in (start, refined[name], refined[f"{name} with prior"])
    )
    print(
        "{:9s} MAE {:4.0f} m/s, refined {:4.0f}, refined with the prior {:4.0f}".format(
            name, *errors
        )
    )

# %%
fig, axes = plt.subplots(2, 4, figsize=(13, 5.5))
for row, sample in zip(axes, (0, 2), strict=True):
    images = {
        "true": true,
        "network": starts["network"],
        "network, refined": refined["network"],
        "network, refined with prior": refined["network with prior"],
    }
    for ax, (name, velocity) in zip(row, images.items(), strict=True):
        plot_velocity(velocity[sample, 0].numpy(), ax, dx=survey.dx)
        ax.set_title(name)
fig.tight_layout()
fig.savefig("fwi_refinement.png")
plt.show()
