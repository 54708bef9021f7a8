"""Folders that differ between the machines of a run are told at its start; links between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from distributed_testing import run_ranks
from training_testing import counting_documents, write_corpus

from pypkg.training.checkpoint.manifest import read_manifest

WORKER = Path(__file__).with_name("machines_worker.py")


def test_one_output_dir(tmp_path):
    folders = [tmp_path / "out"] * 2
    assert run_ranks(WORKER, 2, ["checkpoints", *folders]) == ["", ""]
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_dir_of_its_own(tmp_path):
    """On every rank the message names the one that sees another folder, or none."""
    (tmp_path / "other").mkdir()
    folders = [tmp_path / "out", tmp_path / "out", tmp_path / "other", tmp_path / "missing"]
    for said in run_ranks(WORKER, 4, ["checkpoints", *folders]):
        assert "is not the same folder on all machines" in said
        assert "ranks 2 and 3 cannot see what rank 0 writes there" in said
        assert "all machines share" in said and "set allow_local_output to let each" in said
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("what", ["read-only", "read-only, local"])
def test_an_output_dir_that_one_machine_can_only_read(tmp_path, what):
    """It is told at start, and not by the first checkpoint."""
    for said in run_ranks(WORKER, 3, [what, *[tmp_path / "out"] * 3]):
        assert said.startswith(f"ranks 1 and 2: output_dir '{tmp_path / 'out'}' cannot be written")
        assert "Read-only file system. Set output_dir to a folder you may write" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_parts_of_a_checkpoint(tmp_path):
    """Two machines of two ranks: each keeps its part, checks it, and reads the rest from the other.

    Damage of the second machine's part is told on every rank.
    """
    one, other = tmp_path / "one", tmp_path / "other"
    results = run_ranks(WORKER, 4, ["parts", one, one, other, other])
    kept = Path(f"{one}-kept")
    assert sorted(path.name for path in kept.iterdir()) == [".lock", "checkpoint-2"]
    assert sorted(path.name for path in other.iterdir()) == ["away"], "no lock, probe or checkpoint"
    held = [read_manifest(kept / "checkpoint-2"), read_manifest(one / "checkpoint-2")]
    assert held[0] == held[1] is not None
    (writers,) = held[0].elsewhere
    theirs = set(held[0].elsewhere[writers])
    own = {name for name in held[0].files if name.startswith("model-")}
    assert writers == "ranks 2 and 3" and len(own) == len(theirs) == 2 and not own & theirs
    for rank, said in enumerate(results):
        assert said["locked"] and said["whole"] == [] and said["read"], rank
        assert set(said["opened"]) == (own if rank < 2 else theirs), "the others come by network"
        assert said["gone"] == said["unchecked"] == ["ranks 2 and 3: there is no checkpoint-2"]
        (flipped,), (other_save,) = said["flipped"], said["other save"]
        assert flipped.startswith("ranks 2 and 3: model-0") and "another checksum" in flipped
        assert "of this save, which ranks 2 and 3 wrote, is on no machine" in other_save
        assert "pypkg checkpoint merge" in other_save


@pytest.mark.parametrize(
    "writer", ["ThreadWriter", pytest.param("ProcessWriter", marks=pytest.mark.slow)]
)
def test_a_rank_that_ends_in_a_save_is_named(tmp_path, writer):
    """Though no watchdog ends the other one, which waits for its parts."""
    said, _ = run_ranks(WORKER, 2, [writer, tmp_path, tmp_path])
    assert said.startswith(f"saving {tmp_path / 'checkpoint-1'} failed: rank 1 of this machine has")
    assert "before it sent" in said
    assert list(tmp_path.iterdir()) == []


def test_links_and_ports_between_ranks():
    """What the doctor measures where a group of ranks is slow, and whom a machine reaches."""
    said = run_ranks(WORKER, 3, ["links", "-", "-", "-"])
    pairs = [pair for rank in said for pair in rank[0]]
    assert {(sender, receiver) for sender, receiver, _ in pairs} == {(0, 1), (1, 2), (2, 0)}
    assert all(rate > 0 for *_, rate in pairs)
    assert [ports for _, ports in said] == [["ports: 2 machines; each reaches the others"]] * 3


def test_only_checkpoints_need_it_everywhere(tmp_path):
    folders = [tmp_path / "out", tmp_path / "missing"]
    assert run_ranks(WORKER, 2, ["metrics", *folders]) == ["", ""]


def test_copies_of_the_data_and_other_data(tmp_path):
    documents = counting_documents()
    write_corpus(tmp_path / "one", documents)
    write_corpus(tmp_path / "copy", documents)
    documents[0][0] += 1
    write_corpus(tmp_path / "other", documents)
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    assert run_ranks(WORKER, 3, ["data", one, "-", copy]) == [""] * 3
    for said in run_ranks(WORKER, 3, ["data", one, "-", other]):
        assert said.startswith("the ranks read different data: corpus one has ")
        assert "on rank 0; " in said and "on rank 2. Give every machine the same files" in said


def test_a_token_that_is_not_looked_at_differs(tmp_path):
    """The manifests tell, unless a copy has none."""
    documents = [np.zeros(100_000, np.int64) for _ in range(2)]
    write_corpus(tmp_path / "one", documents)
    documents[0][5000] = 1
    write_corpus(tmp_path / "other", documents)
    one, other = tmp_path / "one", tmp_path / "other"
    for said in run_ranks(WORKER, 3, ["data", one, "-", other]):
        assert "different data: one.manifest.json gives the tokens the checksum " in said
        assert " on rank 0; " in said and " on rank 2. Give every machine the same" in said
    (tmp_path / "other.manifest.json").unlink()
    assert run_ranks(WORKER, 2, ["data", one, other]) == [""] * 2
