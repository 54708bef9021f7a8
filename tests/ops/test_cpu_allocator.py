"""Memory of CPU tensors, which the compiled library takes from malloc instead of Paddle."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from paddle.base import core

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.skipif(paddle.device.get_device() != "cpu", reason="tensors are on a GPU here"),
]

_ELEMENTS = 16_411
# In a process of its own, whose heap has no other holes. 20 MiB are allocated, and each second
# tensor is freed and allocated anew, ten times.
_HEAP_GROWTH = """
from pypkg.device.threads import configure_cpu
configure_cpu(1)
import paddle
from pypkg import ops

def highest():
    return max(each.data_ptr() for each in tensors)

ops.set_backend("compiled")
tensors = [paddle.empty([65536]) for _ in range(80)]
before = highest()
for _ in range(10):
    del tensors[1::2]
    tensors = [each for old in tensors for each in (old, paddle.empty([65536]))]
print(highest() - before)
"""


def blocks(count: int) -> list[paddle.Tensor]:
    return [paddle.empty([_ELEMENTS]) for _ in range(count)]


def allocated() -> int:
    gc.collect()
    return core.host_memory_stat_current_value("Allocated", 0)


def test_freed_memory_fits_a_tensor_of_the_same_size():
    """With Paddle's own allocator many do not fit, and the heap grows by a fifth."""
    command = [sys.executable, "-c", _HEAP_GROWTH]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(answer.stdout.splitlines()[-1]) < 2**20


@pytest.mark.parametrize("elements", [1, 15, 16, 17, _ELEMENTS])
def test_tensors_begin_at_a_cache_line_and_hold_their_values(elements):
    tensors = [paddle.full([elements], float(i)) for i in range(20)]
    assert all(each.data_ptr() % 64 == 0 for each in tensors)
    for i, each in enumerate(tensors):
        np.testing.assert_array_equal(each.numpy(), np.full([elements], float(i), "float32"))


def test_paddle_still_counts_the_memory_of_tensors():
    before = allocated()
    held = blocks(8)
    assert allocated() - before == 8 * _ELEMENTS * 4
    del held
    assert allocated() == before


def test_threads_allocate_and_free_at_once():
    def work(seed: int) -> bool:
        held: list[paddle.Tensor] = []
        for i in range(200):
            held.append(paddle.full([(seed * 977 + i * 131) % 5000 + 1], float(i)))
            held = held[-5:]
        return all(bool((each == each[0]).all()) for each in held)

    before = allocated()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert allocated() == before


def test_too_large_a_tensor_is_an_error_with_its_size():
    size = 2**56
    with pytest.raises(MemoryError, match=str(size)):
        paddle.empty([size], "uint8")
