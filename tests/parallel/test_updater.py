"""The updater of one process: plain AdamW, and what no option changes, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from plain_adamw import build_adamw, clip_by_global_norm, optimizer_state
from whole_values import SlicesOf, whole_state

from pypkg.parallel import mesh
from pypkg.parallel.comm import gather
from pypkg.parallel.optimizer import data_parallel
from pypkg.parallel.optimizer.clipping import layer_of
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions, make_optimizers
from pypkg.parallel.optimizer.loss_scaling import LossScale

ADAMW = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


class Model(paddle.nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        paddle.seed(0)
        self.first = paddle.nn.Linear(5, 7)
        self.norm = paddle.nn.LayerNorm(7)
        self.second = paddle.nn.Linear(7, 3, bias_attr=False)

    def loss(self, x: paddle.Tensor) -> paddle.Tensor:
        return (self.second(self.norm(self.first(x))) ** 2).mean()


def batch(step: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(step).normal(size=(4, 5)), dtype="float32")


class Run:
    """A model and its updater, of one process."""

    def __init__(self, max_norm: float = 0.1, **options: object) -> None:
        self.layer = Model()
        options = UpdateOptions(**ADAMW, max_grad_norm=max_norm, **options)
        self.model, self.updater = distribute(self.layer, options, mesh.Mesh())

    def train(self, steps: range) -> list[float]:
        """Norms of the steps."""
        norms = []
        for step in steps:
            self.model.forward_backward([{"x": batch(step)}], self.updater.scale)
            norms.append(self.updater.step(1e-2).item())
        return norms

    def values(self) -> dict[str, np.ndarray]:
        return values(self.layer)

    def state(self) -> dict[str, np.ndarray]:
        return whole_state(self.updater)


def values(model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    return {name: p.numpy() for name, p in model.named_parameters()}


def assert_same(found: dict, expected: dict, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def test_as_plain_adamw():
    """Up to a few roundings: those of Paddle's own AdamW depend on the processor."""
    model = Model()
    optimizer = build_adamw(model, **ADAMW)
    optimizer.set_lr(1e-2)
    norms = []
    for step in range(4):
        model.loss(batch(step)).backward()
        norms.append(clip_by_global_norm(model.parameters(), 0.1).item())
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
    run = Run()
    np.testing.assert_allclose(run.train(range(4)), norms, rtol=1e-6)
    assert min(norms) > 0.1
    assert_same(run.values(), values(model), rtol=1e-6, atol=1e-8)
    state = {name: v.numpy() for name, v in optimizer_state(optimizer, model).items()}
    assert_same(run.state(), state, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{"offload": True}, {"master_grad": True}])
def test_options_that_change_no_bit(options):
    plain, other = Run(), Run(**options)
    assert other.train(range(4)) == plain.train(range(4))
    assert_same(other.values(), plain.values())
    assert_same(other.state(), plain.state())


def test_resuming_is_exact():
    first = Run()
    assert first.state() == {}
    first.train(range(2))
    saved = first.state()
    second = Run()
    second.layer.set_state_dict({k: paddle.to_tensor(v) for k, v in first.values().items()})
    second.updater.load_state(SlicesOf(saved))
    assert second.train(range(2, 4)) == first.train(range(2, 4))
    assert_same(second.values(), first.values())


def test_some_parameters_without_gradient_in_some_steps():
    """The updates of a step are those of its own gradients, whatever the step before had."""
    run, plain = Run(max_norm=0), Model()
    optimizer = build_adamw(plain, **ADAMW)
    optimizer.set_lr(1e-2)
    for step in (0, 1, 2, 3, 4):
        for model in (run.layer, plain):
            loss = model.loss(batch(step)) if step != 2 else (model.first(batch(step)) ** 2).mean()
            loss.backward()
        run.updater.step(1e-2)
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        assert_same(run.values(), values(plain), rtol=1e-5, atol=1e-7)


def test_no_gradient_and_no_slice_outlives_an_update():
    """A slice of ZeRO stage 3 is another tensor in the next step."""
    run = Run()
    run.train(range(2))
    optimizer = run.updater.optimizer
    assert [each.parameter for each in optimizer._arranged.updates] == run.layer.parameters()
    assert not any(hasattr(each, "gradient") for each in optimizer._arranged.updates)
    first = run.layer.first.weight
    of_step = first.detach()
    of_step.name = first.name
    before = first.numpy()
    optimizer._apply_optimize(None, None, [(of_step, paddle.ones_like(first))])
    assert (first.numpy() != before).any()
    assert optimizer._arranged == ([], [])
    run.train(range(2, 4))


def test_state_of_another_model_is_refused():
    with pytest.raises(KeyError, match=r"first\.weight\.moment1"):
        Run().updater.load_state(SlicesOf({}))


def test_parameters_have_learning_rates_of_their_own():
    """Each as in a run in which its rate is that of all."""
    factors = {"first.weight": 0.25, "second.weight": 3.0}
    run = Run(rate_factors=factors)
    run.train(range(1))
    for name, value in run.values().items():
        alone = Run()
        alone.model.forward_backward([{"x": batch(0)}], alone.updater.scale)
        alone.updater.step(1e-2 * factors.get(name, 1.0))
        np.testing.assert_array_equal(value, alone.values()[name], err_msg=name)


@pytest.mark.parametrize("scale", [None, LossScale(1024.0)])
def test_norms_of_layers(scale):
    """Their squares add up to that of the global norm, which keeps its bits."""
    plain, run = Run(loss_scale=scale), Run(loss_scale=scale, measures_layers=True)
    assert plain.train(range(1)) == (norms := run.train(range(1)))
    assert plain.updater.layer_norms() == {}
    found = run.updater.layer_norms()
    assert list(found) == ["first", "norm", "second"]
    assert sum(norm**2 for norm in found.values()) == pytest.approx(norms[0] ** 2, rel=1e-6)
    layer = Model()
    layer.loss(batch(0)).backward()
    for name in found:
        squares = sum((p.grad**2).sum().item() for p in getattr(layer, name).parameters())
        assert found[name] == pytest.approx(squares**0.5, rel=1e-5)
    assert [layer_of(f"{name}.weight") for name in ("layers.12.mlp", "embed_tokens", "norm")] == [
        "layers.12", "embed_tokens", "norm",
    ]  # fmt: skip


def test_loss_scale_changes_nothing_but_the_range():
    plain, scaled = Run(), Run(loss_scale=LossScale(1024.0))
    np.testing.assert_allclose(scaled.train(range(3)), plain.train(range(3)), rtol=1e-6)
    assert_same(scaled.values(), plain.values(), rtol=1e-5)


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    run = Run(loss_scale=LossScale(1024.0))
    before, updater = run.values(), run.updater
    run.model.forward_backward([{"x": batch(0)}], lambda loss: updater.scale(loss) * float("inf"))
    assert not np.isfinite(updater.step(1e-2).item())
    assert_same(run.values(), before)
    assert run.state() == {}
    assert updater.scaler.state()["skipped_steps"] == 1
    assert updater.scaler.scale == 512.0
    assert all(p.grad is None for p in run.layer.parameters())
    assert np.isfinite(run.train(range(1))).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"offload": True}, {"max_norm": 0.0}])
def test_gradients_that_are_not_finite_change_nothing(options, bad):
    """Without a loss scale, on the device; AdamW's powers alone count the step."""
    run = Run(**options)
    run.train(range(2))
    before, state = run.values(), run.state()
    run.model.forward_backward([{"x": batch(2)}], lambda loss: loss * bad)
    assert not np.isfinite(run.updater.step(1e-2).item())
    assert_same(run.values(), before)
    moments = [name for name in state if "moment" in name]
    after = run.state()
    assert_same({name: after[name] for name in moments}, {name: state[name] for name in moments})


@pytest.mark.parametrize("offload", [False, True])
def test_half_precision_gradients_are_unscaled_in_float32(offload):
    """A gradient of 2^-140, made with a scale of 2^15, is nothing in bfloat16 without it."""
    model = Model().to(dtype="bfloat16")
    options = UpdateOptions(0.0, 0.0, 2.0**-149, loss_scale=LossScale(2.0**15), offload=offload)
    _, updater = distribute(model, options, mesh.Mesh())
    for parameter in model.parameters():
        parameter.grad = paddle.full(parameter.shape, 2.0**-125, "float32").astype("bfloat16")
    updater.step(1e-2)
    for key, value in whole_state(updater).items():
        if key.endswith(".moment1"):
            np.testing.assert_array_equal(value, np.full_like(value, 2.0**-140))
    assert np.float32(2.0**-140) > 0


@pytest.mark.parametrize("offload", [False, True])
def test_state_of_half_precision_parameters_has_master_weights(offload):
    model = Model().to(dtype="bfloat16")
    options = UpdateOptions(**ADAMW, offload=offload)
    _, updater = distribute(model, options, mesh.Mesh())
    (adamw,) = make_optimizers(model, options)
    random = np.random.default_rng(0)
    given = {}
    for name, parameter in model.named_parameters():
        for state_name in adamw.state_names(parameter.dtype):
            shape = adamw.undivided_shape(state_name, parameter.shape) or parameter.shape
            given[f"{name}.{state_name}"] = random.normal(size=shape).astype(np.float32)
    updater.load_state(SlicesOf(given))
    assert_same(whole_state(updater), given)
    assert "first.weight.master_weight" in given


def test_state_names_of_adamw():
    (adamw,) = make_optimizers(Model(), UpdateOptions())
    powers = ("beta1_pow_acc", "beta2_pow_acc")
    assert adamw.state_names(paddle.float32) == ("moment1", "moment2", *powers)
    assert adamw.state_names(paddle.bfloat16) == ("master_weight", "moment1", "moment2", *powers)
    for dtype in ("float32", "bfloat16"):
        parameter = Model().to(dtype=dtype).parameters()[0]
        state = adamw.make_state(parameter, parameter.shape)
        assert tuple(state) == adamw.state_names(parameter.dtype)


def test_a_layout_that_does_not_fit_is_refused():
    model, group = Model(), SimpleNamespace(rank=0, nranks=2)
    sharded = mesh.Mesh(mesh.Degrees(sharding=2), sharding=group)
    with pytest.raises(ValueError, match="sharding_stage is 0"):
        distribute(model, UpdateOptions(), sharded)
    with pytest.raises(ValueError, match="tp_sharding is None"):
        distribute(model, UpdateOptions(), mesh.Mesh(mesh.Degrees(tensor=2), tensor=group))


class TakesVectors:
    """Enough of an ``Optimizer`` to be asked what it takes."""

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) == 1


def test_a_parameter_that_no_optimizer_takes_is_named():
    with pytest.raises(ValueError, match=r"no optimizer takes the parameter first\.weight"):
        distribute(Model(), UpdateOptions(), mesh.Mesh(), optimizers=[TakesVectors()])


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**6])
def test_buckets_average_every_gradient(monkeypatch, bucket_bytes):
    """Two processes of which the other has the same gradients plus one."""
    sent = []

    def all_reduce(tensor: paddle.Tensor, group: object) -> None:
        sent.append(tensor.size * 4)
        paddle.assign(tensor * 2 + 0.5, tensor)  # both have been halved

    monkeypatch.setattr(data_parallel.dist, "all_reduce", all_reduce)
    model = Model()
    model.loss(batch(0)).backward()
    before = [p.grad.numpy() for p in model.parameters()]
    data_parallel.average_gradients(model.parameters(), SimpleNamespace(nranks=2), bucket_bytes)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), gradient + 0.5, rtol=1e-6)
    assert sum(sent) == sum(p.size * 4 for p in model.parameters())
    largest = max(p.size * 4 for p in model.parameters())
    assert max(sent) <= max(bucket_bytes, largest)
    assert len(sent) == {1: 5, 100: 3, 10**6: 1}[bucket_bytes]


def test_a_bucket_has_one_dtype():
    gradients = [paddle.zeros([4], dtype) for dtype in ("float32", "float32", "bfloat16")]
    found = [[g.dtype for g in bucket] for bucket in data_parallel._buckets(gradients, 1000)]
    assert found == [[paddle.float32] * 2, [paddle.bfloat16]]


@pytest.mark.parametrize(
    ("degrees", "copies"),
    [
        ({"sharding": 2}, [((0, 1), (1,)), ((2, 0), (4,))]),
        ({"tensor": 2}, [((0, 1), ()), ((2, 0), (4, 5))]),
        ({"sharding": 2, "data": 2}, [((0, 1), (1, 7)), ((2, 0), (4, 10))]),
    ],
)
def test_places_of_a_name_that_two_stages_hold(monkeypatch, degrees, copies):
    """The first one, and the last one, whose copy is equal."""

    def all_gather_object(stages, own, group):
        stages += [own, {"b": 1}, {"tied": 0, "z": None}]

    monkeypatch.setattr(gather.dist, "all_gather_object", all_gather_object)
    grid = mesh.Mesh(mesh.Degrees(pipeline=3, **degrees), pipeline=object())
    monkeypatch.setattr(gather.mesh, "current", lambda: grid)
    found = gather.places(["a", "b", "nowhere", "tied", "z"], {"tied": 1, "a": None})
    assert list(found) == ["a", "b", "tied", "z"]
    assert (found["a"], found["b"], found["z"]) == (((0, None),), ((1, 1),), ((2, None),))
    assert [(place, gather.possible_writers(place)) for place in found["tied"]] == copies


@pytest.mark.parametrize("over_tensor", [True, False])
@pytest.mark.parametrize("over_sharding", [True, False])
def test_holders_of_the_parts_that_a_rank_writes(monkeypatch, over_tensor, over_sharding):
    """By tensor and sharding rank, of the writer's replica, stage and undivided axes."""
    grid = mesh.Mesh(mesh.Degrees(data=2, pipeline=2, sharding=2, context=2, tensor=3))
    monkeypatch.setattr(gather.mesh, "current", lambda: grid)
    for writer in range(grid.world_size):
        at = grid.coordinates(writer)
        expected = [
            at._replace(tensor=tensor, sharding=sharding)
            for tensor in (range(3) if over_tensor else [at.tensor])
            for sharding in (range(2) if over_sharding else [at.sharding])
        ]
        found = gather.holders(writer, over_tensor, over_sharding)
        assert [grid.coordinates(rank) for rank in found] == expected


@pytest.mark.parametrize("order", list(mesh.TOPOLOGY_ORDERS))
def test_coordinates_of_ranks(order):
    """The last axis of the order runs fastest, and every place of the grid has one rank."""
    degrees = mesh.Degrees(
        data=2, pipeline=3, sharding=2, context=2, tensor=4, topology_order=order
    )
    grid = mesh.Mesh(degrees)
    found = [grid.coordinates(rank) for rank in range(degrees.world_size)]
    outer, inner = "pipeline", "sharding"
    if order == "sharding_first":
        outer, inner = inner, outer
    expected = [
        {"data": data, outer: first, inner: second, "context": context, "tensor": tensor}
        for data in range(2)
        for first in range(getattr(degrees, outer))
        for second in range(getattr(degrees, inner))
        for context in range(2)
        for tensor in range(4)
    ]
    assert [each._asdict() for each in found] == expected
