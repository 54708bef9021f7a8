"""The output projection and its cross entropy, without storing the full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import paddle
import paddle.distributed as dist
from paddle import _C_ops
from paddle.autograd import PyLayer, PyLayerContext
from paddle.distributed.communication.group import Group

from pypkg.ops.dispatch.autograd import backward_once
from pypkg.ops.dispatch.checks import FLOATING, check_dtype, check_shape, compute_dtype
from pypkg.ops.loss.cross_entropy import (
    check_labels,
    cross_entropy_reference,
    logits_gradient,
    loss_and_lse,
)
from pypkg.ops.loss.vocabulary_parallel import VocabularyShard, shard_of
from pypkg.ops.matmul import add_product, matmul

_CHUNK_BYTES = 256 * 2**20
# On a CPU as fast as 256 MiB. The peak memory of a training step is in this function.
_CPU_CHUNK_BYTES = 128 * 2**20


@paddle.jit.not_to_static
def linear_cross_entropy(
    hidden: paddle.Tensor,
    weight: paddle.Tensor,
    labels: paddle.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: Group | None = None,
    chunk_bytes: int | None = None,
    vocab_size: int | None = None,
    token_losses: list[paddle.Tensor] | None = None,
    z_loss: float = 0.0,
) -> paddle.Tensor:
    """``cross_entropy(hidden @ weight.T, labels)``, reduced, one chunk of rows at a time.

    The forward pass computes the logits of a chunk, replaces them by their gradient in place, and
    adds the products to the gradients of hidden and weight (Hsu et al., Liger Kernel, 2024). The
    backward pass only scales, by a float32 factor. If no input requires a gradient, only the loss
    is computed.

    Peak memory beside the inputs, with d bytes per element of hidden:

    - logits of a chunk: chunk_bytes (the full logits would take rows * vocab * d);
    - gradient of hidden: rows * hidden * d;
    - gradient of weight, summed in float32: vocab * hidden * 4;
    - product of a chunk before it is added to that sum: vocab * hidden * 4, or vocab * hidden *
      (d + 4) if d is 2. Products of 16 bits on a GPU, and of float32 on a CPU with the compiled
      operators, are added as they are made and need no buffer.

    With a ``group`` the vocabulary is divided as in ``cross_entropy``: weight holds the rows of
    this process; hidden and labels are equal on all processes. The gradient of hidden is summed
    over the group, and the loss is equal on all processes. If the group size does not divide
    ``vocab_size``, the weight of the last process ends with unused rows, whose gradient is zero.

    Args:
        hidden: [..., hidden]; float32, float16 or bfloat16 (float64 runs on the reference).
        weight: [vocab, hidden] in the dtype of hidden. Under ``paddle.amp`` both are cast to the
            dtype of autocasting.
        labels: [...] int64, each in [0, vocab) or ``ignore_index``.
        ignore_index: label of the rows that have loss 0 and no gradient.
        reduction: "mean" over the rows whose label is not ``ignore_index`` (0 if there are none),
            or "sum".
        group: a ``paddle.distributed`` group, or None when the weight is whole.
        chunk_bytes: memory for the logits of a chunk, which has at least one row; None: 128 MiB on
            a CPU, 256 MiB elsewhere.
        vocab_size: entries of the whole vocabulary; None: the number of rows of all weights.
        token_losses: a list to which the cross entropy of every row is appended, float32 [...], 0
            for ``ignore_index``, without gradient.
        z_loss: factor of the square of each row's log-sum-exp, which is added to its loss
            (Chowdhery et al., PaLM, 2022) and keeps logits from drifting.

    Returns:
        float32 scalar.

    Raises:
        TypeError, ValueError: a dtype, shape or reduction other than above.
        IndexError: as ``cross_entropy``.
        OSError: in a second backward pass through one result (Paddle's type of errors in backward).
    """
    op = "linear_cross_entropy"
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if paddle.amp.is_autocast_enabled():
        target = paddle.amp.get_autocast_gpu_dtype()
        hidden, weight = hidden.astype(target), weight.astype(target)
    check_dtype(op, "hidden", hidden, FLOATING)
    check_dtype(op, "weight", weight, (hidden.dtype,))
    if len(hidden.shape) == 0:
        raise ValueError(f"{op}: hidden must have at least one dimension, got shape []")
    check_shape(op, "weight", weight, ["vocab", hidden.shape[-1]])
    check_labels(op, labels, hidden.shape[:-1])
    cols = weight.shape[0]
    if chunk_bytes is None:
        chunk_bytes = _CPU_CHUNK_BYTES if hidden.place.is_cpu_place() else _CHUNK_BYTES
    rows_per_chunk = max(1, chunk_bytes // (cols * hidden.element_size()))
    record = paddle.is_grad_enabled()
    wanted = (record and not hidden.stop_gradient, record and not weight.stop_gradient)
    shard = shard_of(cols, group, vocab_size)
    if shard.start + cols > shard.vocab_size:
        weight = weight[: shard.vocab_size - shard.start]
    settings = (ignore_index, reduction, shard, wanted, rows_per_chunk, token_losses, z_loss)
    return backward_once(_LinearCrossEntropy.apply(hidden, weight, labels, *settings))


class _Context(PyLayerContext):
    """Values that ``_LinearCrossEntropy`` keeps for its backward.

    Attributes:
        gradients: of hidden and weight for an output gradient of 1; None: not required.
        scale: factor of the gradients, 1 / rows with a label; None for the sum.
        rows_per_chunk: rows that are scaled at a time.
        weight_dtype: dtype of the gradient of weight.
    """

    gradients: tuple[paddle.Tensor | None, paddle.Tensor | None]
    scale: paddle.Tensor | None
    rows_per_chunk: int
    weight_dtype: paddle.dtype


class _Loss(NamedTuple):
    """What is computed of each row: arguments of ``linear_cross_entropy``."""

    ignore_index: int
    shard: VocabularyShard
    z_loss: float


class _LinearCrossEntropy(PyLayer):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: paddle.Tensor,
        weight: paddle.Tensor,
        labels: paddle.Tensor,
        ignore_index: int,
        reduction: str,
        shard: VocabularyShard,
        wanted: tuple[bool, bool],
        rows_per_chunk: int,
        token_losses: list[paddle.Tensor] | None,
        z_loss: float,
    ) -> paddle.Tensor:
        rows = hidden.detach().reshape([-1, hidden.shape[-1]])
        flat_labels = labels.flatten()
        losses: list[paddle.Tensor] = []
        kind = _Loss(ignore_index, shard, z_loss)
        total, dhidden, dweight = _walk_chunks(
            rows, weight.detach(), flat_labels, kind, wanted, rows_per_chunk, losses
        )
        if token_losses is not None:
            none = paddle.zeros([0], dtype=total.dtype)
            token_losses.append(paddle.concat([none, *losses]).reshape(labels.shape))
        ctx.scale = None
        if reduction == "mean":
            counted = (flat_labels != ignore_index).sum().clip(min=1).astype(total.dtype)
            ctx.scale = 1.0 / counted
            total = total * ctx.scale
        if dhidden is not None:
            if shard.group is not None:
                dist.all_reduce(dhidden, group=shard.group)
            dhidden = dhidden.reshape(hidden.shape)
        ctx.gradients = (dhidden, dweight)
        ctx.weight_dtype, ctx.rows_per_chunk = weight.dtype, rows_per_chunk
        return total

    @staticmethod
    def backward(
        ctx: _Context, dloss: paddle.Tensor
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None, None]:
        dhidden, dweight = ctx.gradients
        ctx.gradients = (None, None)  # they are scaled in place, so they can be used only once
        scale = dloss if ctx.scale is None else dloss * ctx.scale
        if dhidden is not None:
            dhidden = _scale(dhidden, scale, ctx.rows_per_chunk)
        if dweight is not None:
            dweight = _multiply_(dweight, scale).astype(ctx.weight_dtype)
        return dhidden, dweight, None


def _scale(x: paddle.Tensor, factor: paddle.Tensor, rows_per_chunk: int) -> paddle.Tensor:
    """x * factor in the memory of x, each product rounded once.

    Paddle would round the factor to the dtype of x, which puts all of a bfloat16 x off by up to
    2^-8 in the same direction. Rows of 16 bits are scaled a chunk at a time, with 6 bytes of memory
    per element of a chunk.
    """
    if x.dtype == compute_dtype(x):
        return _multiply_(x, factor)
    rows = x.reshape([-1, x.shape[-1]])
    for start in range(0, rows.shape[0], rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        rows[chunk] = rows[chunk].astype(factor.dtype).multiply_(factor).astype(x.dtype)
    return rows.reshape(x.shape)


def _multiply_(x: paddle.Tensor, factor: paddle.Tensor) -> paddle.Tensor:
    """x * factor in the memory of x: the scalar ``factor`` is rounded to the dtype of x.

    On a CPU Paddle's product with a broadcast scalar takes three times as long as its ``scale``.
    On a GPU ``scale`` would wait for the scalar.
    """
    factor = factor.astype(x.dtype)
    if not x.place.is_cpu_place():
        return x.multiply_(factor)
    return _scale_(x, factor, 0.0, True)


# No stub has it.
_scale_: Callable[..., paddle.Tensor] = vars(_C_ops)["scale_"]


def _walk_chunks(
    hidden: paddle.Tensor,
    weight: paddle.Tensor,
    labels: paddle.Tensor,
    kind: _Loss,
    wanted: tuple[bool, bool],
    rows_per_chunk: int,
    losses: list[paddle.Tensor],
) -> tuple[paddle.Tensor, paddle.Tensor | None, paddle.Tensor | None]:
    """The summed loss and its gradients with respect to hidden and weight.

    Cross entropies of the rows are appended to ``losses``, one tensor per chunk. The gradients are
    those of the sum, because 1 / rows would underflow in float16. A gradient that is not
    ``wanted`` is None; that of weight has at least float32.
    """
    wide = compute_dtype(hidden)
    total = paddle.zeros([], dtype=wide)
    dhidden = paddle.empty_like(hidden) if wanted[0] else None
    dweight = None
    for start in range(0, hidden.shape[0], rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        loss, penalty, dlogits = _loss_and_gradient(
            hidden[chunk], weight, labels[chunk], kind, any(wanted)
        )
        losses.append(loss)
        total = total + (loss.sum() if penalty is None else (loss + penalty).sum())
        if dlogits is None:
            continue
        if dhidden is not None:
            dhidden[chunk] = matmul(dlogits, weight)
        if wanted[1]:
            dweight = add_product(dweight, dlogits, hidden[chunk])
        del dlogits  # before the next chunk's logits are made
    if wanted[1] and dweight is None:  # no rows
        dweight = paddle.zeros(weight.shape, dtype=wide)
    return total, dhidden, dweight


def _loss_and_gradient(
    hidden: paddle.Tensor,
    weight: paddle.Tensor,
    labels: paddle.Tensor,
    kind: _Loss,
    want_gradient: bool,
) -> tuple[paddle.Tensor, paddle.Tensor | None, paddle.Tensor | None]:
    """Cross entropy and z-loss of each row of a chunk, and the gradient of its logits in their
    memory; None where there is no z-loss, or no gradient is wanted.

    With z-loss the gradient of logit j is p_j (1 + 2 z lse) - [j is the label], which is that of
    the cross entropy times 1 + 2 z lse, and 2 z lse more at the label.
    """
    logits = matmul(hidden, weight, transpose_y=True)
    loss, lse = loss_and_lse(logits, labels, kind.ignore_index, kind.shard)
    penalty, slope = None, None
    if kind.z_loss:
        counts = labels != kind.ignore_index
        held = paddle.where(counts, lse, paddle.zeros_like(lse))
        penalty, slope = kind.z_loss * held.square(), 2.0 * kind.z_loss * held
    if not want_gradient:
        return loss, penalty, None
    factor = paddle.ones_like(loss) if slope is None else 1.0 + slope
    start, ignored = kind.shard.start, kind.ignore_index
    gradient = logits_gradient(logits, labels, lse, factor, start, ignored, True)
    if slope is not None:
        _add_at_labels(gradient, labels - start, slope)
    return loss, penalty, gradient


def _add_at_labels(dlogits: paddle.Tensor, columns: paddle.Tensor, values: paddle.Tensor) -> None:
    """Adds ``values`` [rows] to ``dlogits`` [rows, cols] at ``columns``, where they are inside."""
    is_inside = (columns >= 0) & (columns < dlogits.shape[1])
    index = columns.clip(0, dlogits.shape[1] - 1).unsqueeze(1)
    added = paddle.where(is_inside, values, paddle.zeros_like(values)).unsqueeze(1)
    # On a CPU Paddle's take_along_axis does not support 16-bit floats, so it works on their bits.
    is_half = dlogits.element_size() == 2 and dlogits.place.is_cpu_place()
    held = dlogits.view("int16") if is_half else dlogits
    picked = paddle.take_along_axis(held, index, axis=1)
    picked = picked.view(dlogits.dtype) if is_half else picked
    changed = (picked.astype(values.dtype) + added).astype(dlogits.dtype)
    held.put_along_axis_(index, changed.view("int16") if is_half else changed, axis=1)


def linear_cross_entropy_reference(
    hidden: paddle.Tensor,
    weight: paddle.Tensor,
    labels: paddle.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> paddle.Tensor:
    """``linear_cross_entropy`` composed of Paddle primitives; it stores the full logits."""
    dtype = compute_dtype(hidden)
    logits = paddle.matmul(hidden.astype(dtype), weight.astype(dtype), transpose_y=True)
    losses = cross_entropy_reference(logits, labels, ignore_index)
    if z_loss:
        lse = paddle.logsumexp(logits, axis=-1)
        losses = losses + z_loss * lse.square() * (labels != ignore_index).astype(dtype)
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (labels != ignore_index).sum().clip(min=1).astype(dtype)
