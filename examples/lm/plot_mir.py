"""
Masked inputs against over-fitting
==================================

A small corpus is read many times. Strong weight decay delays over-fitting; a second next-token
loss, on inputs in which some tokens are masked, delays it further. The third line is the honest
control: masked inputs cost a second pass, so the plain run gets twice the steps as well.
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
corpus, held_out = ids[:30_000], ids[-12_800:]
windows = corpus[: len(corpus) // 128 * 128].view(-1, 128)


def train(weight_decay, mir_weight, n_epochs):
    """Held-out loss in nats a byte after each second epoch."""
    model = byte_language_model(64, 2, random_state=0)
    groups = split_weight_decay(model, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    curve = []
    for epoch in range(n_epochs):
        for batch in windows[torch.randperm(len(windows), generator=generator)].split(16):
            model.train()
            masked, _ = mask_inputs(batch, MASK, generator=generator)
            logits = model(input_ids=batch).logits
            if mir_weight:
                masked_logits = model(input_ids=masked).logits
                loss = mir_loss(logits, masked_logits, batch, weight=mir_weight)
            else:
                loss = model.loss_function(logits=logits, labels=batch, vocab_size=259)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if epoch % 2:
            model.eval()
            curve.append(torch.tensor(perplexity(model, held_out)).log().item())
    return curve


# %%
# Train: weak decay, strong decay, strong decay with masked inputs, strong decay for longer.
n_epochs = 28
arms = {
    "decay 0.1": (0.1, 0.0, n_epochs),
    "decay 3": (3.0, 0.0, n_epochs),
    "decay 3, twice the steps": (3.0, 0.0, 2 * n_epochs),
    "decay 3, masked inputs": (3.0, 0.4, n_epochs),
}
figure, ax = plt.subplots(figsize=(6, 3.8))
for name, arm in arms.items():
    curve = train(*arm)
    print(f"{name:26s} best {min(curve):.3f}, last {curve[-1]:.3f} nats a byte")
    passes = (2 if arm[1] else 1) * torch.arange(2, arm[2] + 1, 2)
    ax.plot(passes, curve, label=name)
ax.set(xlabel="passes over the corpus (masked passes count)", ylabel="held-out nats a byte")
ax.legend()
figure.tight_layout()
plt.show()
