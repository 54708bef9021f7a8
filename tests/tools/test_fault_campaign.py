"""The campaign of faults counts what is noticed, and leaves files as they were."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import fault_campaign
import pytest
from campaign_faults import Campaign, Counts
from fault_campaign import (
    CAMPAIGNS,
    Place,
    corpus_place,
    count_noticed,
    damage_rows,
    flip,
    index_place,
    ledger_place,
)
from kill_campaign import table_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_fault_changes_the_file(name):
    rng = random.Random(0)
    data, other = bytes(range(1, 200)), bytes(100)
    changed = [CAMPAIGNS[name](data, other, rng) for _ in range(50)]
    assert sum(each != data for each in changed) > 40
    if name == "flips":
        for each in changed:
            (bits,) = (a ^ b for a, b in zip(data, each, strict=True) if a != b)
            assert bits.bit_count() == 1
    if name == "truncations":
        assert all(data.startswith(each) for each in changed)


def test_noticed_faults_are_counted(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    seen = []

    def is_noticed() -> bool:
        seen.append((tmp_path / "new").read_bytes())
        return len(seen) % 2 == 0

    place = Place({"f": tmp_path / "new"}, {"f": tmp_path / "old"}, {"a": is_noticed})
    for damage in CAMPAIGNS.values():
        assert count_noticed(place, damage, 10, random.Random(0)) == {"f": {"a": 5}}
    assert len(seen) == 40 and b"new" * 100 not in seen
    assert (tmp_path / "new").read_bytes() == b"new" * 100
    same = Place({"f": tmp_path / "new"}, {"f": tmp_path / "new"}, {"a": is_noticed})
    assert count_noticed(same, CAMPAIGNS["swaps"], 10, random.Random(0)) == {}


def test_the_checksums_of_a_corpus_miss_nothing(tmp_path):
    place = corpus_place(tmp_path)
    for name in CAMPAIGNS:
        rows = damage_rows([place], name, 5, seed=0)
        assert [row[1] for row in rows] == [
            "corpus.bin", "corpus.idx", "corpus.lsm", "corpus.manifest.json",
        ]  # fmt: skip
        assert all(row[:1] == [name] and row[3] == "5" for row in rows)
        assert rows[3][5] == ""
    assert not any(check() for check in place.checks.values())


def test_tables_go_between_their_marks():
    page = "a\n<!-- kills: begin -->\nold\n<!-- kills: end -->\nb\n"
    put = fault_campaign.put_table(page, "kills", ["| new |"])
    assert put == "a\n<!-- kills: begin -->\n| new |\n<!-- kills: end -->\nb\n"
    for name in ("damage", "kills", "disk", "links", "stops"):
        text = fault_campaign.PAGE.read_text()
        assert fault_campaign.put_table(text, name, ["| new |"]) != text


def test_a_table_sums_the_layouts():
    one = asdict(Counts(faults=3, lost=1, untold=1, orphans=2, slowest_end=1.5))
    two = asdict(Counts(faults=4, while_saving=2, slowest_end=0.5))
    lines = table_of({"kills: dp2": one, "kills: tp2": two, "disk: dp2": two}, "kills")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    by_column = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert [row["layout"] for row in by_column] == ["dp2", "tp2", "all"]
    for column, values in (
        ("kills", ["3", "4", "7"]), ("lost", ["1", "0", "1"]), ("in a save", ["0", "2", "2"]),
        ("ranks left", ["3", "0", "3"]),
    ):  # fmt: skip
        assert [row[column] for row in by_column] == values
    assert table_of({"disk: dp2": two}, "disk")[-1].split("|")[2].strip() == "4"


class RunningRanks:
    """Ranks that have not ended."""

    def codes(self) -> list[int | None]:
        return [None, None]


def test_what_was_there_once_is_not_waited_for_again(tmp_path):
    """As the folder of a removal, which a rank has made and removed between two looks."""
    campaign = Campaign(None, [tmp_path], {}, random.Random(0))
    looks = iter([False, True, False])
    campaign._wait(RunningRanks(), lambda: next(looks))
    assert list(looks) == [False]


def test_what_loading_a_damaged_ledger_or_index_tells(tmp_path):
    for place in (ledger_place(tmp_path / "a", tmp_path / "b"), index_place(tmp_path / "c")):
        assert not any(check() for check in place.checks.values())
        for file, noticed in count_noticed(place, flip, 30, random.Random(0)).items():
            assert noticed == {"checksums": 30}, file
