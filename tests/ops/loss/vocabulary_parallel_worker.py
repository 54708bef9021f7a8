"""One of two processes that hold half of the vocabulary each; run by test_vocabulary_parallel.py.

Compares loss and gradients with those of the whole vocabulary, computed here without a group.
"""

from __future__ import annotations

import sys

import numpy as np
import paddle
import paddle.distributed as dist
from distributed_testing import REPO, report

sys.path.insert(0, str(REPO / "tests" / "ops"))
from op_testing import assert_close, parameter, random

from pypkg import ops
from pypkg.parallel.process_end import skip_destructors

ROWS, HIDDEN, VOCAB = 13, 16, 40


def main() -> None:
    skip_destructors()
    dist.init_parallel_env()
    ops.set_backend(sys.argv[1])
    group = dist.new_group([0, 1]) if dist.get_group(0) is None else dist.get_group(0)
    cols = VOCAB // group.nranks
    mine = slice(group.rank * cols, (group.rank + 1) * cols)
    labels = np.random.default_rng(0).integers(0, VOCAB, ROWS)
    labels[[2, 9]] = -100
    labels = paddle.to_tensor(labels)

    logits = random((ROWS, VOCAB), 1, 4.0)
    logits[3, : VOCAB // 2] = -np.inf  # the whole of rank 0's shard of one row
    labels[3] = VOCAB - 1
    shard, whole = parameter(logits[:, mine]), parameter(logits, "float64")
    loss = ops.cross_entropy(shard * 1.0, labels, group=group)
    loss.sum().backward()
    expected = ops.cross_entropy_reference(whole, labels)
    expected.sum().backward()
    assert_close(loss.numpy(), expected.numpy(), 5e-6, "loss")
    assert_close(shard.grad.numpy(), whole.grad.numpy()[:, mine], 5e-6, "gradient of the shard")

    hidden, weight = random((ROWS, HIDDEN), 2), random((VOCAB, HIDDEN), 3)
    for z_loss in (0.0, 0.2):
        check_linear(hidden, weight, labels, mine, group, z_loss)
    check_padding_row(hidden, weight, labels, mine, group)
    report("agreed")


def check_linear(
    hidden: np.ndarray,
    weight: np.ndarray,
    labels: paddle.Tensor,
    mine: slice,
    group: object,
    z_loss: float,
) -> None:
    inputs = [parameter(hidden), parameter(weight[mine])]
    chunk_bytes = 5 * inputs[1].shape[0] * 4
    loss = ops.linear_cross_entropy(
        *inputs, labels, group=group, chunk_bytes=chunk_bytes, z_loss=z_loss
    )
    loss.backward()
    exact = [parameter(hidden, "float64"), parameter(weight, "float64")]
    expected = ops.linear_cross_entropy_reference(*exact, labels, z_loss=z_loss)
    expected.backward()
    assert_close(loss.numpy(), expected.numpy(), 5e-6, "linear loss")
    assert_close(inputs[0].grad.numpy(), exact[0].grad.numpy(), 5e-6, "gradient of hidden")
    assert_close(inputs[1].grad.numpy(), exact[1].grad.numpy()[mine], 5e-6, "gradient of weight")


def check_padding_row(
    hidden: np.ndarray, weight: np.ndarray, labels: paddle.Tensor, mine: slice, group: object
) -> None:
    """A vocabulary that two ranks do not divide: the last row of the last shard is padding."""
    vocab = VOCAB - 1
    labels = paddle.where(labels == vocab, paddle.zeros_like(labels), labels)
    inputs = [parameter(hidden), parameter(weight[mine])]
    loss = ops.linear_cross_entropy(*inputs, labels, group=group, vocab_size=vocab)
    loss.backward()
    exact = [parameter(hidden, "float64"), parameter(weight[:vocab], "float64")]
    expected = ops.linear_cross_entropy_reference(*exact, labels)
    expected.backward()
    assert_close(loss.numpy(), expected.numpy(), 5e-6, "loss with a padding row")
    of_weight = np.concatenate([exact[1].grad.numpy(), np.zeros((1, HIDDEN))])[mine]
    assert_close(inputs[1].grad.numpy(), of_weight, 5e-6, "gradient of weight with a padding row")


if __name__ == "__main__":
    main()
