"""Workplaces for tests that train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_testing import Workplace, counting_documents, write_corpus, write_model


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
