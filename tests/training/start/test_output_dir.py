"""output_dir while a run holds it: what is said when it is removed; one process."""

from __future__ import annotations

import shutil

import pytest

from pypkg.errors import UserError
from pypkg.training.start.output_dir import held_output_dir

FAILURES = [
    UserError("saving checkpoint-4 failed: No such file or directory. Free some space."),
    FileNotFoundError("metrics.jsonl"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=["user", "system"])
def test_a_folder_that_is_gone_is_named_as_the_cause(tmp_path, failure):
    output_dir = tmp_path / "out"
    with (
        pytest.raises(UserError, match="was removed or replaced while the run wrote into it"),
        held_output_dir(output_dir, saves=True),
    ):
        shutil.rmtree(output_dir)
        raise failure


@pytest.mark.parametrize("failure", FAILURES, ids=["user", "system"])
def test_another_failure_stays_what_it_is(tmp_path, failure):
    with pytest.raises(type(failure)) as raised, held_output_dir(tmp_path / "out", saves=True):
        raise failure
    assert raised.value is failure
