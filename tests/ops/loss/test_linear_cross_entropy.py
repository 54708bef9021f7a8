from __future__ import annotations

import importlib

import numpy as np
import paddle
import pytest
from op_testing import check_against_reference, parameter, random
from paddle.base import core

from pypkg.ops import (
    cross_entropy_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from pypkg.ops.loss.linear_cross_entropy import _add_at_labels

IGNORE = -100
ROWS, HIDDEN, VOCAB = 21, 24, 50


def arrays() -> list[np.ndarray]:
    return [random((ROWS, HIDDEN), 0), random((VOCAB, HIDDEN), 1)]


def labels() -> paddle.Tensor:
    generator = np.random.default_rng(2)
    values = generator.integers(0, VOCAB, ROWS)
    return paddle.to_tensor(np.where(generator.random(ROWS) < 0.3, IGNORE, values))


# One row a chunk, chunks that do not divide the rows, one chunk for all.
@pytest.mark.parametrize("rows_per_chunk", [1, 4, ROWS])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients(each_backend, reduction, rows_per_chunk):
    y = labels()
    check_against_reference(
        # The factor is the scale that arrives from above in backward.
        lambda h, w: (
            3.0
            * linear_cross_entropy(
                h, w, y, reduction=reduction, chunk_bytes=rows_per_chunk * VOCAB * 4
            )
        ),
        lambda h, w: 3.0 * linear_cross_entropy_reference(h, w, y, reduction=reduction),
        arrays(),
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_float64_is_exact_over_chunks(z_loss):
    y = labels()
    check_against_reference(
        lambda h, w: linear_cross_entropy(h, w, y, chunk_bytes=5 * VOCAB * 8, z_loss=z_loss),
        lambda h, w: linear_cross_entropy_reference(h, w, y, z_loss=z_loss),
        arrays(),
        "float64",
        tolerance=1e-13,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_slope_is_added_at_the_labels_of_this_shard(dtype):
    gradient = paddle.full([3, 4], 0.25).astype(dtype)
    _add_at_labels(gradient, paddle.to_tensor([1, -1, 9]), paddle.to_tensor([0.5, 1.0, 1.0]))
    expected = np.full((3, 4), 0.25)
    expected[0, 1] = 0.75
    np.testing.assert_array_equal(gradient.astype("float32").numpy(), expected)


def test_z_loss(each_backend):
    """The square of each counted row's log-sum-exp, times the factor, and its gradient."""
    y, z_loss = labels(), 0.3
    check_against_reference(
        lambda h, w: linear_cross_entropy(h, w, y, chunk_bytes=4 * VOCAB * 4, z_loss=z_loss),
        lambda h, w: linear_cross_entropy_reference(h, w, y, z_loss=z_loss),
        arrays(),
    )
    hidden, weight = (paddle.to_tensor(each) for each in arrays())
    lse = np.log(np.exp(arrays()[0].astype(np.float64) @ arrays()[1].T).sum(1))
    token_losses: list[paddle.Tensor] = []
    plain = linear_cross_entropy(hidden, weight, y).item()
    with_z = linear_cross_entropy(
        hidden, weight, y, token_losses=token_losses, z_loss=z_loss
    ).item()
    counted = y.numpy() != IGNORE
    assert with_z - plain == pytest.approx(z_loss * (lse[counted] ** 2).mean(), rel=1e-5)
    assert token_losses[0].sum().item() / counted.sum() == pytest.approx(plain, rel=1e-6)


def test_more_dimensions(each_backend):
    y = labels().reshape([3, 7])
    hidden, weight = arrays()
    check_against_reference(
        lambda h, w: linear_cross_entropy(h, w, y, chunk_bytes=4 * VOCAB * 4),
        lambda h, w: linear_cross_entropy_reference(h, w, y),
        [hidden.reshape(3, 7, HIDDEN), weight],
    )


def test_weight_gradient_that_is_added_to_as_it_is_made(monkeypatch):
    """As on a GPU, with Paddle's operator for it replaced by what it does there in 16 bits."""
    calls = []

    def product_and_sum(x, dout, dweight, dbias, multi_precision, has_bias):
        assert (dbias, multi_precision, has_bias) == (None, True, False)
        calls.append(dweight is None)
        product = paddle.matmul(x, dout, transpose_x=True)
        return (product if dweight is None else dweight + product), None

    module = importlib.import_module("pypkg.ops.matmul")
    monkeypatch.setattr(module, "can_add_matmul", lambda x: False)
    monkeypatch.setattr(module, "_adds_to_float32", lambda x: True)
    monkeypatch.setattr(paddle._C_ops, "fused_linear_param_grad_add", product_and_sum)
    y = labels()
    check_against_reference(
        lambda h, w: linear_cross_entropy(h, w, y, chunk_bytes=5 * VOCAB * 4),
        lambda h, w: linear_cross_entropy_reference(h, w, y),
        arrays(),
    )
    assert calls[:2] == [True, False]


@pytest.mark.parametrize("has_blas", [True, False])
def test_weight_gradient_of_several_chunks(compiled, monkeypatch, has_blas):
    """The products are added as they are made; without MKL, each is made and then added."""
    module = importlib.import_module("pypkg.ops.matmul")
    ran, y, run = [], labels(), module.run_compiled
    monkeypatch.setattr(module, "run_compiled", lambda *given: ran.append(given[0]) or run(*given))
    if not has_blas:
        monkeypatch.setattr(module, "can_add_matmul", lambda x: False)
    check_against_reference(
        lambda h, w: linear_cross_entropy(h, w, y, chunk_bytes=5 * VOCAB * 4),
        lambda h, w: linear_cross_entropy_reference(h, w, y),
        arrays(),
    )
    assert ("pypkg_add_matmul" in ran) == has_blas


@pytest.mark.parametrize("rows_per_chunk", [1, 4, ROWS])
@pytest.mark.parametrize("shape", [[ROWS], [3, 7], [0]])
def test_token_losses(each_backend, rows_per_chunk, shape):
    rows = int(np.prod(shape))
    y = labels()[:rows].reshape(shape)
    hidden = parameter(arrays()[0][:rows].reshape(*shape, HIDDEN))
    weight = parameter(arrays()[1])
    losses: list[paddle.Tensor] = []
    total = linear_cross_entropy(
        hidden, weight, y, reduction="sum", chunk_bytes=rows_per_chunk * VOCAB * 4,
        token_losses=losses,
    )  # fmt: skip
    expected = cross_entropy_reference(paddle.matmul(hidden, weight, transpose_y=True), y)
    assert len(losses) == 1 and losses[0].shape == shape and losses[0].stop_gradient
    assert losses[0].dtype == paddle.float32
    np.testing.assert_allclose(losses[0].numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    total.backward()
    assert total.item() == pytest.approx(losses[0].sum().item(), rel=1e-5)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_input_is_frozen(each_backend, wanted):
    inputs = [parameter(each) for each in arrays()]
    linear_cross_entropy(*inputs, labels()).backward()
    expected = inputs[wanted].grad.numpy()
    frozen = [parameter(each) for each in arrays()]
    frozen[1 - wanted].stop_gradient = True
    linear_cross_entropy(*frozen, labels()).backward()
    assert frozen[1 - wanted].grad is None
    np.testing.assert_array_equal(frozen[wanted].grad.numpy(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored(each_backend, reduction):
    inputs = [parameter(each) for each in arrays()]
    loss = linear_cross_entropy(*inputs, paddle.full([ROWS], IGNORE, "int64"), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert all((each.grad.numpy() == 0).all() for each in inputs)


def test_no_rows(each_backend):
    hidden, weight = parameter(np.zeros((0, HIDDEN))), parameter(arrays()[1])
    loss = linear_cross_entropy(hidden, weight, paddle.zeros([0], "int64"))
    loss.backward()
    assert loss.item() == 0
    assert (weight.grad.numpy() == 0).all() and list(hidden.grad.shape) == [0, HIDDEN]


def test_second_backward_is_refused(each_backend):
    inputs = [parameter(each) for each in arrays()]
    loss = linear_cross_entropy(*inputs, labels())
    loss.backward(retain_graph=True)
    with pytest.raises(OSError, match="backward ran through this result before"):
        loss.backward()


def test_used_twice(each_backend):
    y = labels()
    check_against_reference(
        lambda h, w: linear_cross_entropy(h, w, y) + linear_cross_entropy(2.0 * h, w, y),
        lambda h, w: (
            linear_cross_entropy_reference(h, w, y) + linear_cross_entropy_reference(2.0 * h, w, y)
        ),
        arrays(),
    )


def peak_of(call) -> int:
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    result = call()
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    del result
    return peak


def test_memory(compiled):
    """512 rows of a vocabulary of 8192 are 16 MiB of logits; a chunk of them is 1 MiB."""
    rows, hidden_size, vocab, chunk_bytes = 512, 32, 8192, 2**20
    hidden, weight = (
        parameter(random((rows, hidden_size), 0)),
        parameter(random((vocab, hidden_size), 1)),
    )
    y = paddle.zeros([rows], "int64")

    def loss():
        return linear_cross_entropy(hidden, weight, y, chunk_bytes=chunk_bytes)

    with paddle.no_grad():
        only_loss = peak_of(loss)
    weight_bytes = vocab * hidden_size * 4
    with_gradients = peak_of(loss)
    small = 4 * rows * hidden_size * 4
    assert only_loss < chunk_bytes + small
    assert with_gradients < chunk_bytes + 2 * weight_bytes + small
    assert with_gradients < rows * vocab * 4 / 3


@paddle.no_grad()
def test_default_chunk_on_a_cpu(compiled):
    """2048 rows of a vocabulary of 32000 are 250 MiB of logits; a chunk of them is 128 MiB."""
    hidden, weight = paddle.zeros([2048, 8]), paddle.zeros([32000, 8])
    y = paddle.zeros([2048], "int64")
    assert peak_of(lambda: linear_cross_entropy(hidden, weight, y)) < 130 * 2**20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": paddle.ones([9, 5])}, ValueError, r"weight must have shape \[vocab, 4\], got"),
        ({"weight": paddle.ones([9, 4], "bfloat16")}, TypeError, "weight must be float32, got bf"),
        ({"labels": paddle.zeros([2], "int64")}, ValueError, r"labels must have shape \[3\], got"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_wrong_inputs(each_backend, change, error, message):
    good = {
        "hidden": paddle.ones([3, 4]),
        "weight": paddle.ones([9, 4]),
        "labels": paddle.zeros([3], "int64"),
    }
    with pytest.raises(error, match="linear_cross_entropy: " + message):
        linear_cross_entropy(**{**good, **change})
