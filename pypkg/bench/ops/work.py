"""The work of each pass of an operator, as both benchmarks count it.

Each input is read once and each output written once. The module needs neither Paddle nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORWARD, BACKWARD, _ = PASSES = ("forward", "backward", "forward+backward")
STEP = "step"
FILL = "fill"
ELEMENT_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes


@dataclass(frozen=True)
class Work:
    """The least work of one pass.

    Args:
        elements: values in the dtype of the case, each read or written once.
        other_bytes: the same for values whose dtype does not vary with the case.
        flops: multiplications and additions of matrix products; element-wise arithmetic is not
            counted.
    """

    elements: int = 0
    other_bytes: int = 0
    flops: int = 0

    def bytes(self, element_size: int) -> int:
        return self.elements * element_size + self.other_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.elements + other.elements,
            self.other_bytes + other.other_bytes,
            self.flops + other.flops,
        )


PassWork = Mapping[str, Work]

# Description of the counted work of each operator.
COUNTED = {
    "rms_norm": "forward reads x and weight, writes y; backward reads x, dy and weight, writes dx "
    "and dweight",
    "rms_norm+residual": "forward reads x, residual and weight, writes y and x + residual; "
    "backward reads x + residual, both output gradients and weight, writes one gradient for x and "
    "residual alike, and dweight",
    "rotary_embedding": "either pass reads q and k (or their gradients) and the float32 tables, "
    "and writes as much as it reads of q and k",
    "swiglu": "forward reads gate and up, writes their product; backward reads its gradient, gate "
    "and up, writes the gradients of both",
    "geglu": "as swiglu",
    "flash_attention": "for each visible pair of a query and a key and each head, forward 4 x "
    "head_dim (two products), backward 10 x head_dim (five products)",
    "flash_attention_with_lse": "as flash_attention; all keys are visible, and backward is "
    "flash_attention_block_gradients",
    "cross_entropy": "forward reads logits and labels, writes the loss of each row; backward reads "
    "logits, labels and loss gradients, writes the logits' gradient",
    "linear_cross_entropy": "forward one product of 2 x rows x hidden x vocabulary, backward two. "
    "pypkg computes the gradients during forward, so the two passes are only compared together",
    "matmul": "forward one product of 2 x rows x inputs x outputs, backward two. Tensors are "
    "float32; pypkg and torch's autocast round both operands to bfloat16 within the time, `torch, "
    "bfloat16` is given bfloat16 tensors, weight gradient included. With float32 products pypkg's "
    "matmul is Paddle's. The limit is that of float32 products",
    "adamw": "28 bytes per parameter. float32: a step reads weight, gradient and both moments, and "
    "writes all but the gradient. bfloat16: it reads gradient, float32 master weight and moments, "
    "and writes these and the parameter",
    "random_normal": "every element is written once; nothing is read",
}


def rms_norm(rows: int, hidden: int, with_residual: bool = False) -> PassWork:
    """The work for x [rows, hidden]."""
    forward, backward = (4, 4) if with_residual else (2, 3)
    return {
        FORWARD: Work(elements=forward * rows * hidden + hidden),
        BACKWARD: Work(elements=backward * rows * hidden + 2 * hidden),
    }


def rotary_embedding(batch: int, sequence: int, heads: int, head_dim: int) -> PassWork:
    """The work for q and k with ``heads`` heads in total; tables are [sequence, head_dim / 2]."""
    both = Work(
        elements=2 * batch * sequence * heads * head_dim,
        other_bytes=2 * sequence * (head_dim // 2) * 4,
    )
    return {FORWARD: both, BACKWARD: both}


def gated_activation(rows: int, columns: int) -> PassWork:
    """The work for gate and up, each [rows, columns]."""
    return {
        FORWARD: Work(elements=3 * rows * columns),
        BACKWARD: Work(elements=5 * rows * columns),
    }


def flash_attention(pairs: int, heads: int, head_dim: int) -> PassWork:
    """The work of attention.

    Args:
        pairs: visible pairs of a query and a key of one head, over the whole batch.
    """
    forward = 4 * pairs * heads * head_dim
    return {FORWARD: Work(flops=forward), BACKWARD: Work(flops=5 * forward // 2)}


def cross_entropy(rows: int, vocab: int) -> PassWork:
    """The work for logits [rows, vocab] with int64 labels and float32 losses."""
    per_row = rows * (8 + 4)
    return {
        FORWARD: Work(elements=rows * vocab, other_bytes=per_row),
        BACKWARD: Work(elements=2 * rows * vocab, other_bytes=per_row),
    }


def matmul(rows: int, inputs: int, outputs: int) -> PassWork:
    """The work of [rows, inputs] x [inputs, outputs], and of the gradients of both."""
    product = 2 * rows * inputs * outputs
    return {FORWARD: Work(flops=product), BACKWARD: Work(flops=2 * product)}


def adamw(parameters: int) -> PassWork:
    """The work of a step in float32, or in 16 bits with 16-bit gradients and master weights."""
    return {STEP: Work(other_bytes=28 * parameters)}


def random_normal(elements: int) -> PassWork:
    """The work of overwriting a tensor."""
    return {FILL: Work(elements=elements)}


def visible_pairs(mask: str, sequence: int, size: int = 0) -> int:
    """Number of visible pairs of a query and a key, for one head of one sequence.

    Args:
        mask: "full", or a causal mask: "causal", "alibi" and "softcap" see all keys before the
            query; "prefix": all queries also see the first ``size`` keys; "window": the last
            ``size`` keys; "documents": documents of ``size`` tokens, the last may be shorter.
    """
    if mask == "full":
        return sequence**2
    causal = _triangle(sequence)
    if mask == "prefix":
        return causal + _triangle(size - 1)
    if mask == "window":
        return causal - _triangle(max(sequence - size, 0))
    if mask == "documents":
        whole, rest = divmod(sequence, size)
        return whole * _triangle(size) + _triangle(rest)
    return causal


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
