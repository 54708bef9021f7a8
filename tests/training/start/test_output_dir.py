"""All ranks see output_dir, or the run ends at its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.training.start import output_dir
from pypkg.training.start.output_dir import prepare_shared_output_dir


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process is rank 1; rank 0 is played in the folder that is returned."""
    folder = tmp_path / "of_rank_0"
    grid = mesh.Mesh(mesh.Degrees(data=2), rank=1, data=object())
    monkeypatch.setattr(output_dir.mesh, "current", lambda: grid)
    original = output_dir.Path

    def from_first_rank(make: Callable[[], Any]) -> Any:
        with monkeypatch.context() as played:
            played.setattr(output_dir, "Path", lambda *parts: original(folder, *parts[1:]))
            played.setattr(output_dir, "prepare_output_dir", lambda _: folder.mkdir(exist_ok=True))
            return make()

    monkeypatch.setattr(output_dir, "from_first_rank", from_first_rank)
    monkeypatch.setattr(output_dir, "from_all_ranks", lambda make: [None, make()])
    return folder


def test_a_shared_folder(second_of_two, monkeypatch):
    prepare_shared_output_dir(str(second_of_two), saves=True)
    assert list(second_of_two.iterdir()) == []


def test_a_rank_that_does_not_see_it_is_named(second_of_two, tmp_path):
    with pytest.raises(UserError, match=r"rank 1 on .* does not see output_dir .*elsewhere.*shar"):
        prepare_shared_output_dir(str(tmp_path / "elsewhere"), saves=True)
    assert list(second_of_two.iterdir()) == []
    prepare_shared_output_dir(str(tmp_path / "elsewhere"), saves=False)
