"""What is said when memory is exhausted, for each form in which the error arrives."""

from __future__ import annotations

import pytest

from pypkg.console.command_line import exit_code
from pypkg.console.troubleshooting import kinds_of
from pypkg.errors import UserError, memory_shortage
from pypkg.training.evaluator import evaluation_memory

_FRAMES = """

--------------------------------------
C++ Traceback (most recent call last):
--------------------------------------
0   float* phi::DeviceContext::Alloc<float>(phi::TensorBase*, unsigned long, bool) const

----------------------
Error Message Summary:
----------------------
"""
# As paddle/phi/core/memory/allocation/cuda_allocator.cc of Paddle writes it (commit 4fd9ccecfe99).
_GPU = (
    _FRAMES
    + """ResourceExhaustedError: 

Out of memory error on GPU 0. Cannot allocate 2.0GB memory on GPU 0, 78.5GB memory has been \
allocated and available memory is only 0.6GB.

Please check whether there is any other process using GPU 0.
1. If yes, please stop them, or start PaddlePaddle on another GPU.
 (at ../paddle/phi/core/memory/allocation/cuda_allocator.cc:86)
"""  # noqa: W291
)
_CPU = _FRAMES + (
    "ResourceExhaustedError: a CPU tensor of 512 bytes does not fit into the memory of this "
    "process. (at /somewhere/csrc/paddle/cpu_allocator.cc:35)\n"
)
_GPU_SENTENCE = (
    "Out of memory error on GPU 0. Cannot allocate 2.0GB memory on GPU 0, 78.5GB memory has been "
    "allocated and available memory is only 0.6GB"
)
_CPU_SENTENCE = "a CPU tensor of 512 bytes does not fit into the memory of this process"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(_GPU), _GPU_SENTENCE),
        (MemoryError(_CPU), _CPU_SENTENCE),
        (OSError(f"(External) MemoryError: {_CPU}"), _CPU_SENTENCE),  # from a backward pass
        (MemoryError(), "the process was refused more"),
        (MemoryError("Unable to allocate 1.00 TiB for an array"), "Unable to allocate 1.00 TiB"),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
        (OSError("(External) CUDA error(2), out of memory. "), "CUDA error(2), out of memory"),
        (OSError("(External) CUBLAS error(3). 'CUBLAS_STATUS_ALLOC_FAILED'."), "ALLOC_FAILED"),
    ],
)
def test_memory_shortage_is_one_line_with_cause_and_way_out(error, cause):
    told = str(memory_shortage(error, "Use less"))
    assert told.startswith("memory is exhausted: ") and told.endswith(". Use less")
    assert cause in told and "\n" not in told and ".." not in told
    assert [kind.title for kind in kinds_of(told)] == ["Memory is exhausted"]


@pytest.mark.parametrize("error", [ValueError("of a shape"), OSError(28, "No space left")])
def test_other_errors_are_none_of_memory(error):
    assert memory_shortage(error, "Use less") is None


def test_an_evaluation_names_its_own_setting():
    told = "Lower per_device_eval_batch_size, which is 64"
    with pytest.raises(UserError, match=told), evaluation_memory(64):
        raise MemoryError(_GPU)
    with pytest.raises(ValueError, match="of a shape"), evaluation_memory(64):
        raise ValueError("of a shape")


def test_every_command_ends_with_code_2(capsys):
    def fails() -> int:
        raise MemoryError(_GPU)

    assert exit_code(fails, "interrupted") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: memory is exhausted: {_GPU_SENTENCE}. ")
    assert told.endswith("#memory-is-exhausted\n") and "Traceback" not in told
