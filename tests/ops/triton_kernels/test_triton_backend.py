"""The Triton backend: everything but values and gradients, which the operators' tests check."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from op_testing import as_float64, parameter, random

from pypkg import ops
from pypkg.errors import UserError

pytest.importorskip("triton", reason="triton is not installed; it comes with .[test]")

from pypkg.ops.dispatch import triton_operators
from pypkg.ops.triton import kernels, launch, rms_norm


@pytest.fixture(autouse=True)
def backend():
    ops.set_backend("triton")
    yield
    ops.set_backend("auto")


@pytest.mark.parametrize("first", [0, 1])
def test_a_second_backward_is_refused(first):
    """Paddle would end the process in it."""
    x, weight, residual = (parameter(random(shape, 0)) for shape in ((3, 8), (8,), (3, 8)))
    results = ops.rms_norm(x, weight, 1e-6, residual)
    results[first].sum().backward(retain_graph=True)
    with pytest.raises(OSError, match="backward ran through this result before"):
        results[1 - first].sum().backward()


def test_one_backward_through_two_outputs():
    x, weight, residual = (parameter(random(shape, 0)) for shape in ((3, 8), (8,), (3, 8)))
    paddle.autograd.backward(list(ops.rms_norm(x, weight, 1e-6, residual)))
    assert np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize("wanted", [[True, False], [False, True]])
@pytest.mark.parametrize("op", [ops.rms_norm, ops.swiglu])
def test_an_input_without_gradient(op, wanted):
    shapes = [(3, 8), (8,) if op is ops.rms_norm else (3, 8)]
    inputs = [parameter(random(shape, i)) for i, shape in enumerate(shapes)]
    everything = [as_float64(each) for each in paddle.grad(op(*inputs).sum(), inputs)]
    for each, want in zip(inputs, wanted):
        each.stop_gradient = not want
    op(*inputs).sum().backward()
    for each, want, expected in zip(inputs, wanted, everything):
        assert (each.grad is not None) == want
        if want:
            np.testing.assert_array_equal(as_float64(each.grad), expected)


def test_gradient_takes_the_place_of_logits_where_they_are_ours():
    logits, labels = paddle.randn([4, 30]), paddle.to_tensor([1, 2, -100, 29])
    lse, ones = paddle.logsumexp(logits, axis=-1), paddle.ones([4])
    for inplace in (False, True):
        gradient = triton_operators.cross_entropy_gradient(
            logits, labels, lse, ones, 0, -100, inplace
        )
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace


def test_cross_entropy_leaves_logits_alone():
    x = parameter(random((4, 30), 0))
    logits = x * 1.0
    before = logits.numpy().copy()
    ops.cross_entropy(logits, paddle.to_tensor([1, 2, -100, 29])).sum().backward()
    np.testing.assert_array_equal(logits.numpy(), before)


def test_rows_that_no_program_can_hold():
    x = paddle.zeros([1, rms_norm.MAX_COLS + 1])
    with pytest.raises(ValueError, match=r"rows of up to 65536 elements, got 65537"):
        ops.rms_norm(x, paddle.ones([rms_norm.MAX_COLS + 1]))


def test_long_rows():
    """Beyond 8192 the backward kernel reads its inputs twice."""
    rows, cols = 3, 9000
    x, weight = parameter(random((rows, cols), 0)), parameter(random((cols,), 1))
    exact = [parameter(as_float64(each), "float64") for each in (x, weight)]
    for inputs, function in (((x, weight), ops.rms_norm), (exact, ops.rms_norm_reference)):
        (function(*inputs) * paddle.ones([rows, cols])).sum().backward()
    np.testing.assert_allclose(as_float64(x.grad), as_float64(exact[0].grad), atol=1e-5)
    np.testing.assert_allclose(as_float64(weight.grad), as_float64(exact[1].grad), atol=1e-5)


def static_swiglu(x):
    return ops.swiglu(x)


def test_static_graphs_are_refused():
    static = paddle.jit.to_static(static_swiglu, full_graph=True)
    with pytest.raises(UserError, match="dynamic graphs only"):
        static(paddle.ones([2, 8]))


def test_kernels_have_the_signatures_of_the_compiled_ones():
    """They are exchanged for each other in checks and benchmarks."""
    import inspect
    import re

    from pypkg import _native

    for name in kernels.__all__:
        native = getattr(_native, name).__doc__.splitlines()[0]
        names = re.findall(r"(?:\(|, )(\*|\w+)(?=[:,)=])", native)
        ours = inspect.signature(getattr(kernels, name))
        # Only compiled operators read packed rows.
        wanted = [each for each in names if each not in ("*", "q_stride")]
        assert list(ours.parameters) == wanted, name


def test_a_launch_goes_to_the_stream_it_is_given(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 1))
    used = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **settings: used.append(driver.active.get_current_stream(0))

    monkeypatch.setattr(launch, "driver", driver)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for stream in (None, 77):
        launch.launch(Kernel(), (1,), stream=stream)
    assert used == [1, 77] and driver.active.get_current_stream(0) == 1

    class Failing(Kernel):
        def __getitem__(self, grid):
            raise RuntimeError("out of resources")

    with pytest.raises(RuntimeError):
        launch.launch(Failing(), (1,), stream=77)
    assert driver.active.get_current_stream(0) == 1
    launch.launch(Failing(), (0, 5), stream=None)  # an empty grid starts nothing
