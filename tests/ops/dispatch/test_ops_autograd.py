"""Rules of Paddle's autograd that every operator must follow."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from op_testing import as_float64, assert_close, parameter, random
from paddle.distributed.fleet.utils import recompute

from pypkg import ops

COS, SIN = (paddle.to_tensor(random((6, 4), seed).astype("float32")) for seed in (50, 51))
LABELS = paddle.to_tensor([[1, 0, 31], [-100, 7, 2]])

# Every operator as a function of float tensors alone, and the shapes of these.
CASES = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w), [(2, 3, 32), (32,)]),
    "rms_norm with residual": (
        lambda x, w, r: sum(ops.rms_norm(x, w, 1e-6, r)),
        [(2, 3, 32), (32,), (2, 3, 32)],
    ),
    "rotary_embedding": (
        lambda q, k: sum(ops.rotary_embedding(q, k, COS, SIN)),
        [(2, 6, 4, 8), (2, 6, 4, 8)],
    ),
    "swiglu": (ops.swiglu, [(2, 3, 32), (2, 3, 32)]),
    "packed geglu": (ops.geglu, [(2, 3, 32)]),
    "flash_attention": (ops.flash_attention, [(2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)]),
    "padded flash_attention": (ops.flash_attention, [(2, 6, 4, 5), (2, 6, 2, 5), (2, 6, 2, 5)]),
    "cross_entropy": (lambda x: ops.cross_entropy(x * 1.0, LABELS), [(2, 3, 32)]),
    "linear_cross_entropy": (
        lambda h, w: ops.linear_cross_entropy(h, w, LABELS),
        [(2, 3, 8), (32, 8)],
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def inputs_of(name: str) -> list[paddle.Tensor]:
    return [parameter(random(shape, i)) for i, shape in enumerate(CASES[name][1])]


def gradients(function, inputs: list[paddle.Tensor]) -> list[np.ndarray]:
    for each in inputs:
        each.clear_gradient(set_to_zero=False)
    out = function(*inputs)
    cotangent = paddle.to_tensor(random(out.shape, 77).astype("float32"))
    (out * cotangent).sum().backward()
    return [as_float64(each.grad) for each in inputs]


def assert_same_gradients(name: str, function, inputs: list[paddle.Tensor]) -> None:
    expected = gradients(CASES[name][0], inputs_of(name))
    for i, (got, want) in enumerate(zip(gradients(function, inputs), expected)):
        assert_close(got, want, 1e-6, f"gradient of input {i}")


@each_case
def test_no_grad_records_nothing(each_backend, name):
    inputs = inputs_of(name)
    with paddle.no_grad():
        out = CASES[name][0](*inputs)
    assert out.stop_gradient
    # Paddle gives outputs of custom operators the node of a leaf, which holds no input.
    node = out.grad_fn
    assert node is None or node.name() == "GradNodeAccumulation"


@each_case
def test_no_grad_changes_no_value(each_backend, name):
    inputs = inputs_of(name)
    expected = CASES[name][0](*inputs).numpy()
    with paddle.no_grad():
        np.testing.assert_array_equal(CASES[name][0](*inputs).numpy(), expected)


@each_case
def test_constants_get_no_gradient(each_backend, name):
    inputs = inputs_of(name)
    for each in inputs:
        each.stop_gradient = True
    assert CASES[name][0](*inputs).stop_gradient


@each_case
def test_recompute(each_backend, name):
    assert_same_gradients(name, lambda *x: recompute(CASES[name][0], *x), inputs_of(name))


@each_case
def test_inputs_used_twice(each_backend, name):
    """Calling the operator twice on the same tensors doubles their gradients."""
    inputs = inputs_of(name)
    twice = gradients(lambda *x: CASES[name][0](*x) + CASES[name][0](*x), inputs)
    once = gradients(CASES[name][0], inputs)
    for i, (got, want) in enumerate(zip(twice, once)):
        assert_close(got, 2 * want, 1e-6, f"gradient of input {i}")


@each_case
def test_inputs_that_are_not_contiguous(each_backend, name):
    def turned(x):  # the same values, last dimension first in memory
        order = [*range(1, x.ndim), 0]
        back = list(np.argsort(order))
        return x.transpose(order).contiguous().transpose(back)

    def function(*inputs):
        views = [turned(each) if each.ndim > 1 else each for each in inputs]
        assert not all(view.is_contiguous() for view in views)
        return CASES[name][0](*views)

    assert_same_gradients(name, function, inputs_of(name))


@each_case
def test_gradient_that_is_not_contiguous(each_backend, name):
    """Backward through a transposition hands the operator a strided gradient."""

    def function(*inputs):
        out = CASES[name][0](*inputs)
        order = list(range(out.ndim))[::-1]
        return (out.transpose(order) * 1.0).transpose(order)

    assert_same_gradients(name, function, inputs_of(name))


# Padding ends in a slice, on which Paddle itself ends the process here.
@pytest.mark.parametrize("name", [name for name in CASES if name != "padded flash_attention"])
def test_consumer_without_gradient(compiled, name):
    """An operation that gives back no gradient at all is a gradient of zero, not a crash."""

    class Cut(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dx):
            return None

    inputs = inputs_of(name)
    Cut.apply(CASES[name][0](*inputs)).sum().backward()
    for each in inputs:
        assert each.grad is None or (each.grad.numpy() == 0).all()


def static_rms_norm(x, w):
    return ops.rms_norm(x, w)


def static_rms_norm_with_residual(x, w, r):
    y, h = ops.rms_norm(x, w, 1e-6, r)
    return y + h


def static_rotary_embedding(q, k):
    q_out, k_out = ops.rotary_embedding(q, k, COS, SIN)
    return q_out + k_out


def static_rotary_embedding_apart(q, k):
    """Each call uses one output alone."""
    q_out = ops.rotary_embedding(q, None, COS, SIN)[0]
    k_out = ops.rotary_embedding(q, k, COS, SIN)[1]
    return q_out + k_out


def static_geglu(x):
    return ops.geglu(x)


def static_swiglu(gate, up):
    return ops.swiglu(gate, up)


def static_flash_attention(q, k, v):
    return ops.flash_attention(q, k, v)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("rms_norm", static_rms_norm),
        ("rms_norm with residual", static_rms_norm_with_residual),
        ("rotary_embedding", static_rotary_embedding),
        ("rotary_embedding", static_rotary_embedding_apart),
        ("packed geglu", static_geglu),
        ("swiglu", static_swiglu),
        ("flash_attention", static_flash_attention),
    ],
)
def test_to_static(compiled, name, function):
    """Shapes and dtypes are inferred for the static graph, and its gradient is the same."""
    static = paddle.jit.to_static(function, full_graph=True)
    assert_same_gradients(name, static, inputs_of(name))
