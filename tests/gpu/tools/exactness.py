"""Properties of a step in 16 bits: float32 sums without a copy, the same bits in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle.base import core

from pypkg import ops
from pypkg.ops.matmul import add_product
from pypkg.parallel.optimizer.main_grad import add_to

ELEMENTS = 2**22
SLACK = 2**16  # bytes that an allocator may round up to


def check_exactness(dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """Rows with the name of each case and whether it passed, on the device of Paddle.

    - A gradient of ``dtype`` is added to a main gradient in one pass: a GPU makes no copy of it.
    - The product of a weight gradient is added to a main gradient in its memory, and not rounded to
      ``dtype`` before. A CPU has such products in float32 only.
    - The gradients of an embedding whose tokens repeat, and of each attention that runs here, have
      the same bits in every run.
    """
    paddle.seed(0)
    cases: dict[str, Callable[[str], bool]] = {
        "main gradient": _adds_without_a_copy,
        "product of a weight gradient": _adds_products,
        "embedding": lambda each: _repeats(_embedding(each)),
        "attention": lambda each: _repeats(_attention(ops.flash_attention, each)),
    }
    if _on_gpu():
        cases["Paddle's attention"] = lambda each: _repeats(
            _attention(ops.paddle_flash_attention, each)
        )
    return [{"case": f"{name}, {dtype}", "passed": case(dtype)} for name, case in cases.items()]


def _adds_without_a_copy(dtype: str) -> bool:
    total, gradient = paddle.randn([ELEMENTS]), (paddle.randn([ELEMENTS]) * 1e-3).astype(dtype)
    expected = total + gradient.astype("float32")
    peak = _peak(lambda: add_to(total, gradient))
    # Paddle's builds for CPUs convert first, which takes 4 bytes per element for a moment.
    allowed = SLACK if _on_gpu() else 4 * ELEMENTS + SLACK
    return peak <= allowed and bool((total == expected).all())


def _adds_products(dtype: str) -> bool:
    x, gradient = (
        paddle.randn([128, width]).astype(dtype if _on_gpu() else "float32") for width in (192, 320)
    )
    once = add_product(None, x, gradient)
    twice = add_product(once.clone(), x, gradient)
    expected = paddle.matmul(x.astype("float64"), gradient.astype("float64"), transpose_x=True)
    total = once.clone()
    is_in_place = add_product(total, x, gradient).data_ptr() == total.data_ptr()
    return is_in_place and all(
        each.dtype == paddle.float32
        and float((each.astype("float64") - factor * expected).abs().max())
        <= 2.0**-14 * float(expected.abs().max())  # a rounding to bfloat16 is up to 2^-9
        for factor, each in ((1, once), (2, twice), (2, total))
    )


def _embedding(dtype: str) -> Callable[[], list[paddle.Tensor]]:
    weight, tokens = paddle.randn([64, 256]).astype(dtype), paddle.randint(0, 64, [4096])
    weight.stop_gradient = False
    dout = paddle.randn([4096, 256]).astype(dtype)
    return lambda: paddle.grad(F.embedding(tokens, weight), [weight], dout)


def _attention(attention: Callable[..., Any], dtype: str) -> Callable[[], list[paddle.Tensor]]:
    *inputs, dout = (paddle.randn([2, 512, 4, 64]).astype(dtype) for _ in range(4))
    for each in inputs:
        each.stop_gradient = False
    return lambda: paddle.grad(attention(*inputs), inputs, dout)


def _repeats(run: Callable[[], list[paddle.Tensor]], runs: int = 5) -> bool:
    first = [each.astype("float32") for each in run()]
    return all(
        bool((now.astype("float32") == then).all())
        for _ in range(runs)
        for now, then in zip(run(), first, strict=True)
    )


def _on_gpu() -> bool:
    return paddle.device.get_device().startswith("gpu")


def _peak(run: Callable[[], object]) -> int:
    """Bytes that ``run`` held beyond those before it."""
    kind = "device" if _on_gpu() else "host"
    reset, peak, current = (
        getattr(core, f"{kind}_memory_stat_{name}")
        for name in ("reset_peak_value", "peak_value", "current_value")
    )
    before = current("Allocated", 0)
    reset("Allocated", 0)
    run()
    return peak("Allocated", 0) - before
