"""``python -m pypkg.convert``: import, export and larger vocabularies of every family."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from disk_log import DiskLog
from safetensors.numpy import load_file
from sat_writing import write_ranks
from torch_writing import write_torch_file

from pypkg import convert
from pypkg.conversion.destination import copy_companions
from pypkg.data.tokenizers import load
from pypkg.data.tokenizers.base import CONFIG_FILE
from pypkg.data.tokenizers.byte_level import MERGES_FILE
from pypkg.models.architecture.registry import load_config
from pypkg.models.pretrained import from_pretrained, stored_config
from pypkg.models.weights import model_folder
from pypkg.models.weights.formats.tensor_files import TensorFiles

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))
WEIGHTS = "model.safetensors"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _run(*arguments: str | Path) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_there_are_families() -> None:
    assert len(FAMILIES) >= 17


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_an_import_is_byte_identical(family: str, tmp_path: Path) -> None:
    assert _run("import", GOLDEN / family, tmp_path / "in") == 0
    original, imported = load_file(GOLDEN / family / WEIGHTS), load_file(tmp_path / "in" / WEIGHTS)
    for name, value in imported.items():
        assert value.tobytes() == original[name].tobytes(), name
    assert all("inv_freq" in name for name in original.keys() - imported.keys())
    config = json.loads((GOLDEN / family / "config.json").read_text())
    assert json.loads((tmp_path / "in" / "config.json").read_text()) == config
    assert _run("export", tmp_path / "in", tmp_path / "out") == 0
    assert _files(tmp_path / "in") == _files(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_grown_vocabulary(family: str, tmp_path: Path) -> None:
    """Old rows as they were, new ones their mean; the model takes a new token."""
    assert _run("resize-vocab", GOLDEN / family, tmp_path / "m", "--vocab_size", 321,
                "--multiple", 64) == 0  # fmt: skip
    original, grown = load_file(GOLDEN / family / WEIGHTS), load_file(tmp_path / "m" / WEIGHTS)
    config = stored_config(tmp_path / "m")
    assert config == stored_config(GOLDEN / family).replace(vocab_size=384)
    changed = [name for name in grown if grown[name].shape != original[name].shape]
    assert len(changed) == (1 if config.tie_word_embeddings else 2)
    for name, value in grown.items():
        old = original[name]
        assert value[: len(old)].tobytes() == old.tobytes(), name
        if name in changed:
            assert value.shape == (384, *old.shape[1:])
            expected = np.broadcast_to(old.mean(axis=0, dtype=np.float64), value[320:].shape)
            np.testing.assert_allclose(value[320:], expected, rtol=1e-6, atol=1e-9)
    assert from_pretrained(tmp_path / "m").config.vocab_size == 384


def test_grown_vocabulary_of_more_rows_than_are_averaged_at_once(tmp_path: Path) -> None:
    """From 320 rows to 1100, to as many again, and on to 1200: the mean stays what it was."""
    folder = GOLDEN / "llama"
    for step, rows in enumerate((1100, 1100, 1200)):
        target = tmp_path / str(step)
        assert _run("resize-vocab", folder, target, "--vocab_size", rows) == 0
        folder = target
    name = "lm_head.weight"
    mean = load_file(GOLDEN / "llama" / WEIGHTS)[name].mean(axis=0, dtype=np.float64)
    new = load_file(folder / WEIGHTS)[name][320:]
    np.testing.assert_allclose(new, np.broadcast_to(mean, (880, len(mean))), rtol=1e-5, atol=1e-8)


def test_files_beside_the_weights_are_copied_where_there_are_none(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "other.txt"):
        (source / name).write_text("of the source")
    (target / "vocab.txt").write_text("of the target")
    assert copy_companions(source, target) == ["tokenizer.json"]
    assert (target / "vocab.txt").read_text() == "of the target"


@pytest.mark.parametrize(
    "names",
    [
        ["tekken.json"],
        ["tokenizer.model.v3"],
        ["tokenizer.model.v11"],
        ["merges.txt", "vocab.json"],
        ["sentencepiece.bpe.model"],
        ["ice_text.model"],
        ["spiece.model"],
        ["qwen.tiktoken"],
        ["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"],
    ],
    ids=", ".join,
)
def test_files_of_every_tokenizer_are_copied(tmp_path: Path, names: list[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama", source)
    for name in names:
        (source / name).write_bytes(b"{}\xff" + name.encode())  # not read: an end is in config.json
    for action, target in (("import", "in"), ("export", "out")):
        assert _run(action, source, tmp_path / target) == 0
        for name in names:
            assert (tmp_path / target / name).read_bytes() == (source / name).read_bytes()


def test_every_file_that_a_tokenizer_is_read_from_is_copied(tmp_path: Path) -> None:
    names = {pattern.replace("*", "3") for pattern, _ in load._KINDS} | {MERGES_FILE, CONFIG_FILE}
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in names:
        (source / name).touch()
    assert set(copy_companions(source, target)) == names


def test_import_of_pytorch_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "torch"
    source.mkdir()
    write_torch_file(source / "pytorch_model.bin", load_file(GOLDEN / "llama" / WEIGHTS))
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "modeling_x.py", "notes.txt"):
        (source / name).write_text((GOLDEN / "llama" / "config.json").read_text())
    assert _run("import", source, tmp_path / "in") == 0
    assert _run("import", GOLDEN / "llama", tmp_path / "expected") == 0
    found, expected = _files(tmp_path / "in"), _files(tmp_path / "expected")
    assert found[WEIGHTS] == expected[WEIGHTS]
    copied = {"tokenizer.json", "tokenizer.model", "modeling_x.py"}
    assert found.keys() - expected.keys() == copied
    assert all(found[name] == (source / name).read_bytes() for name in copied)
    assert "copied      modeling_x.py, tokenizer.json, tokenizer.model\n" in capsys.readouterr().out


def test_names_without_prefix_are_imported_under_the_whole_ones(tmp_path: Path) -> None:
    """The released gpt2 is of the model without its head."""
    source = tmp_path / "gpt2"
    source.mkdir()
    shutil.copy(GOLDEN / "gpt3" / "config.json", source)
    tensors = load_file(GOLDEN / "gpt3" / WEIGHTS)
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    assert short.keys() != tensors.keys()
    write_torch_file(source / "pytorch_model.bin", short)
    assert _run("import", source, tmp_path / "in") == 0
    assert _run("import", GOLDEN / "gpt3", tmp_path / "expected") == 0
    assert _files(tmp_path / "in") == _files(tmp_path / "expected")


def test_export_of_a_checkpoint_leaves_the_training_behind(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(GOLDEN / "llama", checkpoint)
    for name in ("optimizer.safetensors", "trainer_state.json", "settings.json", "tokenizer.json"):
        (checkpoint / name).write_text("{}")
    assert _run("export", checkpoint, tmp_path / "out") == 0
    kept = {"config.json", "generation_config.json", WEIGHTS, "tokenizer.json"}
    assert _files(tmp_path / "out").keys() == kept


def test_import_of_sat_ranks(tmp_path: Path) -> None:
    glm = GOLDEN / "glm130b"
    write_ranks(tmp_path / "sat", load_file(glm / WEIGHTS), 4)
    assert _run("import", tmp_path / "sat", tmp_path / "in", "--config", glm) == 0
    assert _run("import", glm, tmp_path / "expected") == 0
    assert _files(tmp_path / "in") == _files(tmp_path / "expected")


def test_configuration_of_a_known_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ranks(tmp_path / "sat", load_file(GOLDEN / "glm130b" / WEIGHTS), 2)
    assert _run("import", tmp_path / "sat", tmp_path / "in") == 2
    assert "has no config.json; give --config" in capsys.readouterr().err
    assert _run("import", tmp_path / "sat", tmp_path / "in", "--config", "THUDM/glm-130b") == 2
    error = capsys.readouterr().err
    assert "do not fit its configuration" in error
    assert "missing: transformer.layers.3.attention.query_key_value.weight [36864, 12288]" in error
    assert not (tmp_path / "in").exists()


def test_import_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(GOLDEN / "llama", cache / "models--org--m" / "snapshots" / "c0")
    (cache / "models--org--m" / "refs").mkdir()
    (cache / "models--org--m" / "refs" / "main").write_text("c0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert _run("import", "org/m", tmp_path / "in") == 0
    assert load_config(tmp_path / "in") == load_config(GOLDEN / "llama")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_and_shards(tmp_path: Path, dtype: str) -> None:
    arguments = ("--dtype", dtype, "--max_shard_size", "50KB")
    assert _run("export", GOLDEN / "llama", tmp_path / "out", *arguments) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    files, original = TensorFiles(tmp_path / "out"), TensorFiles(GOLDEN / "llama")
    assert {spec.dtype for spec in files.specs().values()} == {dtype}
    for name in original.shapes():
        expected = original.read(name, dtype)
        assert files.read(name, dtype).tobytes() == expected.tobytes(), name


def test_every_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    source = tmp_path / "mixed"
    source.mkdir()
    shutil.copy(GOLDEN / "llama" / "config.json", source)
    tensors = load_file(GOLDEN / "llama" / WEIGHTS)
    mixed = {
        name: value if "norm" in name else value.astype(np.float16)
        for name, value in tensors.items()
    }
    write_torch_file(source / "pytorch_model.bin", mixed)
    assert _run("import", source, tmp_path / "in") == 0
    for name, value in load_file(tmp_path / "in" / WEIGHTS).items():
        assert value.tobytes() == mixed[name].tobytes(), name


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From headers alone: the tensors of the file need not be there."""
    path = tmp_path / WEIGHTS
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    shutil.copy(GOLDEN / "llama" / WEIGHTS, path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(header)
        file.truncate(size)  # a hole in place of the numbers
    assert _run("inspect", tmp_path) == 0
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line.split() for line in printed.splitlines()}
    assert lines["lm_head.weight"] == ["lm_head.weight", "[320,", "64]", "float32", "20,480"]
    parameters = load_config(tmp_path).num_parameters()
    assert lines["parameters"][1] == f"{parameters:,}"
    assert lines["family"][1:3] == ["llama,", f"{parameters:,}"]
    assert lines["tensors"][1] == f"{len(load_file(GOLDEN / 'llama' / WEIGHTS))},"
    (tmp_path / "config.json").unlink()
    assert _run("inspect", tmp_path) == 0
    assert "unknown: no config.json" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_counts_what_config_says(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Stored rotary frequencies are listed, and not counted."""
    assert _run("inspect", GOLDEN / family) == 0
    config = stored_config(GOLDEN / family)
    printed = capsys.readouterr().out
    assert f"parameters  {config.num_parameters():,} (float32 " in printed
    assert f"family      {config.model_type}, {config.num_parameters():,} parameters" in printed


def test_inspect_needs_no_paddle() -> None:
    code = (
        "import sys; from pypkg.convert import main; "
        f"code = main(['inspect', {str(GOLDEN / 'llama')!r}]); sys.exit(code or 'paddle' in "
        "sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size", "100"], "has a vocabulary of 320, which cannot shrink to 100"),
        (["--vocab_size", "0"], "must be positive numbers"),
        (["--vocab_size", "400", "--multiple", "0"], "must be positive numbers"),
        (["--vocab_size", "400", "--max_shard_size", "5XB"], "max_shard_size must be"),
    ],
)
def test_bad_resize(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _run("resize-vocab", GOLDEN / "llama", tmp_path / "m", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_destination_is_not_overwritten_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert _run("export", GOLDEN / "llama", out) == 0  # an empty folder will do
    (out / "mine.txt").write_text("keep")
    before = _files(out)
    assert _run("export", GOLDEN / "qwen2", out) == 2
    assert f"{out} is not empty; give another folder, or --overwrite" in capsys.readouterr().err
    assert _files(out) == before
    assert _run("export", GOLDEN / "qwen2", out, "--overwrite") == 0
    assert not (out / "mine.txt").exists()
    assert load_config(out).model_type == "qwen2"
    assert list(tmp_path.iterdir()) == [out]


def test_destination_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a" / "source"
    shutil.copytree(GOLDEN / "llama", source)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for destination, message in (
        (tmp_path / "loop", "is a link to loop, which is not there"),
        (tmp_path / "dangling", "is a link to nowhere, which is not there"),
        (source, "holds the source"),
        (tmp_path / "a", "holds the source"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot write"),
    ):
        assert _run("export", source, destination, "--overwrite") == 2
        assert message in capsys.readouterr().err
    assert (source / WEIGHTS).is_file()


def test_a_folder_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run("export", GOLDEN / "llama", tmp_path / "out") == 0
    disk = DiskLog(monkeypatch)
    assert _run("export", GOLDEN / "qwen2", tmp_path / "out", "--overwrite") == 0
    disk.check()
    folders = [event.split()[2] for event in disk.changes() if "safetensors" not in event]
    assert folders[-1] == "out"


def test_failure_leaves_nothing_and_the_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert _run("export", GOLDEN / "llama", out) == 0
    before = _files(out)

    def full_disk(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_folder, "write_tensors", full_disk)
    assert _run("export", GOLDEN / "qwen2", out, "--overwrite") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert _files(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_source_that_does_not_fit_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama", source)
    keys = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**keys, "num_hidden_layers": 1}))
    assert _run("export", source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "not part of the model: model.layers.1." in error
    assert _run("inspect", tmp_path / "nowhere") == 2
    assert "neither a folder nor a model in the Hugging Face cache" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("command", ["export", "import", "resize-vocab", "inspect"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _run(command, "--help")
    assert stop.value.code == 0
    assert "checkpoint of pypkg.pretrain" in " ".join(capsys.readouterr().out.split())
