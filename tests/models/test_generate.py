"""Sampling."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config
from pypkg.models.decoder import Decoder
from pypkg.models.generate import generate

PROMPT = [[5, 3, 8], [1, 2, 60]]


@pytest.fixture
def model(tiny_config: ModelConfig) -> Decoder:
    return from_config(tiny_config.replace(initializer_range=0.5), seed=1)


def test_greedy_takes_the_most_likely(model: Decoder) -> None:
    out = generate(model, paddle.to_tensor(PROMPT), 6, temperature=0.0)
    assert out.shape == [2, 9] and out.dtype == paddle.int64
    assert out[:, :3].tolist() == PROMPT
    logits = model(out).numpy()
    np.testing.assert_array_equal(logits[:, 2:-1].argmax(-1), out[:, 3:].numpy())


def test_sampling_is_given_by_the_seed(model: Decoder) -> None:
    prompt = paddle.to_tensor(PROMPT)
    first = generate(model, prompt, 20, seed=4).tolist()
    assert generate(model, prompt, 20, seed=4).tolist() == first
    assert generate(model, prompt, 20, seed=5).tolist() != first


def test_top_k_and_frequencies(model: Decoder) -> None:
    prompt = paddle.to_tensor([[5, 3, 8]] * 4000)
    logits = model(prompt[:1])[0, -1].numpy().astype(np.float64)
    kept = np.argsort(logits)[-4:]
    expected = np.exp(logits[kept] / 2.0)
    expected /= expected.sum()
    tokens = generate(model, prompt, 1, temperature=2.0, top_k=4, seed=0)[:, -1].numpy()
    counts = np.array([(tokens == token).sum() for token in kept])
    assert counts.sum() == 4000  # nothing outside the four
    deviation = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(counts / 4000 - expected) < 5 * deviation).all()


def test_nothing_is_recorded_and_long_prompts_are_cut(model: Decoder) -> None:
    limit = model.config.max_position_embeddings
    ids = paddle.to_tensor(np.arange(limit + 5)[None] % 61)
    out = generate(model, ids, 1, temperature=0.0)
    assert out.stop_gradient and out.shape == [1, limit + 6]
    assert out[0, -1].item() == model(ids[:, -limit:])[0, -1].argmax().item()


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1, 2], {}, r"must be \[batch, sequence\]"),
        ([[1, 2]], {"temperature": -1.0}, r"temperature \(-1.0\)"),
        ([[1, 2]], {"top_k": -3}, r"top_k \(-3\)"),
    ],
)
def test_bad_arguments(model: Decoder, ids: list, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, paddle.to_tensor(ids), 1, **options)
