"""Workplaces for tests that train."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_testing import Clock, Workplace, counting_documents, write_corpus, write_model


@pytest.fixture
def make_workplace(tmp_path: Path) -> Callable[[str], Workplace]:
    def make(name: str) -> Workplace:
        write_corpus(tmp_path / name / "data" / "corpus", counting_documents())
        write_model(tmp_path / name / "model")
        return Workplace(tmp_path / name)

    return make


@pytest.fixture
def workplace(make_workplace: Callable[[str], Workplace]) -> Workplace:
    return make_workplace("run")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What ``time.perf_counter`` says."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock
