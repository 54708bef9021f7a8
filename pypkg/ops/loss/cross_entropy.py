"""Softmax cross entropy whose gradient overwrites the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle.autograd import PyLayer, PyLayerContext
from paddle.distributed.communication.group import Group

from pypkg.ops.dispatch import triton_operators
from pypkg.ops.dispatch.autograd import backward_once
from pypkg.ops.dispatch.checks import FLOATING, check_dtype, check_shape, compute_dtype
from pypkg.ops.dispatch.library import implementation, run_compiled
from pypkg.ops.loss.vocabulary_parallel import VocabularyShard, merge_over_group, shard_of


@paddle.jit.not_to_static
def cross_entropy(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    ignore_index: int = -100,
    group: Group | None = None,
    inplace_backward: bool = True,
) -> paddle.Tensor:
    """log(sum_j exp(x_j)) - x_label for every row; 0 where the label is ``ignore_index``.

    One pass over the logits computes the log-sum-exp (Milakov and Gimelshein, 2018), in float32
    for every dtype.

    **The backward pass overwrites the logits with their gradient**, which saves a second buffer of
    their size. Consequences:

    - The logits, and a ``detach()`` of them, hold the gradient after backward. Do not read them.
    - Paddle raises RuntimeError ("modified by an inplace operation") if another operation still
      needs the logits in its own backward, such as a second loss or a soft cap that saved its
      output, or if backward runs twice through this loss (``retain_graph``). Gradients are never
      silently wrong.
    - The gradient gets its own buffer if the logits are a leaf, or if a view or base of them (from
      ``reshape`` or a slice) is alive in backward. To save the memory, pass the logits as they were
      computed, without ``reshape``; any number of dimensions is allowed.

    ``inplace_backward=False`` always gives the gradient its own buffer, without these limits. Only
    the compiled backend overwrites the logits.

    With a ``group`` the vocabulary is divided over its processes. All processes hold the same rows
    and labels, and rank r holds the logits of the entries [r * cols, (r + 1) * cols). The loss
    covers the whole vocabulary and is equal on all processes; two all-reduces of [rows] values
    merge the shards.

    Args:
        logits: [..., vocab], or [..., cols] with a group; float32, float16 or bfloat16 (float64
            runs on the reference).
        labels: [...] int64, each in [0, vocab) or ``ignore_index``.
        ignore_index: label of the rows that have loss 0 and no gradient.
        group: a ``paddle.distributed`` group, or None when the logits are whole.
        inplace_backward: whether the gradient may overwrite the logits.

    Returns:
        float32 [...]: the loss per row, not reduced.

    Raises:
        TypeError, ValueError: a dtype or shape other than above.
        IndexError: a label is outside the vocabulary, on the CPU. The CUDA kernel gives such a row
            a NaN loss and gradient instead, which needs no synchronisation with the host.
        RuntimeError: in backward, if the logits were overwritten after the forward pass.
    """
    op = "cross_entropy"
    check_dtype(op, "logits", logits, FLOATING)
    if len(logits.shape) == 0:
        raise ValueError(f"{op}: logits must have at least one dimension, got shape []")
    check_labels(op, labels, logits.shape[:-1])
    shard = shard_of(logits.shape[-1], group)
    inplace = inplace_backward and not logits.is_leaf
    return implementation(_IMPLEMENTATIONS, logits)(logits, labels, ignore_index, shard, inplace)


def check_labels(op: str, labels: paddle.Tensor, shape: Sequence[int]) -> None:
    """Raises unless ``labels`` are int64 of ``shape``."""
    check_dtype(op, "labels", labels, (paddle.int64,))
    check_shape(op, "labels", labels, shape)


def cross_entropy_reference(
    logits: paddle.Tensor, labels: paddle.Tensor, ignore_index: int = -100
) -> paddle.Tensor:
    """``cross_entropy`` without a group, composed of Paddle primitives."""
    _check_label_range(labels, logits.shape[-1], ignore_index)
    ignored = labels == ignore_index
    wide = logits.astype(compute_dtype(logits))
    # The loss of an ignored row is 0 even if its logits are not finite.
    wide = paddle.where(ignored.unsqueeze(-1), paddle.zeros_like(wide), wide)
    safe = paddle.where(ignored, paddle.zeros_like(labels), labels)
    target = paddle.take_along_axis(wide, safe.unsqueeze(-1), axis=-1).squeeze(-1)
    loss = paddle.logsumexp(wide, axis=-1) - target
    return paddle.where(ignored, paddle.zeros_like(loss), loss)


def _cross_entropy_compiled(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    ignore_index: int,
    shard: VocabularyShard,
    inplace: bool,
) -> paddle.Tensor:
    loss, lse = loss_and_lse(logits, labels, ignore_index, shard)
    if logits.stop_gradient or not paddle.is_grad_enabled():
        return loss
    # Python merges the shards of the loss; this operator attaches the gradient to the result.
    settings = (shard.start, ignore_index, inplace)
    return run_compiled("pypkg_cross_entropy", [logits, labels, loss, lse], *settings)[0]


def _cross_entropy_by_reference(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    ignore_index: int,
    shard: VocabularyShard,
    inplace: bool,
) -> paddle.Tensor:
    if shard.group is None:
        return cross_entropy_reference(logits, labels, ignore_index)
    return _cross_entropy_layer(logits, labels, ignore_index, shard, inplace)


def _cross_entropy_layer(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    ignore_index: int,
    shard: VocabularyShard,
    inplace: bool,
) -> paddle.Tensor:
    """The loss from the statistics and gradient of the backend in use; never overwrites logits."""
    return backward_once(_CrossEntropy.apply(logits, labels, ignore_index, shard))


class _Context(PyLayerContext):
    """Values other than tensors that ``_CrossEntropy`` keeps for its backward."""

    gradient: Callable[..., paddle.Tensor]
    settings: tuple[int, int, bool]


class _CrossEntropy(PyLayer):
    @staticmethod
    def forward(
        ctx: _Context,
        logits: paddle.Tensor,
        labels: paddle.Tensor,
        ignore_index: int,
        shard: VocabularyShard,
    ) -> paddle.Tensor:
        loss, lse = loss_and_lse(logits, labels, ignore_index, shard)
        ctx.save_for_backward(logits, labels, lse)
        ctx.settings = (shard.start, ignore_index, False)
        ctx.gradient = implementation(_GRADIENT, logits)
        return loss

    @staticmethod
    def backward(ctx: _Context, dloss: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        logits, labels, lse = ctx.saved_tensor()
        return ctx.gradient(logits, labels, lse, dloss, *ctx.settings), None


def loss_and_lse(
    logits: paddle.Tensor, labels: paddle.Tensor, ignore_index: int, shard: VocabularyShard
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Loss and log-sum-exp of each row over the whole vocabulary, without recording a gradient.

    Args:
        logits: [..., cols], the columns of ``shard``.
        labels: [...] int64.

    Returns:
        loss and lse, float32 [...] (float64 for float64 logits).
    """
    statistics = implementation(_STATISTICS, logits)
    settings = (shard.start, shard.vocab_size, ignore_index)
    loss, lse, *partials = statistics(logits.detach(), labels, *settings)
    if shard.group is None:
        return loss, lse
    row_max, row_sum, target = partials
    lse, target = merge_over_group(row_max, row_sum, target, shard.group)
    return paddle.where(labels == ignore_index, paddle.zeros_like(lse), lse - target), lse


def logits_gradient(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    lse: paddle.Tensor,
    dloss: paddle.Tensor,
    vocab_start: int,
    ignore_index: int,
    inplace: bool,
) -> paddle.Tensor:
    """(softmax(logits) - [label]) * dloss, the gradient of the logits.

    Args:
        logits: [..., cols], the columns from ``vocab_start`` of the whole vocabulary; detached.
        labels: [...] int64.
        lse, dloss: [...], over the whole vocabulary, in the dtype of the loss.
        inplace: permits the result to overwrite logits whose memory no other tensor shares.

    Returns:
        [..., cols] in the dtype of logits.
    """
    gradient = implementation(_GRADIENT, logits)
    return gradient(logits, labels, lse, dloss, vocab_start, ignore_index, inplace)


def _check_label_range(labels: paddle.Tensor, vocab_size: int, ignore_index: int) -> None:
    outside = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if bool(outside.any()):
        first = labels.masked_select(outside)[0].item()
        raise IndexError(
            f"cross_entropy: label {first} is outside [0, {vocab_size}) and not the ignore_index "
            f"{ignore_index}"
        )


def _statistics_reference(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
) -> tuple[paddle.Tensor, ...]:
    """loss, lse, row_max, row_sum, target of one shard, as in cross_entropy.h."""
    _check_label_range(labels, vocab_size, ignore_index)
    cols = logits.shape[-1]
    wide = logits.astype(compute_dtype(logits))
    row_max = wide.max(axis=-1)
    finite_max = paddle.where(row_max == -float("inf"), paddle.zeros_like(row_max), row_max)
    row_sum = paddle.exp(wide - finite_max.unsqueeze(-1)).sum(axis=-1)
    local = labels - vocab_start
    inside = (local >= 0) & (local < cols) & (labels != ignore_index)
    picked = paddle.take_along_axis(wide, local.clip(0, cols - 1).unsqueeze(-1), axis=-1)
    target = paddle.where(inside, picked.squeeze(-1), paddle.zeros_like(row_max))
    lse = row_max + paddle.log(row_sum)
    loss = paddle.where(labels == ignore_index, paddle.zeros_like(lse), lse - target)
    return loss, lse, row_max, row_sum, target


def _gradient_reference(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    lse: paddle.Tensor,
    dloss: paddle.Tensor,
    vocab_start: int,
    ignore_index: int,
    inplace: bool,
) -> paddle.Tensor:
    """The formula of cross_entropy.h, always in a new buffer."""
    wide = logits.astype(lse.dtype)
    columns = paddle.arange(vocab_start, vocab_start + logits.shape[-1])
    hit = (labels.unsqueeze(-1) == columns).astype(lse.dtype)
    gradient = (paddle.exp(wide - lse.unsqueeze(-1)) - hit) * dloss.unsqueeze(-1)
    ignored = (labels == ignore_index).unsqueeze(-1)
    return paddle.where(ignored, paddle.zeros_like(gradient), gradient).astype(logits.dtype)


def _statistics_compiled(
    logits: paddle.Tensor, labels: paddle.Tensor, *settings: int
) -> list[paddle.Tensor]:
    return run_compiled("pypkg_cross_entropy_forward", [logits, labels], *settings)


def _gradient_compiled(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    lse: paddle.Tensor,
    dloss: paddle.Tensor,
    *settings: int,
) -> paddle.Tensor:
    return run_compiled("pypkg_cross_entropy_backward", [logits, labels, lse, dloss], *settings)[0]


_IMPLEMENTATIONS = {
    "compiled": _cross_entropy_compiled,
    "triton": _cross_entropy_layer,
    "reference": _cross_entropy_by_reference,
}
_STATISTICS: dict[str, Callable[..., Sequence[paddle.Tensor]]] = {
    "compiled": _statistics_compiled,
    "triton": triton_operators.cross_entropy_statistics,
    "reference": _statistics_reference,
}
_GRADIENT: dict[str, Callable[..., paddle.Tensor]] = {
    "compiled": _gradient_compiled,
    "triton": triton_operators.cross_entropy_gradient,
    "reference": _gradient_reference,
}
