"""Seconds of each test file, beside those of an earlier run: make test-durations

Reads the files that `pytest --junitxml` writes, prints the test files whose time has changed, and
writes tests/durations.json anew. Times of another machine, or of one that did other work
meanwhile, tell nothing: the file says where it was made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

RECORD = Path(__file__).with_name("durations.json")
# A change is told when it is larger than both.
SECONDS, FRACTION = 3.0, 0.25


def read_reports(reports: Sequence[Path]) -> dict[str, float]:
    """Seconds of each test file, fixtures included; test files by their dotted names."""
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            # A file that is skipped as a whole has its name in place of a test's.
            seconds[case.get("classname") or case.get("name", "")] += float(case.get("time", 0))
    return {name: round(value, 1) for name, value in sorted(seconds.items())}


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A line for each file that is new, gone, slower or faster, the largest change first."""
    rows = []
    for name in before.keys() | after.keys():
        old, new = before.get(name, 0.0), after.get(name, 0.0)
        if abs(new - old) > max(SECONDS, FRACTION * old):
            rows.append((new - old, f"{new - old:+8.1f} s  {old:7.1f} -> {new:7.1f}  {name}"))
    return [line for _, line in sorted(rows, key=lambda row: -abs(row[0]))]


def recorded() -> dict[str, float]:
    """Seconds of each test file when the record was written; empty if there is none."""
    if not RECORD.exists():
        return {}
    return json.loads(RECORD.read_text(encoding="utf-8"))["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="files of pytest --junitxml")
    options = parser.parse_args()
    after = read_reports(options.reports)
    if RECORD.exists():
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        before = record["seconds"]
        print(f"before: {sum(before.values()):.0f} s, {record['machine']}, {record['date']}")
        print(*changes(before, after), sep="\n")
    print(f"now: {sum(after.values()):.0f} s of tests in {len(after)} files")
    record = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": after,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
