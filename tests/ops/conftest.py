from __future__ import annotations

import pytest

from pypkg import ops


@pytest.fixture(params=["compiled", "reference"])
def each_backend(request):
    """Runs a test on every backend; one that is not built is a failure, not a skip."""
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend("auto")


@pytest.fixture
def compiled():
    ops.set_backend("compiled")
    yield
    ops.set_backend("auto")
