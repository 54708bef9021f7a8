"""Messages about a process that was killed."""

from __future__ import annotations

import signal

import pytest

from pypkg.parallel.launch import kills


@pytest.fixture
def counters(tmp_path, monkeypatch):
    """The file in which the kernel counts, as of a machine of the test's own."""
    file = tmp_path / "vmstat"
    monkeypatch.setattr(kills, "_COUNTERS", file)
    return file


def test_the_kernel_has_killed(counters):
    counters.write_text("nr_free_pages 7\noom_kill 4\noom_kill_other 9\n")
    before = kills.out_of_memory_kills()
    counters.write_text("nr_free_pages 7\noom_kill 6\noom_kill_other 9\n")
    said = kills.describe(signal.SIGKILL, before)
    assert said.startswith("SIGKILL. The kernel has ended 2 of the processes")
    assert "per_device_train_batch_size" in said


@pytest.mark.parametrize("content", [None, "oom_kill", "nr_free_pages 7\n", "oom_kill 4\n"])
def test_somebody_has_killed(counters, content):
    """Or the kernel does not tell."""
    if content is not None:
        counters.write_text(content)
    said = kills.describe(signal.SIGKILL, kills.out_of_memory_kills())
    assert "leaves no message" in said and "dmesg" in said and "has ended" not in said


@pytest.mark.parametrize(("number", "name"), [(11, "SIGSEGV"), (6, "SIGABRT"), (50, "signal 50")])
def test_other_signals_have_no_such_reason(number, name):
    assert kills.describe(number, 0) == name


@pytest.mark.parametrize(
    ("exit_code", "number"), [(137, 9), (247, 9), (139, 11), (0, None), (1, None), (2, None)]
)
def test_signals_in_exit_codes(exit_code, number):
    assert kills.signal_of(exit_code) == number
