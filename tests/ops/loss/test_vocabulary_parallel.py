from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import paddle
import pytest
from distributed_testing import run_ranks
from op_testing import as_float64, random

from pypkg.ops import cross_entropy_reference
from pypkg.ops.loss.vocabulary_parallel import VocabularyShard, merge

WORKER = Path(__file__).with_name("vocabulary_parallel_worker.py")
# pypkg.ops.loss.cross_entropy as an attribute is the function.
module = importlib.import_module("pypkg.ops.loss.cross_entropy")


def merged_over_shards(logits: paddle.Tensor, labels: paddle.Tensor, shards: int):
    """What every member of a group of ``shards`` would get, without processes."""
    vocab = logits.shape[-1]
    cols = vocab // shards
    partials = []
    for i in range(shards):
        columns = logits[:, i * cols : (i + 1) * cols].contiguous()
        statistics = module.implementation(module._STATISTICS, columns)
        partials.append(statistics(columns, labels, i * cols, vocab, -100)[2:])
    whole_max = paddle.stack([row_max for row_max, _, _ in partials]).max(axis=0)
    sums: list[paddle.Tensor] = []
    for row_max, row_sum, target in partials:
        # The first pass collects what each shard would send, the second hands out the sum.
        merge(row_max, row_sum, target, lambda _: whole_max, lambda mine: sums.append(mine) or mine)
    total = paddle.stack(sums).sum(axis=0)
    return [merge(*each, lambda _: whole_max, lambda _: total) for each in partials]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_merge(each_backend, shards):
    values = random((6, 40), 0, 5.0)
    values[0, :8] = -np.inf  # a whole shard
    values[1] += 1e4
    labels = paddle.to_tensor([39, 0, 7, 8, 20, 31])
    logits = paddle.to_tensor(values.astype("float32"))
    expected = as_float64(cross_entropy_reference(logits.astype("float64"), labels))
    for lse, target in merged_over_shards(logits, labels, shards):
        # 1e4 in float32 has a spacing of 1e-3.
        np.testing.assert_allclose(as_float64(lse - target), expected, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(
            as_float64(lse - target)[[0, 2, 3, 4, 5]], expected[[0, 2, 3, 4, 5]], atol=5e-6
        )


def test_gradient_of_a_shard_is_its_part_of_the_whole(each_backend):
    values, labels = random((6, 40), 0), paddle.to_tensor([39, 0, 7, -100, 20, 31])
    logits = paddle.to_tensor(values.astype("float32"))
    _, lse = module.loss_and_lse(logits, labels, -100, VocabularyShard(0, 40, None))
    dloss = paddle.to_tensor(random((6,), 1).astype("float32"))
    whole = module.logits_gradient(logits, labels, lse, dloss, 0, -100, False)
    for start in (0, 10, 30):
        part = logits[:, start : start + 10].contiguous()
        got = module.logits_gradient(part, labels, lse, dloss, start, -100, False)
        np.testing.assert_allclose(got.numpy(), whole.numpy()[:, start : start + 10], atol=1e-7)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_two_processes(backend):
    assert run_ranks(WORKER, 2, [backend], timeout=100) == ["agreed", "agreed"]
