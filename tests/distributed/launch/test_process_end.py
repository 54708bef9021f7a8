"""The end of a rank that serves other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks

WORKER = Path(__file__).with_name("process_end_worker.py")


def test_others_may_go_at_any_time_and_exit_code_and_output_stay():
    # A rank that is killed in exit() has another exit code, and the others have ended by then.
    with pytest.raises(AssertionError, match=r"exit codes \[None, 3, None, None\]") as failure:
        run_ranks(WORKER, 4, [3], timeout=60, fork=False)
    assert "a line that C holds back" in str(failure.value)
    assert "a line that Python holds back" in str(failure.value)
