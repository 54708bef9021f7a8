"""Tensors in parts: every cut, transpose and order of rows equals that of the whole array."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_configs import KEYS, tiny

from pypkg.models.architecture.registry import weight_map
from pypkg.models.architecture.weight_map import Packing, Weight, WeightMap
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.assembly import Assembly
from pypkg.models.weights.tp_shards import TPShard, tp_shard

SHAPES = [(1,), (7,), (7, 5), (6, 1), (300, 257), (4, 3, 5), (0, 3), ()]
# Shards of one tensor have one shape, so some end with padding.
TWO_ROWS = (TPShard(0, ((0, 2), (6, 8)), 6), TPShard(0, ((2, 6), (8, 9)), 6))
TWO_COLUMNS = (TPShard(1, ((0, 3),), 4), TPShard(1, ((3, 5),), 4))
SAME_HEAD = (TPShard(0, ((0, 6),), 6), TPShard(0, ((3, 9),), 6))  # rows 3 to 6 on both ranks


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype("f4")


def flat_slices(values: np.ndarray, count: int) -> list[np.ndarray]:
    """``count`` equal slices; padding that must not appear anywhere is NaN."""
    size = -(-values.size // count)
    padded = np.full(size * count, np.nan, "f4")
    padded[: values.size] = values.reshape(-1)
    return np.split(padded, count)


def copied(tensor) -> np.ndarray:
    to = np.full(tensor.shape, np.nan, "f4")
    tensor.copy_to(to)
    return to


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_flat_slices(shape, count):
    whole = numbers(shape)
    joined = Assembly(shape, slices=count).join(flat_slices(whole, count))
    assert (joined.shape, joined.ndim, joined.nbytes) == (shape, whole.ndim, whole.nbytes)
    np.testing.assert_array_equal(copied(joined), whole)


@pytest.mark.parametrize("shards", [TWO_ROWS, TWO_COLUMNS, SAME_HEAD])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_cut_of_shards_and_of_their_slices(shards, count):
    whole = numbers((9, 5))
    parts = [part for shard in shards for part in flat_slices(shard.take(whole), count)]
    joined = Assembly(whole.shape, shards, shards[0].take(whole).shape, count).join(parts)
    views = (joined, whole), (joined.T, whole.T), (joined.T[1:4].T, whole[:, 1:4])
    for values, expected in views:
        for start in range(len(expected) + 1):
            for stop in range(start, len(expected) + 1):
                np.testing.assert_array_equal(copied(values[start:stop]), expected[start:stop])
    order = np.array([8, 0, 1, 2, 7, 3, 4, 5, 6])
    np.testing.assert_array_equal(copied(joined[order]), whole[order])
    np.testing.assert_array_equal(copied(joined[order][2:7].T), whole[order][2:7].T)


def test_what_lies_in_order_is_not_copied():
    whole = numbers((8, 4))
    parts = [whole[:4], whole[4:]]
    joined = Assembly(whole.shape, slices=2).join(parts)
    assert np.shares_memory(joined[5:8].in_order(), parts[1])
    np.testing.assert_array_equal(joined[5:8].in_order(), whole[5:8])
    assert joined[3:5].in_order() is None
    assert joined[5:8].T.in_order() is None


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("packing", [None, Packing(4, (0, 1, 2)), Packing(2, (1, 0, 2), (4, 1, 1))])
def test_tensors_of_a_checkpoint(transpose, turned, packing):
    """Those of the parts equal those of the array."""
    weight = Weight("w", ("a", "b"), (8, 16), transpose, packing, turned)
    names, whole = WeightMap([weight]), numbers((24, 24))
    joined = Assembly(whole.shape, slices=5).join(flat_slices(whole, 5))
    expected, found = names.to_checkpoint("w", whole), names.to_checkpoint("w", joined)
    assert list(found) == list(expected) == ["a", "b"]
    for name, values in expected.items():
        np.testing.assert_array_equal(copied(found[name]), values)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("family", KEYS)
def test_tensors_of_every_family(family, degree):
    """From flat slices of TP shards, as ranks of ZeRO stage 3 hold them, and from whole shards."""
    config = tiny(family)
    names = weight_map(config)
    for name, shape in parameter_shapes(config).items():
        whole = numbers(shape)
        shards = [tp_shard(config, name, degree, rank) for rank in range(degree)]
        shards = tuple(each for each in shards if each is not None)
        held = [shard.take(whole) for shard in shards] or [whole]
        for count in (1, 3):
            parts = [part for values in held for part in flat_slices(values, count)]
            joined = Assembly(shape, shards, held[0].shape, count).join(parts)
            found = names.to_checkpoint(name, joined)
            for source, values in names.to_checkpoint(name, whole).items():
                np.testing.assert_array_equal(copied(found[source]), values)
                np.testing.assert_array_equal(copied(found[source][1:-1]), values[1:-1])
