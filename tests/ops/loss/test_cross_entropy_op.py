from __future__ import annotations

import numpy as np
import paddle
import pytest
from op_testing import as_float64, assert_close, check_against_reference, parameter, random, run
from paddle.base import core

from pypkg.ops import cross_entropy, cross_entropy_reference

IGNORE = -100


def labels_of(shape, vocab: int, seed: int = 7, ignored: float = 0.3) -> paddle.Tensor:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, vocab, shape)
    return paddle.to_tensor(np.where(generator.random(shape) < ignored, IGNORE, labels))


def made(x: paddle.Tensor) -> paddle.Tensor:
    """Logits that are no leaf, so that backward may write over them."""
    return x * 1.0


def test_reference_is_the_formula():
    logits, labels = random((5, 9), 0), np.array([3, IGNORE, 0, 8, IGNORE])
    expected = [
        0.0 if y == IGNORE else np.log(np.exp(row).sum()) - row[y] for row, y in zip(logits, labels)
    ]
    got = cross_entropy_reference(paddle.to_tensor(logits), paddle.to_tensor(labels))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 760), (3, 1128), (2, 5, 64), (300, 17), (7, 32000)])
@pytest.mark.parametrize("inplace", [True, False])
def test_values_and_gradients(each_backend, dtype, shape, inplace):
    if each_backend == "triton":  # interpreted, and a program has one row: more show nothing
        shape = (min(shape[0], 20), *shape[1:])
    labels = labels_of(shape[:-1], shape[-1])
    inputs = [parameter(random(shape, 0, 3.0), dtype)]
    exact = [parameter(as_float64(inputs[0]), "float64")]

    def loss(x):
        # Scaling would round again in bfloat16; a copy is no leaf either.
        return cross_entropy(x.clone(), labels, inplace_backward=inplace)

    (got,), (gradient,) = run(loss, inputs)
    (expected,), (expected_gradient,) = run(lambda x: cross_entropy_reference(x, labels), exact)
    assert loss(inputs[0]).dtype == paddle.float32
    assert_close(got, expected, 5e-6, "loss")  # float32 for every dtype of the logits
    assert_close(gradient, expected_gradient, 5e-6 if dtype == "float32" else 2.0**-8, "gradient")


def test_other_ignore_index(each_backend):
    labels = paddle.to_tensor([0, 1, 2])
    check_against_reference(
        lambda x: cross_entropy(x, labels, ignore_index=0),
        lambda x: cross_entropy_reference(x, labels, 0),
        [random((3, 4), 0)],
    )


def test_all_ignored(each_backend):
    labels = paddle.full([4], IGNORE, "int64")
    (loss,), (gradient,) = run(
        lambda x: cross_entropy(made(x), labels), [parameter(random((4, 9), 0))]
    )
    assert (loss == 0).all() and (gradient == 0).all()


def test_ignored_rows_may_hold_anything(each_backend):
    values = random((3, 6), 0)
    values[0], values[1] = np.nan, np.inf
    labels = paddle.to_tensor([IGNORE, IGNORE, 2])
    (loss,), (gradient,) = run(lambda x: cross_entropy(made(x), labels), [parameter(values)])
    assert (loss[:2] == 0).all() and (gradient[:2] == 0).all()
    assert np.isfinite(loss).all() and np.isfinite(gradient).all()


def test_minus_infinity(each_backend):
    """Entries of -inf have no probability and no gradient; that of the label gives loss +inf."""
    values = random((2, 6), 0)
    values[:, [1, 4]] = -np.inf
    labels = paddle.to_tensor([2, 4])
    (loss,), (gradient,) = run(lambda x: cross_entropy(made(x), labels), [parameter(values)])
    finite = np.exp(values[0][np.isfinite(values[0])]).sum()
    np.testing.assert_allclose(loss, [np.log(finite) - values[0, 2], np.inf], rtol=1e-6)
    # Paddle's own exp(-inf), in the reference, is 2e-40.
    assert (np.abs(gradient[0, [1, 4]]) < 1e-38).all() and np.isfinite(gradient[0]).all()


def test_large_logits(each_backend):
    check_against_reference(
        lambda x: cross_entropy(made(x), paddle.to_tensor([0, 5])),
        lambda x: cross_entropy_reference(x, paddle.to_tensor([0, 5])),
        [random((2, 50), 0, 1e4)],
    )


def test_no_rows(each_backend):
    x = parameter(np.zeros((0, 9)))
    loss = cross_entropy(made(x), paddle.zeros([0], "int64"))
    loss.sum().backward()
    assert list(loss.shape) == [0] and list(x.grad.shape) == [0, 9]


@pytest.mark.parametrize("label", [-1, 9])
def test_label_out_of_range(each_backend, label):
    logits, labels = paddle.ones([2, 9]), paddle.to_tensor([3, label])
    if each_backend == "triton":  # as on a GPU, where to raise would be to wait
        assert list(cross_entropy(logits, labels).isnan()) == [False, True]
        return
    with pytest.raises(IndexError, match=f"label {label} "):
        cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ((2, 9), paddle.zeros([3], "int64"), ValueError, r"labels must have shape \[2\], got"),
        ((2, 9), paddle.zeros([2], "int32"), TypeError, "labels must be int64, got int32"),
        ((), paddle.zeros([], "int64"), ValueError, "at least one dimension"),
    ],
)
def test_wrong_inputs(each_backend, logits, labels, error, message):
    with pytest.raises(error, match="cross_entropy: .*" + message):
        cross_entropy(paddle.ones(logits), labels)


# --- the gradient in place of the logits --------------------------------------------------------


def buffers(make, loss_of=cross_entropy, keep=None):
    """Addresses of the logits and of the gradient that arrives at them."""
    x = parameter(random((6, 40), 0))
    logits = make(x)
    kept = keep(logits) if keep else None
    address, arrived = logits.data_ptr(), []
    logits.register_hook(lambda gradient: arrived.append(gradient.data_ptr()))
    loss = loss_of(logits, labels_of((6,), 40))
    del logits
    loss.sum().backward()
    del kept
    return address, arrived[0]


def test_gradient_takes_the_place_of_the_logits(compiled):
    address, arrived = buffers(made)
    assert arrived == address


def test_gradient_gets_a_buffer_when_asked(compiled):
    address, arrived = buffers(made, lambda x, y: cross_entropy(x, y, inplace_backward=False))
    assert arrived != address


def test_views_are_not_overwritten(compiled):
    """A leaf below a view, or a view kept by the user, would be corrupted."""
    address, arrived = buffers(lambda x: x.reshape([6, 40]))
    assert arrived != address
    address, arrived = buffers(made, keep=lambda logits: logits.reshape([-1]))
    assert arrived != address


def test_leaf_is_not_overwritten(compiled):
    values = random((6, 40), 0).astype("float32")
    x = parameter(values)
    cross_entropy(x, labels_of((6,), 40)).sum().backward()
    np.testing.assert_array_equal(x.numpy(), values)
    x = parameter(values)
    cross_entropy(x.reshape([2, 3, 40]), labels_of((2, 3), 40)).sum().backward()
    np.testing.assert_array_equal(x.numpy(), values)


def test_backward_makes_no_second_logits(compiled):
    x = parameter(random((64, 4096), 0))
    loss = cross_entropy(made(x), labels_of((64,), 4096)).sum()
    size = x.numel().item() * 4
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    loss.backward()
    # What grows is the gradient of the leaf alone, made by the multiplication in made().
    grown = core.host_memory_stat_peak_value("Allocated", 0) - before
    assert grown < 1.1 * size, f"{grown} bytes for logits of {size}"


def test_second_backward_is_refused(compiled):
    x = parameter(random((6, 40), 0))
    loss = cross_entropy(made(x), labels_of((6,), 40)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_losses_on_the_same_logits(compiled):
    x, labels = parameter(random((6, 40), 0)), labels_of((6,), 40)
    logits = made(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (cross_entropy(logits, labels) + cross_entropy(logits, labels)).sum().backward()


@pytest.mark.parametrize("use", ["saved its output", "saved its input"])
def test_other_operation_that_needs_the_logits(compiled, use):
    x, labels = parameter(random((6, 40), 0)), labels_of((6,), 40)
    logits = paddle.tanh(x) if use == "saved its output" else made(x)
    loss = cross_entropy(logits, labels).sum()
    if use == "saved its input":
        loss = loss + (logits * logits).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_not_in_place_allows_all_of_it(each_backend):
    labels = labels_of((6,), 40)

    def twice(function):
        def call(x):
            logits = paddle.tanh(x)
            return function(logits, labels) + function(logits, labels)

        return call

    ours = twice(lambda x, y: cross_entropy(x, y, inplace_backward=False))
    check_against_reference(ours, twice(cross_entropy_reference), [random((6, 40), 0)])
