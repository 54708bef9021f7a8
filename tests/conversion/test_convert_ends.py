"""Exports name the end of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pypkg import convert

LLAMA = Path(__file__).parents[1] / "golden" / "llama"
END = "<|end|>"


def _folder(folder: Path, **changes: Any) -> Path:
    """A model whose config.json names no end, with a tokenizer whose end is token 5."""
    folder.mkdir()
    keys = json.loads((LLAMA / "config.json").read_text())
    keys = {**keys, "eos_token_id": None, **changes}
    (folder / "config.json").write_text(json.dumps(keys))
    shutil.copy(LLAMA / "model.safetensors", folder)
    vocabulary = {"a": 0, "b": 1, END: 5}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def _exported(source: Path, out: Path, *options: str) -> tuple[dict, dict | None]:
    """config.json and generation_config.json."""
    assert convert.main(["export", str(source), str(out), *options]) == 0
    file = out / "generation_config.json"
    config = json.loads((out / "config.json").read_text())
    return config, json.loads(file.read_text()) if file.exists() else None


def test_the_end_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    config, generation = _exported(_folder(tmp_path / "in"), tmp_path / "out")
    assert config["eos_token_id"] == 5
    assert generation == {"bos_token_id": 1, "eos_token_id": 5}


def test_the_tokenizer_of_another_folder(tmp_path: Path) -> None:
    other, source = _folder(tmp_path / "other"), _folder(tmp_path / "in")
    (source / "tokenizer.json").unlink()
    config, _ = _exported(source, tmp_path / "out", "--config", str(other))
    assert config["eos_token_id"] == 5


def test_what_the_source_says_stays(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", eos_token_id=[2, 3])
    config, generation = _exported(source, tmp_path / "out")
    assert config["eos_token_id"] == [2, 3]
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "top_p": 0.5}')
    _, generation = _exported(source, tmp_path / "again")
    assert generation == {"eos_token_id": 7, "top_p": 0.5}


def test_no_end_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _folder(tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    config, generation = _exported(source, tmp_path / "out")
    assert config["eos_token_id"] is None and generation is None
    logged = capsys.readouterr().err
    assert "config.json has no eos_token_id, and the tokenizer cannot be read" in logged
    (source / "tokenizer.json").unlink()
    _, generation = _exported(source, tmp_path / "without")
    assert generation is None


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_a_file_to_copy_that_is_a_link_to_nowhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result would lack it."""
    source = _folder(tmp_path / "in")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("blob")
    assert convert.main(["export", str(source), str(tmp_path / "out")]) == 2
    assert f"{name} is a link to blob, which does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
