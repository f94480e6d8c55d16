"""
One network for both directions
===============================

The Invertible X-Net (Gupta et al., ICLR 2025, arXiv:2410.11247) translates between the latent
images of velocity and of seismic data with one invertible U-Net: forward it simulates, backward
it inverts. Three things are shown: that it really is invertible, and where not; that training
it by inversion needs memory that does not grow with depth; and that one set of weights learns
both directions.
"""

# %%
# Invertible, where sizes can be halved
# -------------------------------------
# At the published latent size of 70 the image must be padded and cropped, and the translation
# is no bijection any more. The default of :func:`~sciml.inverse.seismic.invertible_xnet` is 64.
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch

from sciml.inverse.seismic import (
    GFILoss,
    GFIRegressor,
    InvertibleUNet,
    Survey,
    invertible_xnet,
    make_openfwi_like,
)

torch.manual_seed(0)
net = InvertibleUNet(16, padding="crop")
with torch.no_grad():
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    for size in (16, 32, 64, 70):
        x = torch.randn(1, 16, size, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # at 70 the network says that it is not invertible
            error = (net.inverse(net(x)) - x).abs().max()
        print(f"size {size}: round trip off by {float(error):.1e}")

# %%
# Memory that does not grow with depth
# ------------------------------------
# With ``memory_efficient=True`` the backward pass undoes the network step by step instead of
# storing what each step saw.


def saved_megabytes(couplings, memory_efficient):
    network = InvertibleUNet(16, (couplings,) * 3, memory_efficient=memory_efficient)
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(4, 16, 32, 32, requires_grad=True))
    return total / 2**20


depths = (2, 4, 8, 16)
memory = {name: [saved_megabytes(d, name == "by inversion") for d in depths]
          for name in ("stored", "by inversion")}  # fmt: skip
for name, megabytes in memory.items():
    print(f"{name:13s}" + "".join(f"{m:8.1f} MB" for m in megabytes))

# %%
# Both directions at once
# -----------------------
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
data = make_openfwi_like("flat_vel_a", 180, survey=survey, shape=(32, 32), random_state=0)
train, test = data.isel(sample=slice(0, 150)), data.isel(sample=slice(150, None))
model = GFIRegressor(
    partial(invertible_xnet, latent_size=8, layout=32, width=16, architecture=(2, 2, 2)),
    loss=GFILoss(),
    epochs=24,
    batch_size=10,
    learning_rate=5e-3,
    halve_every=6,
    seismic_transform="signed_log",
)
model.fit(train["seismic"], train["velocity"])
velocity = model.predict(test["seismic"])
seismic = model.predict_seismic(test["velocity"])
for name, predicted, column in (
    ("velocity", velocity, "velocity"),
    ("seismic", seismic, "seismic"),
):
    error = float(abs(predicted - test[column]).mean())
    constant = float(abs(train[column].mean("sample") - test[column]).mean())
    print(f"{name:8s}: mean absolute error {error:.3g}, of the training mean {constant:.3g}")

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
for name, megabytes in memory.items():
    left.plot(depths, megabytes, "o-", label=name)
left.set(xlabel="couplings a level", ylabel="MB for the backward pass", title="memory")
left.legend()
middle.plot(test["velocity"][0, :, 16], test["depth"], "k", label="true")
middle.plot(velocity[0, :, 16], test["depth"], label="predicted")
middle.set(xlabel="velocity (m/s)", ylabel="depth (m)", title="inverse")
middle.invert_yaxis()
middle.legend()
right.plot(test["time"], test["seismic"][0, 0, :, 8], "k", label="true")
right.plot(test["time"], seismic[0, 0, :, 8], label="predicted")
right.set(xlabel="time (s)", title="forward: one trace")
fig.tight_layout()
fig.savefig("invertible_xnet.png")
plt.show()
