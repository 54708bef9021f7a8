"""A block has the bits of its operators, forward and backward, and runs as one operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from test_packed_attention_op import (
    BATCH,
    HEAD_DIM,
    HEADS_K,
    HEADS_Q,
    SEQUENCE,
    masks,
    rotations,
)

from pypkg import ops
from pypkg.ops import blocks

HIDDEN, INTERMEDIATE = 40, 56
ATTENTION_SHAPES = [(HIDDEN, (HEADS_Q + 2 * HEADS_K) * HEAD_DIM), (HEADS_Q * HEAD_DIM, HIDDEN)]
MLP_SHAPES = [(HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
ROWS, TOKENS = (BATCH, SEQUENCE, HIDDEN), (BATCH * SEQUENCE, HIDDEN)


def tensors(*shapes: tuple[int, ...], dtype: str = "float32") -> list[paddle.Tensor]:
    draw = np.random.default_rng(0).standard_normal
    found = [paddle.to_tensor(draw(shape) * 0.3, dtype) for shape in shapes]
    for each in found:
        each.stop_gradient = False
    return found


def results(run: Callable[..., paddle.Tensor], *given: paddle.Tensor) -> list[np.ndarray]:
    """The output of ``run`` and the gradients of ``given``."""
    out = run(*given)
    weights = np.random.default_rng(2).standard_normal(out.shape)
    (out * paddle.to_tensor(weights, out.dtype)).sum().backward()
    return [each.numpy() for each in (out, *(one.grad for one in given))]


def attention(mask: ops.AttentionMask, rotation: dict) -> tuple[Callable, Callable]:
    """The block, and its three operators."""
    heads, options = (BATCH, HEADS_Q, HEADS_K, mask), {"scale": 0.3, "softcap": 4.0, **rotation}

    def parts(x, qkv_weight, o_weight):
        qkv = ops.linear(x, qkv_weight)
        return ops.linear(ops.packed_attention(qkv, *heads, **options), o_weight)

    return lambda *given: ops.attention_block(*given, *heads, **options), parts


def mlp(activation: str) -> tuple[Callable, Callable]:
    def parts(x, gate_up, down):
        return ops.linear(ops.GATED[activation](ops.linear(x, gate_up)), down)

    return lambda *given: ops.gated_mlp_block(*given, activation), parts


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the blocks that ran as one operator."""
    names: list[str] = []
    run = blocks.run_compiled
    monkeypatch.setattr(
        blocks, "run_compiled", lambda op, *args: names.append(op) or run(op, *args)
    )
    return names


@pytest.mark.parametrize("shape", [ROWS, TOKENS])  # the second is that of sequence parallelism
@pytest.mark.parametrize(
    ("rotation", "mask"),
    [("none", "window"), ("halves", "causal"), ("interleaved", "prefix"),
     ("positions", "documents")],
)  # fmt: skip
def test_attention_has_the_bits_of_its_operators(compiled, ran, rotation, mask, shape):
    block, parts = attention(masks()[mask], rotations()[rotation])
    expected = results(parts, *tensors(shape, *ATTENTION_SHAPES))
    for got, wanted in zip(
        results(block, *tensors(shape, *ATTENTION_SHAPES)), expected, strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    assert ran == ["pypkg_attention_block"]


@pytest.mark.parametrize("shape", [ROWS, TOKENS])
@pytest.mark.parametrize("activation", ops.GATED)
def test_mlp_has_the_bits_of_its_operators(compiled, ran, activation, shape):
    block, parts = mlp(activation)
    expected = results(parts, *tensors(shape, *MLP_SHAPES))
    for got, wanted in zip(results(block, *tensors(shape, *MLP_SHAPES)), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert ran == ["pypkg_mlp_block"]


def normed_results(run: Callable, *given: paddle.Tensor) -> list[np.ndarray]:
    """Both outputs of ``run``, and the gradients of ``given``."""

    def both(*given: paddle.Tensor) -> paddle.Tensor:
        return paddle.concat([each.flatten() for each in run(*given)])

    return results(both, *given)


@pytest.mark.parametrize("shape", [ROWS, TOKENS])
def test_norm_and_attention_have_the_bits_of_their_operators(compiled, ran, shape):
    heads = (BATCH, HEADS_Q, HEADS_K, masks()["documents"])
    rotation = (*(rotations()["positions"].get(n) for n in ("cos", "sin", "position_ids")), False)

    def parts(x, residual, weight, *projections):
        y, stream = ops.rms_norm(x, weight, 1e-5, residual)
        return ops.attention_block(y, *projections, *heads, *rotation, 0.3, 4.0), stream

    def block(x, residual, weight, *projections):
        norm = ops.PreNorm(weight, 1e-5, residual)
        return ops.normed_attention_block(x, norm, *projections, *heads, *rotation, 0.3, 4.0)

    given = (shape, shape, (HIDDEN,), *ATTENTION_SHAPES)
    expected = normed_results(parts, *tensors(*given))
    ran.clear()
    for got, wanted in zip(normed_results(block, *tensors(*given)), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert ran == ["pypkg_normed_attention_block"]


@pytest.mark.parametrize("activation", ops.GATED)
@pytest.mark.parametrize("used", [0, 1, 2])
def test_norm_and_mlp_have_the_bits_of_their_operators(compiled, ran, activation, used):
    """Also where only one of the outputs, 0 or 1, is used; 2: both."""

    def outputs(out, stream):
        return (out, stream) if used == 2 else ((out, stream)[used],)

    def parts(x, residual, weight, *projections):
        y, stream = ops.rms_norm(x, weight, 1e-5, residual)
        return outputs(ops.gated_mlp_block(y, *projections, activation), stream)

    def block(x, residual, weight, *projections):
        norm = ops.PreNorm(weight, 1e-5, residual)
        return outputs(*ops.normed_gated_mlp_block(x, norm, *projections, activation))

    given = (ROWS, ROWS, (HIDDEN,), *MLP_SHAPES)
    leaves = slice(0, 2 if used == 1 else None)  # the stream does not depend on the others
    found, expected = [], []
    for run, into in ((parts, expected), (block, found)):
        inputs = tensors(*given)
        joined = paddle.concat([each.flatten() for each in run(*inputs)])
        weights = np.random.default_rng(2).standard_normal(joined.shape)
        (joined * paddle.to_tensor(weights, joined.dtype)).sum().backward()
        into += [joined.numpy(), *(each.grad.numpy() for each in inputs[leaves])]
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert ran[-1] == "pypkg_normed_mlp_block"


def test_norm_and_activation_are_not_kept(compiled):
    """The backward pass computes them again (the tests above compare its bits)."""

    def allocated() -> int:
        return paddle.base.core.host_memory_stat_current_value("Allocated", 0)

    x, residual, weight, *projections = tensors(TOKENS, TOKENS, (HIDDEN,), *MLP_SHAPES)
    before, norm = allocated(), ops.PreNorm(weight, 1e-5, residual)
    out, stream = ops.normed_gated_mlp_block(x, norm, *projections)
    rows = TOKENS[0]
    kept = {"out": HIDDEN, "stream": HIDDEN, "rstd": 1, "gate and up": 2 * INTERMEDIATE}
    assert allocated() - before == 4 * rows * sum(kept.values())
    del out, stream

    x, *projections = tensors(TOKENS, *ATTENTION_SHAPES)
    heads = (BATCH, HEADS_Q, HEADS_K, masks()["causal"])
    before, norm = allocated(), ops.PreNorm(weight, 1e-5, residual)
    out, stream = ops.normed_attention_block(
        x, norm, *projections, *heads, *[None] * 3, False, 1.0, 0.0
    )
    width = (HEADS_Q + 2 * HEADS_K) * HEAD_DIM
    kept = {"out": HIDDEN, "stream": HIDDEN, "rstd": 1, "qkv": width}
    kept |= {"attended": HEADS_Q * HEAD_DIM, "lse": HEADS_Q}
    assert allocated() - before == 4 * rows * sum(kept.values())
    del out, stream


@pytest.mark.parametrize("change", ["dtype", "frozen"])
def test_a_norm_that_the_operator_does_not_take_runs_by_itself(compiled, ran, change):
    x, residual, weight, *projections = tensors(ROWS, ROWS, (HIDDEN,), *MLP_SHAPES)
    if change == "frozen":
        weight.stop_gradient = True
    elif change == "dtype":
        x, residual, *projections = (each.astype("float64") for each in (x, residual, *projections))
        weight = weight.astype("float64")
    ops.normed_gated_mlp_block(x, ops.PreNorm(weight, 1e-5, residual), *projections)
    assert "pypkg_normed_mlp_block" not in ran


def test_mistakes_of_the_norm_are_those_of_rms_norm(compiled):
    x, residual, weight, *projections = tensors(ROWS, TOKENS, (HIDDEN,), *MLP_SHAPES)
    with pytest.raises(ValueError, match="rms_norm: residual must have shape"):
        ops.normed_gated_mlp_block(x, ops.PreNorm(weight, 1e-5, residual), *projections)


def test_a_frozen_weight_has_no_gradient(compiled, ran):
    """The operator of the block would compute it; the parts do not."""
    x, gate_up, down = tensors(ROWS, *MLP_SHAPES)
    down.stop_gradient = True
    ops.gated_mlp_block(x, gate_up, down).sum().backward()
    assert down.grad is None
    assert gate_up.grad is not None
    assert not ran


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_a_cpu_multiplies_float32_alone(compiled, dtype):
    def is_one(dtype: str) -> bool:
        x, column, row = tensors(ROWS, *MLP_SHAPES, dtype=dtype)
        return blocks._is_one(x, None, column, row, 2, 1)

    assert is_one("float32")
    assert not is_one(dtype)


def test_precision_of_products_is_that_of_the_setting(compiled, ran, monkeypatch):
    monkeypatch.setattr(blocks, "products_are_plain", lambda: False)
    ops.gated_mlp_block(*tensors(ROWS, *MLP_SHAPES))
    assert not ran


def test_nothing_is_recorded_without_gradients(compiled, ran):
    block, _ = attention(ops.AttentionMask(), {})
    with paddle.no_grad():
        out = block(*tensors(ROWS, *ATTENTION_SHAPES))
    assert out.stop_gradient
    assert ran


def test_mistakes_name_the_argument(compiled):
    x, gate_up, down = tensors(ROWS, *MLP_SHAPES)
    with pytest.raises(ValueError, match="down_weight must have shape"):
        ops.gated_mlp_block(x, gate_up, gate_up)
    with pytest.raises(ValueError, match="gate_up_weight must have shape"):
        ops.gated_mlp_block(x, down, down)
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh"):
        ops.gated_mlp_block(x, gate_up, down, "tanh")
    with pytest.raises(TypeError, match="down_weight must be float32, got float64"):
        ops.gated_mlp_block(x, gate_up, down.astype("float64"))
    with pytest.raises(ValueError, match="qkv_weight must have shape"):
        ops.attention_block(x, gate_up, down, BATCH, HEADS_Q, HEADS_K)
