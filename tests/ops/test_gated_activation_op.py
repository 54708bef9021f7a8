from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from op_testing import check_against_reference, parameter, random, run

from pypkg.ops import gated_activation_reference, geglu, swiglu

FUNCTIONS = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": lambda gate, up=None: geglu(gate, up, approximate="tanh"),
}
SHAPES = [(1, 1), (1, 760), (3, 1128), (2, 3, 50), (0, 8)]


def formula(name: str, x: float) -> float:
    if name == "silu":
        return x / (1 + math.exp(-x))
    if name == "gelu":
        return x * (1 + math.erf(x / math.sqrt(2))) / 2
    return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_is_the_formula(name):
    gate, up = np.linspace(-6, 6, 41), random((41,), 0)
    expected = [formula(name, x) * u for x, u in zip(gate, up)]
    got = gated_activation_reference(paddle.to_tensor(gate), paddle.to_tensor(up), name)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(each_backend, dtype, name, shape):
    check_against_reference(
        FUNCTIONS[name],
        lambda gate, up: gated_activation_reference(gate, up, name),
        [random(shape, 0, 3.0), random(shape, 1)],
        dtype,
    )


@pytest.mark.parametrize(
    ("name", "gate_first"),
    [("silu", True), ("gelu", True), ("gelu", False), ("gelu_tanh", True), ("gelu_tanh", False)],
)
def test_packed(each_backend, name, gate_first):
    approximate = "tanh" if name == "gelu_tanh" else "none"

    def packed(both):
        return swiglu(both) if name == "silu" else geglu(both, None, approximate, gate_first)

    def unpacked(both):
        halves = paddle.split(both, 2, axis=-1)
        return gated_activation_reference(*(halves if gate_first else halves[::-1]), name)

    check_against_reference(packed, unpacked, [random((2, 3, 2 * 37), 0, 2.0)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_far_from_zero(each_backend, name):
    """Where the activation is flat or the identity, and its exponentials overflow."""
    gate = parameter(np.array([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4]))
    up = parameter(np.full(6, 2.0))
    (out,), (dgate, dup) = run(FUNCTIONS[name], [gate, up])
    np.testing.assert_allclose(out, [0, 0, 0, 180, 400, 2e4], rtol=1e-6, atol=1e-30)
    assert np.isfinite(dgate).all() and np.isfinite(dup).all()


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input(each_backend, wanted):
    """The other is a constant, which must get none."""
    inputs = [parameter(random((3, 5), i)) for i in range(2)]
    inputs[1 - wanted].stop_gradient = True
    swiglu(*inputs).sum().backward()
    assert inputs[wanted].grad is not None
    assert inputs[1 - wanted].grad is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: swiglu(paddle.ones([2, 3])), ValueError, "swiglu: .* even .*, got shape .2, 3."),
        (
            lambda: swiglu(paddle.ones([2, 4]), paddle.ones([2, 2])),
            ValueError,
            r"swiglu: up must have shape \[2, 4\], got \[2, 2\]",
        ),
        (
            lambda: geglu(paddle.ones([2, 4]), paddle.ones([2, 4], "bfloat16")),
            TypeError,
            "geglu: up must be float32, got bfloat16",
        ),
        (lambda: geglu(paddle.ones([2, 4]), approximate="erf"), ValueError, "approximate .*'erf'"),
    ],
)
def test_wrong_inputs(each_backend, call, error, message):
    with pytest.raises(error, match=message):
        call()
