"""The digest of csrc/ that ties compiled libraries to their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pypkg.files.build_info import DIGEST, digest, main
from pypkg.files.paths import library_dir, sources_dir


@pytest.fixture
def sources(tmp_path) -> Path:
    folder = tmp_path / "csrc"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "a.h").write_text("int a;\n")
    (folder / "b.cc").write_text("int b;\n")
    return folder


def test_the_same_files_elsewhere_have_the_same_digest(sources):
    before = digest(sources)
    assert digest(sources.rename(sources.with_name("moved"))) == before


def test_files_of_an_editor_do_not_count(sources):
    before = digest(sources)
    (sources / ".b.cc.swp").touch()
    assert digest(sources) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "kernels" / "a.h").write_text("int c;\n"),
        lambda folder: (folder / "b.cc").rename(folder / "c.cc"),
        lambda folder: (folder / "b.cc").rename(folder / "kernels" / "b.cc"),
        lambda folder: (folder / "b.cc").unlink(),
        lambda folder: (folder / "empty.cc").touch(),
    ],
)
def test_any_change_of_a_file_changes_the_digest(sources, change):
    before = digest(sources)
    change(sources)
    assert digest(sources) != before


def test_a_build_writes_the_digest_beside_the_libraries(tmp_path):
    configured = tmp_path / "configured.json"
    configured.write_text('{"compiler": "one"}')
    assert main([str(configured), str(tmp_path / "_lib")]) == 0
    info = json.loads((tmp_path / "_lib" / "build_info.json").read_text())
    assert info == {"compiler": "one", DIGEST: digest(sources_dir())}


def test_the_libraries_of_this_checkout_are_up_to_date():
    info = json.loads((library_dir() / "build_info.json").read_text())
    assert info[DIGEST] == digest(sources_dir())
