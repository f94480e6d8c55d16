"""Judge scaling laws by runs they have not seen.

    python benchmarks/lm/train_sweep.py scaling --text TEXT --out sweep.jsonl
    python benchmarks/lm/compare_scaling_laws.py sweep.jsonl

Each law is fitted to all but the largest models, and to all but the largest corpora, and predicts
what was left out. `DataConstrained` and `Chinchilla` also predict runs of more epochs.
"""

import argparse
import json
import warnings

import numpy as np

from sciml.lm import Chinchilla, DataConstrained, SoftQ


def error(law, X, y, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        law.fit(X[seen], y[seen])
    return np.sqrt(np.mean((law.predict(X[~seen]) - y[~seen]) ** 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="what train_sweep.py wrote")
    with open(parser.parse_args().sweep) as file:
        runs = [json.loads(line) for line in file]
    tuned = {}
    for run in runs:
        key = (run["parameters"], run["unique"])
        tuned[key] = min(tuned.get(key, np.inf), run["loss"])
    X, y = np.array(list(tuned), dtype=float), np.array(list(tuned.values()))
    print(f"{len(runs)} runs; {len(y)} pairs of size and corpus, at their best epochs")
    laws = {
        "Chinchilla": Chinchilla(),
        "SoftQ (tied)": SoftQ(),
        "SoftQ kaplan": SoftQ("kaplan"),
        "SoftQ harmonic": SoftQ("harmonic"),
        "SoftQ free": SoftQ("free"),
    }
    holdouts = {
        "in sample": None,
        "largest model": X[:, 0] < X[:, 0].max(),
        "largest corpus": X[:, 1] < X[:, 1].max(),
        "both": (X[:, 0] < X[:, 0].max()) & (X[:, 1] < X[:, 1].max()),
    }
    print("root mean square error of the loss in nats; fitted to tuned runs")
    print(f"{'':16s}" + "".join(f"{name:>16s}" for name in holdouts))
    for name, law in laws.items():
        row = []
        for seen in holdouts.values():
            if seen is None:
                law.fit(X, y)
                row.append(np.sqrt(np.mean((law.predict(X) - y) ** 2)))
            else:
                row.append(error(law, X, y, seen))
        print(f"{name:16s}" + "".join(f"{value:16.4f}" for value in row))
        law.fit(X, y)
        constants = {k: getattr(law, f"{k}_") for k in ("E", "alpha", "beta")}
        print(f"{'':16s}" + ", ".join(f"{k} {v:.3f}" for k, v in constants.items()), end="")
        print(f", q {law.q_:.2f}" if hasattr(law, "q_") else "")
    print(f"{'a constant':16s}{np.std(y):16.4f}")

    X3 = np.array([[r["parameters"], r["unique"], r["epochs"]] for r in runs], dtype=float)
    y3 = np.array([r["loss"] for r in runs])
    # Past the best number of epochs the loss rises, which neither law can say.
    rising = np.array([r["loss"] > tuned[r["parameters"], r["unique"]] + 0.02 for r in runs])
    best_at = {
        k: min(
            r["epochs"]
            for r in runs
            if (r["parameters"], r["unique"]) == k and r["loss"] == tuned[k]
        )
        for k in tuned
    }
    over = np.array([r["epochs"] > best_at[r["parameters"], r["unique"]] for r in runs])
    kept = ~(rising & over)
    print(f"\nruns by epochs: {kept.sum()} of {len(y3)} not over-trained")
    for title, seen in (
        ("at most 4 epochs seen, more predicted", X3[kept][:, 2] <= 4),
        ("largest corpus predicted", X3[kept][:, 1] < X3[:, 1].max()),
    ):
        print(title)
        for name, law in (("Chinchilla", Chinchilla()), ("DataConstrained", DataConstrained())):
            print(f"  {name:16s}{error(law, X3[kept], y3[kept], seen):10.4f}")


if __name__ == "__main__":
    main()
