"""tools/faults.py: its runs leave no processes, and its table is complete."""

from __future__ import annotations

import os
from pathlib import Path

import faults
import pytest

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


def fault(old: str) -> faults.Fault:
    return faults.Fault("ops", ["gone.py", "code.py"], old, "", ["tests/old/test_code.py"])


def test_a_fault_that_no_longer_applies_is_named(tmp_path):
    (tmp_path / "code.py").write_text("one\ntwo\ntwo\n")
    (tmp_path / "tests" / "new").mkdir(parents=True)
    (tmp_path / "tests" / "new" / "test_code.py").touch()
    assert fault("one").locate(tmp_path) == (
        tmp_path / "code.py",
        ["tests/new/test_code.py"],
    )
    others = [fault("one"), fault("two"), fault("three")]
    caught = [faults.Result(each.key, "ops", "caught") for each in others]
    page = f"{faults.BEGIN}\n{faults.table(caught, {})}\n{faults.END}"
    assert faults.problems(others, page, tmp_path) == [
        f"the line stands 2 times in code.py: {others[1].key}",
        f"the line stands 0 times in code.py: {others[2].key}",
    ]
    (tmp_path / "tests" / "new" / "test_code.py").unlink()
    assert faults.problems(others[:1], page, tmp_path)[0].startswith("no test file")


def test_only_outputs_at_the_top_are_left_out_of_the_copy(tmp_path):
    for name in ("runs/a", "build/b", "tests/runs/worker.py", "tests/__pycache__/c.pyc"):
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True)
        file.touch()
    copy = faults.Tree(tmp_path / "source", tmp_path / "copy").folder
    files = [each.relative_to(copy) for each in copy.rglob("*") if each.is_file()]
    assert files == [Path("tests/runs/worker.py")]


@pytest.mark.parametrize(("quick", "outcome"), [(False, "caught"), (True, "survived")])
def test_the_quick_tier_has_no_slow_tests(tmp_path, monkeypatch, quick, outcome):
    """A fault whose only tests are slow survives the quick tier, which then has no test to run."""
    expressions = []

    def run(command, *_):
        expressions.append(command[command.index("-m", command.index("-o")) + 1])
        code = 5 if expressions[-1] == "not slow" else 1
        return code, "FAILED tests/new/test_code.py::test_x[a/b c-1] - assert 0"

    monkeypatch.setattr(faults, "run_to_the_end", run)
    (tmp_path / "source").mkdir()
    tree = faults.Tree(tmp_path / "source", tmp_path / "copy", quick)
    assert tree._run(["tests/new/test_code.py"], 1.0) == (outcome, "test_code.py::test_x")
    assert expressions == ["not slow" if quick else "slow or not slow"]


def test_rows_of_the_table_are_kept():
    """Also of faults with the characters that divide a table."""
    results = [
        faults.Result("a.py: x | `y` -> z", "ops", "caught", "test_a.py::test_x"),
        faults.Result("b.py: x -> y", "data", "survived"),
        faults.Result("c.py: x -> y", "data", "no end in 120 s"),
    ]
    before = {faults.cell(results[0].key): "survived"}
    page = f"{faults.BEGIN}\n{faults.table(results, before)}\n{faults.END}"
    rows = faults.rows_of(page)
    assert [(r.room, r.outcome, r.by) for _, r in rows.values()] == [
        (r.room, r.outcome, r.by) for r in results
    ]
    assert [earlier for earlier, _ in rows.values()] == ["survived", "-", "-"]
    assert "1 of 2 (50%) of the faults are caught. Of 1 that were" in page
    assert "| ops | data |" in page and "| 1 of 1 (100%) | 0 of 1 (0%) |" in page


def test_every_fault_applies_and_most_are_caught():
    """One that does not is put at its present line in tools/faults.json, and tried with --new."""
    page = faults.PAGE.read_text(encoding="utf-8")
    known = faults.load_faults()
    assert len({each.key for each in known}) == len(known)
    problems = faults.problems(known, page)
    assert [each for each in problems if not each.startswith("not tried")] == []
    rows = faults.rows_of(page)
    caught = {shown for shown, (_, result) in rows.items() if result.outcome == "caught"}
    assert sum(faults.cell(each.key) in caught for each in known) >= 0.95 * len(known)
