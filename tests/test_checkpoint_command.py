"""`pypkg checkpoint`: what it says of whole and damaged checkpoints, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pypkg.checkpoint import main
from pypkg.files.checksums import file_record, sealed_json
from pypkg.training.checkpoint.manifest import write_manifest
from pypkg.training.state import TrainerState


def make(folder: Path, step: int) -> Path:
    """A checkpoint of two ranks, without weights."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    state = {"global_step": step, "consumed_samples": 4000 * step, "consumed_tokens": 64 * step}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "config.json").write_text("{}")
    write_manifest(checkpoint, TrainerState(**state), {"tensor": 2, "data": 1, "other": True})
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (9, 10):
        make(tmp_path, step)
    return tmp_path


def test_verify_an_output_dir(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/checkpoint-9: whole\n{run}/checkpoint-10: whole\n"


def test_verify_tells_damage_and_files_that_are_not_listed(run, capsys):
    (run / "checkpoint-9" / "notes.txt").write_text("mine")
    (run / "checkpoint-10" / "config.json").write_text("[]")
    assert main(["verify", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  notes.txt is not listed in the manifest",
        f"{run}/checkpoint-10: damaged",
        "  config.json has another checksum than when it was written",
        "  config.json describes another model than the manifest",
    ]
    assert main(["verify", str(run / "checkpoint-9")]) == 0
    assert main(["verify", str(run / "checkpoint-10")]) == 1


def test_verify_by_sizes_reads_nothing(run, capsys):
    file = run / "checkpoint-10" / "trainer_state.json"
    file.write_text(file.read_text().replace(": ", " :"))
    assert main(["verify", "--sizes", str(run)]) == 0
    assert main(["verify", str(run)]) == 1


def test_list_shows_every_checkpoint(run, capsys):
    (run / "checkpoint-9").rename(run / "damaged-checkpoint-9")
    (run / "damaged-checkpoint-9" / "config.json").unlink()
    assert main(["list", str(run)]) == 0
    _, _, newest, damaged = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in newest.split("|")[1:7]] == [
        "checkpoint-10", "10", "40,000", "640", "0.000", "tensor 2",
    ]  # fmt: skip
    assert newest.endswith("| whole          |")
    assert "damaged-checkpoint-9" in damaged and damaged.endswith("| damaged        |")


def test_list_and_verify_without_a_manifest(run, capsys):
    (run / "checkpoint-9" / "manifest.json").unlink()
    assert main(["list", str(run)]) == 0
    assert "checkpoint-9" in capsys.readouterr().out
    assert main(["verify", str(run / "checkpoint-9")]) == 1  # it has no weights either
    assert "has none of model.safetensors" in capsys.readouterr().out


def test_one_of_a_later_version_hides_no_other(run, capsys):
    manifest = run / "checkpoint-9" / "manifest.json"
    manifest.write_bytes(sealed_json({"format": 9, "checksum": "xxh3_128"}))
    assert main(["verify", str(run)]) == 1
    first, why, last = capsys.readouterr().out.splitlines()
    assert first == f"{run}/checkpoint-9: of a later version" and "has format 9" in why
    assert last == f"{run}/checkpoint-10: whole"
    assert main(["list", str(run)]) == 0
    assert "of a later version" in capsys.readouterr().out


def test_inspect_shows_the_manifest(run, capsys):
    assert main(["inspect", str(run / "checkpoint-10")]) == 0
    shown = capsys.readouterr().out
    for words in ("step      10\n", "samples   40,000\n", "layout    tensor 2\n", "paddle 3."):
        assert words in shown
    assert file_record(run / "checkpoint-10" / "config.json").digest in shown


def test_what_cannot_be_inspected(run, capsys):
    manifest = run / "checkpoint-10" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("640", "641"))
    assert main(["inspect", str(run / "checkpoint-10")]) == 2
    assert "its own digest does not fit" in capsys.readouterr().err
    assert main(["inspect", str(run)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    assert main(["inspect", str(manifest)]) == 2
    assert "manifest.json is a file; give the folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "list"])
def test_a_folder_without_checkpoints(tmp_path, command, capsys):
    shutil.rmtree(tmp_path)
    assert main([command, str(tmp_path)]) == 2
    assert "neither a checkpoint nor a folder with checkpoints" in capsys.readouterr().err
