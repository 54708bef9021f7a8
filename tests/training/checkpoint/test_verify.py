"""Damage of a checkpoint is noticed, whichever file has it, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_testing import DAMAGES, KINDS, as_of_an_earlier_version, save

from pypkg.errors import UserError
from pypkg.files.checksums import FileRecord, file_record, sealed_json
from pypkg.training.checkpoint.folders import checkpoints
from pypkg.training.checkpoint.manifest import model_fingerprint, read_manifest, write_manifest
from pypkg.training.checkpoint.verify import verify
from pypkg.training.state import TrainerState


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 20)


@pytest.fixture
def checkpoint(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def rewrite(file: Path, **changes: object) -> None:
    """Changes a JSON file, the manifest with its own digest."""
    content = json.loads(file.read_text()) | changes
    if file.name == "manifest.json":
        del content["digest"]
        file.write_bytes(sealed_json(content))
    else:
        file.write_text(json.dumps(content, indent=2))


def test_the_manifest_lists_every_file(whole):
    manifest = read_manifest(whole)
    assert manifest.files.keys() | {"manifest.json"} == set(KINDS)
    assert all(file_record(whole / name) == record for name, record in manifest.files.items())
    assert (manifest.step, manifest.consumed_samples, manifest.consumed_tokens) == (20, 80, 1280)
    assert manifest.layout["tensor"] == manifest.layout["data"] == 1
    assert manifest.versions.keys() == {"pypkg", "paddle"} and all(manifest.versions.values())


@pytest.mark.parametrize("checks", ["checksums", "sizes"])
def test_a_whole_checkpoint(whole, checks):
    report = verify(whole, checks)
    assert report.damage == () and report.unlisted == () and report.manifest is not None


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_at_random_places_is_noticed(checkpoint, kind, damage):
    random = np.random.default_rng(KINDS.index(kind))
    file = checkpoint / kind
    before = file.read_bytes()
    changes = 0
    while changes < 4:
        damage(file, random)
        if file.read_bytes() != before:
            changes += 1
            (problem, *_) = verify(checkpoint).damage
            assert file.name in problem
        file.write_bytes(before)
    assert verify(checkpoint).damage == ()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "manifest.json"])
def test_a_missing_file_and_one_of_another_checkpoint(checkpoint, kind, tmp_path):
    file = checkpoint / kind
    (tmp_path / "other").mkdir()
    other = save(tmp_path / "other", 10) / kind
    if other.read_bytes() != file.read_bytes():
        shutil.copy(other, file)
        assert verify(checkpoint).damage
    file.unlink()
    for checks in ("checksums", "sizes"):
        assert verify(checkpoint, checks).damage == (f"{file.name} is missing",)


def test_the_state_of_an_older_checkpoint_is_noticed_by_sizes_as_well(checkpoint, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(save(tmp_path / "other", 10) / "trainer_state.json", checkpoint)
    damage = " ".join(verify(checkpoint, "sizes").damage)
    assert "trainer_state.json is of step 10, but the folder is named checkpoint-20" in damage
    assert "global_step 10, the manifest 20" in damage
    assert "consumed_samples 40, the manifest 80" in damage


def test_another_model_is_noticed_by_sizes_as_well(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(file.read_text().replace("64", "32"))
    (problem,) = verify(checkpoint, "sizes").damage
    assert problem == "config.json describes another model than the manifest"


def test_the_order_of_keys_makes_no_other_model(tmp_path):
    keys = {"hidden_size": 64, "vocab_size": 100}
    found = set()
    for order in (list(keys), list(reversed(keys))):
        content = json.dumps({key: keys[key] for key in order})
        (tmp_path / "config.json").write_text(content)
        found.add(model_fingerprint(tmp_path))
    assert len(found) == 1


def test_the_manifest_of_another_checkpoint(checkpoint, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(save(tmp_path / "other", 10) / "manifest.json", checkpoint)
    assert "model.safetensors has another checksum" in " ".join(verify(checkpoint).damage)


def test_files_that_are_not_listed_are_no_damage(checkpoint):
    (checkpoint / "extra" / "mine.txt").write_text("mine")
    report = verify(checkpoint)
    assert report.damage == () and report.unlisted == ("extra/mine.txt",)


def test_an_unreadable_file_is_named(checkpoint):
    file = checkpoint / "tokenizer.json"
    file.unlink()
    file.symlink_to(file.name)
    (problem,) = verify(checkpoint).damage
    assert problem.startswith("tokenizer.json cannot be read")


def test_a_manifest_of_a_later_version(checkpoint):
    rewrite(checkpoint / "manifest.json", format=99)
    with pytest.raises(UserError, match=r"manifest\.json has format 99 .* verify_checkpoint to no"):
        verify(checkpoint)


def test_a_manifest_without_its_fields(checkpoint):
    (checkpoint / "manifest.json").write_bytes(
        sealed_json({"format": 1, "checksum": "xxh3_128", "step": 3})
    )
    assert "does not have the entries of a manifest" in verify(checkpoint).damage[0]


def test_records_of_writers_are_taken_as_they_are(tmp_path):
    """So that a byte that was lost on its way to the disk is noticed."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    record = FileRecord(7, "0" * 32)
    write_manifest(tmp_path, TrainerState(1), {}, {"model.safetensors": record})
    assert read_manifest(tmp_path).files == {"model.safetensors": record}


# Checkpoints of earlier versions have no manifest.


@pytest.fixture
def unlisted(checkpoint) -> Path:
    return as_of_an_earlier_version(checkpoint)


@pytest.mark.parametrize("checks", ["checksums", "sizes"])
def test_a_manifest_that_was_written_and_is_missing_is_damage(checkpoint, checks):
    (checkpoint / "manifest.json").unlink()
    (problem,) = verify(checkpoint, checks).damage
    assert problem == ("manifest.json is missing, but trainer_state.json says that it was written")


def test_a_checkpoint_without_a_manifest_is_accepted(unlisted):
    report = verify(unlisted)
    assert report.damage == () and report.manifest is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "has none of"), ("config.json", "config.json is missing"),
        ("trainer_state.json", "trainer_state.json is missing"),
    ],
)  # fmt: skip
def test_parts_without_which_nothing_goes_on(unlisted, name, words):
    (unlisted / name).unlink()
    assert words in " ".join(verify(unlisted).damage)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_truncated_file_without_a_manifest(unlisted, name):
    file = unlisted / name
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = verify(unlisted).damage
    assert name in problem and "truncated" in problem


def test_a_changed_step_without_a_manifest(unlisted):
    """From 20 to 70 in a run of 50 steps, it would end at once and look finished."""
    rewrite(unlisted / "trainer_state.json", global_step=70)
    (problem,) = verify(unlisted).damage
    assert problem == "trainer_state.json is of step 70, but the folder is named checkpoint-20"


def test_a_lost_trainer_state_does_not_hide_a_checkpoint(checkpoint):
    """It is the newest one and damaged, not none at all."""
    (checkpoint / "trainer_state.json").unlink()
    assert checkpoints(checkpoint.parent) == [(20, checkpoint)]


def test_what_is_read_is_told(whole):
    read: list[int] = []
    verify(whole, on_read=read.append)
    assert sum(read) == sum(record.size for record in read_manifest(whole).files.values())
