"""What is dropped or mended before a text is tokenized."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pypkg.data.preprocess.filters import EMPTY, TOO_SHORT, digest, has_run, text_filter


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        ("plain", "plain", None),
        ("", "", EMPTY),
        ("ab", "ab", TOO_SHORT),
        ("abc", "abc", None),
        ("déj", "déj", None),  # characters, not bytes
        ("a" * 11, "a", TOO_SHORT),
        ("xyz" + "a" * 11, "xyza", None),
        ("xyz" + "a" * 10, "xyz" + "a" * 10, None),
        ("ok " + "é" * 30 + "." * 12, "ok é.", None),
        ("\n" * 40, "\n" * 40, None),
    ],
)
def test_filter(text, kept, reason):
    assert text_filter(False, 10, 3)(text) == (kept, reason)


def test_strip():
    assert text_filter(True, None, 3)(" \nabc\t") == ("abc", None)
    assert text_filter(True, None, 3)(" \n\t") == ("", EMPTY)
    assert text_filter(False, None, 0)(" ") == (" ", None)


runs = st.lists(st.tuples(st.sampled_from("ab\né"), st.integers(1, 14)), max_size=12)


@settings(max_examples=500, deadline=None)
@given(runs=runs, length=st.integers(1, 12))
def test_runs_are_found_as_by_a_regex(runs, length):
    text = "".join(character * count for character, count in runs)
    expected = re.search(rf"(.)\1{{{length},}}", text, re.DOTALL) is not None
    assert has_run(text, length) == expected


def test_digest():
    assert digest("a") == digest("a") != digest("b")
    assert len(digest("é" * 1000)) == 16
