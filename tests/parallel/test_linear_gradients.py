"""Backward passes of linear layers: overlapped sums, and weight gradients that a product adds.

One process stands for two ranks. A sum does nothing until it is waited for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from pypkg.parallel import linear_gradients, mesh, tp_layers
from pypkg.parallel.linear_gradients import OverlappedColumnLinear, forbid_added_gradient
from pypkg.parallel.optimizer.main_grad import with_main_grad

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
    stream = linear_gradients.dist.stream
    for name in ("all_gather", "all_reduce", "reduce_scatter"):
        monkeypatch.setattr(stream, name, getattr(made, name))
    monkeypatch.setattr(linear_gradients, "matmul", made.product)
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


@pytest.fixture
def adding(monkeypatch):
    """Layers are made as with ``enable_linear_fused_grad_add``."""
    degrees = mesh.Degrees(adds_weight_gradients=True)
    monkeypatch.setattr(mesh, "current", lambda: mesh.Mesh(degrees))


def layer_with_main_grad(has_bias: bool = True) -> paddle.nn.Layer:
    layer = tp_layers.replicated_linear(WIDTH, OUT, has_bias)
    layer.weight.set_value(draw(WIDTH, OUT))
    parameters = layer.parameters()
    with_main_grad(parameters, paddle.optimizer.SGD(parameters=parameters))
    return layer


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, WIDTH), (9, WIDTH), (2, 3, WIDTH)])
def test_gradients_of_several_passes(adding, monkeypatch, shape, has_bias):
    added, add = [], linear_gradients.add_product
    monkeypatch.setattr(
        linear_gradients, "add_product", lambda *given: added.append(given) or add(*given)
    )
    layer, x = layer_with_main_grad(has_bias), draw(*shape)
    expected, address = [np.zeros(p.shape, np.float64) for p in layer.parameters()], None
    for number in range(3):
        incoming = draw(number + 1, *shape[:-1], OUT)[number].detach()
        out = layer(x)
        plain = x.numpy() @ layer.weight.numpy()
        np.testing.assert_allclose(out.numpy(), plain, rtol=1e-5, atol=1e-5)
        out.backward(incoming)
        rows = incoming.numpy().reshape(-1, OUT).astype(np.float64)
        expected[0] += x.numpy().reshape(-1, WIDTH).T @ rows
        expected[-1] += rows.sum(0) if has_bias else 0
        for parameter, wanted in zip(layer.parameters(), expected, strict=True):
            assert parameter.grad is None or not parameter.grad._is_initialized()
            assert parameter.main_grad.dtype == paddle.float32
            np.testing.assert_allclose(parameter.main_grad.numpy(), wanted, rtol=1e-5, atol=1e-5)
        assert address in (None, layer.weight.main_grad.data_ptr())  # added to in place
        address = layer.weight.main_grad.data_ptr()
    of_x = sum(
        draw(number + 1, *shape[:-1], OUT)[number].numpy() @ layer.weight.numpy().T
        for number in range(3)
    )
    np.testing.assert_allclose(x.grad.numpy(), of_x, rtol=1e-5, atol=1e-5)
    assert len(added) == 3


def test_without_main_grad_the_gradient_is_a_plain_one(adding):
    layer, x = tp_layers.replicated_linear(WIDTH, OUT, False), draw(4, WIDTH)
    layer(x).sum().backward()
    wanted = x.numpy().sum(0)[:, None].repeat(OUT, 1)
    np.testing.assert_allclose(layer.weight.grad.numpy(), wanted, rtol=1e-5)


def test_a_gradient_that_a_hook_changes_is_handed_to_it(adding):
    layer, x = layer_with_main_grad(), draw(4, WIDTH)
    forbid_added_gradient(layer.weight)
    layer.weight.register_hook(lambda gradient: 3 * gradient)
    layer(x).sum().backward()
    wanted = 3 * x.numpy().sum(0)[:, None].repeat(OUT, 1)
    np.testing.assert_allclose(layer.weight.main_grad.numpy(), wanted, rtol=1e-5)


def test_such_layers_are_called(adding):
    """The operators of whole blocks would not add gradients."""
    first, second = (
        tp_layers.replicated_linear(*shape, False) for shape in ((WIDTH, OUT), (OUT, WIDTH))
    )
    assert tp_layers.joined_layers(first, second) is None


def test_a_pass_without_gradients_is_a_plain_product(adding, monkeypatch):
    layer, x = layer_with_main_grad(), draw(4, WIDTH)
    expected = layer(x)
    monkeypatch.setattr(linear_gradients.GradientAddingLinear, "apply", None)
    with paddle.no_grad():
        assert (layer(x) == expected).all()


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(adding, frozen):
    layer, x = layer_with_main_grad(), draw(4, WIDTH)
    each = {"x": x, "weight": layer.weight, "bias": layer.bias}
    each[frozen].stop_gradient = True
    layer(x).sum().backward()
    has_gradient = {
        "x": x.grad is not None,
        "weight": layer.weight.main_grad is not None,
        "bias": layer.bias.main_grad is not None,
    }
    assert has_gradient == {name: name != frozen for name in each}
