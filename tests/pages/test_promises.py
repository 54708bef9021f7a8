"""Every promise of docs/training.md has a test: promises.md says which."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from page_blocks import REPO

from pypkg import supervise
from pypkg.config.settings import Settings
from pypkg.console import progress
from pypkg.parallel.launch import rendezvous
from pypkg.parallel.optimizer import loss_scaling
from pypkg.training.checkpoint import lock
from pypkg.training.feed import samples
from pypkg.training.healing import healer

TABLE = Path(__file__).with_name("promises.md")
PAGE = REPO / "docs/training.md"
SUPERVISE = supervise._parser().parse_args([])  # the defaults
SETTING_NAMES = tuple(Settings.__dataclass_fields__)
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
_RULE = re.compile(r"\|[-| ]+\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def statements(page: str) -> list[str]:
    """Paragraphs, list items and table rows of a page, each as one line."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=#)", _FENCE.sub("", page)):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        rules = [number for number, line in enumerate(lines) if _RULE.fullmatch(line)]
        if rules:
            found += lines[: rules[0] - 1] + lines[rules[0] + 1 :]
        else:
            found += re.split(r"^- ", "\n".join(lines), flags=re.M)
    return [_one_line(text) for text in found if text.strip()]


def rows() -> list[tuple[str, str]]:
    """The quotes of promises.md, and the cell beside each: tests, or why there is none."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert all(len(each) == 2 for each in cells), [each for each in cells if len(each) != 2]
    return [(quote, beside) for quote, beside in cells if quote != "quote"]


@cache
def _tests_of(file: str) -> frozenset[str]:
    path = REPO / "tests" / file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    return frozenset(re.findall(r"^def (test_\w+)\(", source, re.M))


def test_every_quote_is_of_one_statement_of_the_page() -> None:
    page = statements(PAGE.read_text(encoding="utf-8"))
    assert [quote for quote, _ in rows() if sum(quote in each for each in page) != 1] == []


def test_every_statement_of_the_page_is_quoted() -> None:
    """A new statement needs a row in promises.md, with its test."""
    quotes = [quote for quote, _ in rows()]
    page = statements(PAGE.read_text(encoding="utf-8"))
    assert len(page) > 100
    assert [each for each in page if not any(quote in each for quote in quotes)] == []


def test_every_named_test_exists() -> None:
    promises = TABLE.read_text(encoding="utf-8").partition("## No promises")[0]
    for quote, beside in rows():
        if f"| {quote} |" in promises:
            assert re.fullmatch(r"(`[\w/.]+::\w+` ?)+", beside), beside
    named = re.findall(r"`([\w/.]+)::(\w+)`", promises)
    assert [f"{file}::{test}" for file, test in named if test not in _tests_of(file)] == []


@pytest.mark.parametrize(
    ("quote", "value"),
    [
        ("at the end: {} batches", samples.TEST_ITERS),
        ("which a run writes every {} s", lock.BEAT_SECONDS),
        ("if none came for {} s", lock.SILENCE_SECONDS),
        ("It watches the lock for at least {} s", lock.WATCH_SECONDS),
        ("with a line in the log every {} s", progress.LOG_SECONDS),
        ("after {} such steps in a row at the scale 1", loss_scaling.MOST_OVERFLOWS),
        ("or of more than {} `count`", healer._MOST_LISTED),
        ("not complete after `PYPKG_START_SECONDS` ({})", rendezvous.Limits().start),
        ("for `PYPKG_SILENCE_SECONDS` ({})", rendezvous.Limits().silence),
        ("for `PYPKG_HANG_SECONDS` ({};", rendezvous.Limits().hang),
        ("It comes after `--backoff` seconds ({})", SUPERVISE.backoff),
        ("up to `--max_backoff` ({})", SUPERVISE.max_backoff),
        ("after `--max_restarts` restarts ({})", SUPERVISE.max_restarts),
    ],
)
def test_numbers_of_the_page(quote: str, value: float) -> None:
    assert quote.format(f"{value:g}") in _one_line(PAGE.read_text(encoding="utf-8"))


def test_settings_that_may_differ() -> None:
    """Those that the page names, and no others."""
    page = _one_line(PAGE.read_text(encoding="utf-8"))
    (named,) = re.findall(r"settings differ between ranks \((.*?) may\)", page)
    equal = dict.fromkeys(SETTING_NAMES, 1)
    kept = rendezvous.comparable(json.dumps(equal), "1.0")
    assert set(SETTING_NAMES) - kept.keys() == set(re.findall(r"`(\w+)`", named))


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("# Title\nOne\nline.\n\nTwo.\n", ["One line.", "Two."]),
        ("## T\n- one\n  more\n- two\n", ["one more", "two"]),
        ("Text:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n", ["Text:", "| 1 | 2 |"]),
        ("```bash\nrun\n```\nAfter.\n", ["After."]),
    ],
)
def test_statements(page: str, expected: list[str]) -> None:
    assert statements(page) == expected
