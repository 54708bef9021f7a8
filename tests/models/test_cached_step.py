"""Which decoders run a step of generation as one operator, and that its logits are those of a pass.

tests/models/layers/test_kv_cache.py compares the logits of every family with a pass without cache.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from tiny_configs import KEYS, tiny

from pypkg import ops
from pypkg.models import ModelConfig, cached_step, from_config
from pypkg.models.building import Model
from pypkg.models.generate import next_logits
from pypkg.models.layers.kv_cache import KVCache

# Families whose layers are attention and a gated MLP, each after an RMS norm.
ONE_OPERATOR = {
    *(
        "baichuan_7b",
        "baichuan_13b",
        "chatglm2",
        "glm",
        "llama",
        "mistral",
        "qwen",
        "qwen2",
        "qwen3",
    ),
}


@pytest.fixture
def steps(monkeypatch) -> list[bool]:
    """Whether each pass after the first ran as one operator."""
    ran: list[bool] = []
    step = cached_step.ops.decoder_step

    def decoder_step(*arguments):
        logits = step(*arguments)
        ran.append(logits is not None)
        return logits

    monkeypatch.setattr(cached_step.ops, "decoder_step", decoder_step)
    return ran


def evaluated(config: ModelConfig) -> Model:
    model = from_config(config.replace(initializer_range=0.1), seed=3)
    model.eval()
    return model


def logits(model: Model, tokens: np.ndarray, prompt: int = 5) -> np.ndarray:
    """After the prompts, and after each further token."""
    cache = KVCache(model.config, [0] * len(tokens))
    parts = [tokens[:, :prompt], *np.split(tokens[:, prompt:], tokens.shape[1] - prompt, axis=1)]
    return np.stack([next_logits(model, paddle.to_tensor(each), cache).numpy() for each in parts])


def drawn(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(10, 4000, [rows, 8])


@pytest.mark.parametrize("family", [each for each in KEYS if not tiny(each).prefix_lm])
def test_families(steps, family: str) -> None:
    logits(evaluated(tiny(family)), drawn())
    assert any(steps) == (family in ONE_OPERATOR)
    assert all(steps)


def test_more_than_a_few_rows_take_a_pass(steps) -> None:
    model = evaluated(tiny("llama"))
    logits(model, drawn(rows=9))
    assert steps == [False] * 3


@pytest.mark.parametrize("hooked", ["layers.1", "layers.0.mlp.down_proj", "norm", "lm_head"])
def test_a_hook_of_a_call_is_called(steps, hooked: str) -> None:
    model = evaluated(tiny("llama"))
    expected = logits(model, drawn())
    assert steps == [True] * 3
    calls = []
    layer = dict(model.named_sublayers())[hooked]
    layer.register_forward_post_hook(lambda *_: calls.append(1))
    found = logits(model, drawn())
    assert len(calls) == 4 and steps == [True] * 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_chosen_attention_is_used(steps) -> None:
    model = evaluated(tiny("llama"))
    model.use_attention("reference")
    logits(model, drawn())
    assert not steps


def test_weights_are_those_of_the_model_when_a_generation_begins() -> None:
    model = evaluated(tiny("llama"))
    first = logits(model, drawn())
    with paddle.no_grad():
        model.layers[1].mlp.down_proj.weight.scale_(3.0)
    second = logits(model, drawn())
    ops.set_backend("reference")
    expected = logits(model, drawn())
    ops.set_backend("auto")
    assert np.abs(second - first).max() > 1e-3
    np.testing.assert_allclose(second, expected, rtol=0, atol=1e-5)
