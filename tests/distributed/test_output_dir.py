"""The output folder of a run is the same on all machines, or the run says so at its start."""

from __future__ import annotations

from pathlib import Path

from distributed_testing import run_ranks

WORKER = Path(__file__).parent / "workers" / "output_dir_worker.py"


def test_one_folder(tmp_path):
    assert run_ranks(WORKER, 2, [tmp_path / "out", tmp_path / "out"]) == ["", ""]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_of_its_own(tmp_path):
    """On every rank the message names the one that sees another folder, or none."""
    (tmp_path / "other").mkdir()
    folders = [tmp_path / "out", tmp_path / "out", tmp_path / "other", tmp_path / "missing"]
    for said in run_ranks(WORKER, 4, folders):
        assert "is not the same folder on all machines" in said
        assert "ranks 2 and 3 cannot see what rank 0 writes there" in said
        assert "all machines share" in said
    assert list((tmp_path / "out").iterdir()) == []
