"""Gradients on their way to owners: when a reduction starts and is waited for, and its result.

One process stands for two ranks with the same samples. A reduction does nothing until it is waited
for, so that a result that is read too early is wrong.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from pypkg.parallel.linear_gradients import GradientAddingLinear, add_weight_gradients
from pypkg.parallel.optimizer.zero import gradient_reducer
from pypkg.parallel.optimizer.zero.gradient_reducer import IN_FLIGHT, GradientReducer

WIDTH, LAYERS, RANKS = 6, 4, 2


class Model(paddle.nn.Layer):
    """Layers of a matrix and a vector; the first matrix is used again at the end.

    Products are in float32, whatever the dtype of the parameters. With ``adds`` they add the
    gradients of matrices to ``main_grad``.
    """

    def __init__(self, dtype: str = "float32", adds: bool = False) -> None:
        super().__init__()
        paddle.seed(5)
        self.layers = paddle.nn.LayerList(
            [paddle.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        ).to(dtype=dtype)
        self.adds = adds
        for layer in self.layers if adds else ():
            add_weight_gradients(layer)
            layer.weight.main_grad = layer.bias.main_grad = None

    def loss(self, x: paddle.Tensor) -> paddle.Tensor:
        for layer in self.layers:
            x = paddle.tanh(self._product(x, layer.weight) + layer.bias.astype("float32"))
        return self._product(x, self.layers[0].weight).square().mean()

    def _product(self, x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        if self.adds:
            return GradientAddingLinear.apply(x, weight, None)
        return x @ weight.astype("float32")


def batch(number: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(number).normal(size=(3, WIDTH)), dtype="float32")


class Communication:
    """Reductions over ``RANKS`` ranks that make the same gradients as this one.

    Attributes:
        trace: (what, number): "start" and "wait" of a reduction, "gradient" of a parameter.
        sizes: elements of each reduction.
    """

    def __init__(self) -> None:
        self.trace: list[tuple[str, int]] = []
        self.sizes: list[int] = []
        self.owners: list[int] = []
        self._totals: dict[int, paddle.Tensor] = {}  # what an owner's buffer already holds
        self.rank = 0

    def reduce(self, tensor: paddle.Tensor, dst: int, group: Any, sync_op: bool) -> Any:
        assert not sync_op
        assert group.nranks == RANKS
        number = len(self.sizes)
        self.trace.append(("start", number))
        self.sizes.append(tensor.size)
        self.owners.append(dst)
        return SimpleNamespace(wait=lambda: self._wait(number, tensor, dst))

    def _wait(self, number: int, tensor: paddle.Tensor, dst: int) -> None:
        self.trace.append(("wait", number))
        if dst != self.rank:
            tensor.scale_(float("nan"))  # nobody may read it
            return
        before = self._totals.get(tensor.data_ptr())
        fresh = tensor if before is None else tensor - before
        tensor.add_((RANKS - 1) * fresh)
        self._totals[tensor.data_ptr()] = tensor.clone()

    def most_under_way(self) -> int:
        under_way = most = 0
        for what, _ in self.trace:
            under_way += {"start": 1, "wait": -1}.get(what, 0)
            most = max(most, under_way)
        return most


@pytest.fixture
def communication(monkeypatch) -> Communication:
    made = Communication()
    monkeypatch.setattr(gradient_reducer.dist, "reduce", made.reduce)
    return made


def reducer_of(
    model: paddle.nn.Layer, owner_of: Any, bucket_bytes: int, dtype: Any = paddle.float32
) -> GradientReducer:
    """``owner_of``: the owner of the parameter with a number."""
    parameters = model.parameters()
    owners = {p.name: owner_of(number) for number, p in enumerate(parameters)}
    group = SimpleNamespace(nranks=RANKS, rank=0, ranks=[0, 1])
    return GradientReducer(parameters, owners, group, dtype, bucket_bytes)


def expected_gradients(batches: list[paddle.Tensor]) -> list[np.ndarray]:
    model = Model()
    for x in batches:
        model.loss(x).backward()
    return [p.grad.numpy() for p in model.parameters()]


# A gradient, a layer of two, and all of an owner in a bucket; each is padded to 256 bytes.
A_LAYER = RANKS * 512
BUCKET_BYTES = [RANKS * 256, A_LAYER, 2**20]


@pytest.mark.parametrize("adds", [False, True], ids=["", "added by products"])
@pytest.mark.parametrize("once", [False, True], ids=["each pass", "once"])
@pytest.mark.parametrize("bucket_bytes", BUCKET_BYTES)
def test_owner_gets_the_mean_over_all_ranks(communication, bucket_bytes, once, adds):
    model = Model(adds=adds)
    parameters = model.parameters()
    reducer = reducer_of(model, lambda number: number // 2 % 2, bucket_bytes)
    for step in range(2):
        batches = [batch(3 * step + number) for number in range(3)]
        reducer.begin_step(len(batches) if once else 1)
        for x in batches:
            model.loss(x).backward()
        assert all(p.grad is None for p in parameters)
        assert all(getattr(p, "main_grad", None) is None for p in parameters)
        reducer.finish()
        found = dict((p.name, gradient) for p, gradient in reducer.gradients())
        wanted = expected_gradients(batches)
        owned = [number for number in range(len(parameters)) if number // 2 % 2 == 0]
        assert found.keys() == {parameters[number].name for number in owned}
        for number in owned:
            gradient = found[parameters[number].name]
            assert gradient.shape == parameters[number].shape
            np.testing.assert_allclose(gradient.numpy(), wanted[number], rtol=1e-5, atol=1e-7)
        reducer.clear()
        assert reducer.buffers() == []
        communication._totals.clear()
    count = len(communication.sizes)
    assert count % (2 if once else 6) == 0, "every step and every pass has as many"
    assert communication.most_under_way() <= IN_FLIGHT
    assert set(communication.owners) == {0, 1}


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", BUCKET_BYTES)
def test_products_and_gradients_of_one_matrix_are_added(communication, bucket_bytes, passes):
    """A matrix whose product adds its gradient, and which is also used in another way."""
    model = Model(adds=True)
    reducer = reducer_of(model, lambda number: 0, bucket_bytes)
    shared = model.layers[1].weight

    def loss(model: Model, x: paddle.Tensor) -> paddle.Tensor:
        return model.loss(x) + (x @ model.layers[1].weight).square().mean()

    reducer.begin_step(3)  # of which ``passes`` come
    plain = Model()
    for number in range(passes):
        loss(model, batch(number)).backward()
        loss(plain, batch(number)).backward()
    reducer.finish()
    found = {p.name: gradient.numpy() for p, gradient in reducer.gradients()}
    expected = plain.layers[1].weight.grad.numpy()
    np.testing.assert_allclose(found[shared.name], expected, rtol=1e-5, atol=1e-7)


def test_later_products_are_added_in_the_bucket(communication):
    model = Model(adds=True)
    reducer = reducer_of(model, lambda number: number // 2 % 2, A_LAYER)
    reducer.begin_step(2)
    model.loss(batch(0)).backward()
    weights = [layer.weight for layer in model.layers]
    bucket_of = {p.name: each for each in reducer._buckets for p in each.parameters}
    for weight in weights:
        place = reducer._view(bucket_of[weight.name], weight)
        assert weight.main_grad.data_ptr() == place.data_ptr()
        assert (weight.main_grad == place).all()
    model.loss(batch(1)).backward()
    assert all(weight.main_grad is None for weight in weights)
    reducer.finish()


def test_a_reduction_starts_before_the_gradients_of_earlier_layers_are_made(communication):
    """And is waited for after them: the backward pass of a layer runs beside it."""
    model = Model()
    for number, parameter in enumerate(model.parameters()):
        parameter._register_backward_hook(
            lambda *_, number=number: communication.trace.append(("gradient", number))
        )
    reducer = reducer_of(model, lambda number: number // 2 % 2, A_LAYER)
    model.loss(batch(0)).backward()
    trace = communication.trace.copy()
    assert [each for each in trace if each[0] == "start"] == [("start", n) for n in range(LAYERS)]
    for number in range(LAYERS - 1):  # reductions begin with the last layer
        weight = 2 * (LAYERS - 1 - number)
        done = trace[: trace.index(("start", number))]
        assert {("gradient", weight), ("gradient", weight + 1)} <= set(done)
        # At least the next weight but one is still to come: the backward pass goes on.
        assert ("gradient", weight - 2) not in done
        if ("wait", number) in trace:
            assert ("gradient", weight - 2) in trace[: trace.index(("wait", number))]
    reducer.finish()
    waited = [number for what, number in communication.trace if what == "wait"]
    assert waited == list(range(LAYERS))


def test_a_wait_for_the_owners_sum_is_left_to_the_next_micro_batch(communication):
    model = Model()
    reducer = reducer_of(model, lambda number: 0, 2**20)
    model.loss(batch(0)).backward()
    assert communication.trace == [("start", 0)]
    model.loss(batch(1)).backward()
    assert communication.trace == [("start", 0), ("wait", 0), ("start", 1)]
    reducer.finish()
    assert communication.trace[-1] == ("wait", 1)


def test_once_in_a_step_is_one_reduction_in_the_last_pass(communication):
    model = Model()
    reducer = reducer_of(model, lambda number: number % 2, 2**20)
    reducer.begin_step(3)
    for number in range(3):
        assert communication.trace == []
        model.loss(batch(number)).backward()
    assert [what for what, _ in communication.trace] == ["start", "start"]
    reducer.finish()


def test_small_gradients_share_a_reduction_and_large_ones_are_not_copied(communication):
    model = Model()
    reducer = reducer_of(model, lambda number: 0, RANKS * 256)
    model.loss(batch(0)).backward()
    reducer.finish()
    # 64 elements are 256 bytes: a vector (6, padded to 64) each, and a matrix of 36 alone.
    assert Counter(communication.sizes) == {WIDTH: LAYERS, WIDTH * WIDTH: LAYERS}
    communication.sizes.clear()
    reducer = reducer_of(Model(), lambda number: 0, RANKS * 512)
    assert [bucket.size for bucket in reducer._buckets] == [128] * LAYERS


def test_a_parameter_without_gradient_has_none_and_holds_nothing_up(communication):
    model = Model()
    model.unused = paddle.nn.Linear(WIDTH, WIDTH)
    reducer = reducer_of(model, lambda number: 0, 2**20)
    for number in range(2):
        model.loss(batch(number)).backward()
    assert communication.sizes == []  # the bucket is not complete
    reducer.finish()
    found = {p.name: gradient.numpy() for p, gradient in reducer.gradients()}
    assert len(communication.sizes) == 1
    assert found.keys() == {p.name for p in model.layers.parameters()}
    wanted = expected_gradients([batch(0), batch(1)])
    for parameter, gradient in zip(model.layers.parameters(), wanted, strict=True):
        np.testing.assert_allclose(found[parameter.name], gradient, rtol=1e-5, atol=1e-7)


def test_gradients_of_sixteen_bits_with_sums_in_float32(communication):
    model = Model("bfloat16")
    reducer = reducer_of(model, lambda number: 0, A_LAYER, paddle.float32)
    batches = [batch(number) for number in range(2)]
    for x in batches:
        model.loss(x).backward()
    reducer.finish()
    found = {p.name: gradient for p, gradient in reducer.gradients()}
    for parameter, wanted in zip(model.parameters(), expected_gradients(batches), strict=True):
        gradient = found[parameter.name]
        assert gradient.dtype == paddle.float32
        assert np.abs(gradient.numpy() - wanted).max() < 0.05 * np.abs(wanted).max()
