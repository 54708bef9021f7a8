"""16 bits on a CPU: Paddle's operators compute in float32 there and leave tensors in 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from op_testing import random
from tiny_configs import KEYS, tiny

from pypkg.models import from_config
from pypkg.ops import linear_cross_entropy, rms_norm, rms_norm_reference
from pypkg.ops.dispatch import half_on_cpu

DTYPES = ("bfloat16", "float16")
OPERATORS: dict[str, Callable[..., paddle.Tensor]] = {
    "matmul": lambda x, y: paddle.matmul(x, y, transpose_y=True),
    "@": lambda x, y: x @ y.t(),
    "linear": lambda x, y: F.linear(x, y.t(), y[:, 0]),
    "+": lambda x, y: x + y,
    "add": paddle.add,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / (y * y + 1.0),
    "layer_norm": lambda x, y: F.layer_norm(x, [x.shape[1]], y[0], y[1], 1e-5),
    "gelu": lambda x, y: F.gelu(x, approximate=True),
    "relu": lambda x, y: F.relu(x),
    "silu": lambda x, y: F.silu(x),
    "softmax": lambda x, y: F.softmax(x),
    "normalize": lambda x, y: F.normalize(x, axis=1),
    "where": lambda x, y: paddle.where(x.astype("float32") > 0, x, y),
}


@pytest.fixture
def half(monkeypatch):
    """The operators of ``install``, until the end of the test."""
    for name in (*half_on_cpu._OPERATORS, *half_on_cpu._IN_PLACE):
        monkeypatch.setattr(paddle._C_ops, name, getattr(paddle._C_ops, name))
    for name in half_on_cpu._ARITHMETIC:
        monkeypatch.setattr(paddle.Tensor, f"__{name}__", getattr(paddle.Tensor, f"__{name}__"))
    half_on_cpu.install.__wrapped__()


def inputs(dtype: str, of: str) -> list[paddle.Tensor]:
    """Values that ``of`` holds, as leaves in ``dtype``."""
    tensors = [paddle.to_tensor(random((6, 6), seed)).astype(of).astype(dtype) for seed in (0, 1)]
    for each in tensors:
        each.stop_gradient = False
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_results_and_gradients_are_those_of_float32_rounded(half, name, dtype):
    found = {}
    for each in ("float32", dtype):
        x, y = inputs(each, dtype)
        out = OPERATORS[name](x, y)
        (out.astype("float32") * paddle.to_tensor(random((6, 6), 2))).sum().backward()
        gradients = [tensor.grad for tensor in (x, y) if tensor.grad is not None]
        assert {value.dtype for value in (out, *gradients)} == {getattr(paddle, each)}
        found[each] = [value.astype("float32").numpy() for value in (out, *gradients)]
    # The gradient of the output is rounded too, and that of a composed operator once a step.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for value, expected in zip(found[dtype], found["float32"], strict=True):
        assert np.abs(value - expected).max() <= 2 * unit * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(half, dtype):
    for operator in (paddle.Tensor.add_, paddle.Tensor.multiply_):
        x, y = (each.detach() for each in inputs(dtype, dtype))
        expected = operator(x.astype("float32"), y.astype("float32")).astype(dtype)
        address = x.data_ptr()
        assert operator(x, y) is x and x.data_ptr() == address and x.dtype == y.dtype
        assert np.array_equal(x.astype("float32").numpy(), expected.astype("float32").numpy())


def test_other_dtypes_stay_as_they_were(half):
    x, y = inputs("float32", "float32")
    wide, narrow = x + y, x.astype("bfloat16")
    assert wide.dtype == (x + narrow).dtype == (narrow + x).dtype == paddle.float32
    assert np.array_equal(wide.numpy(), x.numpy() + y.numpy())
    assert (narrow * 2).dtype == (2 * narrow).dtype == (1.0 - narrow).dtype == paddle.bfloat16


def test_our_operators_take_float16_by_their_reference(half, compiled):
    x, weight = paddle.to_tensor(random((5, 8), 0)), paddle.to_tensor(random((8,), 1))
    x, weight = x.astype("float16"), weight.astype("float16")
    found, expected = rms_norm(x, weight), rms_norm_reference(x, weight)
    assert found.dtype == paddle.float16 and np.array_equal(found.numpy(), expected.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KEYS)
def test_every_family(half, compiled, family, dtype):
    """Loss, norm of the gradients and their dtypes; layouts: distributed/optimizer/test_half.py."""
    config, found = tiny(family), []
    tokens = np.random.default_rng(0).integers(8, 4000, [2, 2, 16])
    if config.prefix_lm:
        tokens[0, :, 6:8] = config.gmask_token_id, config.sop_token_id
    input_ids, labels = map(paddle.to_tensor, tokens)
    for each in ("float32", dtype):
        model = from_config(config, each, seed=3)
        loss = model.loss(input_ids=input_ids, labels=labels)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {getattr(paddle, each)}
        squares = sum(float((g.astype("float32") ** 2).sum()) for g in gradients)
        found.append([loss.item(), squares**0.5])
    np.testing.assert_allclose(found[1], found[0], rtol=5e-3)


@pytest.mark.parametrize("counted", [3, 7])
def test_the_mean_of_a_loss_divides_by_a_float32_number(half, compiled, counted):
    """1 / 3 and 1 / 7, rounded to bfloat16, are off by 0.2 %, and with them every gradient."""
    rows, hidden_size, vocab = 32, 256, 40
    labels = np.full(rows, -100)
    labels[:counted] = np.arange(counted)
    h = paddle.to_tensor(random((rows, hidden_size), 0)).astype("bfloat16")
    w = paddle.to_tensor(random((vocab, hidden_size), 1) / 16).astype("bfloat16")
    exact = h.astype("float64").numpy() @ w.astype("float64").numpy().T
    exact = np.exp(exact - exact.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    exact[np.arange(rows), np.maximum(labels, 0)] -= 1
    exact = (exact * (labels >= 0)[:, None] / counted) @ w.astype("float64").numpy()
    found = {}
    for reduction in ("mean", "sum"):
        hidden = h.detach()
        hidden.stop_gradient = False
        # Rows are scaled a few at a time.
        arguments = {"chunk_bytes": 5 * vocab * 2, "reduction": reduction}
        linear_cross_entropy(hidden, w, paddle.to_tensor(labels), **arguments).backward()
        found[reduction] = hidden.grad.astype("float64").numpy()
    assert np.abs(found["mean"] - exact).max() < 2.0**-7 * np.abs(exact).max()
    # Beside what the sum has of it already, each element is rounded once.
    once = found["sum"] / counted
    assert (np.abs(found["mean"] - once) <= 2.0**-8 * np.abs(once)).all()
    assert (found["mean"] * once).sum() / (once * once).sum() == pytest.approx(1, abs=2e-4)
    assert not found["mean"][counted:].any()
