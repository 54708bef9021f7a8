"""A column-parallel layer: its input gradient is on its way while the weight gradient is computed.

One process stands for two ranks. A sum does nothing until it is waited for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from pypkg.parallel import tp_layers
from pypkg.parallel.tp_layers import OverlappedColumnLinear

RANKS, TOKENS, WIDTH, OUT = 2, 6, 4, 3
GROUP = SimpleNamespace(nranks=RANKS)


class Communication:
    """Of ranks that hold the same as this one. ``trace``: what happened, in its order."""

    def __init__(self) -> None:
        self.trace: list[str] = []

    def product(self, *arguments: Any, **options: Any) -> paddle.Tensor:
        self.trace.append("product")
        return paddle.matmul(*arguments, **options)

    def all_gather(self, whole: paddle.Tensor, own: paddle.Tensor, group: Any) -> None:
        paddle.assign(paddle.concat([own] * RANKS), whole)

    def all_reduce(self, tensor: paddle.Tensor, group: Any, sync_op: bool) -> Any:
        assert not sync_op
        return self._start(lambda: tensor.scale_(RANKS))

    def reduce_scatter(
        self, own: paddle.Tensor, whole: paddle.Tensor, group: Any, sync_op: bool
    ) -> Any:
        assert not sync_op
        own.fill_(-1e9)
        return self._start(lambda: paddle.assign(RANKS * whole[: own.shape[0]], own))

    def _start(self, run: Any) -> Any:
        self.trace.append("start")

        def wait() -> None:
            self.trace.append("wait")
            with paddle.no_grad():
                run()

        return SimpleNamespace(wait=wait)


@pytest.fixture
def communication(monkeypatch) -> Communication:
    made = Communication()
    stream = tp_layers.dist.stream
    for name in ("all_gather", "all_reduce", "reduce_scatter"):
        monkeypatch.setattr(stream, name, getattr(made, name))
    monkeypatch.setattr(tp_layers, "matmul", made.product)
    return made


def draw(*shape: int) -> paddle.Tensor:
    values = np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)
    tensor = paddle.to_tensor(values)
    tensor.stop_gradient = False
    return tensor


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gathers", [False, True], ids=["tensor", "sequence"])
def test_the_sum_starts_before_the_weight_gradient_and_ends_after_it(
    communication, gathers, has_bias
):
    shape = (TOKENS, WIDTH) if gathers else (2, TOKENS // 2, WIDTH)
    x, weight, bias = draw(*shape), draw(WIDTH, OUT), draw(OUT) if has_bias else None
    out = OverlappedColumnLinear.apply(x, weight, bias, GROUP, gathers=gathers)
    whole = paddle.concat([x] * RANKS) if gathers else x
    expected = paddle.nn.functional.linear(whole, weight, bias)
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=1e-6, atol=1e-6)
    out_gradient = draw(*out.shape).detach()
    out.backward(out_gradient)
    assert communication.trace == ["product", "start", "product", "wait"]
    of_x = RANKS * (out_gradient @ weight.t())
    found = [each.grad.clone() for each in (x, weight, bias) if each is not None]
    for each in (x, weight, bias):
        if each is not None:
            each.clear_gradient(False)
    expected.backward(out_gradient)
    wanted = [of_x[:TOKENS] if gathers else of_x, weight.grad, bias.grad if has_bias else None]
    for actual, value in zip(found, wanted[: len(found)], strict=True):
        np.testing.assert_allclose(actual.numpy(), value.numpy(), rtol=1e-5, atol=1e-6)
