"""Train a sweep of tiny byte-level transformers on repeated data: losses to judge laws by.

    python benchmarks/lm/train_sweep.py scaling --text TEXT --out sweep.jsonl
    python benchmarks/lm/train_sweep.py mir     --text TEXT --out mir.jsonl

Each line of the output is one run: width, parameters, unique bytes, epochs, weight decay, masked
weight, seed, and the validation loss in nats a byte, at the end and at its best. The recipe is
that of the data-constrained pre-training paper in small: AdamW (0.9, 0.95), decay of linear weights
only, warm-up, constant rate, warm-down; pre-norm blocks with rotary positions, q/k-norm and
SwiGLU. A GPU is used when there is one. `compare_scaling_laws.py` reads the lines.
"""

import argparse
import itertools
import json
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from sciml.lm.mir import mask_inputs, split_weight_decay

MASK = 256
LENGTH = 128
BATCH = 16
RATES = {16: 8e-3, 32: 6e-3, 64: 4e-3, 96: 3e-3}


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        hidden = 8 * width // 3 // 16 * 16
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(rotate(z, cos, sin), z.shape[-1:]) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(b, t, d)))
        a, g = self.gate(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(g) * a)


def rotate(z, cos, sin):
    a, b = z.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class ByteTransformer(nn.Module):
    def __init__(self, width, layers=3):
        super().__init__()
        heads = max(2, width // 32)
        self.embed = nn.Embedding(257, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 257, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.embed.weight, std=1 / width)
        angle = torch.arange(LENGTH)[:, None] / 10000 ** (
            torch.arange(0, width // heads, 2) / (width // heads)
        )
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def scale(n):
    """Factor of the rate at each of n steps: warm-up, constant, warm-down."""
    i = torch.arange(n)
    warm, down = max(1, round(0.01 * n)), max(1, round(0.3 * n))
    q = ((n - i) / down).clamp(max=1)
    return torch.where(i < warm, (i + 1) / warm, q + (1 - q) * 0.01)


class Trainer:
    """Trains runs of one width and masked weight, one after the other.

    On a GPU one step is captured and replayed: at this size launches cost more than the work.
    Data, order, rate and decay of a run are therefore read from tensors that stay in place.
    """

    def __init__(self, width, mir_weight, data, valid, device, max_steps):
        self.width, self.device = width, device
        self.model = ByteTransformer(width).to(device)
        self.data, self.valid = data.view(-1, LENGTH).to(device), valid.to(device)
        self.picks = torch.zeros(max_steps, BATCH, dtype=torch.long, device=device)
        self.rates = torch.zeros(max_steps, device=device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=device)
        self.decay = torch.zeros((), device=device)
        self.mir_weight = mir_weight
        self.decayed = split_weight_decay(self.model, 1.0)[0]["params"]
        self.moments = [torch.zeros(2, *p.shape, device=device) for p in self.model.parameters()]
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.graph, self.stream = None, None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream()
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    self._step()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._step()

    def _step(self):
        rate = self.rates[self.step_index].squeeze()
        batch = self.data[self.picks[self.step_index].squeeze(0)]
        target = batch[:, 1:].reshape(-1)

        def loss_of(ids):
            return F.cross_entropy(self.model(ids)[:, :-1].reshape(-1, 257), target)

        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters]
        torch._foreach_zero_(gradients)
        loss_of(batch).backward()
        if self.mir_weight:
            masked, _ = mask_inputs(batch, MASK)
            (self.mir_weight * loss_of(masked)).backward()
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        with torch.no_grad():  # AdamW, its rate and decay read from tensors
            torch._foreach_mul_(gradients, (1 / (norm + 1e-6)).clamp(max=1))
            for p in self.decayed:
                p.mul_(1 - rate * self.decay)
            first, second = ([m[k] for m in self.moments] for k in (0, 1))
            torch._foreach_lerp_(first, gradients, 0.1)
            torch._foreach_mul_(second, 0.95)
            torch._foreach_addcmul_(second, gradients, gradients, 0.05)
            t = (self.step_index + 1).squeeze()
            root = torch._foreach_div(second, 1 - 0.95**t)
            torch._foreach_sqrt_(root)
            torch._foreach_add_(root, 1e-8)
            update = torch._foreach_div(first, root)
            torch._foreach_mul_(update, rate / (1 - 0.9**t))
            torch._foreach_sub_(parameters, update)
            self.step_index += 1

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        logits = self.model(self.valid)[:, :-1]
        self.model.train()
        return F.cross_entropy(logits.reshape(-1, 257), self.valid[:, 1:].reshape(-1))

    def run(self, run):
        """A generator that advances a few steps at a time and ends with the result."""
        torch.manual_seed(run["seed"])
        fresh = ByteTransformer(self.width)
        order = torch.Generator().manual_seed(run["seed"])
        n_windows = run["unique"] // LENGTH
        n_steps = max(2, round(run["epochs"] * n_windows / BATCH))
        picks = [torch.randperm(n_windows, generator=order) for _ in range(run["epochs"] + 1)]
        with torch.cuda.stream(self.stream):  # None on a CPU: no stream
            self.model.load_state_dict(fresh.state_dict())
            for m in self.moments:
                m.zero_()
            self.step_index.zero_()
            self.picks[:n_steps] = torch.cat(picks)[: n_steps * BATCH].view(-1, BATCH)
            self.rates[:n_steps] = RATES[self.width] * scale(n_steps)
            self.decay.fill_(run["weight_decay"])
            losses, every = [], max(10, n_steps // 12)
            for i in range(n_steps):
                with torch.cuda.stream(self.stream):
                    self.graph.replay() if self.graph else self._step()
                    if (i + 1) % every == 0 or i + 1 == n_steps:
                        losses.append(self.evaluate())
                if i % 8 == 7:
                    yield None
            losses = torch.stack(losses).tolist()
        n_parameters = sum(p.numel() for p in self.model.parameters())
        yield {
            **run,
            "parameters": n_parameters,
            "steps": n_steps,
            "loss": losses[-1],
            "best": min(losses),
        }


def scaling_runs():
    """Three sizes on four corpora, from few epochs to past the best."""
    for width, unique in itertools.product((16, 32, 64), (5_000, 10_000, 20_000, 40_000)):
        for epochs in (4, 8, 16, 32):
            if unique * epochs <= 640_000:
                yield {
                    "width": width,
                    "unique": unique,
                    "epochs": epochs,
                    "weight_decay": 1.0,
                    "mir_weight": 0.0,
                    "seed": 0,
                }


def mir_runs():
    for seed, decay in itertools.product(range(5), (0.1, 1.0, 3.0)):
        for epochs, weight in ((16, 0.0), (16, 0.4), (32, 0.0)):
            yield {
                "width": 96,
                "unique": 40_000,
                "epochs": epochs,
                "weight_decay": decay,
                "mir_weight": weight,
                "seed": seed,
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("scaling", "mir"))
    parser.add_argument("--text", required=True, help="a text file of at least 450 kB")
    parser.add_argument("--out", required=True)
    parser.add_argument("--concurrent", type=int, default=1, help="runs of a kind at once (GPU)")
    parser.add_argument("--limit", type=int, help="only the first so many runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop then")
    options = parser.parse_args()
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    with open(options.text, "rb") as file:
        text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    valid = text[-128 * LENGTH :].view(128, LENGTH)
    data = text[: 400_000 // LENGTH * LENGTH]
    runs = list(scaling_runs() if options.kind == "scaling" else mir_runs())[: options.limit]
    queues = {}
    for run in runs:
        queues.setdefault((run["width"], run["mir_weight"]), []).append(run)
    for queue in queues.values():
        queue.sort(key=lambda run: run["unique"] * run["epochs"])
    max_steps = max(run["unique"] * run["epochs"] for run in runs) // (LENGTH * BATCH) + 1
    active = [
        [key, Trainer(*key, data, valid, device, max_steps), None]
        for key, queue in queues.items()
        for _ in range(min(options.concurrent, len(queue)))
    ]
    print(f"{len(runs)} runs, ready after {time.perf_counter() - started:.0f} s", flush=True)
    bar = tqdm(total=len(runs), mininterval=5)
    with open(options.out, "a") as file:
        while active and time.perf_counter() - started < options.seconds:
            for slot in list(active):
                key, trainer, run = slot
                if run is None:
                    if not queues[key]:
                        active.remove(slot)
                        continue
                    slot[2] = run = trainer.run(queues[key].pop())
                if (result := next(run)) is not None:
                    slot[2] = None
                    print(json.dumps(result), file=file, flush=True)
                    bar.update()
    bar.close()
    print(f"{options.kind}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
