"""Peak memory and time on a generated graph of the size of ogbn-arxiv, against backpropagation.

169,343 nodes, 1,166,243 undirected links (twice as many directed edges), 128 features, 40 classes.
Every training runs in a process of its own, whose peak resident memory is the whole process:
interpreter, libraries and graph. CPU time hardly depends on what else the machine is doing.

    python benchmarks/graphs/bench_arxiv_size.py [--epochs 10]
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from torch_geometric.data import Data
from torch_geometric.nn import GCN
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import to_torch_csr_tensor

from sciml.graphs import ForwardGNNClassifier

NODES, LINKS, FEATURES, CLASSES = 169_343, 1_166_243, 128, 40


def make_graph():
    """Random graph in which 65 % of the links join nodes of one class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (NODES,), generator=generator)
    order = y.argsort()
    counts = y.bincount(minlength=CLASSES)
    starts = counts.cumsum(0) - counts
    source = torch.randint(NODES, (LINKS,), generator=generator)
    within = torch.rand(LINKS, generator=generator)
    friend = order[starts[y[source]] + (within * counts[y[source]]).long()]
    stranger = torch.randint(NODES, (LINKS,), generator=generator)
    same = torch.rand(LINKS, generator=generator) < 0.65
    target = torch.where(same, friend, stranger)
    edge_index = torch.stack([torch.cat([source, target]), torch.cat([target, source])])
    means = torch.randn(CLASSES, FEATURES, generator=generator)
    x = 0.3 * means[y] + torch.randn(NODES, FEATURES, generator=generator)
    part = torch.rand(NODES, generator=generator)
    return Data(
        x=x,
        edge_index=edge_index,
        y=y,
        train_mask=part < 0.54,
        val_mask=(part >= 0.54) & (part < 0.72),
        test_mask=part >= 0.72,
    )


def work(kind, layers, epochs):
    data = make_graph()
    start, cpu_start = time.perf_counter(), time.process_time()
    if kind.startswith("sf"):
        model = ForwardGNNClassifier(
            num_layers=layers,
            max_epochs=epochs,
            patience=epochs,
            random_state=0,
            batch_size=8192 if kind == "sf_minibatch" else None,
        ).fit(data)
        accuracy = model.score(data)
    else:
        torch.manual_seed(0)
        model = GCN(FEATURES, 128, layers, CLASSES, cached=True)
        edges = data.edge_index
        if kind == "backprop_csr":
            edges, weight = gcn_norm(data.edge_index, num_nodes=NODES)
            edges = to_torch_csr_tensor(edges, weight, size=(NODES, NODES))
            model = GCN(FEATURES, 128, layers, CLASSES, normalize=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-4)
        for epoch in range(1, epochs + 1):
            optimizer.zero_grad()
            logits = model(data.x, edges)
            loss = torch.nn.functional.cross_entropy(
                logits[data.train_mask], data.y[data.train_mask]
            )
            loss.backward()
            optimizer.step()
            if epoch % 2 == 0:
                with torch.no_grad():
                    right = model(data.x, edges).argmax(1) == data.y
        accuracy = right[data.test_mask].float().mean().item()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    with open("/proc/self/status") as status:  # getrusage's maximum is inherited from the parent
        peak = next(int(line.split()[1]) / 2**20 for line in status if line.startswith("VmHWM"))
    result = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak}
    print(json.dumps(result | {"accuracy": accuracy}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--worker", nargs=2)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], int(args.worker[1]), args.epochs)
        sys.exit()
    results = {}
    for kind, layers in [
        ("sf", 3),
        ("sf_minibatch", 3),
        ("sf", 4),
        ("backprop", 4),
        ("backprop_csr", 4),
    ]:
        command = [
            sys.executable,
            __file__,
            "--epochs",
            str(args.epochs),
            "--worker",
            kind,
            str(layers),
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        got = results[kind, layers] = json.loads(out.splitlines()[-1])
        print(
            f"{kind:13s} L={layers}: {got['seconds']:6.1f} s ({got['cpu_seconds']:.1f} s of CPU), "
            f"peak {got['peak_gib']:.2f} GiB, "
            f"test accuracy {got['accuracy']:.3f} after {args.epochs} epochs",
            flush=True,
        )
    ours = results["sf", 4]
    for kind in ("backprop", "backprop_csr"):
        wall, cpu = (results[kind, 4][key] / ours[key] for key in ("seconds", "cpu_seconds"))
        print(f"end to end, 4 layers: {kind} / sf = {wall:.2f} (CPU time {cpu:.2f})")
    assert results["sf", 3]["peak_gib"] < 4
