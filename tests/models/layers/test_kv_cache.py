"""A model with a key-value cache against the same model without one, for every family."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from tiny_configs import KEYS, tiny

from pypkg.models import ModelConfig, from_config
from pypkg.models.building import Model
from pypkg.models.generate import next_logits
from pypkg.models.layers.kv_cache import KVCache

LENGTHS = (9, 5, 12)  # of the prompts of a batch
FURTHER = 7  # tokens after each prompt
# Changes of a family's configuration that a prompt of a few tokens notices.
CHANGES = {
    "mistral": {"sliding_window": 4},
    "qwen": {"logn_attention_length": 6, "dynamic_ntk_length": None},
}
OTHERS = {
    "softcap": ("llama", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 7.0}),
    "two_types": (
        "llama",
        {"sliding_window": 3, "layer_types": ("sliding_attention", "full_attention")},
    ),
    "yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 8}},
    ),
    "no_positions": ("llama", {"position_embedding": "none"}),
}  # fmt: skip


def configuration(case: str) -> ModelConfig:
    family, changes = OTHERS.get(case, (case, CHANGES.get(case, {})))
    return tiny(family).replace(initializer_range=0.1, **changes)


def make(config: ModelConfig) -> Model:
    model = from_config(config, seed=3)
    model.eval()
    return model


def rows_of(config: ModelConfig, lengths: tuple[int, ...]) -> list[list[int]]:
    """Prompts, each with ``FURTHER`` tokens after it."""
    random = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(lengths):
        row = random.integers(10, 4000, length + FURTHER).tolist()
        if config.prefix_lm:
            mask = config.mask_token_id if number == 1 else config.gmask_token_id
            row[length - 4], row[length - 2] = mask, config.sop_token_id
        rows.append(row)
    return rows


def cached_logits(model: Model, rows: list[list[int]], passes: tuple[int, ...]) -> np.ndarray:
    """Logits after each pass, [passes, batch, vocab]; the first pass reads the prompts."""
    prompts = [len(row) - FURTHER for row in rows]
    padding = [max(prompts) - length for length in prompts]
    padded = np.stack([np.pad(row, (pad, 0)) for pad, row in zip(padding, rows, strict=True)])
    cache, begin, found = KVCache(model.config, padding), 0, []
    for count in (max(prompts), *passes):
        ids = paddle.to_tensor(padded[:, begin : begin + count])
        found.append(next_logits(model, ids, cache).numpy())
        begin += count
    return np.stack(found)


@pytest.mark.parametrize("lengths", [LENGTHS, (6,)], ids=["padded", "one row"])
@pytest.mark.parametrize("case", [*KEYS, *OTHERS])
@paddle.no_grad()
def test_logits_are_those_without_a_cache(case: str, lengths: tuple[int, ...]) -> None:
    config = configuration(case)
    model, rows = make(config), rows_of(config, lengths)
    passes = (1, 1, 3, 2)
    found = cached_logits(model, rows, passes)
    for number, (row, prompt) in enumerate(zip(rows, lengths, strict=True)):
        ends = prompt + np.concatenate([[0], np.cumsum(passes)]) - 1
        expected = model(paddle.to_tensor([row]))[0].numpy()[ends]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found[:, number], expected, rtol=0, atol=1e-5)


@paddle.no_grad()
def test_a_cache_grows() -> None:
    """Over the first 128 tokens, and in one pass over more than it has room for."""
    model = make(tiny("llama").replace(initializer_range=0.1))
    rows = np.random.default_rng(1).integers(10, 4000, [2, 400])
    cache, begin = KVCache(model.config, [0, 0]), 0
    expected = model(paddle.to_tensor(rows)).numpy()
    for count in (126, 1, 1, 1, 200, 1):
        found = next_logits(model, paddle.to_tensor(rows[:, begin : begin + count]), cache)
        begin += count
        np.testing.assert_allclose(found.numpy(), expected[:, begin - 1], rtol=0, atol=1e-5)
    assert cache.capacity == 384


def test_the_reference_attention_keeps_the_cache() -> None:
    model, config = make(configuration("bloom")), configuration("bloom")
    rows = rows_of(config, LENGTHS)
    expected = cached_logits(model, rows, (1, 2))
    model.use_attention("reference")
    found = cached_logits(model, rows, (1, 2))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
