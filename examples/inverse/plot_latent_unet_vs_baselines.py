"""
Latent U-Net against InversionNet on small maps
===============================================

Two networks of about as many parameters learn to predict velocity from shot gathers: the Latent
U-Net (Gupta et al., ICLR 2025, arXiv:2410.11247), which keeps an image in its middle, and
InversionNet (Wu & Lin, arXiv:1811.07875), which squeezes everything through one pixel. Both are
instances of one class, :class:`~sciml.inverse.seismic.GFIModel`.

With two hundred maps and half a minute of training neither is near convergence: the figure shows
what each does with the same budget, not a ranking. ``benchmarks/inverse/compare_gfi.py`` trains
longer, on more maps and seeds.
"""

# %%
# Curved layers on 32 x 32 cells of 20 m, three shots of 0.6 s, a receiver in every other column.
from functools import partial

import matplotlib.pyplot as plt

from sciml.inverse.seismic import (
    GFIRegressor,
    Survey,
    inversion_net,
    latent_unet,
    make_openfwi_like,
    plot_velocity,
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
data = make_openfwi_like("curve_vel_a", 240, survey=survey, shape=(32, 32), random_state=0)
train, test = data.isel(sample=slice(0, 200)), data.isel(sample=slice(200, None))

# %%
# :class:`~sciml.inverse.seismic.GFIRegressor` scales both sides, trains, keeps the best epoch on a
# validation share, and predicts in metres a second with the coordinates of its input. A latent
# image of 16 cells is to these maps what one of 32 is to the published maps of 70, so its encoders
# and decoders have that ``layout``.
models = {
    "Latent U-Net": partial(latent_unet, latent_size=16, layout=32, width=12, repeats=1),
    "InversionNet": partial(inversion_net, width=3),
}
predicted = {}
for name, model in models.items():
    regressor = GFIRegressor(
        model,
        epochs=16,
        batch_size=15,
        learning_rate=5e-3,
        halve_every=4,
        seismic_transform="signed_log",
    )
    regressor.fit(train["seismic"], train["velocity"])
    predicted[name] = regressor.predict(test["seismic"])
    metrics = regressor.metrics(test["seismic"], test["velocity"])
    print(f"{name:13s} MAE {metrics['mae_m_s']:.0f} m/s, SSIM {metrics['ssim']:.3f}")
mean_map = train["velocity"].mean("sample")
print(f"mean map      MAE {float(abs(mean_map - test['velocity']).mean()):.0f} m/s")

# %%
fig, axes = plt.subplots(2, 3, figsize=(11, 6))
for row, sample in zip(axes, (0, 1), strict=True):
    plot_velocity(test["velocity"][sample], row[0])
    row[0].set_title("true")
    for ax, (name, velocity) in zip(row[1:], predicted.items(), strict=True):
        plot_velocity(velocity[sample], ax)
        ax.set_title(name)
fig.tight_layout()
fig.savefig("latent_unet.png")
plt.show()
