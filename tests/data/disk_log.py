"""Records fsync and rename, and finds what a crash of the machine could lose or mix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


class DiskLog:
    """What the code under test asks of the file system, from construction on.

    Attributes:
        events: ``fsync NAME``, ``rename FROM TO`` and ``unlink NAME``, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self._on_disk: dict[tuple[int, int], tuple[int, int]] = {}
        self._problems: list[str] = []
        self._entries: set[str] = set()  # folders with a rename that is not on the disk
        self._before = lambda event: None
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._renaming(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._syncing(os.fsync))
        monkeypatch.setattr(Path, "unlink", self._unlinking(Path.unlink))

    def crash_before(self, event: str) -> None:
        """Makes the call of this event raise KeyboardInterrupt instead."""

        def crash(found: str) -> None:
            if found == event:
                raise KeyboardInterrupt

        self._before = crash

    def changes(self) -> list[str]:
        """The events that change names."""
        return [event for event in self.events if not event.startswith("fsync ")]

    def check(self) -> None:
        """Every renamed file was on the disk before, and every rename is by now."""
        assert any(event.startswith("rename ") for event in self.events)
        assert self._problems == []
        assert self._entries == set()

    def _record(self, event: str) -> None:
        self._before(event)
        self.events.append(event)

    def _syncing(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._record(f"fsync {Path(path).name}")
            fsync(descriptor)
            key, state = _identity(os.fstat(descriptor))
            self._on_disk[key] = state
            self._entries.discard(path)

        return call

    def _renaming(self, rename: Callable[..., None]) -> Callable[..., None]:
        def call(source: Path, target: Path) -> None:
            self._record(f"rename {Path(source).name} {Path(target).name}")
            if not str(target).endswith(".old"):  # what is moved aside was written earlier
                self._problems += [str(path) for path in _tree(source) if self._is_lost(path)]
            rename(source, target)
            self._entries.add(os.path.realpath(Path(target).parent))

        return call

    def _unlinking(self, unlink: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self._record(f"unlink {path.name}")
            unlink(path, missing_ok)

        return call

    def _is_lost(self, path: Path) -> bool:
        key, state = _identity(path.stat())
        return self._on_disk.get(key) != state


def _tree(path: Path) -> list[Path]:
    return [Path(path), *Path(path).rglob("*")]


def _identity(status: os.stat_result) -> tuple[tuple[int, int], tuple[int, int]]:
    """Which file, and what tells its contents from earlier ones."""
    return (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns)
