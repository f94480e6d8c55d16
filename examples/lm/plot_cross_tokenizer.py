"""
A teacher that splits numerals
==============================

The student has a token for "42", the teacher spells it "4", "2". Distilling across the two
tokenizers by exact matches (GOLD) compares sorted probabilities where a token has no match, and
takes probability away from all of them; P-KL (:func:`~sciml.lm.projected_kl_loss`) projects the
student onto the teacher's vocabulary, where "42" is mostly "4". How much probability is left for
the numeral?

First one span with logits alone, then two byte-pair tokenizers trained on sums in words, a teacher
that has learned the sums and students that only see the teacher.
"""

# %%
# One span. The student scores {a, b, 12, 34, ~} where the text says "12"; the teacher scores
# {a, b, 1, 2, 3, 4, %} and is sure (0.9) of "1", then of "2". Gradient descent on the logits.
import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sciml.lm import (
    HiddenLogits,
    TokenProjection,
    align_texts,
    build_token_projection,
    combine,
    coverage_report,
    hybrid_kl_loss,
    label_logp,
    next_token_labels,
    projected_kl_loss,
    reduce_rows,
    sum_rows,
    token_bytes,
    uld_loss,
)

span = torch.full((1, 2, 7), 0.1 / 6)
span[0, 0, 2] = span[0, 1, 3] = 0.9
one_chunk = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
by_hand = TokenProjection(
    torch.tensor([[0, -1], [1, -1], [2, 3], [4, 5], [-1, -1]]),
    torch.tensor([[1, 0], [1, 0], [10 / 11, 1 / 11], [10 / 11, 1 / 11], [0, 0]]),
    n_teacher_tokens=7,
)
SPAN_LOSSES = {
    "P-KL": projected_kl_loss,
    "GOLD": lambda *inputs, **options: hybrid_kl_loss(*inputs, threshold=1.0, **options),
}
one_span = {}
for name, loss in SPAN_LOSSES.items():
    logits = torch.zeros(1, 1, 5, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        loss(logits, span.log(), *one_chunk, by_hand, shift=False).backward()
        optimizer.step()
    one_span[name] = logits.detach().softmax(-1)[0, 0].tolist()
    named = zip(("a", "b", "12", "34", "~"), one_span[name], strict=True)
    print(f"one span, {name}:", ", ".join(f"P({token}) {p:.2f}" for token, p in named))

# %%
# Now tokenizers. Both are byte-pair encodings of the same text; the teacher's cuts digits apart.
N_SUMS, HIDDEN = 48, 64
generator = torch.Generator().manual_seed(0)
operands = torch.randint(10, 50, (N_SUMS, 2), generator=generator).tolist()
texts = [f"The sum of {a} and {b} is {a + b}." for a, b in operands]


def bpe(individual_digits: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=individual_digits),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


tokenizers = bpe(individual_digits=False), bpe(individual_digits=True)
projection = build_token_projection(*tokenizers)
for kind, row in coverage_report(projection, tokenizers[0]).items():
    print(f"{kind:8} {row['n_tokens']:3.0f} tokens: {row['exact']:.0%} exact, {row['common']:.0%} "
          f"common at 0.6, {row['projected']:.0%} projected")  # fmt: skip
batch = align_texts(texts, *tokenizers)

# %%
# The numeral that follows "is" can be known. It is the last token but one of each text.
labels = torch.where(batch.student_mask > 0, batch.student_ids, -100)
answer = batch.student_mask.sum(1) - 2
spelled = token_bytes(tokenizers[0])
assert spelled[int(batch.student_ids[0, answer[0]])] == str(sum(operands[0])).encode()
answer_labels = torch.full_like(labels, -100)
answer_labels.scatter_(1, answer[:, None], labels.gather(1, answer[:, None]))


class Recurrent(nn.Module):
    """A small recurrent language model that gives hidden states and output layer."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, HIDDEN)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, n_tokens)

    def forward(self, ids: Tensor) -> HiddenLogits:
        return HiddenLogits(self.gru(self.embedding(ids))[0], self.head.weight, self.head.bias)


def train(model, objective, n_steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(n_steps):
        optimizer.zero_grad()
        objective(model).backward()
        optimizer.step()
    return model


def cross_entropy(model):
    ids, mask = batch.teacher_ids, batch.teacher_mask
    targets = next_token_labels(torch.where(mask > 0, ids, -100))
    weights = (targets >= 0) / (targets >= 0).sum()
    total, _ = sum_rows(label_logp, model(ids), targets, weights=weights, mask=targets >= 0)
    return -total


def any_numeral(z: Tensor):
    """Log-probability that a row gives to all numerals together; only looked at, not trained."""
    return z.log_softmax(-1)[:, is_numeral].logsumexp(-1, keepdim=True), torch.zeros_like


is_numeral = torch.tensor([text.isdigit() and len(text) > 1 for text in spelled])


@torch.no_grad()
def probabilities(model) -> tuple[float, float]:
    """Mean probability, where the answer stands, of any numeral and of the right one."""
    logits, targets = model(batch.student_ids), next_token_labels(answer_labels)
    values = reduce_rows(
        combine((any_numeral, []), (label_logp, [0])), logits, targets, mask=targets >= 0
    )
    numeral, right = values[targets >= 0].exp().mean(0).tolist()
    return numeral, right


# %%
# Students are trained on the distillation loss alone, with no cross entropy on the text, so that
# what they know of numerals comes from the teacher.
LOSSES = {
    "P-KL": lambda s, t, c: projected_kl_loss(s, t, *c, projection),
    "H-KL": lambda s, t, c: hybrid_kl_loss(s, t, *c, projection, threshold=0.6),
    "GOLD": lambda s, t, c: hybrid_kl_loss(s, t, *c, projection, threshold=1.0),
    "ULD": lambda s, t, c: uld_loss(
        s, t, *c, student_ids=batch.student_ids, teacher_ids=batch.teacher_ids
    ),
}
chunks = batch.student_chunks, batch.teacher_chunks
results: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
for seed in range(3):
    torch.manual_seed(seed)
    teacher = train(Recurrent(projection.n_teacher_tokens), cross_entropy, 150)
    with torch.no_grad():
        theirs = teacher(batch.teacher_ids)
    for name, loss in LOSSES.items():
        torch.manual_seed(100 + seed)
        student = train(
            Recurrent(projection.n_student_tokens),
            lambda model, loss=loss, theirs=theirs: loss(model(batch.student_ids), theirs, chunks),
            150,
        )
        results[name].append(probabilities(student))
    print(f"seed {seed}: P(a numeral), P(the right one)", end="")
    for name, values in results.items():
        print(f"; {name} {values[-1][0]:.3f}, {values[-1][1]:.3f}", end="")
    print(flush=True)

# %%
# Under GOLD and H-KL the mass goes to single digits, which both vocabularies have; ULD is sure of a
# numeral, but of any. P-KL stays with the numerals and leans to the right one. Only leans: the mean
# over a chunk's rows forgets the order of the digits, "42" from "24", and where the teacher is sure
# of every digit the mean of its log-probabilities leaves little mass to match. The rest is for the
# cross entropy on the text, which :class:`~sciml.lm.CrossTokenizerDistillationLoss` adds.
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for i, (name, values) in enumerate(one_span.items()):
    axes[0].bar([x + 0.4 * i for x in range(5)], values, 0.4, label=name)
axes[0].set_xticks([x + 0.2 for x in range(5)], ["a", "b", "12", "34", "~"])
axes[0].set(title="one span that says 12", ylabel="probability")
axes[0].legend()
for i, label in enumerate(("a numeral", "the right one")):
    means = [sum(pair[i] for pair in pairs) / len(pairs) for pairs in results.values()]
    axes[1].bar([x + 0.4 * i for x in range(len(means))], means, 0.4, label=label)
axes[1].set_xticks([x + 0.2 for x in range(len(results))], list(results))
axes[1].set(title="where a sum stands, mean of 3 seeds", ylim=(0, 1))
axes[1].legend()
fig.savefig("cross_tokenizer.png")
plt.show()
