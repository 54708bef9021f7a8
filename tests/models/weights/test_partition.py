"""Parts of parameters: that they make up the whole, and that no more is read than they hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tiny_configs import KEYS, tiny

from pypkg.models.architecture.registry import weight_map
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.tp_shards import (
    TPShard,
    tensor_parallel_problems,
    tp_shard,
    whole_shape,
)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("family", KEYS)
def test_parts(family, degree):
    config = tiny(family)
    names = weight_map(config)
    generator = np.random.default_rng(0)
    split = 0
    for name, shape in parameter_shapes(config).items():
        whole = generator.standard_normal(shape, dtype=np.float32)
        stored = names.to_checkpoint(name, whole)
        rebuilt = np.full_like(whole, np.nan)
        for rank in range(degree):
            shard = tp_shard(config, name, degree, rank)
            if shard is None:
                break
            split += 1
            elements_read = []

            def read(source, cut, stored=stored, elements_read=elements_read):
                value = stored[source][tuple(cut)]
                elements_read.append(value.size)
                return value

            def read_cut(cut, name=name, shape=shape, read=read):
                return names.read_slices(name, shape, cut, read)

            own = shard.read(read_cut)
            held = sum(stop - start for start, stop in shard.ranges)
            assert sum(elements_read) == own.size // own.shape[shard.axis] * held
            np.testing.assert_array_equal(own, shard.take(whole))
            elements_read.clear()
            rows = (own.shape[0] // 3, own.shape[0] // 3 + 2)
            np.testing.assert_array_equal(shard.read(read_cut, rows), own[slice(*rows)])
            assert sum(elements_read) <= own[slice(*rows)].size
            assert whole_shape(config, name, own.shape, degree) == shape
            shard.put(own, rebuilt)
        else:
            np.testing.assert_array_equal(rebuilt, whole)
    assert split >= degree * (4 * config.num_hidden_layers + 1)


def test_uneven_vocabulary():
    config = tiny("llama").replace(vocab_size=1021)
    last = tp_shard(config, "lm_head.weight", 2, 1)
    assert last.ranges == ((511, 1021),)
    own = last.take(np.ones([1021, 64], np.float32))
    assert own.shape == (511, 64)
    assert own[:510].all() and not own[510].any()


def test_problems_name_both_values_and_a_way_out():
    config = tiny("llama")
    assert tensor_parallel_problems(config, 2) == []
    heads, width, key_values, vocabulary = tensor_parallel_problems(config.replace(vocab_size=4), 3)
    assert heads == (
        "num_attention_heads (4) is not divisible by tensor_parallel_degree (3); use 1, 2 or 4"
    )
    assert "intermediate_size (160)" in width
    assert "num_key_value_heads (2) and tensor_parallel_degree (3)" in key_values
    assert "vocab_size (4)" in vocabulary


@pytest.mark.parametrize(("kind", "axis"), [("up_proj", 1), ("gate_up_proj", 1), ("down_proj", 0)])
def test_what_a_layer_has_several_of_is_divided_like_one(kind, axis):
    config = tiny("llama")
    one, several = f"layers.1.mlp.{kind}.weight", f"layers.1.mlp.experts.7.{kind}.weight"
    shard = tp_shard(config, several, 2, 1)
    assert shard == tp_shard(config, one, 2, 1)
    assert shard.axis == axis


@pytest.mark.parametrize("rows", [(0, 3), (5, 9), (60, 66), (7, 7)])
@pytest.mark.parametrize("shard", [TPShard(0, ((0, 8), (20, 70)), 66), TPShard(1, ((2, 5),), 4)])
def test_rows_of_a_shard(shard: TPShard, rows: tuple[int, int]) -> None:
    """Those of the whole shard, from what lies in them alone."""
    whole = np.arange(1.0, 80 * 6 + 1).reshape(80, 6)
    read = []

    def read_slices(cut: Sequence[slice]) -> np.ndarray:
        read.append(whole[tuple(cut)].size)
        return whole[tuple(cut)]

    found = shard.read(read_slices, rows)
    np.testing.assert_array_equal(found, shard.take(whole)[slice(*rows)])
    assert sum(read) == np.count_nonzero(found)
