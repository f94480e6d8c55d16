import math

import pytest
import torch

from sciml.lm import (
    byte_language_model,
    decode_bytes,
    encode_bytes,
    english_text,
    perplexity,
    train_byte_language_model,
)


def test_bytes_round_trip_and_specials_are_left_out():
    text = "naïve café, 数学"
    ids = encode_bytes(text)
    assert ids.tolist() == list(text.encode())
    assert decode_bytes(torch.cat([torch.tensor([256]), ids, torch.tensor([257])])) == text
    assert encode_bytes("").shape == (0,)


def test_english_text_is_long_and_english():
    text = english_text()
    assert len(text) > 300_000
    assert text.count(" the ") > 2_000


def test_same_seed_same_weights_and_global_generator_untouched():
    state = torch.get_rng_state()
    first, second = (byte_language_model(16, 1, 2, random_state=3) for _ in range(2))
    other = byte_language_model(16, 1, 2, random_state=4)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_training_learns_and_repeats():
    text = "abcabcabc" * 40
    runs = []
    for _ in range(2):
        model = byte_language_model(32, 1, 2)
        losses = train_byte_language_model(
            model, text, 60, batch_size=8, length=16, learning_rate=1e-2
        )
        runs.append((losses, model))
    assert runs[0][0] == runs[1][0]
    assert runs[0][0][0] > 4.5
    value = perplexity(runs[0][1], text, length=16)
    assert math.log(value) < 0.2
    assert not runs[0][1].training


def test_untrained_perplexity_is_about_the_vocabulary():
    assert perplexity(byte_language_model(32, 1, 2), english_text()[:4000]) == pytest.approx(
        259, rel=0.05
    )


def test_perplexity_does_not_depend_on_the_batch_size():
    model, text = byte_language_model(32, 1, 2), english_text()[:2000]
    one, many = (perplexity(model, text, length=64, batch_size=n) for n in (1, 7))
    assert one == pytest.approx(many, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: byte_language_model(30, 1, 4), "hidden_size must be a multiple of 2"),
        (lambda: byte_language_model(64, 0), "num_layers must be an integer"),
        (
            lambda: train_byte_language_model(byte_language_model(16, 1, 2), "short"),
            "at least length = 128 tokens, got 5",
        ),
        (
            lambda: perplexity(byte_language_model(16, 1, 2), torch.zeros(3, 3)),
            "one-dimensional tensor of token ids",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_diverging_run_is_reported():
    model = byte_language_model(16, 1, 2)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        train_byte_language_model(model, "x" * 200, 2)
