"""Updated weights come beside the forward pass: the order of starts, layers and waits, by a trace.

One process stands for two ranks. A broadcast does nothing until it is waited for, so that a layer
that computes too early uses an old weight.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from pypkg.parallel.optimizer.zero import weight_broadcast
from pypkg.parallel.optimizer.zero.weight_broadcast import WeightBroadcast

WIDTH, LAYERS = 4, 3


class Block(paddle.nn.Layer):
    """A block whose weight is in a layer that it does not call."""

    def __init__(self, trace: list[Any]) -> None:
        super().__init__()
        self.inner = paddle.nn.Linear(WIDTH, WIDTH, bias_attr=False)
        self.trace = trace

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        self.trace.append("block")
        return x @ self.inner.weight


class Model(paddle.nn.Layer):
    def __init__(self, trace: list[Any]) -> None:
        super().__init__()
        self.first = paddle.nn.Linear(WIDTH, WIDTH, bias_attr=False)
        self.layers = paddle.nn.LayerList([Block(trace) for _ in range(LAYERS)])
        self.last = paddle.nn.Linear(WIDTH, WIDTH, bias_attr=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@pytest.fixture
def trace(monkeypatch) -> list[Any]:
    """("start" or "wait", name of the parameter), and "block" for each block that computes."""
    found: list[Any] = []

    def broadcast(tensor: paddle.Tensor, src: int, group: Any, sync_op: bool) -> Any:
        assert not sync_op
        assert src == group.ranks[OWNER]
        found.append(("start", tensor.name))

        def wait() -> None:
            found.append(("wait", tensor.name))
            tensor.set_value(np.full(tensor.shape, 2.0, "float32"))  # what the owner sends

        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(weight_broadcast.dist, "broadcast", broadcast)
    return found


OWNER = 1
GROUP: Any = SimpleNamespace(nranks=2, rank=0, ranks=[4, 5])


def made(trace: list[Any]) -> tuple[Model, WeightBroadcast, list[str]]:
    model = Model(trace)
    names = [p.name for p in model.parameters()]
    return model, WeightBroadcast(model, dict.fromkeys(names, OWNER), GROUP), names


def test_a_layer_waits_for_its_own_weights_alone(trace):
    model, weights, names = made(trace)
    weights.start()
    out = model(paddle.ones([1, WIDTH]))
    of_blocks = [step for name in names[1:-1] for step in (("wait", name), "block")]
    starts = [("start", name) for name in names]  # all before the first layer computes
    assert trace == [*starts, ("wait", names[0]), *of_blocks, ("wait", names[-1])]
    np.testing.assert_array_equal(out.numpy(), np.full([1, WIDTH], (2.0 * WIDTH) ** (LAYERS + 2)))


def test_a_second_pass_waits_for_nothing(trace):
    model, weights, _ = made(trace)
    weights.start()
    model(paddle.ones([1, WIDTH]))
    trace.clear()
    model(paddle.ones([1, WIDTH]))
    assert trace == ["block"] * LAYERS


def test_all_can_be_waited_for_without_a_pass(trace):
    model, weights, names = made(trace)
    weights.start()
    weights.wait()
    assert trace == [*(("start", name) for name in names), *(("wait", name) for name in names)]
    trace.clear()
    model(paddle.ones([1, WIDTH]))
    assert trace == ["block"] * LAYERS


def test_what_is_frozen_is_not_sent(trace):
    model = Model(trace)
    model.first.weight.stop_gradient = True
    owners = {p.name: OWNER for p in model.parameters() if not p.stop_gradient}
    WeightBroadcast(model, owners, GROUP).start()
    assert [name for _, name in trace] == list(owners)
