"""One rank of test_context.py: attention over ranks that divide the tokens, against one process.

Arguments: "ring", "heads", or "memory", the peak of a ring's ranks; the number of ranks, and for
"memory" the length of a sample.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from distributed_testing import REPO, report
from paddle.base import core

sys.path.insert(0, str(REPO / "tests" / "models"))
from tiny_configs import tiny

from pypkg import ops
from pypkg.models import from_config
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import mean_over_token_shards
from pypkg.parallel.context.heads import (
    attended_heads,
    heads_for_tokens,
    own_heads,
    tokens_for_heads,
)
from pypkg.parallel.context.ring import ring_attention
from pypkg.parallel.context.tokens import own_batch, own_tokens
from pypkg.training.step.engine import Engine, to_device

BATCH, SEQUENCE, HEADS, HEAD_DIM = 2, 48, 4, 8
_STARTS = np.zeros([BATCH, SEQUENCE], np.int32)
_STARTS[0, 5:], _STARTS[0, 29:], _STARTS[1, 40:] = 5, 29, 40
_SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


def masks() -> dict[str, Callable[[Any], ops.AttentionMask]]:
    """Given the slopes of the heads at hand."""
    starts = paddle.to_tensor(_STARTS)
    prefixes = paddle.to_tensor(np.array([0, 31], np.int32))
    return {
        "causal": lambda _: ops.AttentionMask(),
        "window": lambda _: ops.AttentionMask(window=9),
        "documents": lambda _: ops.AttentionMask(document_starts=starts),
        "window in documents": lambda _: ops.AttentionMask(document_starts=starts, window=17),
        "prefix": lambda _: ops.AttentionMask(prefix_lengths=prefixes),
        "ALiBi": lambda slopes: ops.AttentionMask(alibi_slopes=paddle.to_tensor(slopes)),
        "both directions": lambda _: ops.AttentionMask(causal=False),
    }


def tensors(heads_k: int, seed: int) -> list[paddle.Tensor]:
    """Query, key and value of all tokens, and the gradient of the output."""
    generator = np.random.default_rng(seed)
    heads = (HEADS, heads_k, heads_k, HEADS)
    shapes = [[BATCH, SEQUENCE, each, HEAD_DIM] for each in heads]
    return [paddle.to_tensor(generator.normal(size=each), dtype="float32") for each in shapes]


def run(attend: Callable[..., paddle.Tensor], given: list[paddle.Tensor]) -> list[paddle.Tensor]:
    """The output, and the gradients of query, key and value."""
    inputs = [each.clone() for each in given[:3]]
    for each in inputs:
        each.stop_gradient = False
    out = attend(*inputs)
    out.backward(given[3])
    return [out, *(each.grad for each in inputs)]


def by_heads(query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, mask: Any, **options):
    heads = query.shape[2], key.shape[2]
    qkv = paddle.concat([each.flatten(2) for each in (query, key, value)], axis=-1)
    exchanged = tokens_for_heads(qkv, BATCH, *heads)
    parts = ops.split_heads(exchanged, BATCH, *attended_heads(*heads))
    out = ops.flash_attention(*parts, mask, **options)
    return heads_for_tokens(out.flatten(2)).reshape(query.shape)


def differences(kind: str) -> dict[str, float]:
    """The largest difference from one process, relative to the largest element."""
    found = {}
    attend = ring_attention if kind == "ring" else by_heads
    cases = [(name, 2, 0.0) for name in masks()]
    for name, heads_k, softcap in [*cases, ("causal", 1, 0.0), ("causal", 4, 5.0)]:
        given, make = tensors(heads_k, seed=len(found)), masks()[name]
        options = {"scale": 0.4, "softcap": softcap}
        whole = run(partial(ops.flash_attention, mask=make(_SLOPES), **options), given)
        own = run(
            partial(attend, mask=make(np.array(own_heads(_SLOPES))), **options),
            [own_tokens(each, axis=1) for each in given],
        )
        found[f"{name}, {heads_k} heads, cap {softcap}"] = max(
            float((a - own_tokens(b, axis=1)).abs().max() / b.abs().max())
            for a, b in zip(own, whole, strict=True)
        )
    return found


class _MeanOfLabels:
    """A model whose loss is the mean of the labels that count."""

    def loss(self, batch: dict[str, Any]) -> paddle.Tensor:
        labels = batch["labels"].astype("float32")
        counts = (labels >= 0).astype("float32")
        mean = (labels * counts).sum() / paddle.clip(counts.sum(), min=1.0)
        return mean * batch.get("loss_weight", 1.0)

    def forward_backward(self, batches: list[dict[str, Any]], scale: object) -> paddle.Tensor:
        return paddle.stack([self.loss(batch) for batch in batches]).mean()

    evaluate = loss

    def train(self) -> None:
        pass

    eval = train


def means(normalization: str) -> list[float]:
    """Of the labels of two micro batches, by a training step and by an evaluation."""
    labels = np.full([2, 1, SEQUENCE], -100)
    labels[0, 0, 3:7], labels[1, 0, 40:] = 8, np.arange(8)
    batches = [{"input_ids": np.zeros([1, SEQUENCE], np.int64), "labels": each} for each in labels]
    updater: Any = SimpleNamespace(scale=None)
    engine = Engine(_MeanOfLabels(), updater, normalization=normalization)
    loss = engine.forward_backward(batches)
    assert loss is not None
    return [mean_over_token_shards(loss).item(), engine.evaluate(batches)]


def peak(length: int) -> int:
    """Bytes beyond weights and gradients, of a step with one sample."""
    model = from_config(tiny("llama").replace(max_position_embeddings=length), seed=1)
    model.train()
    ids = np.random.default_rng(0).integers(8, 4096, [1, length])
    batch = to_device(own_batch({"input_ids": ids, "labels": ids}))
    model.loss(**batch).backward()
    model.clear_gradients(set_to_zero=True)
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    model.loss(**batch).backward()
    return core.host_memory_stat_peak_value("Allocated", 0) - before


def main(kind: str, ranks: int, length: int = 0) -> None:
    mesh.initialize(mesh.Degrees(context=ranks, ring=kind != "heads"))
    if kind == "memory":
        report(peak(length))
        return
    ids = np.arange(SEQUENCE)[None]
    report(
        {
            "differences": differences(kind),
            "tokens": own_batch({"input_ids": ids, "labels": ids})["input_ids"][0].tolist(),
            "means": {name: means(name) for name in ("global", "micro_batch")},
        }
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
