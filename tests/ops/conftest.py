from __future__ import annotations

import paddle
import pytest
import triton_kernels

from pypkg import ops

HAS_TRITON = triton_kernels.installed()
if HAS_TRITON and not paddle.device.get_device().startswith("gpu"):
    with triton_kernels.interpreter():
        from pypkg.ops.triton import kernels  # noqa: F401

BACKENDS = ("compiled", "triton", "reference")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module whose operators have fewer backends names them as BACKENDS."""
    if "each_backend" in metafunc.fixturenames:
        names = getattr(metafunc.module, "BACKENDS", BACKENDS)
        metafunc.parametrize("each_backend", names, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted Triton kernels take long, and other dtypes than float32 only change the casts."""
    for item in items:
        given = getattr(item, "callspec", None)
        if given is None or given.params.get("each_backend") != "triton":
            continue
        if given.params.get("dtype", "float32") != "float32":
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def each_backend(request):
    """Runs a test on every backend; one that is not built is a failure, not a skip."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed; it comes with .[test]")
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend("auto")


@pytest.fixture
def compiled():
    ops.set_backend("compiled")
    yield
    ops.set_backend("auto")
