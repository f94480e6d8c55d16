"""
Seismic data like OpenFWI's, without a download
===============================================

Velocity models of ten families, and what seventy receivers record over them: a data set like
those of OpenFWI (Deng et al., NeurIPS 2022, arXiv:2111.02926) takes minutes to make instead of
hours to download. The published files hold 500 models each; statistics and solver are compared
with the published ones below.
"""

# %%
# Ten families
# ------------
# In the A families velocity grows with depth; in the B families each layer draws its own. The
# style families stand in for style-transferred photographs.
import time

import matplotlib.pyplot as plt

from sciml.inverse.seismic import (
    OPENFWI_STATISTICS,
    VELOCITY_KINDS,
    make_openfwi_like,
    make_velocity_maps,
    plot_gather,
    plot_velocity,
)

fig, axes = plt.subplots(2, 5, figsize=(10, 4.2))
for ax, kind in zip(axes.T.flat, VELOCITY_KINDS, strict=True):
    ax.imshow(make_velocity_maps(kind, 1, random_state=2)[0], vmin=1500, vmax=4500)
    ax.set_title(kind, fontsize=9)
    ax.axis("off")
fig.tight_layout()
fig.savefig("velocity_families.png")

# %%
# Shot gathers
# ------------
# Five shots, a thousand samples of a millisecond, a 15 Hz Ricker wavelet. The result is an
# xarray Dataset with coordinates in metres and seconds. With ``path=`` it would be written shard
# by shard, and a run that is killed would go on where it stopped.
start = time.perf_counter()
data = make_openfwi_like("flat_vel_a", 12, random_state=0)
seconds = time.perf_counter() - start
print(data)
print(f"{12 / seconds:.1f} models a second on one core")

# %%
# The mean and standard deviation of the recordings are near those of the published FlatVel-A.
published = OPENFWI_STATISTICS["flat_vel_a"]
seismic = data["seismic"]
print(f"mean {float(seismic.mean()):+.5f} (published {published.mean:+.5f})")
print(f"std  {float(seismic.std()):.3f} (published {published.std:.3f})")
print(f"min {float(seismic.min()):.1f}, max {float(seismic.max()):.1f} (published -27.0, 52.8)")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
plot_velocity(data["velocity"][3], left)
plot_gather(data["seismic"][3, 2], right)
left.set_title("velocity model")
right.set_title("shot in the middle")
fig.tight_layout()
fig.savefig("openfwi_like.png")
plt.show()
