"""Matrix products, and their precision on a CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import _C_ops

from pypkg.errors import UserError
from pypkg.ops.dispatch.checks import compute_dtype
from pypkg.ops.dispatch.library import backend, run_compiled

PRECISIONS = ("float32", "bfloat16")
_FEW_ROWS = 8  # with more rows, MKL's product is faster than the operator
_precision = "float32"


def set_matmul_precision(name: str) -> None:
    """Sets the precision of products of float32 matrices on a CPU, for the whole process.

    Args:
        name: "float32", or "bfloat16", which rounds the operands to bfloat16 and sums the products
            in float32, forward and backward. All tensors stay float32. Other dtypes, other devices
            and attention are not affected.

    Raises:
        UserError: an unknown name, or bfloat16 where the compiled operators, the processor's
            AVX512_BF16 instructions or Paddle's oneDNN are missing.
    """
    global _precision
    if name not in PRECISIONS:
        raise UserError(f"matmul_precision is {name!r}; expected one of {', '.join(PRECISIONS)}")
    if name == "bfloat16":
        _check_bfloat16()
    _precision = name


def _check_bfloat16() -> None:
    from pypkg import _native

    if not _native.matmul_bfloat16_supported():
        raise UserError(
            "matmul_precision is 'bfloat16', but this processor has no AVX512_BF16 instructions; "
            "set it to 'float32'"
        )
    if backend() != "compiled":
        raise UserError(
            "matmul_precision is 'bfloat16', which needs the compiled operators, but the backend "
            f"in use is {backend()!r}; set matmul_precision to 'float32' or build the operators"
        )
    one = paddle.ones([1, 1], "float32").cpu()
    try:
        run_compiled("pypkg_matmul_bfloat16", [one, one], False, False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "matmul_precision is 'bfloat16', but this Paddle has no oneDNN that multiplies in "
            f"bfloat16 ({error}); set it to 'float32'"
        ) from error


def matmul(
    x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool = False, transpose_y: bool = False
) -> paddle.Tensor:
    """x @ y, optionally transposed, in the precision of ``set_matmul_precision``.

    Args:
        x: [..., m, k], or [..., k, m] with ``transpose_x``.
        y: [k, n], or [n, k] with ``transpose_y``; or such a matrix for each of x.

    Returns:
        [..., m, n] in the dtype of x.
    """
    if not transpose_x and has_few_rows(x, y):
        return run_compiled("pypkg_matmul_few_rows", [x, y], transpose_y)[0]
    narrow = _precision == "bfloat16" and x.dtype == paddle.float32 and x.place.is_cpu_place()
    if not narrow or y.ndim > 2 or 0 in x.shape or 0 in y.shape:
        return paddle.matmul(x, y, transpose_x, transpose_y)
    rows = x if x.ndim == 2 else x.reshape([-1, x.shape[-1]])
    out = run_compiled("pypkg_matmul_bfloat16", [rows, y], transpose_x, transpose_y)[0]
    return out if x.ndim == 2 else out.reshape([*x.shape[:-1], out.shape[-1]])


def can_add_matmul(x: paddle.Tensor) -> bool:
    """Whether the operator ``pypkg_add_matmul`` can add a product of x to a sum in its memory.

    It needs the MKL of Paddle, and sums in float32.
    """
    return (
        _precision == "float32"
        and x.dtype == paddle.float32
        and x.place.is_cpu_place()
        and backend() == "compiled"
        and _has_blas()
    )


@functools.cache
def _has_blas() -> bool:
    one = paddle.ones([1, 1], "float32").cpu()
    paddle.matmul(one, one)  # Paddle loads MKL with the first product of a process
    try:
        run_compiled("pypkg_add_matmul", [one, one, one.clone()], False, False)
    except (OSError, RuntimeError):
        return False
    return True


def add_product(total: paddle.Tensor | None, x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """total + x^T y, in at least float32; in the memory of ``total`` if it is given.

    On a GPU in 16 bits, and on a CPU in float32, the product is added as it is computed.

    Args:
        total: [m, n], float32 (float64 for such operands), or None for zero.
        x: [k, m].
        y: [k, n] in the dtype of x.
    """
    if total is not None and can_add_matmul(x):
        run_compiled("pypkg_add_matmul", [x, y, total], True, False)
        return total
    if _adds_to_float32(x):
        return _C_ops.fused_linear_param_grad_add(x, y, total, None, True, False)[0]
    product = matmul(x, y, transpose_x=True)
    if product.dtype != compute_dtype(product):
        product = product.astype(compute_dtype(product))
    return product if total is None else total.add_(product)


def _adds_to_float32(x: paddle.Tensor) -> bool:
    """Whether Paddle can accumulate a product of such matrices directly into a float32 tensor."""
    return x.place.is_gpu_place() and x.dtype in (paddle.float16, paddle.bfloat16)


def linear(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None
) -> paddle.Tensor:
    """x @ weight + bias, in the precision of ``set_matmul_precision``.

    Args:
        x: [..., in_features].
        weight: [in_features, out_features].
        bias: [out_features], or None.

    Returns:
        [..., out_features] in the dtype of x.
    """
    if _precision == "float32" and not has_few_rows(x, weight):
        if bias is None and paddle.in_dynamic_mode():
            return _product()(x, weight)
        return F.linear(x, weight, bias)
    out = matmul(x, weight)
    return out if bias is None else out + bias


def has_few_rows(x: paddle.Tensor, y: paddle.Tensor) -> bool:
    """Whether the product is that of a step of generation, for which there is an operator.

    Memory bounds it. With eight rows, the products of a step of llama-58m took 62 ms in Paddle and
    20 ms in this operator, on one thread of a Xeon with other work beside it.
    """
    return (
        not paddle.is_grad_enabled()  # first, as training asks most often
        and _precision == "float32"
        and 0 < _rows_of_each(x.shape, y.shape) <= _FEW_ROWS
        and x.dtype in (paddle.float32,)
        and y.dtype in (paddle.float32,)
        and x.place.is_cpu_place()
        and 0 not in y.shape
        and paddle.in_dynamic_mode()
        and backend() == "compiled"
        and not paddle.amp.is_autocast_enabled()
    )


def _rows_of_each(x: list[int], y: list[int]) -> int:
    """The number of rows of x for each matrix of y; 0: x and y have different batch shapes."""
    if len(y) == 2:
        return math.prod(x[:-1])
    return x[-2] if x[:-2] == y[:-2] and 0 not in x else 0


def products_are_plain() -> bool:
    """Whether ``linear`` without a bias is Paddle's matmul, which a compiled operator can run."""
    return _precision == "float32" and not _has_other_linear()


@functools.cache
def _has_other_linear() -> bool:
    """Whether flags choose another operator for ``F.linear``; they are read once."""
    if not paddle.is_compiled_with_cuda():
        return False
    flags = ("FLAGS_use_legacy_linear", "FLAGS_use_accuracy_compatible_kernel")
    return any(paddle.get_flags(list(flags)).values())


@functools.cache
def _product() -> Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]:
    """The operator that ``F.linear`` runs without a bias in this build of Paddle.

    ``F.linear`` checks the build and flags in every call, which takes longer than the product of
    small matrices.
    """
    if not paddle.is_compiled_with_cuda():
        return lambda x, weight: _C_ops.linear(x, weight, None)
    if _has_other_linear():
        return F.linear
    return lambda x, weight: _C_ops.matmul(x, weight, False, False)
