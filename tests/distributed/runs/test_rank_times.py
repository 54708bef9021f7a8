"""skip_profile_timer false: a table of every rank's time and traffic at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_testing import run_ranks
from training_testing import Workplace, small_workplace

from pypkg.training.step.rank_times import Times, table

PRETRAIN = Path(__file__).with_name("pretrain_worker.py")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return small_workplace(tmp_path)


def run(workplace: Workplace, nproc: int, **settings: object) -> list[str]:
    """What each rank writes."""
    given = {"max_steps": 5, "eval_steps": 5, "save_steps": 5, "num_threads": 1, **settings}
    if nproc == 1:
        result = workplace.run(**given)
        assert result.returncode == 0, result.stderr[-3000:]
        return [result.stdout]
    arguments = workplace.command(**given)[3:]
    assert run_ranks(PRETRAIN, nproc, arguments, logs=workplace.folder) == [0] * nproc
    return [(workplace.folder / f"{rank}.log").read_text() for rank in range(nproc)]


def rows_of(output: str) -> list[dict[str, float]]:
    """The table in ``output``: by column, in seconds and bytes."""
    _, header, *rest = output[output.index("ranks: ") :].splitlines()
    columns = header.replace("peak memory", "peak_memory").split()
    rows = []
    for line in rest:
        words = line.replace(",", "").split()
        if not words or not words[0].isdigit():
            break
        values = []
        for word in words:
            if word in UNITS:
                values[-1] *= UNITS[word]
            elif word != "s":
                values.append(float(word))
        rows.append(dict(zip(columns, values, strict=True)))
    return rows


def test_table_of_two_stages(workplace):
    output, other = run(
        workplace, 2, pipeline_parallel_degree=2, skip_profile_timer=False, logging_steps=5
    )
    rows = rows_of(output)
    assert [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        parts = [row[name] for name in ("compute", "communication", "data", "stages")]
        assert all(part > 0 for part in parts), row
        assert sum(parts) == pytest.approx(row["step"], abs=3e-4)
        # Two micro batches of two rows of 16 tokens in a step; both ranks train on them.
        assert row["tokens/s"] == pytest.approx(2 * 2 * 16 / 2 / row["step"], rel=0.02)
        assert row["peak_memory"] > 50 * 2**20
        assert row["world"] == 4  # the gradient norm
    # Of each micro batch: activations of 32 features and the tokens one way, gradients the other;
    # the loss and its dtype.
    tokens, loss = 2 * 16, 4 + 8
    for row, bytes_of_token in zip(rows, (32 * 4 + 8, 32 * 4), strict=True):
        assert row["pipeline"] == pytest.approx(2 * tokens * bytes_of_token + loss, rel=1e-3)
    assert output.count("ranks: ") == 1 and "ranks: " not in other


def test_table_of_one_process(workplace):
    (output,) = run(workplace, 1, skip_profile_timer=False)
    (row,) = rows_of(output)
    assert set(row) == {
        "rank", "peak_memory", "tokens/s", "step", "compute", "communication", "data",
    }  # fmt: skip
    assert row["communication"] == 0
    assert row["compute"] + row["data"] == pytest.approx(row["step"], abs=2e-4)


def test_no_table_unless_asked_for(workplace):
    assert "ranks: " not in run(workplace, 1)[0]


def test_losses_are_the_same(workplace, tmp_path):
    run(workplace, 1)
    plain = workplace.losses()
    run(workplace, 1, skip_profile_timer=False, overwrite_output_dir=True)
    assert workplace.losses() == plain


def test_columns_are_those_that_any_rank_has():
    quiet = Times(steps=2, tokens=200, seconds=1.0, data=0.5)
    busy = Times(steps=2, tokens=200, seconds=1.0, stages=0.25, sent={"tensor": 3 * 2**20})
    rows = rows_of(table([quiet, busy]))
    assert rows[0] == {
        "rank": 0, "peak_memory": 0, "tokens/s": 100, "step": 0.5, "compute": 0.25,
        "communication": 0, "data": 0.25, "stages": 0, "tensor": 0,
    }  # fmt: skip
    assert rows[1]["tensor"] == 1.5 * 2**20 and rows[1]["compute"] == 0.375
