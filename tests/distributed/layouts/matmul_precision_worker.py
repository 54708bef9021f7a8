"""One rank of test_tensor_parallel.py: which products the layers of a tensor-parallel group make.

Argument: whether to use sequence parallelism (0 or 1). Reports the largest difference of each layer
from products of operands rounded to bfloat16.
"""

from __future__ import annotations

import sys

import numpy as np
import paddle
from distributed_testing import report

from pypkg import ops
from pypkg.parallel import mesh, tp_layers

TOKENS, WIDTH, INNER, VOCABULARY = 8, 64, 96, 50


def draw(*shape: int) -> np.ndarray:
    """The same on all ranks, and numbers that bfloat16 holds."""
    values = np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)
    return paddle.to_tensor(values).astype("bfloat16").astype("float32").numpy()


def largest(actual: paddle.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual.numpy() - expected).max())


def main(sequence_parallel: bool) -> None:
    degree = mesh.launched_processes()
    rank = mesh.initialize(mesh.Degrees(tensor=degree, sequence_parallel=sequence_parallel)).rank
    ops.set_matmul_precision("bfloat16")
    # A little more than what bfloat16 holds, which rounding has to take away.
    unrounded = np.float32(1 + 2**-10)

    def part(values: np.ndarray, axis: int) -> np.ndarray:
        return np.split(values, degree, axis)[rank]

    def tokens(values: np.ndarray) -> np.ndarray:
        return part(values, 0) if sequence_parallel else values

    x, to_inner, inner, from_inner, table = (
        draw(TOKENS, WIDTH), draw(WIDTH, INNER), draw(TOKENS, INNER), draw(INNER, WIDTH),
        draw(VOCABULARY, WIDTH),
    )  # fmt: skip
    column = tp_layers.column_linear(WIDTH, INNER, False)
    column.weight.set_value(part(to_inner, 1) * unrounded)
    row = tp_layers.row_linear(INNER, WIDTH, False)
    row.weight.set_value(part(from_inner, 0) * unrounded)
    head = paddle.to_tensor(part(table, 0) * unrounded)
    logits = tp_layers.gathered_vocab_logits(paddle.to_tensor(x), head, VOCABULARY)
    report(
        {
            "column": largest(column(paddle.to_tensor(tokens(x))), x @ part(to_inner, 1)),
            "row": largest(row(paddle.to_tensor(part(inner, 1))), tokens(inner @ from_inner)),
            "head": largest(logits, x @ table.T),
        }
    )


if __name__ == "__main__":
    main(sys.argv[1] == "1")
