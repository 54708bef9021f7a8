"""Linear and embedding layers, under names that say how tensor parallelism splits them.

This is the only place that chooses the layer class: plain ones in a process by itself, fleet's in a
tensor-parallel group. Parameters start at zero; the model draws them or reads them from a file.

With sequence parallelism (Korthikanti et al., 2022) activations between a row and the next column
layer are [tokens / degree, features]: each process holds an equal run of the batch's tokens, which
are counted row after row. A column layer gathers them, a row layer sums and scatters them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import nn

from pypkg.errors import UserError
from pypkg.ops import linear, matmul
from pypkg.parallel import mesh


def tensor_degree() -> int:
    """Number of processes that the layers are split over."""
    return mesh.current().tensor_degree


def tensor_rank() -> int:
    """Which of them this process is."""
    return mesh.current().tensor_rank


def tensor_group() -> object | None:
    """Their paddle.distributed group; None for a process by itself."""
    return mesh.current().tensor


def is_sequence_parallel() -> bool:
    """Whether activations between the layers are split as well."""
    return mesh.current().sequence_parallel and tensor_degree() > 1


def column_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A linear layer whose output features are split.

    Args:
        out_features: those of all processes together, of which each has an equal number.
    """
    if tensor_degree() == 1:
        return replicated_linear(in_features, out_features, has_bias)
    from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear
    from paddle.distributed.fleet.utils.sequence_parallel_utils import ColumnSequenceParallelLinear

    layer_class = ColumnSequenceParallelLinear if is_sequence_parallel() else ColumnParallelLinear
    layer = layer_class(in_features, out_features, _zeros(), has_bias, gather_output=False)
    layer.linear = _linear
    return layer


def row_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A linear layer whose input features are split, and its outputs summed; then comes the bias.

    Args:
        in_features: those of all processes together, of which each has an equal number.
    """
    if tensor_degree() == 1:
        return replicated_linear(in_features, out_features, has_bias)
    from paddle.distributed.fleet.meta_parallel import RowParallelLinear
    from paddle.distributed.fleet.utils.sequence_parallel_utils import RowSequenceParallelLinear

    layer_class = RowSequenceParallelLinear if is_sequence_parallel() else RowParallelLinear
    layer = layer_class(in_features, out_features, _zeros(), has_bias, input_is_parallel=True)
    layer.linear = _linear
    if has_bias and is_sequence_parallel():
        sum_gradient_over_tensor_group(layer.bias)
    return layer


def replicated_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A linear layer that every process has whole. Weight [in_features, out_features]."""
    return _Linear(in_features, out_features, _zeros(), _zeros() if has_bias else False)


class _Linear(nn.Linear):
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return linear(x, self.weight, self.bias)


def _linear(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    name: str | None = None,
) -> paddle.Tensor:
    """What fleet's layers call, which follows ``ops.set_matmul_precision`` as the plain ones do."""
    return linear(x, weight, bias)


def vocab_embedding(vocab_size: int, hidden_size: int) -> nn.Layer:
    """An embedding table whose rows are split.

    Each process has ceil(vocab_size / degree) of them; the last has rows beyond the vocabulary,
    which no token finds, if that does not come out even.

    Called with a function instead of tokens, the layer returns what that makes of its weight.
    """
    degree = tensor_degree()
    if degree == 1:
        return _table_class(nn.Embedding)(vocab_size, hidden_size, weight_attr=_zeros())
    from paddle.distributed.fleet.meta_parallel import VocabParallelEmbedding

    padded = -(-vocab_size // degree) * degree
    return _table_class(VocabParallelEmbedding)(padded, hidden_size, weight_attr=_zeros())


@functools.cache
def _table_class(base: type[nn.Layer]) -> type[nn.Layer]:
    class Table(base):
        """An embedding, or a head where it is called with a function of its weight.

        The head goes through the layer, because that is when stage 3 of sharding has the weight.
        """

        def forward(self, x: paddle.Tensor | Callable[[paddle.Tensor], Any]) -> Any:
            return x(self.weight) if callable(x) else super().forward(x)

    return Table


def gathered_vocab_logits(
    hidden: paddle.Tensor, weight: paddle.Tensor, vocab_size: int
) -> paddle.Tensor:
    """hidden @ weight.T over the whole vocabulary: [..., vocab_size].

    Args:
        hidden: [..., features], the same on all processes.
        weight: this process's rows of ``vocab_embedding``.
    """
    if tensor_degree() == 1:
        return matmul(hidden, weight, transpose_y=True)
    from paddle.distributed.fleet.layers.mpu import mp_ops

    shared = mp_ops._c_identity(hidden, group=tensor_group())  # its gradient is summed
    logits = matmul(shared, weight, transpose_y=True)
    return mp_ops._c_concat(logits, group=tensor_group())[..., :vocab_size]


def split_tokens(x: paddle.Tensor) -> paddle.Tensor:
    """[batch, sequence, features] to what sequence parallelism has between the layers.

    Raises:
        UserError: the tokens cannot be split evenly.
    """
    if not is_sequence_parallel():
        return x
    from paddle.distributed.fleet.utils.sequence_parallel_utils import ScatterOp

    tokens = x.reshape([-1, x.shape[-1]])
    if tokens.shape[0] % tensor_degree():
        raise UserError(
            f"a batch of {x.shape[0]} rows of {x.shape[1]} tokens cannot be divided over "
            f"tensor_parallel_degree ({tensor_degree()}) processes; change the length of the "
            "sequences, or turn sequence_parallel off"
        )
    return ScatterOp.apply(tokens)


def gather_tokens(x: paddle.Tensor, batch: int, sequence: int) -> paddle.Tensor:
    """The inverse of ``split_tokens``: [batch, sequence, features]."""
    if not is_sequence_parallel():
        return x
    from paddle.distributed.fleet.utils.sequence_parallel_utils import GatherOp

    return GatherOp.apply(x).reshape([batch, sequence, x.shape[-1]])


def sum_split_token_gradients(layer: nn.Layer) -> None:
    """For a layer that works on split tokens: each process sees the gradient of its tokens only."""
    if is_sequence_parallel():
        for parameter in layer.parameters():
            sum_gradient_over_tensor_group(parameter)


def sum_gradient_over_tensor_group(parameter: paddle.Tensor) -> None:
    """For a parameter that all processes have, but use for a part of the work each.

    The sum is over each backward pass, before anything is accumulated or reduced elsewhere.
    """
    group = tensor_group()
    if group is None:
        return

    @paddle.no_grad()
    def total(gradient: paddle.Tensor) -> paddle.Tensor:
        result = gradient.clone()
        dist.all_reduce(result, group=group)
        return result

    parameter.register_hook(total)


def sum_replica_gradients(parameter: paddle.Tensor, start: int, kind: int, kinds: int) -> None:
    """For a parameter whose last columns, from ``start`` on, several neighbouring processes share.

    Gradients of the columns are summed over the processes of the same kind. That is one sum over
    the tensor-parallel group with room for every kind, so that it needs no groups of its own.

    Args:
        kind: which of the ``kinds`` different contents of those columns this process has.
    """
    group = tensor_group()
    # Which a norm over all processes counts once (optimizer/clipping.py).
    parameter.replicated_columns = (start, tensor_degree() // kinds)

    @paddle.no_grad()
    def total(gradient: paddle.Tensor) -> paddle.Tensor:
        shared = gradient[..., start:]
        rooms = paddle.zeros([kinds, *shared.shape], dtype=gradient.dtype)
        rooms[kind] = shared
        dist.all_reduce(rooms, group=group)
        return paddle.concat([gradient[..., :start], rooms[kind]], axis=-1)

    parameter.register_hook(total)


def gather_from_tensor_group(value: paddle.Tensor) -> list[paddle.Tensor]:
    """``value``, of the same shape on all processes, of each of them by rank."""
    group = tensor_group()
    if group is None:
        return [value]
    values: list[paddle.Tensor] = []
    dist.all_gather(values, value.detach().contiguous(), group=group)
    return values


def _zeros() -> paddle.ParamAttr:
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))
