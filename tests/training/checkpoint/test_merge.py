"""Joining the parts of a checkpoint that two machines hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_testing import flip

from pypkg.checkpoint import main
from pypkg.errors import UserError
from pypkg.files.checksums import file_records
from pypkg.models.weights.formats.safetensors import TensorSpec, write_tensors
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.training.checkpoint.manifest import (
    Manifest,
    model_fingerprint,
    put_manifest,
    read_manifest,
)
from pypkg.training.checkpoint.merge import merge
from pypkg.training.checkpoint.verify import verify

WRITERS = ("rank 0 (10.0.0.1)", "rank 1 (10.0.0.2)")
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make(folder: Path, step: int = 20, seed: int = 0) -> list[Path]:
    """The parts of two machines, below folders of their own."""
    values = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    index = {"weight_map": {"a": FILES[0], "b": FILES[1]}}
    small = {
        "config.json": {},
        "model.safetensors.index.json": index,
        "trainer_state.json": {"global_step": step, "consumed_samples": 0, "consumed_tokens": 0},
    }
    parts, records = [], []
    for number, (name, file) in enumerate(zip("ab", FILES, strict=True)):
        part = folder / f"machine{number}" / f"checkpoint-{step}"
        part.mkdir(parents=True)
        for each, content in small.items():
            (part / each).write_text(json.dumps(content))
        write_tensors(part / file, {name: TensorSpec("float32", (8,))}, [(name, values[number])])
        records.append({path.name: each for path, each in file_records(part.iterdir()).items()})
        parts.append(part)
    for number, part in enumerate(parts):
        other = 1 - number
        elsewhere = {WRITERS[other]: {FILES[other]: records[other][FILES[other]]}}
        manifest = Manifest(
            step, 0, 0, model_fingerprint(part), files=records[number], elsewhere=elsewhere
        )
        put_manifest(part, manifest)
    return parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return make(tmp_path)


def test_the_parts_make_a_whole_checkpoint(parts, tmp_path, capsys):
    output = tmp_path / "out" / "checkpoint-20"
    assert main(["merge", *map(str, parts), "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 5 files, ")
    report = verify(output)
    assert report.damage == report.unlisted == () and report.manifest is not None
    assert report.manifest.elsewhere == {} and len(report.manifest.files) == 5
    files = TensorFiles(output)
    for number, name in enumerate("ab"):
        there = parts[number] / FILES[number]
        assert (output / FILES[number]).read_bytes() == there.read_bytes()
        assert files.read(name, "float32").shape == (8,)
    assert sorted(path.name for path in output.parent.iterdir()) == ["checkpoint-20"]
    assert '"format": 1' in (output / "manifest.json").read_text()


def test_the_order_of_the_folders_is_free(parts, tmp_path):
    for name, order in (("one", parts), ("other", parts[::-1])):
        merge(order, tmp_path / name)
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (
        tmp_path / "other" / "manifest.json"
    ).read_bytes()


def test_a_part_is_shown_as_one(parts, capsys):
    assert main(["verify", str(parts[0])]) == 0
    assert capsys.readouterr().out == f"{parts[0]}: a whole part\n"
    assert main(["inspect", str(parts[0])]) == 0
    size = (parts[1] / FILES[1]).stat().st_size
    assert f"elsewhere 1, {size:,} bytes, written by rank 1 (10.0.0.2)" in capsys.readouterr().out


def check_refused(words: str, folders: list[Path], output: Path) -> None:
    before = sorted(output.parent.iterdir()) if output.parent.exists() else None
    with pytest.raises(UserError, match=words):
        merge(folders, output)
    after = sorted(output.parent.iterdir()) if output.parent.exists() else None
    assert after == before or (before is None and after == [])


def test_a_part_that_is_missing(parts, tmp_path):
    words = rf"{FILES[1]} is in none of .*: rank 1 \(10.0.0.2\) wrote it"
    check_refused(words, parts[:1], tmp_path / "new" / "whole")


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
def test_a_part_that_is_damaged(parts, tmp_path, name):
    flip(next(part / name for part in parts if (part / name).exists()), np.random.default_rng(0))
    check_refused(f"{name} has another size or checksum", parts, tmp_path / "new" / "whole")


def test_a_part_that_cannot_be_read(parts, tmp_path):
    """A file that opens, and fails at its first byte."""
    broken = parts[1] / FILES[1]
    broken.unlink()
    broken.symlink_to("/proc/self/mem")
    check_refused(f"{broken} cannot be read", parts, tmp_path / "new" / "whole")


def test_parts_of_different_steps(parts, tmp_path):
    other = make(tmp_path / "other", step=30)
    words = "is of step 20 and .* of step 30: they are parts of different checkpoints"
    check_refused(words, [parts[0], other[1]], tmp_path / "new" / "whole")


def test_parts_of_different_saves_of_a_step(parts, tmp_path):
    other = make(tmp_path / "other", seed=1)
    words = "of step 20, but of different saves"
    check_refused(words, [parts[0], other[1]], tmp_path / "new" / "whole")


def test_what_is_no_part(parts, tmp_path):
    merge(parts, tmp_path / "whole")
    output = tmp_path / "new" / "whole"
    check_refused("is a whole checkpoint, not a part", [tmp_path / "whole"], output)
    check_refused("has no manifest.json", [tmp_path], output)
    (parts[1] / "manifest.json").write_text("{}")
    check_refused("cannot be merged", parts, output)


def test_an_output_that_cannot_be(parts, tmp_path):
    check_refused("exists already", parts, tmp_path / "machine0")
    check_refused("named after step 30, but", parts, tmp_path / "new" / "checkpoint-30")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        merge(parts, tmp_path / "file" / "whole")


def test_earlier_versions_do_not_take_a_part_for_a_whole(parts):
    assert '"format": 2' in (parts[0] / "manifest.json").read_text()
    manifest = read_manifest(parts[0])
    assert manifest is not None and manifest.elsewhere.keys() == {WRITERS[1]}
    shutil.rmtree(parts[1])
    assert verify(parts[0]).damage == ()
