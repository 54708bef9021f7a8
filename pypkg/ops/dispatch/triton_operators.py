"""The Triton kernels as Paddle operators with gradients, like csrc/paddle for the CUDA kernels.

They run in dynamic graphs only, because the tensors of a static graph have no addresses.
``pypkg.ops`` checks the arguments. The first call imports the kernels and, with them, Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import paddle
from paddle.autograd import PyLayer, PyLayerContext

from pypkg.ops.dispatch.autograd import BackwardGuard
from pypkg.ops.dispatch.library import raw_stream

Tensors = tuple[paddle.Tensor, ...]
Gradients = tuple[paddle.Tensor | None, ...]  # None: the input requires no gradient


def _kernels() -> ModuleType:
    from pypkg.ops.triton import kernels

    return kernels


def _matrix(tensor: paddle.Tensor) -> paddle.Tensor:
    """``tensor`` as a contiguous [rows, last dimension]; a copy only if it is not contiguous."""
    return tensor.detach().contiguous().reshape([-1, tensor.shape[-1]])


def _like(matrix: paddle.Tensor) -> paddle.Tensor:
    return paddle.empty(matrix.shape, dtype=matrix.dtype)


def _floats(*shape: int) -> paddle.Tensor:
    return paddle.empty(shape, dtype="float32")


def _apply(layer: type[PyLayer], *arguments: object) -> Tensors:
    """The outputs of a layer whose first argument is a BackwardGuard."""
    guard = BackwardGuard()
    outputs = layer.apply(guard, *arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    guard.watch(outputs)
    return outputs


def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None
) -> paddle.Tensor | Tensors:
    if residual is None:
        return _apply(_RmsNorm, x, weight, epsilon)[0]
    return _apply(_AddRmsNorm, x, residual, weight, epsilon)


class _Context(PyLayerContext):
    """Values other than tensors that every layer keeps for its backward.

    Attributes:
        guard: raises on a second backward pass.
        wanted: for each input tensor, whether it requires a gradient.
    """

    guard: BackwardGuard
    wanted: list[bool]


def _wanted(ctx: _Context, gradients: Sequence[paddle.Tensor]) -> Gradients:
    return tuple(each if wanted else None for each, wanted in zip(gradients, ctx.wanted))


class _RmsNorm(PyLayer):
    @staticmethod
    def forward(
        ctx: _Context,
        guard: BackwardGuard,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        epsilon: float,
    ) -> paddle.Tensor:
        h, w = _matrix(x), weight.detach().contiguous()
        y, rstd = _like(h), _floats(h.shape[0])
        _kernels().rms_norm_forward(h, w, y, rstd, epsilon=epsilon, stream=raw_stream(x))
        ctx.guard, ctx.wanted = guard, [not each.stop_gradient for each in (x, weight)]
        ctx.save_for_backward(h, w, rstd)
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: _Context, dy: paddle.Tensor) -> Gradients:
        ctx.guard.ran()
        dx, _, dweight = _rms_norm_gradients(ctx.saved_tensor(), dy, None, False)
        return _wanted(ctx, (dx, dweight))


class _AddRmsNorm(PyLayer):
    @staticmethod
    def forward(
        ctx: _Context,
        guard: BackwardGuard,
        x: paddle.Tensor,
        residual: paddle.Tensor,
        weight: paddle.Tensor,
        epsilon: float,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        rows, w = _matrix(x), weight.detach().contiguous()
        y, h, rstd = _like(rows), _like(rows), _floats(rows.shape[0])
        _kernels().rms_norm_forward(
            rows, w, y, rstd, _matrix(residual), h, epsilon=epsilon, stream=raw_stream(x)
        )
        ctx.guard = guard
        ctx.wanted = [not each.stop_gradient for each in (x, residual, weight)]
        ctx.save_for_backward(h, w, rstd)
        return y.reshape(x.shape), h.reshape(x.shape)

    @staticmethod
    def backward(ctx: _Context, dy: paddle.Tensor, dh: paddle.Tensor) -> Gradients:
        ctx.guard.ran()
        # Paddle adds to gradients in place, so x and residual cannot share one.
        is_twice = all(ctx.wanted[:2])
        return _wanted(ctx, _rms_norm_gradients(ctx.saved_tensor(), dy, dh, is_twice))


def _rms_norm_gradients(
    saved: Sequence[paddle.Tensor], dy: paddle.Tensor, dh: paddle.Tensor | None, is_twice: bool
) -> Tensors:
    """dx; a second one, if ``is_twice`` in memory of its own; dweight."""
    h, weight, rstd = saved
    kernels = _kernels()
    dx, dweight = _like(h), _like(weight)
    second = _like(h) if is_twice else None
    workspace = _floats(kernels.rms_norm_backward_workspace(h))
    kernels.rms_norm_backward(
        *(_matrix(dy), h, weight, rstd, dx, dweight, workspace),
        None if dh is None else _matrix(dh),
        second,
        stream=raw_stream(h),
    )
    return dx.reshape(dy.shape), (dx if second is None else second).reshape(dy.shape), dweight


def rotary_embedding(
    q: paddle.Tensor,
    k: paddle.Tensor | None,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    position_ids: paddle.Tensor | None,
    interleaved: bool,
    rotary_offset: int,
) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    rotation = _Rotation(
        *(cos.detach().contiguous(), sin.detach().contiguous()),
        None if position_ids is None else position_ids.contiguous(),
        *(interleaved, rotary_offset),
    )
    if k is None:
        return _apply(_Rotary, rotation, q)[0], None
    q_out, k_out = _apply(_Rotary, rotation, q, k)
    return q_out, k_out


@dataclass(frozen=True)
class _Rotation:
    """The arguments without gradient. A PyLayer finds tensors in tuples, but not in this class."""

    cos: paddle.Tensor
    sin: paddle.Tensor
    position_ids: paddle.Tensor | None
    interleaved: bool
    rotary_offset: int


class _RotaryContext(_Context):
    rotation: _Rotation


class _Rotary(PyLayer):
    @staticmethod
    def forward(
        ctx: _RotaryContext, guard: BackwardGuard, rotation: _Rotation, *heads: paddle.Tensor
    ) -> Tensors:
        ctx.guard, ctx.rotation = guard, rotation
        ctx.wanted = [not each.stop_gradient for each in heads]
        return _rotate(heads, rotation, inverse=False)

    @staticmethod
    def backward(ctx: _RotaryContext, *gradients: paddle.Tensor) -> Gradients:
        ctx.guard.ran()
        return _wanted(ctx, _rotate(gradients, ctx.rotation, inverse=True))


def _rotate(heads: Sequence[paddle.Tensor], rotation: _Rotation, inverse: bool) -> Tensors:
    inputs = [each.detach().contiguous() for each in heads]
    outputs = [_like(each) for each in inputs]
    k, k_out = (inputs[1], outputs[1]) if len(heads) == 2 else (None, None)
    _kernels().rotary_embedding(
        *(inputs[0], k, rotation.cos, rotation.sin, outputs[0], k_out, rotation.position_ids),
        rotary_offset=rotation.rotary_offset,
        interleaved=rotation.interleaved,
        inverse=inverse,
        stream=raw_stream(inputs[0]),
    )
    return tuple(outputs)


def gated_activation(
    gate: paddle.Tensor, up: paddle.Tensor | None, activation: str, gate_first: bool
) -> paddle.Tensor:
    inputs = (gate,) if up is None else (gate, up)
    return _apply(_GatedActivation, activation, gate_first, *inputs)[0]


class _GatedContext(_Context):
    activation: str
    gate_first: bool


class _GatedActivation(PyLayer):
    """The activation of gate and up, or of one packed tensor whose halves are read in place."""

    @staticmethod
    def forward(
        ctx: _GatedContext,
        guard: BackwardGuard,
        activation: str,
        gate_first: bool,
        *inputs: paddle.Tensor,
    ) -> paddle.Tensor:
        ctx.guard, ctx.activation, ctx.gate_first = guard, activation, gate_first
        ctx.wanted = [not each.stop_gradient for each in inputs]
        matrices = [_matrix(each) for each in inputs]
        ctx.save_for_backward(*matrices)
        gate, up = _halves(matrices, gate_first)
        out = paddle.empty(gate.shape, dtype=matrices[0].dtype)
        _kernels().gated_activation_forward(gate, up, out, activation, stream=raw_stream(out))
        return out.reshape([*inputs[0].shape[:-1], out.shape[1]])

    @staticmethod
    def backward(ctx: _GatedContext, dout: paddle.Tensor) -> Gradients:
        ctx.guard.ran()
        matrices = ctx.saved_tensor()
        gradients = [_like(each) for each in matrices]
        _kernels().gated_activation_backward(
            *_halves(matrices, ctx.gate_first),
            _matrix(dout),
            *_halves(gradients, ctx.gate_first),
            ctx.activation,
            stream=raw_stream(dout),
        )
        shaped = [each.reshape([*dout.shape[:-1], each.shape[1]]) for each in gradients]
        return _wanted(ctx, shaped)


class _Columns:
    """Columns of a matrix as a kernel argument. Paddle's flags decide if its own slices copy."""

    def __init__(self, matrix: paddle.Tensor, start: int, count: int) -> None:
        self._matrix, self._start = matrix, start
        self.dtype, self.shape = matrix.dtype, (matrix.shape[0], count)

    def data_ptr(self) -> int:
        return self._matrix.data_ptr() + self._start * self._matrix.element_size()

    def stride(self, dim: int) -> int:
        return self._matrix.stride(dim)


def _halves(
    matrices: Sequence[paddle.Tensor], gate_first: bool
) -> tuple[paddle.Tensor | _Columns, paddle.Tensor | _Columns]:
    """gate and up: two matrices, or the two halves of one packed matrix."""
    if len(matrices) == 2:
        return matrices[0], matrices[1]
    (packed,) = matrices
    half = packed.shape[1] // 2
    first, second = _Columns(packed, 0, half), _Columns(packed, half, half)
    return (first, second) if gate_first else (second, first)


def cross_entropy_statistics(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
) -> Tensors:
    """loss, lse, row_max, row_sum, target of one shard, as in cross_entropy.h."""
    matrix = _matrix(logits)
    outputs = [_floats(matrix.shape[0]) for _ in range(5)]
    _kernels().cross_entropy_forward(
        *(matrix, labels.contiguous().flatten(), *outputs),
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        stream=raw_stream(logits),
    )
    return tuple(each.reshape(labels.shape) for each in outputs)


def cross_entropy_gradient(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    lse: paddle.Tensor,
    dloss: paddle.Tensor,
    vocab_start: int,
    ignore_index: int,
    inplace: bool,
) -> paddle.Tensor:
    """(softmax(logits) - [label]) * dloss.

    With ``inplace`` the result overwrites the logits, even if other tensors share their memory.
    """
    matrix = _matrix(logits)
    gradient = matrix if inplace else _like(matrix)
    _kernels().cross_entropy_backward(
        *(matrix, labels.contiguous().flatten()),
        *(each.contiguous().flatten() for each in (lse, dloss)),
        gradient,
        vocab_start=vocab_start,
        ignore_index=ignore_index,
        stream=raw_stream(logits),
    )
    return gradient.reshape(logits.shape)
