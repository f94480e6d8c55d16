import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sciml.lm import (
    RuleAnnotator,
    SpanAnnotation,
    TraceLoss,
    TraceTrainer,
    grpo_advantages,
    pointwise_clipped_kl,
)

VOCABULARY, EOS, PAD, HINT = 12, 10, 11, 9
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8]]
REFERENCES = [0, 1, 0, 1]


def llama(seed=0):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 9
    return model


def verifier(response, reference):
    return int(response[0]) % 2 == reference


def annotate(prompt, segments, correct, reference):
    return SpanAnnotation((0,), "key" if correct else "error", "parity")


def add_hint(prompt, diagnostic_type):
    return [HINT, *prompt]


def trainer(policy, kind=TraceTrainer, **options):
    arguments = {
        "annotator": annotate,
        "hint": add_hint,
        "group_size": 4,
        "max_new_tokens": 6,
        "learning_rate": 1e-2,
        "random_state": 0,
    } | options
    return kind(policy, verifier, **arguments)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Recorder(TraceTrainer):
    """Keeps the batches and what the teacher said."""

    def compute_loss(self, batch, student_logits, teacher_logits, num_items_in_batch):
        if not hasattr(self, "seen"):
            self.seen = []
        self.seen.append((batch, teacher_logits))
        return super().compute_loss(batch, student_logits, teacher_logits, num_items_in_batch)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_step_equals_a_loop_over_responses(micro_batch_size):
    policy, twin, teacher = llama(), llama(), llama()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    fitted = trainer(
        policy,
        Recorder,
        optimizer=optimizer,
        max_grad_norm=None,
        loss=TraceLoss(error_action="reverse"),
        max_coverage=0.5,
    )
    fitted.fit(PROMPTS, REFERENCES, n_steps=1, batch_size=8, micro_batch_size=micro_batch_size)
    rewards, responses, prompts = [], [], []
    for batch, _ in fitted.seen:
        for row, i in enumerate(batch.index):
            responses.append(batch.labels[row][batch.response_mask[row]].tolist())
            prompts.append(PROMPTS[i])
            rewards.append(float(verifier(responses[-1], REFERENCES[i])))
    assert prompts[0] == prompts[3] != prompts[4] == prompts[7]
    advantages = grpo_advantages(torch.tensor(rewards), 4)
    total, n_marked = 0, 0
    for prompt, response, reward, advantage in zip(
        prompts, responses, rewards, advantages, strict=True
    ):
        ids = torch.tensor([prompt + response])
        logits = twin(ids).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)[torch.arange(len(response)), response]
        policy_loss = -advantage * (logps - logps.detach()).exp()
        if len(response) > 1:  # half of a single token is none
            hinted = torch.tensor([[HINT, *prompt, *response]])
            with torch.no_grad():
                theirs = teacher(hinted).logits[0, len(prompt)]
            direction = "forward" if reward else "reverse"
            kl = pointwise_clipped_kl(logits[:1], theirs[None], direction=direction)
            each = torch.cat([0.5 * kl[None], policy_loss[1:]])
            n_marked += 1
        else:
            each = policy_loss
        total = total + each.mean() / 8
    total.backward()
    (entry,) = fitted.history_
    assert entry["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
    assert entry["reward"] == pytest.approx(np.mean(rewards))
    assert 0 < entry["reward"] < 1
    assert entry["coverage"] == pytest.approx(n_marked / sum(map(len, responses)))
    assert entry["kl_weight"] == 0.5
    assert entry["policy_loss"] + 0.5 * entry["kl"] == pytest.approx(entry["loss"], abs=1e-6)
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.1 * p.grad
    torch.testing.assert_close(weights(policy), weights(twin), rtol=1e-4, atol=1e-5)
    assert torch.equal(weights(fitted.teacher), weights(teacher))  # frozen


def test_the_teacher_is_a_copy_renewed_when_due_and_stops_with_its_weight():
    policy = llama()
    states, called = [], []

    class Watched(Recorder):
        def on_step_start(self, step):
            super().on_step_start(step)
            states.append((weights(self.student), weights(self.teacher)))

    def annotator(*arguments):
        called.append(arguments)
        return annotate(*arguments)

    loss = TraceLoss(warmup=3, decay=3)
    fitted = trainer(policy, Watched, annotator=annotator, loss=loss, sync_every=2)
    fitted.fit(PROMPTS, REFERENCES, n_steps=8, batch_size=8)
    for step in range(0, 6, 2):
        assert torch.equal(*states[step])
        assert not torch.equal(*states[step + 1])
        assert torch.equal(states[step][1], states[step + 1][1])
    assert torch.equal(states[5][1], states[7][1])  # not renewed any more
    for batch, teacher_logits in fitted.seen:
        marked = bool(batch.key_mask.any())
        assert (teacher_logits is not None) == marked
        assert not (marked and batch.step >= 6)
        assert not batch.error_mask.any()  # TRACE-FKL has no action for wrong responses
    weights_seen = [entry["kl_weight"] for entry in fitted.history_]
    assert weights_seen == pytest.approx([0.5, 0.5, 0.5, 0.5, 1 / 3, 1 / 6, 0, 0])
    n_right = sum(round(8 * entry["reward"]) for entry in fitted.history_[:6])
    assert len(called) == n_right  # right responses only, and only while it matters


def test_without_an_annotator_it_is_grpo_without_a_second_model():
    policy = llama()
    fitted = trainer(policy, annotator=None, learning_rate=3e-2)
    assert fitted.teacher is policy
    fitted.fit(
        PROMPTS,
        REFERENCES,
        n_steps=30,
        batch_size=16,
        validation_prompts=PROMPTS,
        metric=lambda prompts, responses: {"length": float(np.mean([len(r) for r in responses]))},
    )
    rewards = [entry["reward"] for entry in fitted.history_[1:]]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert fitted.history_[-1]["val_entropy"] < fitted.history_[0]["val_entropy"]
    assert "val_length" in fitted.history_[-1]
    assert all(entry["kl"] == 0 for entry in fitted.history_[1:])


def test_an_interrupted_run_resumes_bit_by_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"loss": TraceLoss(warmup=2, decay=4), "sync_every": 3}
    whole = trainer(llama(), **options).fit(PROMPTS, REFERENCES, n_steps=5, batch_size=8)
    first = trainer(llama(), **options)
    first.fit(PROMPTS, REFERENCES, n_steps=2, batch_size=8, checkpoint=path)
    # Between two copies the teacher is older than the policy: the checkpoint has both.
    second = trainer(llama(seed=5), **options)
    second.fit(PROMPTS, REFERENCES, n_steps=5, batch_size=8, resume_from=path)
    assert torch.equal(weights(whole.student), weights(second.student))
    assert torch.equal(weights(whole.teacher), weights(second.teacher))
    assert whole.history_ == second.history_


class Tokenizer:
    """Digits and a dot, a token each."""

    eos_token_id, pad_token_id = EOS, PAD

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ["0123456789".index(c) for c in text if c.isdigit()]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join("0123456789"[i] for i in ids if i < 10)


def test_texts_are_cut_into_segments_and_hints_are_texts():
    asked, hinted = [], []

    class Rules(RuleAnnotator):
        def __call__(self, prompt, segments, correct, reference):
            asked.append((prompt, segments, correct, reference))
            return SpanAnnotation((1,) if len(segments) > 1 else (), "key", "4")

    def hint(prompt, diagnostic_type):
        hinted.append(prompt)
        return diagnostic_type + prompt

    fitted = Recorder(
        llama(),
        lambda response, reference: len(response) > reference,
        annotator=Rules(),
        hint=hint,
        segmenter=lambda text: [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)],
        group_size=4,
        max_new_tokens=8,
        tokenizer=Tokenizer(),
        random_state=0,
    )
    fitted.fit(["12", "345"], [3, 3], n_steps=1, batch_size=8)
    assert asked
    assert all(prompt in ("12", "345") for prompt, *_ in asked)
    assert all(max(map(len, segments)) <= 2 for _, segments, _, _ in asked)
    (batch, _), *_ = fitted.seen
    for row, prompt in enumerate(batch.hinted_prompts):
        marked = batch.key_mask[row].nonzero().flatten().tolist()
        if prompt is None:
            assert marked == []
        else:
            spelled = (batch.labels[row] < 10) & (batch.labels[row] >= 0)
            assert marked == spelled.nonzero().flatten().tolist()[2:4]
            assert prompt.tolist() in ([4, 1, 2], [4, 3, 4, 5])
    assert hinted


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"group_size": 1}, "group_size"),
        ({"sync_every": 0}, "sync_every"),
        ({"scale_rewards": "batch"}, "scale_rewards"),
        ({"max_coverage": 2.0}, "max_coverage"),
        ({"temperature": 0.0}, "temperature"),
        ({"loss": TraceLoss(temperature=0.5)}, "loss"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        trainer(llama(), **options)


@pytest.mark.parametrize(
    ("options", "fit", "error", "match"),
    [
        ({}, {"batch_size": 6}, ValueError, "batch_size"),
        ({}, {"references": [0]}, ValueError, "references"),
        ({"annotator": lambda *a: ((0,), "key")}, {}, TypeError, "SpanAnnotation"),
        (
            {"annotator": lambda *a: SpanAnnotation((0,), "key", "x")},
            {},
            ValueError,
            "annotator must return kind 'error' for a response that is wrong",
        ),
        (
            {"annotator": lambda p, s, c, r: SpanAnnotation((99,), "key" if c else "error", "x")},
            {},
            ValueError,
            "segments below",
        ),
    ],
)
def test_bad_input(options, fit, error, match):
    loss = TraceLoss(error_action="reverse")
    arguments = {"references": REFERENCES, "n_steps": 1, "batch_size": 8} | fit
    with pytest.raises(error, match=match):
        trainer(llama(), loss=loss, max_coverage=1.0, **options).fit(PROMPTS, **arguments)


def test_a_verifier_must_return_a_reward_in_the_unit_interval_and_ids_need_a_hint():
    for value in (2.0, float("nan")):
        bad = TraceTrainer(llama(), lambda r, s, value=value: value, group_size=4)
        with pytest.raises(ValueError, match="verifier"):
            bad.fit(PROMPTS, REFERENCES, n_steps=1, batch_size=8)
    without = TraceTrainer(llama(), lambda r, s: 1.0, annotator=annotate, max_coverage=1.0)
    with pytest.raises(TypeError, match="hint"):
        without.fit(PROMPTS, REFERENCES, n_steps=1, batch_size=8)
