import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from sciml.lm import (
    DistillationBatch,
    Distiller,
    EntropyGatedLengthCurriculum,
    HiddenLogits,
    TopKLogProbs,
    TwoStageKL,
    generalized_jsd,
    mixed_kl,
    sampled_reverse_kl,
    token_kl,
)

VOCABULARY, EOS, PAD = 12, 10, 11
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 0], [2], [3, 3]]
RESPONSES = [[3, 4, EOS], [5], [6, 7, 8, 9], [1, EOS], [2, 2, EOS], [9, 8]]


def llama(seed, layers=1, scale=3.0, dropout=0.0):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attention_dropout=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= scale / 0.02 / 16  # far from uniform
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def oracle_loss(student, teacher, prompts, responses, kl, average="token"):
    """One sequence at a time, without padding, from logits."""
    each = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, -1)
        ours, theirs = (m(ids).logits[0, rows] for m in (student, teacher))
        each.append(kl(ours, theirs.detach(), reduction="none"))
    if average == "token":
        return torch.cat(each).mean()
    return torch.stack([e.mean() for e in each]).mean()


KLS = {
    "forward_kl": token_kl,
    "reverse_kl": partial(token_kl, direction="reverse"),
    "mixed_kl": mixed_kl,
    "generalized_jsd": partial(generalized_jsd, reduction="mean"),
}


@pytest.mark.parametrize("objective", KLS)
@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_step_equals_a_loop_over_unpadded_sequences(objective, average, micro_batch_size):
    student, teacher, twin = llama(0), llama(1, layers=2), llama(0)
    distiller = Distiller(
        student,
        teacher,
        prefix="teacher",
        objective=objective,
        average=average,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        max_grad_norm=None,
        random_state=0,
    )
    distiller.fit(
        PROMPTS,
        responses=RESPONSES,
        n_steps=1,
        batch_size=len(PROMPTS),
        micro_batch_size=micro_batch_size,
    )
    loss = oracle_loss(twin, teacher, PROMPTS, RESPONSES, KLS[objective], average)
    loss.backward()
    (entry,) = distiller.history_
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["n_tokens"] == sum(len(r) for r in RESPONSES)
    assert entry["generated_tokens"] == 0
    norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.1 * p.grad
    torch.testing.assert_close(weights(student), weights(twin), rtol=1e-4, atol=1e-6)


def test_on_policy_step_trains_on_the_tokens_that_the_student_drew():
    student, teacher, twin = llama(0), llama(1, layers=2), llama(0)
    seen = []

    class Recorder(Distiller):
        def compute_loss(self, batch, *logits):
            seen.append(batch)
            return super().compute_loss(batch, *logits)

    distiller = Recorder(student, teacher, max_new_tokens=5, random_state=0)
    distiller.fit(PROMPTS, n_steps=1, batch_size=6)
    (batch,) = seen
    assert isinstance(batch, DistillationBatch)
    assert batch.prefix == "student"
    prompts = [PROMPTS[i] for i in batch.index]
    responses = []
    for row, prompt in enumerate(prompts):
        ids, mask = batch.input_ids[row], batch.attention_mask[row].bool()
        assert ids[mask][: len(prompt)].tolist() == prompt
        assert batch.position_ids[row][mask].tolist() == list(range(int(mask.sum())))
        response = batch.labels[row][batch.response_mask[row]].tolist()
        assert EOS not in response[:-1]
        assert len(response) == 5 or response[-1] == EOS
        responses.append(response)
    loss = oracle_loss(twin, teacher, prompts, responses, KLS["reverse_kl"])
    assert distiller.history_[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert distiller.n_generated_tokens_ == sum(len(r) for r in responses)


def test_responses_do_not_depend_on_padding():
    model = llama(0, layers=2)
    distiller = Distiller(model, llama(1), sampling_temperature=0.0, random_state=0)
    prompts = [torch.tensor(p) for p in PROMPTS]
    together = distiller.generate(model, prompts, max_new_tokens=6, seed=0)
    for prompt, response in zip(prompts, together, strict=True):
        ids = prompt
        for token in response:  # greedy, without a cache
            assert token == model(ids[None]).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None]])
        assert len(response) == 6 or response[-1] == EOS
        (alone,) = distiller.generate(model, [prompt], max_new_tokens=6, seed=1)
        assert torch.equal(alone, response)


def test_responses_are_drawn_from_the_models_own_distribution():
    model = llama(0, scale=1.0)
    # Settings that would draw from another distribution must not be used.
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    distiller = Distiller(model, llama(1), sampling_temperature=1.5, random_state=0)
    prompt = torch.tensor([1, 2, 3])
    state = torch.get_rng_state()
    drawn = distiller.generate(model, [prompt] * 4000, max_new_tokens=1, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.top_k == 1
    counts = torch.bincount(torch.cat(drawn), minlength=VOCABULARY).double()
    expected = 4000 * (model(prompt[None]).logits[0, -1] / 1.5).softmax(-1).double()
    assert ((counts - expected) ** 2 / expected).sum() < 31.3  # 99.9 % of chi2 with 11 degrees


def fit(student, *, prefix=0.5, n_steps=6, dropout_check=True, **options):
    distiller = Distiller(
        student,
        llama(1, layers=2),
        prefix=prefix,
        objective=TwoStageKL(3, second=partial(mixed_kl, reverse_weight=0.5)),
        curriculum=EntropyGatedLengthCurriculum((2, 3, 4), stage_steps=2, min_entropy=0.01),
        learning_rate=1e-2,
        random_state=0,
        lr_schedule=lambda step: 1 / (1 + step),
    )
    return distiller.fit(
        PROMPTS,
        n_steps=n_steps,
        batch_size=4,
        validation_prompts=PROMPTS[:3],
        validation_every=3,
        **options,
    )


def test_same_seed_same_result_whatever_the_global_state(tmp_path):
    students = [llama(0, dropout=0.2) for _ in range(2)]
    first = fit(students[0])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    second = fit(students[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert first.history_ == second.history_
    assert torch.equal(weights(students[0]), weights(students[1]))
    assert {entry["prefix"] for entry in first.history_[1:]} == {"student", "teacher"}
    assert [e["max_new_tokens"] for e in first.history_] == [2, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_resumed_from_a_checkpoint_equals_the_whole_one(tmp_path, stop):
    whole = llama(0, dropout=0.2)
    expected = fit(whole)
    path = tmp_path / "run.safetensors"
    fit(llama(0, dropout=0.2), n_steps=stop, checkpoint=path)
    other = llama(5, dropout=0.2)
    resumed = fit(other, resume_from=path)
    assert torch.equal(weights(other), weights(whole))

    def trained(entry):  # a shorter run validates at its end too
        return {k: v for k, v in entry.items() if not k.startswith("val_")}

    assert [trained(e) for e in resumed.history_] == [trained(e) for e in expected.history_]
    assert resumed.history_[-1] == expected.history_[-1]
    assert resumed.n_generated_tokens_ == expected.n_generated_tokens_


def test_an_interrupted_run_saves_the_last_whole_step(tmp_path):
    whole = llama(0)
    fit(whole)
    path = tmp_path / "run.safetensors"
    student = llama(0)
    original, calls = Distiller.compute_loss, 0

    def interrupt(self, *args):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "compute_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(student, checkpoint=path)
    resumed = llama(5)
    fit(resumed, resume_from=path)
    assert torch.equal(weights(resumed), weights(whole))


KILLED = """
    import sys
    import torch
    sys.path.insert(0, {folder!r})
    from test_distillation import fit, llama
    fit(llama(0, dropout=0.2), n_steps=4000, checkpoint=sys.argv[1], checkpoint_every=1,
        resume_from=sys.argv[1])
"""


def test_a_killed_run_resumes_bit_by_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    code = textwrap.dedent(KILLED.format(folder=os.path.dirname(__file__)))
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        start = time.monotonic()
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() - start < 120
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = llama(5, dropout=0.2)
    done = fit(resumed, n_steps=1, resume_from=path).history_[-1]["step"]
    n_steps = done + 3
    resumed, whole = llama(5, dropout=0.2), llama(0, dropout=0.2)
    fit(resumed, n_steps=n_steps, resume_from=path)
    fit(whole, n_steps=n_steps)
    assert torch.equal(weights(resumed), weights(whole))


def cached(folder, *, top_k=VOCABULARY, **options):
    student = llama(0)
    distiller = Distiller(
        student,
        llama(1, layers=2),
        prefix="teacher",
        objective="forward_kl",
        max_new_tokens=4,
        learning_rate=1e-2,
        random_state=0,
        **options,
    )
    cache = {} if folder is None else {"teacher_cache": folder, "teacher_top_k": top_k}
    distiller.fit(PROMPTS, n_steps=4, batch_size=4, **cache)
    return student, distiller


def test_teacher_cache_of_the_whole_vocabulary_changes_nothing(tmp_path):
    whole, plain = cached(None)
    student, distiller = cached(tmp_path)
    torch.testing.assert_close(weights(student), weights(whole), rtol=1e-4, atol=1e-5)
    for entry, want in zip(distiller.history_, plain.history_, strict=True):
        assert entry["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert entry["n_tokens"] == want["n_tokens"]


def test_teacher_cache_is_read_instead_of_the_teacher_and_can_be_completed(tmp_path):
    student, _ = cached(tmp_path, top_k=3)
    shards = sorted(tmp_path.iterdir())
    assert [s.name for s in shards] == ["teacher-00000.safetensors", "teacher-00001.safetensors"]
    # Training runs no teacher once the cache is there.
    broken = llama(1, layers=2)
    broken.forward = None
    again = llama(0)
    options = {"prefix": "teacher", "objective": "forward_kl", "max_new_tokens": 4}
    Distiller(again, broken, **options, learning_rate=1e-2, random_state=0).fit(
        PROMPTS, n_steps=4, batch_size=4, teacher_cache=tmp_path, teacher_top_k=3
    )
    assert torch.equal(weights(again), weights(student))
    # A cache whose making was interrupted is completed to the same files.
    content = shards[1].read_bytes()
    shards[1].unlink()
    cached(tmp_path, top_k=3)
    assert shards[1].read_bytes() == content
    with pytest.raises(ValueError, match="teacher_cache.*other top_k"):
        cached(tmp_path, top_k=2)
    # The loss is the coarse one.
    kept = []

    class Recorder(Distiller):
        def compute_loss(self, batch, ours, theirs, items):
            kept.append((batch, theirs))
            return super().compute_loss(batch, ours, theirs, items)

    Recorder(llama(0), llama(1, layers=2), **options, learning_rate=0.0, random_state=0).fit(
        PROMPTS, n_steps=1, batch_size=4, teacher_cache=tmp_path, teacher_top_k=3
    )
    batch, theirs = kept[0]
    assert isinstance(theirs, TopKLogProbs)
    logits = llama(1, layers=2)(
        batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits[:, batch.n_prompt - 1 : -1]
    want = logits.log_softmax(-1).sort(-1, descending=True)
    mask = batch.response_mask
    torch.testing.assert_close(theirs.log_probs[mask], want.values[mask][:, :3], atol=1e-5, rtol=0)
    assert torch.equal(theirs.indices[mask], want.indices[mask][:, :3])


def test_cache_of_given_responses(tmp_path):
    losses = []
    for cache in ({}, {"teacher_cache": tmp_path, "teacher_top_k": VOCABULARY}):
        distiller = Distiller(
            llama(0), llama(1), prefix="teacher", objective="forward_kl", random_state=0
        ).fit(PROMPTS, responses=RESPONSES, n_steps=2, batch_size=4, **cache)
        losses.append([entry["loss"] for entry in distiller.history_])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_validation_measures_the_student():
    student, teacher = llama(0), llama(1, layers=2)

    def metric(prompts, responses):
        assert prompts == PROMPTS
        return {"even": np.mean([int(r[0]) % 2 == 0 for r in responses])}

    distiller = Distiller(student, teacher, max_new_tokens=4, learning_rate=0.0, random_state=0)
    distiller.fit(
        PROMPTS,
        n_steps=1,
        batch_size=4,
        validation_prompts=PROMPTS,
        validation_responses=RESPONSES,
        metric=metric,
    )
    first, last = distiller.history_
    assert first["step"] == 0
    keys = {"val_entropy", "val_forward_kl", "val_reverse_kl", "val_length", "val_nll", "val_even"}
    assert keys <= set(first)
    assert {k: first[k] for k in keys} == {k: last[k] for k in keys}
    nll = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logp = student(torch.tensor([prompt + response])).logits[0].log_softmax(-1).detach()
        nll += [-float(logp[len(prompt) + t - 1, y]) for t, y in enumerate(response)]
    assert first["val_nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    drawn = [
        r.tolist()
        for start in (0, 4)
        for r in distiller.generate(
            student,
            [torch.tensor(p) for p in PROMPTS[start : start + 4]],
            max_new_tokens=4,
            seed=distiller.seed_of("validation", start),
        )
    ]
    assert first["val_length"] == np.mean([len(r) for r in drawn])
    for name, kl in (("val_forward_kl", "forward_kl"), ("val_reverse_kl", "reverse_kl")):
        want = oracle_loss(student, teacher, PROMPTS, drawn, KLS[kl])
        assert first[name] == pytest.approx(want.item(), rel=1e-4)
    uniform = torch.zeros(VOCABULARY)
    entropies = [
        float(np.log(VOCABULARY))
        - oracle_loss(student, lambda ids: zero_logits(ids, uniform), [p], [r], KLS["reverse_kl"])
        for p, r in zip(PROMPTS, drawn, strict=True)
    ]
    lengths = [len(r) for r in drawn]
    want = np.average([float(e.detach()) for e in entropies], weights=lengths)
    assert first["val_entropy"] == pytest.approx(want, rel=1e-4)


def zero_logits(ids, row):
    class Output:
        logits = row.expand(*ids.shape, -1)

    return Output


def test_sampled_reverse_kl_objective_is_the_function():
    student, teacher, twin = llama(0), llama(1, layers=2), llama(0)
    seen = []

    class Recorder(Distiller):
        def compute_loss(self, batch, *logits):
            seen.append(batch)
            return super().compute_loss(batch, *logits)

    Recorder(
        student,
        teacher,
        objective="sampled_reverse_kl",
        optimizer=torch.optim.SGD(student.parameters(), lr=1.0),
        max_grad_norm=None,
        max_new_tokens=3,
        random_state=0,
    ).fit(PROMPTS, n_steps=1, batch_size=6)
    batch = seen[0]
    inputs = {
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    rows = slice(batch.n_prompt - 1, -1)
    ours, theirs = (m(batch.input_ids, **inputs).logits[:, rows] for m in (twin, teacher))
    sampled_reverse_kl(ours, theirs, batch.labels, shift=False).backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= p.grad
    torch.testing.assert_close(weights(student), weights(twin), rtol=1e-4, atol=1e-5)


def test_a_model_with_more_behind_its_head_is_read_by_its_logits():
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        capped.lm_head.weight *= 50
    for student, teacher in ((capped, llama(1)), (llama(0), capped)):
        kinds = []

        class Recorder(Distiller):
            def compute_loss(self, batch, ours, theirs, items, kinds=kinds):
                kinds.append((type(ours), type(theirs)))
                return super().compute_loss(batch, ours, theirs, items)

        distiller = Recorder(
            student, teacher, prefix="teacher", objective="forward_kl", learning_rate=0.0
        )
        distiller.fit(PROMPTS, responses=RESPONSES, n_steps=1, batch_size=6)
        want = oracle_loss(student, teacher, PROMPTS, RESPONSES, token_kl)
        assert distiller.history_[0]["loss"] == pytest.approx(want.item(), rel=1e-4)
        expected = {capped: torch.Tensor}
        assert kinds == [(expected.get(student, HiddenLogits), expected.get(teacher, HiddenLogits))]


def test_adapters_are_trained_and_saved_alone(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors import safe_open

    def adapted():
        torch.manual_seed(3)
        return get_peft_model(llama(0), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    options = {"max_new_tokens": 3, "learning_rate": 1e-2, "random_state": 0}
    student, path = adapted(), tmp_path / "run.safetensors"
    base = student.get_base_model().lm_head.weight.detach().clone()
    distiller = Distiller(student, llama(1), **options).fit(PROMPTS, n_steps=4, batch_size=4)
    assert all(entry["n_tokens"] <= 4 * 3 for entry in distiller.history_)
    assert torch.equal(student.get_base_model().lm_head.weight, base)
    part = adapted()
    Distiller(part, llama(1), **options).fit(PROMPTS, n_steps=2, batch_size=4, checkpoint=path)
    with safe_open(path, framework="pt") as file:
        names = [n for n in file.keys() if n.startswith("student.")]
    assert names
    assert all("lora_" in name for name in names)
    resumed = adapted()
    Distiller(resumed, llama(1), **options).fit(PROMPTS, n_steps=4, batch_size=4, resume_from=path)
    assert torch.equal(weights(resumed), weights(student))


def test_accelerator_of_one_process_changes_nothing(tmp_path):
    from accelerate import Accelerator

    plain, accelerated = llama(0), llama(0)
    options = {"max_new_tokens": 3, "learning_rate": 1e-2, "random_state": 0}
    Distiller(plain, llama(1), **options).fit(PROMPTS, n_steps=4, batch_size=4)
    path = tmp_path / "run.safetensors"
    accelerator = Accelerator(cpu=True)
    Distiller(accelerated, llama(1), accelerator=accelerator, **options).fit(
        PROMPTS, n_steps=2, batch_size=4, checkpoint=path
    )
    accelerated = llama(5)
    Distiller(accelerated, llama(1), accelerator=accelerator, **options).fit(
        PROMPTS, n_steps=4, batch_size=4, resume_from=path
    )
    assert torch.equal(weights(accelerated), weights(plain))


PROCESSES = """
    import sys
    import torch
    sys.path.insert(0, {folder!r})
    from accelerate import Accelerator
    from test_distillation import PROMPTS, RESPONSES, Distiller, llama, weights
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    student = llama(0)
    d = Distiller(
        student, llama(1), prefix="teacher", objective="forward_kl", accelerator=accelerator,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1), random_state=0,
    ).fit(PROMPTS, responses=RESPONSES, n_steps=3, batch_size=5, micro_batch_size=2)
    if accelerator.is_main_process:
        losses = torch.tensor([e["loss"] for e in d.history_])
        torch.save([weights(student), losses], sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    script, result = tmp_path / "run.py", tmp_path / "result.pt"
    script.write_text(textwrap.dedent(PROCESSES.format(folder=os.path.dirname(__file__))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    student = llama(0)
    distiller = Distiller(
        student,
        llama(1),
        prefix="teacher",
        objective="forward_kl",
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        random_state=0,
    ).fit(PROMPTS, responses=RESPONSES, n_steps=3, batch_size=5)
    theirs, losses = torch.load(result, weights_only=True)
    torch.testing.assert_close(theirs, weights(student), rtol=1e-4, atol=1e-6)
    assert losses.tolist() == pytest.approx([e["loss"] for e in distiller.history_], rel=1e-5)


class FixedWeights:
    def __init__(self, values):
        self.values = np.array(values, dtype=float)

    def weights(self, distiller, step):
        return self.values

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_prompts_are_weighted_and_those_of_weight_zero_are_left_out():
    student, teacher, twin = llama(0), llama(1), llama(0)
    values = [2.0, 0.0, 1.0, 0.5, 0.0, 3.0]
    distiller = Distiller(
        student,
        teacher,
        prefix="teacher",
        objective="forward_kl",
        average="sequence",
        weighting=FixedWeights(values),
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        max_grad_norm=None,
    ).fit(PROMPTS, responses=RESPONSES, n_steps=1, batch_size=6)
    each = [
        w * oracle_loss(twin, teacher, [p], [r], token_kl, "sequence")
        for w, p, r in zip(values, PROMPTS, RESPONSES, strict=True)
    ]
    loss = sum(each) / 6
    loss.backward()
    entry = distiller.history_[0]
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["n_tokens"] == sum(len(r) for r, w in zip(RESPONSES, values, strict=True) if w)
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.1 * p.grad
    torch.testing.assert_close(weights(student), weights(twin), rtol=1e-4, atol=1e-6)


def test_a_step_without_a_weight_changes_nothing():
    student = llama(0)
    before = weights(student)
    distiller = Distiller(
        student, llama(1), average="sequence", weighting=FixedWeights([0.0] * 6), learning_rate=0.1
    ).fit(PROMPTS, n_steps=2, batch_size=3)
    assert [entry["loss"] for entry in distiller.history_] == [0.0, 0.0]
    assert torch.equal(weights(student), before)


def test_subclasses_bring_their_own_teacher_and_groups_of_responses():
    """A teacher of more tokens, cut to the student's, and two responses a prompt."""
    config = llama(1).config
    config.vocab_size = VOCABULARY + 3
    torch.manual_seed(2)
    teacher = LlamaForCausalLM(config).eval()
    seen = []

    class Grouped(Distiller):
        def check_models(self):
            pass

        def draw_prompts(self, step, batch_size):
            return np.repeat(super().draw_prompts(step, batch_size // 2), 2)

        def teacher_logits(self, batch):
            full = self.response_logits(self.teacher, batch)
            return full._replace(weight=full.weight[:VOCABULARY])

        def token_measures(self, batch, student_logits):
            return {"ones": torch.ones(batch.response_mask.shape)}

        def compute_loss(self, batch, *logits):
            seen.append(batch)
            return super().compute_loss(batch, *logits)

    student = llama(0)
    with pytest.raises(ValueError, match="vocabulary"):
        Distiller(student, teacher).fit(PROMPTS)
    distiller = Grouped(student, teacher, max_new_tokens=3, random_state=0).fit(
        PROMPTS, n_steps=2, batch_size=4, validation_prompts=PROMPTS
    )
    assert distiller.history_[-1]["val_ones"] == 1
    assert (seen[0].index[::2] == seen[0].index[1::2]).all()
    assert not torch.equal(seen[0].labels[0], seen[0].labels[1])


def test_every_epoch_takes_every_prompt_once():
    seen = []

    class Recorder(Distiller):
        def compute_loss(self, batch, *logits):
            seen.append(batch.index.copy())
            return super().compute_loss(batch, *logits)

    Recorder(llama(0), llama(1), prefix="teacher", random_state=0).fit(
        PROMPTS, responses=RESPONSES, n_steps=3, batch_size=4
    )
    drawn = np.concatenate(seen)
    assert sorted(drawn[:6]) == list(range(6))
    assert sorted(drawn[6:]) == list(range(6))
    assert drawn[:6].tolist() != drawn[6:].tolist()


def test_strings_with_a_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        w: i for i, w in enumerate("zero one two three four five six seven eight nine".split())
    }
    inner = Tokenizer(models.WordLevel({**words, "</s>": EOS, "<pad>": PAD}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    answers = []

    def metric(prompts, responses):
        answers.extend(responses)
        return {"n": len(responses)}

    distiller = Distiller(
        llama(0), llama(1), tokenizer=tokenizer, max_new_tokens=3, random_state=0
    ).fit(["one two", "three"], n_steps=1, batch_size=2, validation_prompts=["four"], metric=metric)
    assert [p.tolist() for p in distiller.prompt_ids_] == [[1, 2], [3]]
    assert distiller.history_[-1]["val_n"] == 1
    assert all(word in words for answer in answers for word in answer.split())


def test_distillation_brings_the_student_to_the_teacher():
    student = llama(0)
    distiller = Distiller(
        student, llama(1), max_new_tokens=4, learning_rate=1e-2, random_state=0
    ).fit(PROMPTS, n_steps=60, batch_size=6, validation_prompts=PROMPTS)
    first, last = distiller.history_[0], distiller.history_[-1]
    assert last["val_reverse_kl"] < 0.3 * first["val_reverse_kl"]
    assert not student.training


def build(**options):
    return Distiller(llama(0), options.pop("teacher", llama(1)), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: build(prefix="both"), ValueError, "prefix must be one of"),
        (lambda: build(prefix=1.5), ValueError, "prefix must be in"),
        (lambda: build(objective="kl"), ValueError, "objective must be one of"),
        (lambda: build(objective=3), TypeError, "objective must be a name or callable"),
        (
            lambda: build(objective="sampled_reverse_kl", prefix=0.5),
            ValueError,
            "prefix must be 'student'",
        ),
        (
            lambda: build(objective="sampled_reverse_kl", sampling_temperature=0.7),
            ValueError,
            "to be equal",
        ),
        (lambda: build(max_new_tokens=0), ValueError, "max_new_tokens"),
        (lambda: build(temperature=0.0), ValueError, "temperature"),
        (lambda: build(sampling_temperature=-1.0), ValueError, "sampling_temperature"),
        (lambda: build(average="batch"), ValueError, "average"),
        (lambda: build(learning_rate=-1.0), ValueError, "learning_rate"),
        (lambda: build(max_grad_norm=0.0), ValueError, "max_grad_norm"),
        (lambda: build(weighting=FixedWeights([1])), ValueError, "average must be 'sequence'"),
        (
            lambda: Distiller(llama(0).requires_grad_(False), llama(1)),
            ValueError,
            "student must have a parameter",
        ),
        (lambda: build().fit([]), ValueError, "prompts must be a sequence"),
        (lambda: build().fit("text"), ValueError, "prompts must be a sequence"),
        (lambda: build().fit(["text"]), TypeError, "token ids without a tokenizer"),
        (lambda: build().fit([[]]), ValueError, "one token id or more"),
        (lambda: build().fit([[0.5]]), ValueError, "one token id or more"),
        (lambda: build().fit(PROMPTS, responses=[[1]]), ValueError, "same length"),
        (lambda: build().fit(PROMPTS, n_steps=0), ValueError, "n_steps"),
        (lambda: build().fit(PROMPTS, batch_size=0), ValueError, "batch_size"),
        (lambda: build().fit(PROMPTS, micro_batch_size=0), ValueError, "micro_batch_size"),
        (
            lambda: build(curriculum=EntropyGatedLengthCurriculum((2, 3))).fit(PROMPTS),
            ValueError,
            "curriculum needs validation_prompts",
        ),
        (lambda: build().fit(PROMPTS, metric=len), ValueError, "metric needs"),
        (
            lambda: build().fit(PROMPTS, validation_responses=RESPONSES),
            ValueError,
            "validation_responses need",
        ),
        (
            lambda: build(prefix="teacher").fit(
                PROMPTS, teacher_cache="nowhere", teacher_top_k=VOCABULARY + 1
            ),
            ValueError,
            "teacher_top_k must be at most",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_models_of_other_vocabularies_and_foreign_checkpoints_are_refused(tmp_path):
    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    with pytest.raises(ValueError, match="vocabulary of 12 tokens, got 5"):
        build(teacher=small).fit(PROMPTS)
    path = tmp_path / "run.safetensors"
    build(max_new_tokens=2).fit(PROMPTS, n_steps=1, batch_size=2, checkpoint=path)
    with pytest.raises(ValueError, match="prompts must be those of the checkpoint"):
        build().fit(PROMPTS[:3], resume_from=path)
    with pytest.raises(ValueError, match="student must have the checkpoint's parameters"):
        Distiller(llama(0, layers=2), llama(1)).fit(PROMPTS, resume_from=path)
    with pytest.raises(ValueError, match="curriculum must be None"):
        build(curriculum=EntropyGatedLengthCurriculum((2, 3))).fit(
            PROMPTS, validation_prompts=PROMPTS, resume_from=path
        )
    other = tmp_path / "other.safetensors"
    from sciml._checkpoint import save_checkpoint

    save_checkpoint(other, {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="resume_from must be written by Distiller"):
        build().fit(PROMPTS, resume_from=other)


def test_a_gradient_that_is_not_finite_stops_the_run():
    def objective(student_logits, teacher_logits, *, mask, temperature, num_items_in_batch):
        return token_kl(student_logits, teacher_logits, mask=mask) * torch.inf

    with pytest.raises(FloatingPointError, match="gradient's norm"):
        build(objective=objective, max_new_tokens=2).fit(PROMPTS, n_steps=1, batch_size=2)
