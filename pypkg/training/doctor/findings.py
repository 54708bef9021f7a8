"""Findings of the doctor and the exit code that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from pypkg.errors import UserError
from pypkg.parallel.launch.rendezvous import named

T = TypeVar("T")


class Severity(IntEnum):
    """Severity of a finding. The worst one is the exit code of ``pypkg doctor``."""

    OK = 0
    WARNING = 1  # the run starts, but may be slow or end early
    ERROR = 2  # the run cannot start, or cannot finish


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was examined, in a word or two.
        what: the values found and expected.
        where: ranks and host; empty for one process.
        remedy: how to fix it; empty if nothing is wrong.
    """

    severity: Severity
    check: str
    what: str
    where: str = ""
    remedy: str = ""

    def line(self) -> str:
        """One line for a terminal or a log."""
        place = f" on {self.where}" if self.where else ""
        remedy = f". {self.remedy}" if self.remedy else ""
        return f"{self.check}: {self.what}{place}{remedy}"

    def labelled(self) -> str:
        """The line after its severity, as commands print it."""
        return f"{self.severity.name.lower():<9}{self.line()}"


def exit_code(findings: Iterable[Finding]) -> int:
    """0: no problem; 1: warnings; 2: errors."""
    return int(max((each.severity for each in findings), default=Severity.OK))


def place_of(ranks: Sequence[int], size: int) -> str:
    """Where something was found: "ranks 0 to 7 (10.0.0.1)"; empty in a run of one process."""
    return named(list(ranks)) if size > 1 else ""


def by_value(values: Sequence[T], key: Callable[[T], Hashable]) -> Iterator[tuple[T, list[int]]]:
    """Groups ranks by key: yields the first value with each key, and the ranks with that key.

    Args:
        values: one value per rank.
    """
    ranks: dict[Hashable, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(key(value), []).append(rank)
    for own in ranks.values():
        yield values[own[0]], own


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun, such as "2 ranks". ``plural`` is for irregular nouns."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def finding_of(check: str, examine: Callable[[], str]) -> Finding:
    """Runs ``examine``: OK with the text that it returns, or ERROR with its UserError."""
    try:
        return Finding(Severity.OK, check, examine())
    except UserError as error:
        return Finding(Severity.ERROR, check, "; ".join(str(error).splitlines()))
