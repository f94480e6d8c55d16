"""
Masked inputs against over-fitting
==================================

A small corpus is read many times, and strong weight decay delays over-fitting. A second next-token
loss, on inputs in which some tokens are masked, adds to that. Masked inputs cost a second pass, so
the honest control gives the plain run twice the steps as well: it over-fits with them.
"""

import matplotlib.pyplot as plt
import torch

from sciml.lm import (
    byte_language_model,
    encode_bytes,
    english_text,
    mask_inputs,
    mir_loss,
    perplexity,
    split_weight_decay,
)

MASK = 258  # a row of the embedding that no text uses
ids = encode_bytes(english_text())
corpus, held_out = ids[:40_000], ids[-16_000:]
windows = corpus[: len(corpus) // 128 * 128].view(-1, 128)


def train(mir_weight, n_epochs):
    """Held-out loss in nats a byte after each second epoch."""
    model = byte_language_model(96, 3, random_state=0)
    groups = split_weight_decay(model, weight_decay=3.0)
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    n_steps = n_epochs * -(-len(windows) // 16)
    warm_down = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 5, (n_steps - step) / (0.3 * n_steps))
    )
    generator = torch.Generator().manual_seed(0)
    curve = []
    for epoch in range(n_epochs):
        for batch in windows[torch.randperm(len(windows), generator=generator)].split(16):
            model.train()
            logits = model(input_ids=batch).logits
            if mir_weight:
                masked, _ = mask_inputs(batch, MASK, generator=generator)
                masked_logits = model(input_ids=masked).logits
                loss = mir_loss(logits, masked_logits, batch, weight=mir_weight)
            else:
                loss = model.loss_function(logits=logits, labels=batch, vocab_size=259)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warm_down.step()
        if epoch % 2:
            model.eval()
            curve.append(torch.tensor(perplexity(model, held_out)).log().item())
    return curve


# %%
# Train: plain, plain for twice as long, with masked inputs.
arms = {"plain": (0.0, 16), "plain, twice the steps": (0.0, 32), "masked inputs": (0.4, 16)}
figure, ax = plt.subplots(figsize=(6, 3.8))
for name, (mir_weight, n_epochs) in arms.items():
    curve = train(mir_weight, n_epochs)
    print(f"{name:24s} best {min(curve):.3f}, last {curve[-1]:.3f} nats a byte")
    passes = (2 if mir_weight else 1) * torch.arange(2, n_epochs + 1, 2)
    ax.plot(passes, curve, label=name)
ax.set(xlabel="passes over the corpus (masked passes count)", ylabel="held-out nats a byte")
ax.legend()
figure.tight_layout()
plt.show()
