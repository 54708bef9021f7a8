"""tools/faults.py ends a run that a fault makes endless, and all processes that it has started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import faults

# A process in a session of its own, like a rank of a test; its parent goes on or ends at once.
LEAVES_A_RANK = 'setsid sleep 600 & echo $!; exec sleep "$0"'


def run(tmp_path: Path, pause: float, limit: float) -> tuple[int | None, int]:
    command = ["sh", "-c", LEAVES_A_RANK, str(pause)]
    code, output = faults.run_to_the_end(command, tmp_path, os.environ, limit)
    return code, int(output)


def test_a_run_without_end_is_ended_with_its_ranks(tmp_path):
    code, rank = run(tmp_path, pause=600, limit=1.5)
    assert code is None
    assert not Path(f"/proc/{rank}").exists()


def test_ranks_that_outlive_their_run_are_ended(tmp_path):
    code, rank = run(tmp_path, pause=0, limit=600)
    assert code == 0
    assert not Path(f"/proc/{rank}").exists()
