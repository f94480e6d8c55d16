"""
Choose the depth of an infinitely wide network by cross-validation
==================================================================

A kernel machine with the NTK is an infinitely wide network trained to the end, and its depth is a
parameter like any other: ``GridSearchCV`` searches ``kernel__depth`` beside ``C``. Nested
cross-validation, which selects anew within each outer fold, gives an honest comparison with the
usual choice, an RBF support vector machine whose ``gamma`` and ``C`` are searched the same way.

The machine is that of Chen et al., "On the Equivalence between Neural Network and Support Vector
Machine", NeurIPS 2021 (arXiv:2111.06063): no intercept, one problem a class against the rest.
"""

# %%
# Two data sets, two pipelines, grids of equal size.
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sciml.kernels import NTK, KernelMachineClassifier

warnings.filterwarnings("error", module="sciml")  # every machine converges, or we hear of it

C = [1.0, 10.0, 100.0]
models = {
    "NTK machine": (
        make_pipeline(StandardScaler(), KernelMachineClassifier(NTK())),
        {
            "kernelmachineclassifier__kernel__depth": [1, 2, 4],
            "kernelmachineclassifier__C": C,
        },
    ),
    "RBF SVC": (
        make_pipeline(StandardScaler(), SVC()),
        {"svc__gamma": [0.003, 0.01, 0.03], "svc__C": C},
    ),
}
data_sets = {
    "digits": load_digits(return_X_y=True),
    "breast_cancer": load_breast_cancer(return_X_y=True),
}

# %%
# Nested cross-validation
# -----------------------
# Five outer folds measure, three inner folds choose.
outer = StratifiedKFold(5, shuffle=True, random_state=0)
inner = StratifiedKFold(3, shuffle=True, random_state=0)
scores = {}
print(f"{'data':>14} {'model':>12}  accuracy        seconds  chosen (fold by fold)")
for data_name, (X, y) in data_sets.items():
    for model_name, (pipeline, grid) in models.items():
        search = GridSearchCV(pipeline, grid, cv=inner)
        start = time.perf_counter()
        result = cross_validate(search, X, y, cv=outer, return_estimator=True)
        seconds = time.perf_counter() - start
        accuracy = scores[data_name, model_name] = result["test_score"]
        chosen = [tuple(e.best_params_[key] for key in grid) for e in result["estimator"]]
        print(
            f"{data_name:>14} {model_name:>12}  {accuracy.mean():.4f} ± {accuracy.std():.4f} "
            f"{seconds:7.1f}  {chosen}"
        )

# %%
# How accuracy depends on depth and C
# -----------------------------------
# The search on all data, without outer folds. A deeper kernel is smaller (its diagonal for depth H
# is proportional to (H + 1) / 2^H), so depth 4 asks for a larger C; given that, depth matters
# little on these data.
fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for ax, (data_name, (X, y)) in zip(axes, data_sets.items(), strict=True):
    pipeline, grid = models["NTK machine"]
    search = GridSearchCV(pipeline, grid, cv=inner).fit(X, y)
    table = search.cv_results_["mean_test_score"].reshape(len(C), -1)  # C varies slowest
    for c, row in zip(C, table, strict=True):
        ax.plot(grid["kernelmachineclassifier__kernel__depth"], row, "o-", label=f"C = {c:g}")
        print(f"{data_name:>14} C = {c:<5g} depths 1, 2, 4: {row.round(4)}")
    ax.axhline(np.mean(scores[data_name, "RBF SVC"]), color="k", ls=":", label="RBF SVC (nested)")
    ax.set(title=data_name, xlabel="hidden layers", ylabel="accuracy (3 folds)", xscale="log")
    ax.set_xticks([1, 2, 4], ["1", "2", "4"])
    ax.minorticks_off()
    print(f"{data_name}: best of all {search.best_score_:.4f} at {search.best_params_}")
axes[0].legend(fontsize=8)
fig.savefig("ntk_model_selection.png")
plt.show()
