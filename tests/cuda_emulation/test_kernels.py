"""The CUDA kernels' own code, run on the CPU against float64, and the CPU kernels beside it."""

from __future__ import annotations

from types import ModuleType

import checks
import hopper_cases
import kernel_cases
import pytest
from guarded_memory import GuardedArray, GuardedBackend

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


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_random_numbers_have_the_bits_of_the_cpu_kernel(dtype: str, emulated: ModuleType):
    from pypkg import _native

    drawn = []
    for kernels in (emulated, _native):
        out = GuardedArray((5 * 700,), dtype)
        kernels.random_normal(
            out,
            **{"key": 2**63 + 1, "stream_id": 2**40, "deviation": 0.02, "first": 2**37 + 5},
            **{"rows": 5, "cols": 600, "out_stride": 700, "index_stride": 1000},
        )
        drawn.append(out.storage.tobytes())
    assert drawn[0] == drawn[1]
