"""Epochs per second of single-forward training against a plain implementation of the same.

The plain one runs the convolution over all edges in every epoch and all layers again in every
validation. The graph is generated with the numbers of Cora: 2,708 nodes, 10,556 edges, 1,433 words
of which 1.3 % are non-zero, 7 classes. Both take turns; medians are compared.

    python benchmarks/graphs/bench_epochs.py
"""

import statistics
import time

import torch
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv
from torch_geometric.utils import to_undirected

from sciml.graphs import ForwardGNNClassifier, add_class_nodes, unit_rows


def make_graph():
    generator = torch.Generator().manual_seed(0)
    n, words, classes = 2708, 1433, 7
    y = torch.randint(classes, (n,), generator=generator)
    likely = 0.013 * (0.5 + torch.rand(classes, words, generator=generator))
    x = (torch.rand(n, words, generator=generator) < likely[y]).float()
    x = x / x.sum(1, keepdim=True).clamp(min=1)
    source = torch.randint(n, (20 * 5278,), generator=generator)
    target = torch.randint(n, (20 * 5278,), generator=generator)
    keep = (y[source] == y[target]) | (torch.rand(len(source), generator=generator) < 0.04)
    edges = to_undirected(torch.stack([source, target])[:, keep][:, :5278])
    part = torch.rand(n, generator=generator)
    return Data(
        x=x,
        edge_index=edges,
        y=y,
        train_mask=part < 0.64,
        val_mask=(part >= 0.64) & (part < 0.8),
        test_mask=part >= 0.8,
    )


def plain(data, epochs, layers=2):
    torch.manual_seed(0)
    augmented = add_class_nodes(data, random_state=0)
    n, edges = data.num_nodes, augmented.edge_index
    convs = torch.nn.ModuleList(
        GCNConv(w, 128) for w in [data.num_features, 128, 128, 128][:layers]
    )
    frozen = augmented.x

    def logits(z):
        return z[:n] @ z[n:].T

    for layer, conv in enumerate(convs):
        optimizer = torch.optim.Adam(conv.parameters(), lr=1e-3, weight_decay=5e-4)
        for epoch in range(epochs):
            optimizer.zero_grad()
            out = logits(conv(unit_rows(frozen), edges).relu())
            loss = torch.nn.functional.cross_entropy(out[data.train_mask], data.y[data.train_mask])
            loss.backward()
            optimizer.step()
            if epoch % 2:
                with torch.no_grad():
                    h, total = augmented.x, 0
                    for earlier in convs[: layer + 1]:
                        h = earlier(unit_rows(h), edges).relu()
                        total = total + logits(h).softmax(1)
                    (total.argmax(1) == data.y)[data.val_mask].float().mean().item()
        with torch.no_grad():
            frozen = conv(unit_rows(frozen), edges).relu()


def ours(data, epochs, layers=2):
    ForwardGNNClassifier(num_layers=layers, max_epochs=epochs, patience=epochs, random_state=0).fit(
        data
    )


if __name__ == "__main__":
    data, epochs = make_graph(), 30
    for layers in (2, 4):
        seconds = {plain: [], ours: []}
        cpu_seconds = {plain: [], ours: []}
        for _ in range(4):
            for run in seconds:
                start, cpu_start = time.perf_counter(), time.process_time()
                run(data, epochs, layers)
                seconds[run].append(time.perf_counter() - start)
                cpu_seconds[run].append(time.process_time() - cpu_start)
        rates = {run: layers * epochs / statistics.median(t[1:]) for run, t in seconds.items()}
        cpu = {run: statistics.median(t[1:]) for run, t in cpu_seconds.items()}
        print(
            f"{layers} layers: ours {rates[ours]:.1f} epochs/s, plain {rates[plain]:.1f}, "
            f"ratio {rates[ours] / rates[plain]:.2f} (of CPU time {cpu[plain] / cpu[ours]:.2f})",
            flush=True,
        )
