"""The trainer on language models small enough to enumerate."""

import copy
import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sciml.lm import (
    DistributionMatcher,
    best_of_n,
    best_of_n_kl,
    fdpg_loss,
    sequence_logps,
)

BOS, EOS, V, LENGTH = 4, 3, 5, 3  # tokens 0, 1, 2, end and begin


def tiny(seed=0, scale=4.0):
    """A Llama with a few thousand weights, whose next-token distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        model.lm_head.weight.data *= scale
    return model


def completions():
    """All that can be drawn: up to three tokens, ended by EOS or by the limit."""
    others = [token for token in range(V) if token != EOS]
    result = [
        torch.tensor([*body, EOS])
        for n in range(LENGTH)
        for body in itertools.product(others, repeat=n)
    ]
    return result + [torch.tensor(body) for body in itertools.product(others, repeat=LENGTH)]


ALL = completions()
KEYS = {tuple(ids.tolist()): i for i, ids in enumerate(ALL)}


@torch.no_grad()
def all_logps(model, prompt=(BOS,)):
    prefix = torch.tensor(prompt)
    rows = []
    for ids in ALL:
        whole = torch.cat([prefix, ids])[None]
        labels = whole.clone()
        labels[:, : len(prefix)] = -100
        rows.append(sequence_logps(model(input_ids=whole).logits, labels)[0])
    return torch.stack(rows).double()


def reward(ids):
    """Twice as likely for each 0, and much for one rare string."""
    ids = ids.tolist()
    return math.log(2) * ids.count(0) + 2.0 * (ids[:2] == [2, 2])


REWARDS = torch.tensor([reward(ids) for ids in ALL], dtype=torch.float64)


def scorer(batch):
    return [reward(ids) for ids in batch]


def kl(p, q):
    return float((p.exp() * (p - q)).sum())


OPTIONS = {"n_samples": 64, "max_new_tokens": LENGTH, "learning_rate": 1e-2, "warmup_steps": 0}


def test_enumeration_is_complete_and_sampling_follows_it():
    model = tiny()
    model.generation_config.top_k = 1  # settings of the model that would bend the distribution
    model.generation_config.repetition_penalty = 3.0
    logps = all_logps(model)
    assert float(logps.exp().sum()) == pytest.approx(1, abs=1e-5)
    drawn, _ = best_of_n(
        model, lambda batch: [0.0] * len(batch), 1, n_results=4000, max_new_tokens=LENGTH,
        batch_size=4000, random_state=0,
    )  # fmt: skip
    counts = torch.bincount(torch.tensor([KEYS[tuple(x.tolist())] for x in drawn]), minlength=85)
    tv = 0.5 * (counts / counts.sum() - logps.exp()).abs().sum()
    assert tv < 0.06
    assert model.generation_config.top_k == 1


def target(model, beta=1.0, prompt=(BOS,), rewards=REWARDS):
    return (all_logps(model, prompt) + rewards / beta).log_softmax(0)


@pytest.mark.parametrize(
    ("divergence", "criterion", "interval", "baseline", "rate", "n_steps"),
    [
        ("kl", "kl", 8, "z", 1e-2, 60),
        pytest.param("reverse_kl", "always", 1, "z", 1e-2, 60, marks=pytest.mark.slow),
        # With a proposal that lags, or without a baseline, a rate of 1e-2 overshoots.
        pytest.param("kl", "tv", 8, None, 3e-3, 200, marks=pytest.mark.slow),
        pytest.param("js", "kl", 4, "mean", 3e-3, 200, marks=pytest.mark.slow),
        pytest.param("tv", "kl", 4, "z", 3e-3, 200, marks=pytest.mark.slow),
    ],
)
def test_reaches_the_target(divergence, criterion, interval, baseline, rate, n_steps):
    prior = tiny()
    policy, p = copy.deepcopy(prior), target(prior, beta=0.7)
    matcher = DistributionMatcher(
        policy, scorer, ref_model=prior, beta=0.7, divergence=divergence, criterion=criterion,
        q_update_interval=interval, baseline=baseline,
    ).fit(n_steps=n_steps, random_state=0, **OPTIONS | {"learning_rate": rate})  # fmt: skip
    start, end = kl(p, all_logps(prior)), kl(p, all_logps(policy))
    assert start > 0.5
    assert end < 0.2 * start
    assert kl(all_logps(policy), p) < 0.3 * kl(all_logps(prior), p)
    log_z = (all_logps(prior) + REWARDS / 0.7).logsumexp(0)
    assert matcher.partition_.log_z() == pytest.approx(float(log_z), abs=0.1)
    assert any(entry["proposal_updated"] for entry in matcher.history_)
    ess = [entry["ess"] for entry in matcher.history_]
    assert sorted(ess[-9:])[4] > 0.8 > ess[0]
    last = matcher.history_[-1]
    assert last["kl_ref"] == pytest.approx(kl(all_logps(policy), all_logps(prior)), abs=0.3)
    assert matcher.n_steps_ == n_steps


def test_one_step_is_the_loss_written_out():
    prior = tiny()
    policy, by_hand = copy.deepcopy(prior), copy.deepcopy(prior)
    seen = []

    def watch(batch):
        seen.extend(batch)
        return scorer(batch)

    DistributionMatcher(policy, watch, ref_model=tiny(1), baseline=None, clip_ratio=5.0).fit(
        n_steps=1, batch_size=7, random_state=1, **OPTIONS
    )
    at = [KEYS[tuple(ids.tolist())] for ids in seen]
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    logps = torch.cat(
        [
            sequence_logps(
                by_hand(input_ids=torch.cat([torch.tensor([BOS]), ids])[None]).logits,
                torch.cat([torch.tensor([-100]), ids])[None],
            )
            for ids in seen
        ]
    )
    scores = (all_logps(tiny(1)) + REWARDS)[at].float()
    q = logps.detach()
    log_z = (scores - q).logsumexp(0) - math.log(64)
    fdpg_loss(logps, scores, q, log_z, clip_ratio=5.0).backward()
    optimizer.step()
    for ours, expected in zip(policy.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_each_prompt_has_its_own_target():
    prior = tiny()
    policy, prompts = copy.deepcopy(prior), [[BOS, 0], [BOS, 1, 2], [BOS, 2]]

    def wants_its_last_token(prompts, batch):
        return [2.0 * ids.tolist().count(prompt[-1]) for prompt, ids in zip(prompts, batch)]  # noqa: B905

    matcher = DistributionMatcher(policy, wants_its_last_token, ref_model=prior)
    matcher.fit(prompts, n_steps=40, n_contexts=2, random_state=0, **OPTIONS)
    for i, prompt in enumerate(prompts):
        rewards = torch.tensor([2.0 * ids.tolist().count(prompt[-1]) for ids in ALL]).double()
        p = target(prior, 1.0, prompt, rewards)
        assert kl(p, all_logps(policy, prompt)) < 0.3 * kl(p, all_logps(prior, prompt))
        exact = float((all_logps(prior, prompt) + rewards).logsumexp(0))
        assert matcher.partition_.log_z(i) == pytest.approx(exact, abs=0.15)


def test_hard_constraint_and_contexts_that_never_meet_it():
    prior = tiny()
    policy = copy.deepcopy(prior)

    def has_a_one(prompts, batch):
        never = [prompt[-1] == 0 for prompt in prompts]
        return [
            -math.inf if stop or 1 not in ids.tolist() else 0.0
            for stop, ids in zip(never, batch, strict=True)
        ]

    matcher = DistributionMatcher(policy, has_a_one, ref_model=prior)
    matcher.fit([[BOS, 1], [BOS, 0]], n_steps=40, random_state=0, **OPTIONS)
    assert {entry["n_skipped"] for entry in matcher.history_} == {1}
    assert matcher.partition_.log_z(1) == -math.inf
    meets = torch.tensor([1 in ids.tolist() for ids in ALL])
    share = [float(all_logps(m, (BOS, 1)).exp()[meets].sum()) for m in (prior, policy)]
    assert share[1] > 0.9 > 0.7 > share[0]
    assert math.exp(matcher.partition_.log_z(0)) == pytest.approx(share[0], abs=0.05)
    weights = [p.clone() for p in policy.parameters()]
    with pytest.warns(RuntimeWarning, match="step 0 was skipped"):
        DistributionMatcher(policy, has_a_one, ref_model=prior).fit(
            [[BOS, 0]], n_steps=1, **OPTIONS
        )
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters(), strict=True))


@pytest.mark.parametrize("killed_at", [5, 6, 9])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, killed_at):
    """Killed anywhere, also while the proposal is decided on, with the scorer raising Ctrl-C."""
    prior, path = tiny(), tmp_path / "run.safetensors"
    fit = {"n_steps": 8, "checkpoint": path, "checkpoint_every": 3, "random_state": 2, **OPTIONS}
    create = {"ref_model": prior, "q_update_interval": 4}
    whole = copy.deepcopy(prior)
    reference = DistributionMatcher(whole, scorer, **create).fit(**fit)
    calls = itertools.count(1)

    def killer(batch):
        if next(calls) == killed_at:  # call 5 belongs to the decision before step 4
            raise KeyboardInterrupt
        return scorer(batch)

    with pytest.raises(KeyboardInterrupt):
        DistributionMatcher(copy.deepcopy(prior), killer, **create).fit(**fit)
    policy = copy.deepcopy(prior)
    resumed = DistributionMatcher(policy, scorer, **create)
    resumed.fit(**fit | {"random_state": None, "resume_from": path})
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), policy.parameters()))  # noqa: B905
    assert resumed.history_ == reference.history_
    assert resumed.partition_.log_z() == reference.partition_.log_z()
    with pytest.raises(ValueError, match="differs in beta"):
        DistributionMatcher(policy, scorer, beta=2.0, **create).fit(**fit | {"resume_from": path})
    for parameter in policy.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters of the checkpoint"):
        DistributionMatcher(policy, scorer, **create).fit(**fit | {"resume_from": path})


def test_adapters_have_the_base_model_for_a_prior():
    from peft import LoraConfig, get_peft_model

    prior, base = tiny(), tiny()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_alpha=16)
    torch.manual_seed(0)
    policy = get_peft_model(base, config)
    state = torch.get_rng_state()
    matcher = DistributionMatcher(policy, scorer)
    matcher.fit(n_steps=40, random_state=0, **OPTIONS | {"learning_rate": 3e-2})
    assert torch.equal(torch.get_rng_state(), state)
    p = target(prior)
    assert kl(p, all_logps(policy.eval())) < 0.25 * kl(p, all_logps(prior))
    with policy.disable_adapter():
        torch.testing.assert_close(all_logps(policy), all_logps(prior))


def test_best_of_n_follows_its_law():
    model = tiny()
    n, beta = 4, 1e-3  # distinct rewards: a little of the number of the completion
    rewards = REWARDS + beta * torch.arange(len(ALL)) / len(ALL)
    chosen, got = best_of_n(
        model, lambda batch: [float(rewards[KEYS[tuple(x.tolist())]]) for x in batch], n,
        n_results=1500, max_new_tokens=LENGTH, batch_size=6000, random_state=0,
    )  # fmt: skip
    order = rewards.argsort()
    cumulative = all_logps(model).exp()[order].cumsum(0)
    before = torch.cat([cumulative.new_zeros(1), cumulative[:-1]])
    law = torch.zeros(len(ALL), dtype=torch.float64)
    law[order] = cumulative**n - before**n
    counts = torch.bincount(torch.tensor([KEYS[tuple(x.tolist())] for x in chosen]), minlength=85)
    assert 0.5 * (counts / counts.sum() - law).abs().sum() < 0.08
    assert float(got.mean()) == pytest.approx(float(law @ rewards), abs=0.05)
    exact = float((law * (law / all_logps(model).exp()).clamp(min=1e-30).log()).sum())
    assert exact <= best_of_n_kl(n) + 1e-9
    prompts = [[BOS, 0], [BOS, 1, 2]]
    texts, got = best_of_n(
        model, lambda prompts, batch: [float(p[1] == 0) for p in prompts], 2, prompts,
        n_results=3, max_new_tokens=1,
    )  # fmt: skip
    assert len(texts) == 6
    assert got.tolist() == [[1.0] * 3, [0.0] * 3]


class Letters:
    """A tokenizer of four letters."""

    bos_token_id = BOS

    def __call__(self, text):
        return {"input_ids": [BOS] + ["abc".index(letter) for letter in text]}

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join("abc"[i] for i in row.tolist() if i < 3) for row in rows]


def test_texts_and_progress(capsys):
    prior = tiny()
    seen = []

    def counts(prompts, texts):
        seen.extend(zip(prompts, texts, strict=True))
        return torch.tensor([float(text.count("a")) for text in texts])

    policy = copy.deepcopy(prior).train()
    matcher = DistributionMatcher(policy, counts, ref_model=prior, tokenizer=Letters())
    matcher.fit(["ab", "c"], n_steps=2, verbose=True, **OPTIONS)
    assert policy.training
    assert {prompt for prompt, _ in seen} == {"ab", "c"}
    assert all(set(text) <= set("abc") for _, text in seen)
    assert "kl_target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("match", "error", "options"),
    [
        ("beta", ValueError, {"beta": 0.0}),
        ("divergence", ValueError, {"divergence": "mse"}),
        ("baseline", ValueError, {"baseline": "median"}),
        ("criterion", ValueError, {"criterion": "js"}),
        ("q_update_interval", ValueError, {"q_update_interval": 0}),
        ("scorer must be callable", TypeError, {"scorer": 3}),
        ("scorer must return a number for each of 64", ValueError, {"scorer": lambda x: [1.0]}),
        ("NaN or .inf", ValueError, {"scorer": lambda x: [math.nan] * len(x)}),
        ("NaN or .inf", ValueError, {"scorer": lambda x: [math.inf] * len(x)}),
        ("a reference is needed", ValueError, {"ref_model": None}),
        ("learning_rate", ValueError, {"fit": {"learning_rate": 0.0}}),
        ("n_steps", ValueError, {"fit": {"n_steps": 0}}),
        ("n_samples", ValueError, {"fit": {"n_samples": 0}}),
        ("warmup_steps", ValueError, {"fit": {"warmup_steps": -1}}),
        ("prompts must be a list", ValueError, {"fit": {"prompts": []}}),
        ("prompts must be a list", ValueError, {"fit": {"prompts": "ab"}}),
        ("tokenizer must be given", ValueError, {"fit": {"prompts": ["ab"]}}),
        ("prompts.0. must be a text or token ids", ValueError, {"fit": {"prompts": [[]]}}),
    ],
)
def test_bad_input(match, error, options):
    fit = {"n_steps": 1, **OPTIONS} | options.pop("fit", {})
    arguments = {"scorer": scorer, "ref_model": tiny(1)} | options
    with pytest.raises(error, match=match):
        DistributionMatcher(tiny(), **arguments).fit(**fit)


def test_models_without_what_is_needed():
    model = tiny()
    with pytest.raises(ValueError, match="ref_model must be a copy"):
        DistributionMatcher(model, scorer, ref_model=model)
    with pytest.raises(ValueError, match="parameters that require a gradient"):
        DistributionMatcher(tiny().requires_grad_(False), scorer, ref_model=model).fit(**OPTIONS)
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="beginning-of-sequence"):
        best_of_n(model, scorer, 2)
    with pytest.raises(ValueError, match="n must be an integer"):
        best_of_n(model, scorer, 0)
