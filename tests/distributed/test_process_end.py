"""How a rank ends that serves others."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks

WORKER = Path(__file__).with_name("process_end_worker.py")


def test_ranks_may_go_at_any_time():
    run_ranks(WORKER, 4, [0], timeout=60)


def test_exit_code_and_output_stay():
    with pytest.raises(AssertionError, match=r"exit codes \[None, 3, None, None\]") as failure:
        run_ranks(WORKER, 4, [3], timeout=60)
    assert "a line that C holds back" in str(failure.value)
    assert "a line that Python holds back" in str(failure.value)
