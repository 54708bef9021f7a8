"""Long phases of a run say that they get on, item by item: the hang limit counts from there."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from training_testing import Workplace

from pypkg.config import load_settings
from pypkg.console import progress
from pypkg.parallel.launch import watchdog
from pypkg.training import run

# Of a run with two layers, and of one that goes on from its checkpoint.
ITEMS = [
    r"drawing layers\.[01]\.mlp\.down_proj\.weight",
    r"index maps: order of \d+ documents",
    r"index maps: beginnings of \d+ samples",
    r"writing \w+_doc_idx\.npy",
    r"reading \w+_shuffle_idx\.npy",
    r"batch [12] of the evaluation",
    r"writing model\.safetensors",
    r"writing optimizer\.safetensors",
    r"bringing optimizer\.safetensors to the disk",
    r"reading model\.safetensors",
    r"reading layers\.[01]\.mlp\.down_proj\.weight",
]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What this process reports, as its watchdog hears it in a run of several ranks."""
    reports: list[str] = []
    monkeypatch.setattr(watchdog, "at", lambda _, operation: reports.append(operation))
    progress.listen(reports.append)
    yield reports
    progress.listen(None)


def test_each_item_of_a_long_phase_is_reported(
    workplace: Workplace, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_peak", lambda _: None)  # seconds, for a number in the log
    monkeypatch.setattr(run, "report_outcome", lambda *_, **__: None)
    for steps in (2, 3):
        words = workplace.command(max_steps=steps, save_steps=2, decay_steps=9)[3:]
        assert run.run(load_settings(words)) == 0
    silent = [item for item in ITEMS if not any(re.fullmatch(item, each) for each in told)]
    assert silent == []
