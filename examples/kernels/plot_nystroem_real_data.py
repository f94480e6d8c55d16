"""
Landmarks on real data: how many does a regression need?
========================================================

Digits and diabetes ship with scikit-learn. With ``--data-home FOLDER`` the California housing data
(``FOLDER/cal_housing_py3.pkz``, or downloaded there by scikit-learn) are added:

.. code-block:: bash

    python plot_nystroem_real_data.py --data-home ~/scikit_learn_data

Each curve is Nyström ridge regression with landmarks drawn uniformly, recursively, or in one pass
by SQUEAK, of which the last two follow ridge leverage scores; the dotted line is kernel ridge
regression on all rows. Neither digits nor diabetes has the rare clusters that uniform landmarks
miss, and the three choices come out alike: scores are an insurance, which here pays nothing.
"""

# %%
import sys

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import fetch_california_housing, load_diabetes, load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelBinarizer, StandardScaler

from sciml.kernels import NystroemRidge

X, y = load_digits(return_X_y=True)
data = {"digits": (X / 16, LabelBinarizer(neg_label=-1).fit_transform(y), 0.5, 0.1)}
X, y = load_diabetes(return_X_y=True)
data["diabetes"] = (StandardScaler().fit_transform(X), y[:, None] / y.std(), 0.02, 10.0)
if "--data-home" in sys.argv:
    home = sys.argv[sys.argv.index("--data-home") + 1]
    X, y = fetch_california_housing(data_home=home, return_X_y=True)
    data["California housing"] = (StandardScaler().fit_transform(X), y[:, None], 0.1, 0.1)

# %%
# Error on held-out rows
# ----------------------
# The share of the variance that is not explained, median over five seeds of the landmarks. Targets
# are centred, since there is no intercept; classes of digits are ten regressions.
SIZES = (25, 50, 100, 200)
METHODS = ("uniform", "recursive", "squeak")


def unexplained(model, rows):
    train, test, target, held_out = rows
    mean = target.mean(axis=0)
    residual = held_out - mean - model.fit(train, target - mean).predict(test)
    return np.square(residual).mean() / np.square(held_out - mean).mean()


fig, axes = plt.subplots(1, len(data), figsize=(5 * len(data), 4), layout="constrained")
for ax, (name, (X, Y, gamma, alpha)) in zip(axes, data.items(), strict=True):
    rows = train_test_split(X, Y, test_size=0.25, random_state=0)
    print(
        f"{name}, {len(rows[0])} training rows\n  landmarks  " + "".join(f"{m:8d}" for m in SIZES)
    )
    for method in METHODS:
        options = {"gamma": gamma, "method": method}
        errors = [
            np.median(
                [
                    unexplained(
                        NystroemRidge(alpha, n_components=m, random_state=seed, **options), rows
                    )
                    for seed in range(5)
                ]
            )
            for m in SIZES
        ]
        ax.plot(SIZES, errors, "o-", label=method)
        print(f"  {method:10s} " + "".join(f"{error:8.4f}" for error in errors))
    if len(rows[0]) < 5000:  # n x n values
        exact = unexplained(KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma), rows)
        ax.axhline(exact, color="k", linestyle=":", label="all rows")
        print(f"  all rows   {exact:8.4f}")
    ax.set(title=name, xlabel="landmarks", ylabel="unexplained variance", ylim=(0, None))
    ax.legend()
fig.savefig("nystroem_real_data.png")
plt.show()
