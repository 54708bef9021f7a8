"""The Triton kernels, interpreted, against float64: the checks that every other kernel passes.

Arrays end before an inaccessible page and lie among canaries, so that masks are tested too.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed; it comes with .[test]")

import checks
import kernel_cases
from guarded_memory import GuardedArray, GuardedBackend

from pypkg.ops.triton import kernels, launch

CASES = [
    case for case in kernel_cases.small_cases() if case.operation not in kernel_cases.WITHOUT_TRITON
]

pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED, reason="there is a GPU: `make gpu-check` checks the kernels on it"
)


class Tensor:
    """A GuardedArray with the few attributes of a tensor that the kernels ask for."""

    def __init__(self, array: GuardedArray):
        self._storage = array.storage
        self.dtype, self.shape = array.dtype, array.storage.shape

    def data_ptr(self) -> int:
        return self._storage.ctypes.data

    def stride(self, dim: int) -> int:
        return self._storage.strides[dim] // self._storage.itemsize


class OnGuardedArrays:
    """The kernels, on GuardedArrays."""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            def tensor(value: Any) -> Any:
                return Tensor(value) if isinstance(value, GuardedArray) else value

            named = {key: tensor(value) for key, value in settings.items()}
            return getattr(kernels, name)(*map(tensor, arguments), **named)

        return call


def by_tier(case: checks.Case):
    """float16 and bfloat16 differ in the casts alone."""
    marks = pytest.mark.slow if case.dtype == "float16" else ()
    return pytest.param(case, id=str(case), marks=marks)


@pytest.mark.parametrize("case", map(by_tier, CASES))
def test_kernels_agree_with_float64(case: checks.Case):
    checks.check(case, GuardedBackend(OnGuardedArrays()))
