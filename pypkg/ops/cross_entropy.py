"""Softmax cross entropy whose gradient takes the place of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle.autograd import PyLayer, PyLayerContext
from paddle.distributed.communication.group import Group

from pypkg.ops import _triton
from pypkg.ops._autograd import backward_once
from pypkg.ops._checks import FLOATING, check_dtype, check_shape, compute_dtype
from pypkg.ops._library import implementation, run_compiled
from pypkg.ops._vocabulary_parallel import VocabularyShard, merge_over_group, shard_of


@paddle.jit.not_to_static
def cross_entropy(
    logits: paddle.Tensor,
    labels: paddle.Tensor,
    ignore_index: int = -100,
    group: Group | None = None,
    inplace_backward: bool = True,
) -> paddle.Tensor:
    """log(sum_j exp(x_j)) - x_label for every row; 0 where the label is ``ignore_index``.

    The log-sum-exp is found in one pass over the logits (Milakov and Gimelshein, 2018), in float32
    for every dtype.

    **The backward pass writes the gradient over the logits**, so that no second buffer of their
    size exists. What follows from it:

    - Do not read the logits, or a ``detach()`` of them, after backward: they hold the gradient.
    - If another operation still needs the logits in its own backward (a second loss on them, a soft
      cap before them that saved its output), or backward runs twice through this loss
      (``retain_graph``), Paddle raises RuntimeError ("modified by an inplace operation"): gradients
      are never silently wrong.
    - Logits that are a leaf are left alone, and so are logits of which a view or a base (before
      ``reshape``, a slice) is alive in backward: there the gradient gets its own buffer. To save
      the memory, pass the logits as they were made, in any number of dimensions.

    ``inplace_backward=False`` always gives the gradient its own buffer and lifts these limits. Only
    the compiled backend overwrites.

    With a ``group`` the vocabulary is divided over its processes: all hold the same rows and
    labels, and rank r holds the logits of the entries [r * cols, (r + 1) * cols). The loss is that
    over the whole vocabulary, equal on all; two all-reduces of [rows] values merge the shards.

    Args:
        logits: [..., vocab] (this process's cols of it with a group); float32, float16 or bfloat16
            (float64 runs on the reference).
        labels: [...] int64, each in [0, vocab) or ``ignore_index``.
        ignore_index: the label of rows that count nothing.
        group: a ``paddle.distributed`` group, or None when the logits are whole.
        inplace_backward: whether the gradient may overwrite the logits.

    Returns:
        float32 [...]: the loss per row, not reduced.

    Raises:
        TypeError, ValueError: a dtype or shape other than above.
        IndexError: a label outside the vocabulary, on the CPU. The CUDA kernel gives such a row a
            NaN loss and gradient instead, which costs no synchronisation.
        RuntimeError: in backward, when the logits were overwritten since the forward pass.
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
    """``cross_entropy`` without a group, composed of Paddle primitives and their gradients."""
    _check_label_range(labels, logits.shape[-1], ignore_index)
    ignored = labels == ignore_index
    wide = logits.astype(compute_dtype(logits))
    # Ignored rows count nothing even where their logits are not finite.
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
    # Puts the gradient operator behind a loss whose shards only Python could merge.
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
    """From the statistics and the gradient of the backend in use; never over the logits."""
    return backward_once(_CrossEntropy.apply(logits, labels, ignore_index, shard))


class _Context(PyLayerContext):
    """What ``_CrossEntropy`` keeps for its backward beside tensors."""

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
    """Loss and log-sum-exp per row over the whole vocabulary; records no gradient."""
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
    """(softmax(logits) - [label]) * dloss, in the buffer of the logits if ``inplace`` and unshared.

    Args:
        logits: [..., cols], the columns from vocab_start of the whole vocabulary; off the tape.
        labels: [...] int64.
        lse, dloss: [...], over the whole vocabulary, in the dtype of the loss.
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
    """loss, lse, row_max, row_sum, target of one shard, as in csrc/kernels/cross_entropy.h."""
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
    """The formula of csrc/kernels/cross_entropy.h in a new buffer: ``inplace`` only permits."""
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
    "triton": _triton.cross_entropy_statistics,
    "reference": _statistics_reference,
}
_GRADIENT: dict[str, Callable[..., paddle.Tensor]] = {
    "compiled": _gradient_compiled,
    "triton": _triton.cross_entropy_gradient,
    "reference": _gradient_reference,
}
