"""Update rules in one process: against original implementations, float64 and one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
import pytest
from whole_values import SlicesOf, whole_state

from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions

RATE, DECAY = 0.02, 0.1
GOLDEN = json.loads(
    (Path(__file__).resolve().parents[2] / "golden/optimizers.json").read_text(encoding="utf-8")
)
OPTIMIZERS = ("adamw", "adamw_16bit_moment", "adamw_8bit", "lion", "adafactor", "muon")


class Model(paddle.nn.Layer):
    """One parameter, ``weight``, which no weight decay applies to if it is a vector."""

    def __init__(self, weight: np.ndarray, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = self.create_parameter(list(weight.shape), dtype=dtype)
        self.weight.set_value(paddle.to_tensor(weight).astype(dtype))


class Run:
    """A parameter and what updates it."""

    def __init__(self, weight: np.ndarray, optim: str, dtype: str = "float32", **options) -> None:
        self.model = Model(weight, dtype)
        common = {"beta1": 0.9, "beta2": 0.99, "weight_decay": DECAY, "optim": optim}
        given = UpdateOptions(**(common | options))
        _, self.updater = distribute(self.model, given, mesh.Mesh())

    def step(self, gradient: np.ndarray, rate: float = RATE) -> np.ndarray:
        parameter = self.model.weight
        parameter.grad = paddle.to_tensor(gradient).astype(parameter.dtype)
        self.updater.step(rate)
        return parameter.astype("float32").numpy()

    def state(self) -> dict[str, np.ndarray]:
        return whole_state(self.updater)


def random(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Normal numbers of magnitudes that differ from row to row."""
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.uniform(-3, 0, size=(shape[0], *([1] * (len(shape) - 1))))
    return (generator.normal(size=shape) * scales).astype(np.float32)


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"{c['optim']}-{np.shape(c['weight'])}"
)
def test_steps_of_the_original(case):
    """Muon's matrices are of bfloat16, whose roundings differ between libraries."""
    weight = np.array(case["weight"], np.float32)
    run = Run(weight, case["optim"])
    for gradient in np.array(case["gradients"], np.float32):
        found = run.step(gradient)
    expected = np.array(case["updated"], np.float32)
    largest = np.abs(expected - weight).max()
    tolerance = 1e-2 if case["optim"] == "muon" else 1e-5
    assert np.abs(found - expected).max() < tolerance * largest


class Reference:
    """The formulas in float64, for one parameter; Newton-Schulz without roundings."""

    def __init__(self, optim: str, weight: np.ndarray) -> None:
        self.optim, self.weight = optim, weight.astype(np.float64)
        self.first = np.zeros_like(self.weight)
        self.row, self.column, self.second = 0.0, 0.0, 0.0
        self.t = 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        direction = getattr(self, self.optim)(gradient.astype(np.float64))
        if self.weight.ndim > 1:
            self.weight *= 1 - RATE * DECAY
        self.weight -= RATE * direction
        return self.weight

    def lion(self, g: np.ndarray) -> np.ndarray:
        direction = np.sign(0.9 * self.first + 0.1 * g)
        self.first = 0.99 * self.first + 0.01 * g
        return direction

    def adafactor(self, g: np.ndarray) -> np.ndarray:
        beta, squares = 1 - self.t**-0.8, g**2 + 1e-30
        if g.ndim == 2:
            self.row = beta * self.row + (1 - beta) * squares.mean(1)
            self.column = beta * self.column + (1 - beta) * squares.mean(0)
            variance = np.outer(self.row, self.column) / self.row.mean()
        else:
            variance = self.second = beta * self.second + (1 - beta) * squares
        update = g / np.sqrt(variance)
        return update / max(1.0, np.sqrt((update**2).mean()))

    def muon(self, g: np.ndarray) -> np.ndarray:
        self.first = 0.95 * self.first + 0.05 * g
        scale = 0.2 * np.sqrt(max(g.shape))
        return scale * newton_schulz(0.95 * self.first + 0.05 * g)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("optim", "shape"),
    [
        ("lion", (7, 5)), ("lion", (9,)), ("adafactor", (7, 5)), ("adafactor", (9,)),
        ("muon", (24, 40)), ("muon", (40, 24)),
    ],
)  # fmt: skip
def test_steps_against_float64(optim, shape):
    weight = random(shape, 1)
    run, reference = Run(weight, optim), Reference(optim, weight)
    for seed in range(10):
        gradient = random(shape, 2 + seed)
        found, expected = run.step(gradient), reference.step(gradient)
    change = np.abs(expected - weight).max()
    # bfloat16 keeps 8 bits, of matrices whose small singular values the iteration enlarges.
    assert np.abs(found - expected).max() < (3e-2 if optim == "muon" else 2e-5) * change


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resuming_is_exact(optim):
    weight = random((72, 64))
    first = Run(weight, optim)
    for seed in range(3):
        at = first.step(random((72, 64), 10 + seed))
    second = Run(at, optim)
    second.updater.load_state(SlicesOf(first.state()))
    for seed in range(3, 6):
        gradient = random((72, 64), 10 + seed)
        np.testing.assert_array_equal(second.step(gradient), first.step(gradient))
    for name, value in first.state().items():
        np.testing.assert_array_equal(second.state()[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_offload_changes_no_bit(optim, dtype):
    weight = random((72, 64))
    plain, offloaded = Run(weight, optim, dtype), Run(weight, optim, dtype, offload=True)
    for seed in range(3):
        gradient = random((72, 64), seed)
        np.testing.assert_array_equal(offloaded.step(gradient), plain.step(gradient))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_gradients_that_are_not_finite_change_nothing(optim, stochastic):
    run = Run(random((72, 64)), optim, "bfloat16", stochastic_rounding=stochastic)
    before = run.step(random((72, 64), 1))
    state = run.state()
    gradient = random((72, 64), 2)
    gradient[3, 4] = np.inf
    np.testing.assert_array_equal(run.step(gradient), before)
    counts = ("step", "beta1_pow_acc", "beta2_pow_acc")
    kept = {name: value for name, value in state.items() if not name.endswith(counts)}
    assert kept
    after = run.state()
    for name, value in kept.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_stochastic_rounding_follows_master_weights(optim):
    """Steps far below half a unit of bfloat16, which the nearest value would lose, add up."""
    weight = np.ones((64, 64), np.float32)
    exact = Run(weight, optim, "float32")
    rounded = Run(weight, optim, "bfloat16", stochastic_rounding=True)
    assert not any(name.endswith("master_weight") for name in rounded.state())
    generator = np.random.default_rng(0)
    for _ in range(40):
        gradient = 1 + 0.5 * generator.normal(size=weight.shape).astype(np.float32)
        wide, narrow = exact.step(gradient, 1e-4), rounded.step(gradient, 1e-4)
    change = (wide - weight).mean()
    assert abs(change) > 1e-4
    assert abs((narrow - weight).mean() - change) < 0.2 * abs(change)
    assert not any(name.endswith("master_weight") for name in rounded.state())
    assert any(name.endswith("step") for name in rounded.state())


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_half_precision_has_master_weights(optim):
    run = Run(random((72, 64)), optim, "bfloat16")
    exact = Run(random((72, 64)), optim)
    exact.model.weight.set_value(run.model.weight.astype("float32"))
    for seed in range(3):
        gradient = paddle.to_tensor(random((72, 64), seed)).astype("bfloat16")
        gradient = gradient.astype("float32").numpy()
        wide, narrow = exact.step(gradient), run.step(gradient)
    np.testing.assert_array_equal(run.state()["weight.master_weight"], wide)
    np.testing.assert_allclose(narrow, wide, rtol=2**-8)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="no optimizer 'sgd'"):
        Run(random((4, 4)), "sgd")
