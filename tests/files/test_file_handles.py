"""The limit of open files: raised as far as it goes, and named where it is too low."""

from __future__ import annotations

import os
import resource

import pytest

from pypkg.errors import UserError
from pypkg.files import file_handles


@pytest.fixture
def limit(monkeypatch):
    """Limits that stand in for this process's own."""
    now = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: now.__setitem__(slice(2), wanted))
    return now


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([256, 4096], [4096, 4096]),
        ([4096, 4096], [4096, 4096]),
        ([1024, resource.RLIM_INFINITY], [1 << 20, resource.RLIM_INFINITY]),
        ([resource.RLIM_INFINITY] * 2, [resource.RLIM_INFINITY] * 2),
        ([1 << 22, 1 << 30], [1 << 22, 1 << 30]),  # never lowered
    ],
)
def test_raised_to_what_is_allowed(limit, before, after):
    limit[:] = before
    file_handles.raise_limit()
    assert limit == after


def test_too_low_for_what_is_needed(limit):
    file_handles.require(100, "Few connections")
    with pytest.raises(UserError, match=r"2,032 connections need about 2\d\d\d open files.* 256"):
        file_handles.require(2032, "2,032 connections")


def test_limits_of_this_process():
    """Against the kernel's, which counts what is open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    file_handles.require(1, "One more")
    with pytest.raises(UserError, match=f"whose limit is {soft}"):
        file_handles.require(soft, "As many as the limit, beside those that are open")
    assert len(os.listdir("/proc/self/fd")) < soft
