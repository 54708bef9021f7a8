"""The memory of a block of a layer that is one operator (ops/blocks.py).

The operator keeps neither the output of the norm before it nor what an activation makes: its
backward pass computes them again, in the memory of their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pypkg.planner.operators import ACTIVATIONS, GRADIENTS, Operators
from pypkg.planner.tape import Gradients, Parameter, Tensor

# The backward pass from the output of a block to that of its first product. It returns the gradient
# of the latter and that of the second weight.
_Inner = Callable[[], tuple[Tensor, Tensor]]


class PreNorm(NamedTuple):
    """The norm before a block, in one operator with it: of x + residual, for each of ``rows``."""

    residual: Tensor
    weight: Parameter
    rows: int


def attention_block(
    ops: Operators,
    x: Tensor,
    norm: PreNorm | None,
    weights: Sequence[Parameter],
    elements: Sequence[int],
    rows: int,
    workspace: int,
) -> list[Tensor]:
    """Both projections and attention (``pypkg_attention_block``, ``pypkg_normed_...``).

    Args:
        weights: weights of qkv and of the output.
        elements: elements of qkv, of what is attended and of the output.
        rows, workspace: as of ``Operators.packed_attention``.

    Returns:
        the output, and with a norm x + residual.
    """

    def forward() -> tuple[Tensor, _Inner]:
        qkv, attended, lse = ops.new(elements[0]), ops.new(elements[1]), ops.floats(rows)

        def inner() -> tuple[Tensor, Tensor]:
            assert lse
            of_attended, of_o = ops.like(attended), ops.like(weights[1])
            of_qkv = ops.like(qkv)
            ops.scratch(workspace)
            del of_attended
            return of_qkv, of_o

        return ops.new(elements[2]), inner

    return _block(ops, x, norm, weights, forward)


def mlp_block(
    ops: Operators,
    x: Tensor,
    norm: PreNorm | None,
    weights: Sequence[Parameter],
    width: int,
    outputs: int,
) -> list[Tensor]:
    """A gated MLP (``pypkg_mlp_block``, ``pypkg_normed_mlp_block``).

    Args:
        weights: weights of gate and up, packed, and of the output.
        width: elements of gate, and of up.
        outputs: elements of the output.

    Returns:
        the output, and with a norm x + residual.
    """

    def forward() -> tuple[Tensor, _Inner]:
        gate_up, activated = ops.new(2 * width), ops.new(width)

        def inner() -> tuple[Tensor, Tensor]:
            activated_again = ops.new(width, GRADIENTS)  # at first its gradient
            of_gate_up, of_down = ops.like(gate_up), ops.like(weights[1])
            del activated_again
            return of_gate_up, of_down

        out = ops.new(outputs)
        del activated
        return out, inner

    return _block(ops, x, norm, weights, forward)


def _block(
    ops: Operators,
    x: Tensor,
    norm: PreNorm | None,
    weights: Sequence[Parameter],
    forward: Callable[[], tuple[Tensor, _Inner]],
) -> list[Tensor]:
    if norm is not None:
        return _normed_block(ops, x, norm, weights, forward)
    (out, inner), kept = forward(), x.detach()

    def backward(incoming: list[Tensor | None]) -> Gradients:
        first, of_second = inner()
        gradients = [ops.like(kept), ops.like(weights[0]), of_second]
        del first
        return gradients

    ops.tape.record([x, *weights], [out], backward)
    return [out]


def _normed_block(
    ops: Operators,
    x: Tensor,
    norm: PreNorm,
    weights: Sequence[Parameter],
    forward: Callable[[], tuple[Tensor, _Inner]],
) -> list[Tensor]:
    y, stream = ops.like(x, ACTIVATIONS), ops.like(x, ACTIVATIONS)
    rstd, kept = ops.floats(norm.rows), stream.detach()
    out, inner = forward()
    del y

    def backward(incoming: list[Tensor | None]) -> Gradients:
        assert rstd
        first, of_second = inner()
        y_again = ops.like(kept)  # at first its gradient
        of_norm = ops.add_rms_norm_gradients(kept, norm.weight, norm.rows)
        of_first = ops.like(weights[0])
        del first, y_again
        return [*of_norm, of_first, of_second]

    ops.tape.record([x, norm.residual, norm.weight, *weights], [out, stream], backward)
    return [out, stream]
