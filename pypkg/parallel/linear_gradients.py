"""Linear layers with backward passes of their own.

A column-parallel layer can sum its input gradient while it computes its weight gradient.

A product can add a weight gradient to its float32 sum, ``main_grad`` (optimizer/main_grad.py).
Otherwise it writes the gradient in 16 bits, and another operator reads and adds it. That moves 4
bytes of memory per element more, and rounds the product to 16 bits. Megatron-LM calls this gradient
accumulation fusion. Paddle's ColumnParallelLinear has it too. It is not used, because it ignores
hooks that change the weight's gradient, and works only with the overlap of mp_async_allreduce.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.distributed.communication.group import Group

from pypkg.ops import linear, matmul
from pypkg.ops.matmul import add_product


def add_weight_gradients(layer: Any) -> None:
    """Makes ``weight_gradient`` add the gradients of the weight of ``layer`` to its main_grad."""
    layer.weight.adds_product = True


def forbid_added_gradient(parameter: paddle.Tensor) -> None:
    """Makes ``weight_gradient`` return the gradient of ``parameter``, because a hook changes it."""
    parameter.adds_product = False


def adds_to_main_grad(parameter: paddle.Tensor) -> bool:
    """Whether ``weight_gradient`` adds the gradient of ``parameter`` to its main_grad."""
    return getattr(parameter, "adds_product", False) and hasattr(parameter, "main_grad")


def weight_gradient(
    x: paddle.Tensor, gradient: paddle.Tensor, weight: paddle.Tensor
) -> paddle.Tensor | None:
    """The gradient x^T gradient of ``weight``; None if it was added to ``weight.main_grad``.

    Where it is None, the weight's backward hooks run with ``weight.grad`` None.

    Args:
        x: [tokens, in_features], the layer's input.
        gradient: [tokens, out_features], that of the layer's output.
        weight: [in_features, out_features].
    """
    if not adds_to_main_grad(weight):
        return matmul(x, gradient, transpose_x=True)
    weight.main_grad = add_product(weight.main_grad, x, gradient)
    return None


class GradientAddingLinear(PyLayer):
    """``ops.linear`` with the weight gradient of ``weight_gradient``.

    A second backward pass through the same result ends the process (``backward_once``); a guard
    would cost host time in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None
    ) -> paddle.Tensor:
        """
        Args:
            x: [..., in_features].
            weight: [in_features, out_features].
            bias: [out_features], or None.
        """
        given = (x, weight) if bias is None else (x, weight, bias)
        ctx.is_wanted = [not each.stop_gradient for each in given]
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> Any:
        x, weight = ctx.saved_tensor()
        rows = gradient.reshape([-1, gradient.shape[-1]])
        of_x, of_weight, *of_bias = ctx.is_wanted
        return (
            matmul(gradient, weight, transpose_y=True) if of_x else None,
            weight_gradient(x.reshape([-1, x.shape[-1]]), rows, weight) if of_weight else None,
            *(rows.sum(0) if wanted else None for wanted in of_bias),
        )


class OverlappedColumnLinear(PyLayer):
    """A column-parallel product that sums its input gradient while it computes the weight gradient.

    Paddle's InnerOverlapLinear and SPInnerOverlapLinear do the same, but with Paddle's own
    products, which ignore ``ops.set_matmul_precision``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        bias: paddle.Tensor | None,
        group: Group,
        gathers: bool,
    ) -> paddle.Tensor:
        """
        Args:
            x: [..., in_features]; with ``gathers`` [tokens of this rank, in_features].
            weight: [in_features, out_features of this rank].
            bias: [out_features of this rank], or None.
            gathers: sequence parallelism: gathers ``x``, and reduce-scatters its gradient.
        """
        if gathers:
            own, x = x, paddle.empty([group.nranks * x.shape[0], *x.shape[1:]], x.dtype)
            dist.stream.all_gather(x, own, group=group)
        ctx.group, ctx.gathers, ctx.has_bias = group, gathers, bias is not None
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> Any:
        x, weight = ctx.saved_tensor()
        of_x = matmul(gradient, weight, transpose_y=True)
        if ctx.gathers:
            whole = of_x
            of_x = paddle.empty([whole.shape[0] // ctx.group.nranks, *whole.shape[1:]], whole.dtype)
            task: Any = dist.stream.reduce_scatter(of_x, whole, group=ctx.group, sync_op=False)
        else:
            task = dist.stream.all_reduce(of_x, group=ctx.group, sync_op=False)
        rows = gradient.reshape([-1, gradient.shape[-1]])
        gradients = [of_x, weight_gradient(x.reshape([-1, x.shape[-1]]), rows, weight)]
        if ctx.has_bias:
            gradients.append(rows.sum(0))
        task.wait()
        return tuple(gradients)
