"""Atomic writes: the order of fsync and rename, and what a failure in between leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disk_log import DiskLog

from pypkg.errors import UserError
from pypkg.files import OutputFile, publish_files, replace_folder, write_file


@pytest.fixture
def disk(monkeypatch) -> DiskLog:
    return DiskLog(monkeypatch)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_synced_renamed_and_its_folder_synced(tmp_path, disk):
    write_file(tmp_path / "f", b"one", b"two")
    assert (tmp_path / "f").read_bytes() == b"onetwo"
    assert disk.events == ["fsync f.tmp", "rename f.tmp f", f"fsync {tmp_path.name}"]
    disk.check()


def test_a_file_that_need_not_be_durable_is_whole_and_renamed_alone(tmp_path, disk):
    write_file(tmp_path / "f", b"one", b"two", durable=False)
    assert (tmp_path / "f").read_bytes() == b"onetwo"
    assert disk.events == ["rename f.tmp f"]


def test_what_is_written_after_sync_is_synced_by_publish(tmp_path, disk):
    with OutputFile(tmp_path / "f") as file:
        file.write(b"one")
        file.sync()
        file.write(b"two")
        file.publish()
    assert (tmp_path / "f").read_bytes() == b"onetwo"
    disk.check()


@pytest.mark.parametrize("event", ["fsync f.tmp", "rename f.tmp f"])
def test_an_interrupted_write_leaves_the_old_contents_alone(tmp_path, disk, event):
    write_file(tmp_path / "f", b"old")
    disk.crash_before(event)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_a_write_that_fails_names_the_file(tmp_path):
    (tmp_path / "f").mkdir()
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/f: Is a directory"):
        write_file(tmp_path / "f", b"new")
    assert names(tmp_path) == ["f"]


def test_several_files_are_all_synced_before_the_first_rename(tmp_path, disk):
    files = {tmp_path / f"{name}.new": tmp_path / name for name in ("b", "a")}
    for temporary in files:
        temporary.write_text(temporary.name)
    publish_files(files)
    assert disk.events == [
        "fsync b.new", "fsync a.new", "rename b.new b", "rename a.new a", f"fsync {tmp_path.name}",
    ]  # fmt: skip
    disk.check()


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A complete folder ``new``, and ``final``, which it is to replace."""
    new, final = tmp_path / "new", tmp_path / "final"
    for folder in (new, final):
        (folder / "below").mkdir(parents=True)
        (folder / "below" / "file").write_text(folder.name)
    return new, final


def test_a_folder_is_synced_with_all_below_it(tmp_path, disk, folders):
    new, final = folders
    replace_folder(new, final)
    assert (final / "below" / "file").read_text() == "new"
    assert names(tmp_path) == ["final"]
    assert disk.events[:3] == ["fsync file", "fsync below", "fsync new"]
    assert disk.changes()[:2] == ["rename final new.old", "rename new final"]
    disk.check()


@pytest.mark.parametrize("event", ["fsync below", "rename final new.old", "rename new final"])
def test_an_interrupted_replacement_leaves_the_old_folder(disk, folders, event):
    new, final = folders
    disk.crash_before(event)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(new, final)
    assert (final / "below" / "file").read_text() == "final"
    assert not os.path.exists(f"{new}.old")


def test_a_folder_where_there_was_none(tmp_path, disk, folders):
    replace_folder(folders[0], tmp_path / "other")
    assert names(tmp_path) == ["final", "other"]
    disk.check()
