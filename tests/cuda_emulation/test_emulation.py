"""The test tools themselves: faults in kernels do not go unnoticed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from types import ModuleType

import build_emulated
import checks
import kernel_cases
import numpy as np
import pytest
from guarded_memory import GuardedArray, GuardedBackend

SEEDS = range(4)


def results(
    emulated: ModuleType, fault: str, faulty: bool, seeds: Iterable[int] = SEEDS
) -> list[str]:
    """right, wrong or the error message, by seed."""
    found = []
    for seed in seeds:
        emulated.seed(seed)
        try:
            found.append("right" if emulated.run_with_fault(fault, faulty) else "wrong")
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("fault", ["missing barrier", "missing wait"])
def test_races_give_wrong_results(emulated: ModuleType, fault: str):
    assert results(emulated, fault, faulty=True) == ["wrong"] * len(SEEDS)
    assert results(emulated, fault, faulty=False) == ["right"] * len(SEEDS)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("thread missing at barrier", "deadlock"), ("mixed collectives", "lanes of one warp are at")],
)
def test_divergence_is_reported(emulated: ModuleType, fault: str, message: str):
    assert all(message in result for result in results(emulated, fault, faulty=True))
    assert results(emulated, fault, faulty=False) == ["right"] * len(SEEDS)


def test_blocks_run_at_a_time_and_wait_for_each_other(emulated: ModuleType):
    seeds = range(12)  # with one in three a single block runs at a time
    assert results(emulated, "no wait for the turn", True, seeds).count("wrong") >= 2
    assert results(emulated, "no wait for the turn", False, seeds) == ["right"] * len(seeds)
    never = results(emulated, "turn that never comes", True, seeds)
    assert all("waits for another block in vain" in result for result in never)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("no_wait_for_copies", "wrong|ends with copies under way"),
        ("wrong_parity", "wrong|ends with copies under way|deadlock"),
        ("too_many_bytes", "deadlock"),
        ("no_fence", "without wgmma.fence"),
        ("no_wait_for_products", "wrong"),
        ("misplaced_operand", "does not start with the swizzle's pattern"),
        ("threads_missing", "deadlock"),
    ],
)
def test_faults_in_hopper_instructions_are_noticed(emulated: ModuleType, fault: str, found: str):
    noticed = 0
    for seed in range(8):
        emulated.seed(seed)
        assert emulated.hopper_product_is_right(emulated.HopperFault.none)
        try:
            right = emulated.hopper_product_is_right(getattr(emulated.HopperFault, fault))
            result = "right" if right else "wrong"
        except RuntimeError as error:
            result = str(error)
        noticed += bool(re.search(found, result))
    is_a_race = fault in ("no_wait_for_copies", "wrong_parity")  # copies may come in time
    assert noticed >= (3 if is_a_race else 8)


def test_a_product_of_stores_without_a_fence_is_noticed(emulated: ModuleType):
    for seed in range(8):
        emulated.seed(seed)
        assert emulated.hopper_sum_of_transposed_is_right(emulated.HopperFault.none)
        with pytest.raises(RuntimeError, match=r"reads a store without fence\.proxy\.async"):
            emulated.hopper_sum_of_transposed_is_right(emulated.HopperFault.no_proxy_fence)


def test_access_past_shared_memory_crashes(emulated: ModuleType):
    program = (
        f"import sys; sys.path.insert(0, {str(build_emulated.HERE)!r})\n"
        "import build_emulated\n"
        "build_emulated.load().run_with_fault('shared memory too small', True)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert result.returncode < 0, result.stderr.decode()
    assert results(emulated, "shared memory too small", faulty=False) == ["right"] * len(SEEDS)


def test_access_past_an_array_crashes():
    program = (
        f"import sys; sys.path.insert(0, {str(build_emulated.HERE)!r})\n"
        "import ctypes\n"
        "from guarded_memory import GuardedArray\n"
        "array = GuardedArray((4,), 'float32')\n"
        "ctypes.string_at(array.storage.ctypes.data, 17)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode < 0


def test_write_before_an_array_is_noticed():
    array = GuardedArray((3, 4), "bfloat16").write(np.zeros((3, 4)))
    array._buffer._around[0][-1] = 0
    with pytest.raises(AssertionError, match="wrote before the array"):
        array.numpy()


class _Forgetful:
    """Kernels that leave one row out."""

    def __init__(self, kernels: ModuleType):
        self._kernels = kernels

    def __getattr__(self, name: str):
        return getattr(self._kernels, name)

    def gated_activation_forward(self, gate, up, out, name, stream):
        rows, cols = out.storage.shape
        part = [GuardedArray((rows - 1, cols), out.dtype) for _ in range(3)]
        for source, target in zip((gate, up), part):
            target.storage[...] = source.storage[:-1]
        self._kernels.gated_activation_forward(*part, name, stream=stream)
        out.storage[:-1] = part[2].storage


def test_an_unwritten_row_fails_a_check(emulated: ModuleType):
    case = kernel_cases.gated_activation_case("bfloat16", "silu", 3, 16)
    checks.check(case, GuardedBackend(emulated))
    with pytest.raises(AssertionError, match="out is off by inf"):
        checks.check(case, GuardedBackend(_Forgetful(emulated)))


def test_one_wrong_element_fails_a_comparison():
    expected = np.random.default_rng(0).standard_normal(10_000)
    actual = expected.copy()
    actual[77] += 0.1
    error = checks.Comparison("x", actual, expected, 0).error()
    assert checks.tolerance("bfloat16", 8) < error < 0.1
