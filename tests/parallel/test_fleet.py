"""The schedule that fleet gives for a number of micro batches."""

from __future__ import annotations

import pytest

from pypkg.errors import UserError
from pypkg.parallel import pipeline


class Engine:
    """A schedule of fleet that is made for no micro batches yet."""

    accumulate_steps = 0

    def _init_user_hooks(self) -> None:
        pass


@pytest.fixture
def interleaved(monkeypatch) -> pipeline.Schedule:
    """Of four stages with two model chunks each."""
    monkeypatch.setattr(pipeline, "pipeline_degree", lambda: 4)
    monkeypatch.setattr(pipeline, "virtual_stages", lambda: 2)
    schedule = object.__new__(pipeline.Schedule)
    schedule._engine, schedule._all_forward_first = Engine(), Engine()
    return schedule


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_too_few_micro_batches_for_interleaved_stages_are_refused(interleaved, count):
    with pytest.raises(UserError, match=rf"\({count}\) is too small .* make it 4, or at least 8"):
        interleaved._engine_for(count)


@pytest.mark.parametrize(("count", "all_forward_first"), [(4, True), (8, False), (9, False)])
def test_schedule_of_interleaved_stages(interleaved, count, all_forward_first):
    chosen = interleaved._engine_for(count)
    assert (chosen is interleaved._all_forward_first) == all_forward_first
    assert chosen.accumulate_steps == count
