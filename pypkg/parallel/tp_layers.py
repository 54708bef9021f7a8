"""Linear and embedding layers, named after how tensor parallelism splits them.

Only this module chooses the layer class: Paddle's plain layers without tensor parallelism, fleet's
layers in a tensor-parallel group. Parameters are zero until the model initializes or loads them.

With sequence parallelism (Korthikanti et al., 2022), activations between a row-parallel and the
next column-parallel layer have the shape [tokens / degree, features]. The batch's tokens are
flattened row by row, and each rank holds an equal number of consecutive ones. A column-parallel
layer gathers them, a row-parallel layer reduce-scatters them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed.communication.group import Group

from pypkg.errors import UserError
from pypkg.ops import linear, matmul
from pypkg.parallel import mesh
from pypkg.parallel.linear_gradients import (
    GradientAddingLinear,
    OverlappedColumnLinear,
    add_weight_gradients,
    forbid_added_gradient,
)


def tensor_degree() -> int:
    """Size of the tensor-parallel group; 1 without tensor parallelism."""
    return mesh.current().tensor_degree


def tensor_rank() -> int:
    """Index of this rank in the tensor-parallel group."""
    return mesh.current().tensor_rank


def tensor_group() -> Group | None:
    """The group of the tensor axis; None without tensor parallelism."""
    return mesh.current().tensor


def is_sequence_parallel() -> bool:
    """Whether the tensor group also splits the tokens between the layers."""
    return mesh.current().sequence_parallel and tensor_degree() > 1


def column_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A column-parallel linear layer: each rank holds out_features / degree output features.

    Args:
        in_features: size of the input's last axis, whole on each rank.
        out_features: output features of all ranks together.
    """
    if tensor_degree() == 1:
        return replicated_linear(in_features, out_features, has_bias)
    from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear
    from paddle.distributed.fleet.utils.sequence_parallel_utils import ColumnSequenceParallelLinear

    layer_class = ColumnSequenceParallelLinear if is_sequence_parallel() else ColumnParallelLinear
    layer = layer_class(in_features, out_features, _zeros(), has_bias, gather_output=False)
    _set_product(layer, _linear)
    layer.mp_skip_c_identity = mesh.current().degrees.skip_identity
    if mesh.current().degrees.overlap_input_gradients:
        overlapped: Any = layer
        overlapped.forward = functools.partial(_overlapped, layer)
        overlapped.has_own_product = True
    return layer


def row_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A row-parallel linear layer: each rank holds in_features / degree input features.

    The outputs are summed over the group, then the bias is added.

    Args:
        in_features: input features of all ranks together.
        out_features: size of the output's last axis, whole on each rank.
    """
    if tensor_degree() == 1:
        return replicated_linear(in_features, out_features, has_bias)
    from paddle.distributed.fleet.meta_parallel import RowParallelLinear
    from paddle.distributed.fleet.utils.sequence_parallel_utils import RowSequenceParallelLinear

    layer_class = RowSequenceParallelLinear if is_sequence_parallel() else RowParallelLinear
    layer = layer_class(in_features, out_features, _zeros(), has_bias, input_is_parallel=True)
    _set_product(layer, _linear)
    layer.mp_skip_c_identity = mesh.current().degrees.skip_identity
    if has_bias and is_sequence_parallel():
        sum_gradient_over_tensor_group(layer.bias)
    return layer


def replicated_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A linear layer whose weight [in_features, out_features] every rank holds whole."""
    layer = _Linear(in_features, out_features, _zeros(), _zeros() if has_bias else False)
    _set_product(layer, linear)
    return layer


class _Linear(nn.Linear):
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.linear(x, self.weight, self.bias)


def _set_product(layer: Any, product: Callable[..., paddle.Tensor]) -> None:
    """Sets how a layer computes its product: ``product``, or one with another weight gradient."""
    layer.linear = product
    if mesh.current().degrees.adds_weight_gradients:
        add_weight_gradients(layer)
        layer.linear = _gradient_adding_linear
        layer.has_own_product = True  # more than ``ops.linear``


class JoinedLayers(NamedTuple):
    """A column-parallel and the next row-parallel layer, for a caller that computes the products.

    The caller computes ``leave(f(enter(x) @ column_weight) @ row_weight)`` with its own f, instead
    of calling the layers.

    Attributes:
        column, row: the layers.
        column_weight, row_weight: this rank's weights, [in_features, out_features].
        is_divided: whether tensor parallelism divides the layers.
    """

    column: Any
    row: Any
    column_weight: paddle.Tensor
    row_weight: paddle.Tensor
    is_divided: bool

    def enter(self, x: paddle.Tensor) -> paddle.Tensor:
        """The input of the first product: what the column layer does with ``x`` before it."""
        if not self.is_divided:
            return x
        if is_sequence_parallel():
            return _sequence_parallel().AllGatherOp.apply(x)
        group, skips = self.column.model_parallel_group, self.column.mp_skip_c_identity
        return _mp_ops()._c_identity(x, group=group, skip_c_identity_dynamic=skips)

    def leave(self, product: paddle.Tensor) -> paddle.Tensor:
        """The output of the row layer: what it does with the second product."""
        if not self.is_divided:
            return product
        if is_sequence_parallel():
            return _sequence_parallel().ReduceScatterOp.apply(product)
        return _mp_ops()._mp_allreduce(
            product,
            group=self.row.model_parallel_group,
            use_calc_stream=True,
            use_model_parallel=True,
            skip_c_identity_dynamic=self.row.mp_skip_c_identity,
        )


def joined_layers(column: nn.Layer, row: nn.Layer) -> JoinedLayers | None:
    """``column`` and ``row`` as ``JoinedLayers``; None if the layers have to be called.

    They have to be called if one has a bias or call hooks (in ZeRO stage 3 a hook gathers the
    weight), if the column layer's product is not ``ops.linear``, or in a static graph.
    """
    if "has_own_product" in column.__dict__ or not paddle.in_dynamic_mode():
        return None
    for layer in (column, row):
        if has_call_hooks(layer) or layer._parameters.get("bias") is not None:
            return None
    # A look-up in the dictionary takes a quarter of the time of an attribute of the layer.
    weights = column._parameters["weight"], row._parameters["weight"]
    return JoinedLayers(column, row, weights[0], weights[1], type(column) is not _Linear)


def plain_weights(layer: nn.Layer) -> tuple[paddle.Tensor, paddle.Tensor | None] | None:
    """Weight and bias for a product without gradients; None if a call is more than that product."""
    if type(layer) is not _Linear or has_call_hooks(layer):
        return None
    return layer._parameters["weight"], layer._parameters.get("bias")


@functools.cache
def _mp_ops() -> Any:
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops


@functools.cache
def _sequence_parallel() -> Any:
    from paddle.distributed.fleet.utils import sequence_parallel_utils

    return sequence_parallel_utils


def has_call_hooks(layer: nn.Layer) -> bool:
    """Whether ``layer`` has hooks that run before or after each call."""
    return bool(layer._forward_pre_hooks or layer._forward_post_hooks)


def _linear(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    name: str | None = None,
) -> paddle.Tensor:
    """``ops.linear`` in place of fleet's product, which ignores ``ops.set_matmul_precision``."""
    return linear(x, weight, bias)


def _gradient_adding_linear(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    name: str | None = None,
) -> paddle.Tensor:
    """``_linear`` with the weight gradient of ``linear_gradients.py``."""
    if not paddle.is_grad_enabled():
        return linear(x, weight, bias)
    return GradientAddingLinear.apply(x, weight, bias)


def _overlapped(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    return OverlappedColumnLinear.apply(
        x, layer.weight, layer.bias, tensor_group(), gathers=is_sequence_parallel()
    )


def vocab_embedding(vocab_size: int, hidden_size: int) -> nn.Layer:
    """An embedding table split by rows: each rank holds ceil(vocab_size / degree) rows.

    If the degree does not divide vocab_size, the last rank has padding rows, which no token
    selects. The layer takes token ids, int64 [batch, sequence], and returns [batch, sequence,
    hidden_size]. Called with a function, it returns the function of its weight (a tied head).
    """
    degree = tensor_degree()
    if degree == 1:
        return _table_class(nn.Embedding)(vocab_size, hidden_size, weight_attr=_zeros())
    from paddle.distributed.fleet.meta_parallel import VocabParallelEmbedding

    padded = -(-vocab_size // degree) * degree
    return _table_class(VocabParallelEmbedding)(padded, hidden_size, weight_attr=_zeros())


@functools.cache
def _table_class(base: Any) -> Callable[..., nn.Layer]:
    class Table(base):
        """An embedding, and a tied head if it is called with a function of its weight.

        The head calls the layer because ZeRO stage 3 gathers the weight only for a call.
        """

        def forward(self, x: paddle.Tensor | Callable[[paddle.Tensor], Any]) -> Any:
            return x(self.weight) if callable(x) else super().forward(x)

    return Table


def gathered_vocab_logits(
    hidden: paddle.Tensor, weight: paddle.Tensor, vocab_size: int
) -> paddle.Tensor:
    """The logits hidden @ weight.T of the whole vocabulary, [..., vocab_size], on every rank.

    Every rank of the tensor group must call this.

    Args:
        hidden: [..., features], the same on all ranks.
        weight: [rows, features], this rank's rows of ``vocab_embedding``.
    """
    if tensor_degree() == 1:
        return matmul(hidden, weight, transpose_y=True)
    shared = _mp_ops()._c_identity(hidden, group=tensor_group())  # sums its gradient
    logits = matmul(shared, weight, transpose_y=True)
    return _mp_ops()._c_concat(logits, group=tensor_group())[..., :vocab_size]


def split_tokens(x: paddle.Tensor) -> paddle.Tensor:
    """This rank's tokens of ``x`` under sequence parallelism; else ``x``.

    Args:
        x: [batch, sequence, features], the same on all ranks of the tensor group.

    Returns:
        [batch * sequence / degree, features].

    Raises:
        UserError: the degree does not divide the number of tokens.
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
    """The inverse of ``split_tokens``: [batch, sequence, features] on every rank."""
    if not is_sequence_parallel():
        return x
    from paddle.distributed.fleet.utils.sequence_parallel_utils import GatherOp

    return GatherOp.apply(x).reshape([batch, sequence, x.shape[-1]])


def sum_split_token_gradients(layer: nn.Layer) -> None:
    """Sums the gradients of ``layer`` over the tensor group under sequence parallelism."""
    if is_sequence_parallel():
        for parameter in layer.parameters():
            sum_gradient_over_tensor_group(parameter)


def sum_gradient_over_tensor_group(parameter: paddle.Tensor) -> None:
    """Sums the gradient of a replicated parameter to which each rank contributes a part.

    A hook does this in each backward pass, before the gradient is accumulated or reduced elsewhere.
    """
    group = tensor_group()
    if group is None:
        return

    @paddle.no_grad()
    def total(gradient: paddle.Tensor) -> paddle.Tensor:
        result = gradient.clone()
        dist.all_reduce(result, group=group)
        return result

    forbid_added_gradient(parameter)
    parameter.register_hook(total)


def sum_replica_gradients(parameter: paddle.Tensor, start: int, kind: int, kinds: int) -> None:
    """Sums the gradient of columns that consecutive ranks replicate (key-value heads).

    A hook sums them with one all-reduce over the tensor group. Its buffer has a slot for each
    distinct set of columns, so no further process groups are needed.

    Args:
        parameter: replicated columns begin at ``start`` on its last axis.
        kind: index of this rank's columns among the ``kinds`` distinct sets of columns.
    """
    group = tensor_group()
    # The global norm counts them once (optimizer/clipping.py).
    parameter.replicated_columns = (start, tensor_degree() // kinds)

    @paddle.no_grad()
    def total(gradient: paddle.Tensor) -> paddle.Tensor:
        shared = gradient[..., start:]
        slots = paddle.zeros([kinds, *shared.shape], dtype=gradient.dtype)
        slots[kind] = shared
        dist.all_reduce(slots, group=group)
        return paddle.concat([gradient[..., :start], slots[kind]], axis=-1)

    forbid_added_gradient(parameter)
    parameter.register_hook(total)


def gather_from_tensor_group(value: paddle.Tensor) -> list[paddle.Tensor]:
    """``value`` of every rank of the tensor group, by rank; all have one shape and dtype.

    Every rank of the group must call this. Gradients do not flow through it.
    """
    group = tensor_group()
    if group is None:
        return [value]
    values: list[paddle.Tensor] = []
    dist.all_gather(values, value.detach().contiguous(), group=group)
    return values


def _zeros() -> paddle.ParamAttr:
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))
