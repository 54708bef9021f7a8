"""A decoder layer reads and writes little more than it must: pypkg.bench.memory_passes counts."""

from __future__ import annotations

from dataclasses import replace

import paddle
import pytest
from tiny_configs import tiny

from pypkg.bench.memory_passes import Moved, count_layer
from pypkg.bench.ops.case import BenchmarkError
from pypkg.models.layers.mlp import GatedMLP

# The proportions of a layer of llama-7b at 8192 tokens, divided by 32.
HIDDEN, INTERMEDIATE, TOKENS, HEADS = 128, 344, 256, 4


@pytest.fixture
def config(tiny_config):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "head_dim": HIDDEN // HEADS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return replace(tiny_config, **sizes, **heads)


@pytest.mark.parametrize(
    ("hooked", "operators"),
    [
        ((), 2),
        (("input_layernorm", "post_attention_layernorm"), 4),
        (("self_attn.o_proj", "mlp.down_proj"), 8),
    ],
)
def test_a_layer_moves_little_more_than_it_must(config, hooked, operators) -> None:
    """Two operators where nothing but they is called, and the parts around a hook of a call."""
    counted = count_layer(config, TOKENS, hooked)
    assert len(counted) == operators
    assert 1.0 < Moved.total([moved for _, moved in counted]).ratio <= 1.15


def test_a_copy_in_the_layer_is_an_error(config, monkeypatch) -> None:
    forward = GatedMLP.forward

    def copying(self, x, *args):
        return forward(self, paddle.assign(x), *args)

    monkeypatch.setattr(GatedMLP, "forward", copying)
    with pytest.raises(BenchmarkError, match=r"the layer runs .*assign.*whose bytes"):
        count_layer(config, TOKENS, ("mlp.down_proj",))


def test_shared_key_heads_move_fewer_bytes(config) -> None:
    counted = dict(count_layer(config, TOKENS, ("self_attn.o_proj", "mlp.down_proj")))
    shared = replace(config, num_key_value_heads=HEADS // 2)
    fewer = dict(count_layer(shared, TOKENS, ("self_attn.o_proj", "mlp.down_proj")))
    q, lse = TOKENS * HIDDEN, TOKENS * HEADS
    # qkv, out and lse; then queries and keys read and written for the rotation.
    assert counted["pypkg_packed_attention"].forward == 3 * q + q + lse + 2 * (q + q)
    assert fewer["pypkg_packed_attention"].forward == 2 * q + q + lse + 2 * (q + q // 2)


def test_a_layer_of_other_operators_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match=r"the layer runs gelu, layer_norm, whose bytes"):
        count_layer(tiny("gpt3", 2), 16)
