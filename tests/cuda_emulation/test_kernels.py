"""The CUDA kernels' own code, run on the CPU against float64, and the CPU kernels beside it."""

from __future__ import annotations

from types import ModuleType

import checks
import hopper_cases
import kernel_cases
import pytest
from guarded_memory import GuardedBackend

CASES = kernel_cases.small_cases()
HOPPER_BACKWARD = [
    "flash_attention_backward (Hopper, dk and dv)",
    "flash_attention_backward (Hopper, dq)",
]


def operations(emulated: ModuleType) -> list[str]:
    """What was launched since the last call."""
    return [launch.partition(" on shape")[0] for launch in emulated.take_launches()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_cuda_kernels_agree_with_float64(case: checks.Case, emulated: ModuleType):
    emulated.seed(1)
    checks.check(case, GuardedBackend(emulated))


@pytest.mark.parametrize("case", hopper_cases.small_cases(), ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_emulated_hopper_kernels_agree_with_float64(
    case: checks.Case, emulated: ModuleType, seed: int
):
    emulated.take_launches()
    emulated.seed(seed)
    checks.check(case, GuardedBackend(emulated))
    assert operations(emulated) == [
        "flash_attention_forward (Hopper)",
        *2 * ["flash_attention_backward (delta)", *HOPPER_BACKWARD],
    ]


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype in checks.CPU_DTYPES], ids=str)
def test_cpu_kernels_agree_with_float64(case: checks.Case):
    from pypkg import _native

    checks.check(case, GuardedBackend(_native))
