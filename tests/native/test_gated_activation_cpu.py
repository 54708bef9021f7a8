from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_testing import DTYPES, arg, assert_close, load, poisoned, store

from pypkg import _native

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SHAPES = [(1, 1), (1, 760), (3, 1128), (7, 5)]
erfc = np.vectorize(math.erfc)


def activate(name, x):
    """Value and derivative in float64, in forms that do not cancel for negative x."""
    if name == "gelu":
        cdf = 0.5 * erfc(-x / math.sqrt(2))
        return x * cdf, cdf + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    # gelu_tanh is x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
    c = 2 * math.sqrt(2 / math.pi)
    inner, slope = (
        (x, 1.0) if name == "silu" else (c * (x + 0.044715 * x**3), c * (1 + 0.134145 * x**2))
    )
    s = np.exp(-np.logaddexp(0, -inner))
    return x * s, s + x * s * (1 - s) * slope


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(rng, activation, dtype, shape):
    gate, up, dout = (store(rng.normal(0, 3, shape), dtype) for _ in range(3))
    out, dgate, dup = (poisoned(shape, dtype) for _ in range(3))
    _native.gated_activation_forward(arg(gate), arg(up), arg(out), activation)
    value, slope = activate(activation, load(gate))
    assert_close(out, value * load(up))
    _native.gated_activation_backward(
        arg(gate), arg(up), arg(dout), arg(dgate), arg(dup), activation
    )
    assert_close(dgate, load(dout) * load(up) * slope)
    assert_close(dup, load(dout) * value)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wide_range_of_gates(activation):
    """Both tails: the value there is relatively accurate until it falls below 1e-35."""
    gate = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -90.0, 90.0, 1e4, 0.0]])
    gate = store(gate[None, :], "float32")
    out = poisoned(gate.shape)
    _native.gated_activation_forward(gate, np.ones_like(gate), out, activation)
    expected, _ = activate(activation, load(gate))
    # The exponent of e^u rounds as u does: u * 2^-24 relative, u up to 100 (silu: 12).
    np.testing.assert_allclose(load(out), expected, rtol=2e-5, atol=1e-35)


@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_of_a_packed_matrix(rng, gate_first):
    rows, cols = 4, 40
    packed = store(rng.normal(size=(rows, 2 * cols)), "float32")
    halves = packed[:, :cols], packed[:, cols:]
    gate, up = halves if gate_first else halves[::-1]
    dout = store(rng.normal(size=(rows, cols)), "float32")
    value, slope = activate("silu", load(gate))
    expected_dgate, expected_dup = load(dout) * load(up) * slope, load(dout) * value
    out = poisoned((rows, cols))
    _native.gated_activation_forward(gate, up, out)
    assert_close(out, value * load(up))
    # The gradients may take the place of gate and up.
    _native.gated_activation_backward(gate, up, dout, gate, up)
    assert_close(gate, expected_dgate)
    assert_close(up, expected_dup)


def test_threads_do_not_matter(rng, every_thread_count):
    gate, up = (store(rng.normal(size=(9, 100)), "float32") for _ in range(2))
    outputs = []
    for count in every_thread_count:
        _native.set_num_threads(count)
        outputs.append(poisoned(gate.shape))
        _native.gated_activation_forward(gate, up, outputs[-1], "gelu")
    assert all(np.array_equal(outputs[0], other) for other in outputs[1:])


def test_bad_arguments():
    x = np.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match="silu, gelu or gelu_tanh, got relu"):
        _native.gated_activation_forward(x, x, x.copy(), "relu")
    wide = np.ones((2, 16), np.float32)
    with pytest.raises(ValueError, match="strided like gate and up"):
        _native.gated_activation_backward(wide[:, :8], wide[:, 8:], x, x.copy(), x.copy())
