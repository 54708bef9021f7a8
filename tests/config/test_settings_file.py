"""Settings files that cannot be read, and what the error says of them."""

from __future__ import annotations

import pytest

from pypkg.config import load_settings
from pypkg.errors import UserError


def _error(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(arguments)
    return str(caught.value)


def test_a_missing_file_a_folder_and_a_binary_file(tmp_path):
    assert "no.json cannot be read: No such file or directory" in _error(
        [str(tmp_path / "no.json")]
    )
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert "cannot be read: Is a directory" in _error([str(folder)])
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "binary.json cannot be read" in _error([str(binary)])
    assert "expected a settings file ending in .json" in _error(["run.yaml"])


def test_invalid_json_shows_the_place(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{\n  "seed": 1,\n  "max_steps" 3\n}\n', encoding="utf-8")
    text = _error([str(file)])
    assert "at line 3, column 15" in text
    lines = text.splitlines()
    assert lines[1] == '    "max_steps" 3'
    assert lines[2].index("^") - 2 == 14
    file.write_text("", encoding="utf-8")
    assert "at line 1, column 1" in _error([str(file)])
    file.write_text("[" * 100_000, encoding="utf-8")
    assert "JSON" in _error([str(file)])
    file.write_text('{"seed": ' + "9" * 5000 + "}", encoding="utf-8")
    assert "JSON" in _error([str(file)])


def test_not_an_object_and_doubled_keys(tmp_path):
    file = tmp_path / "run.json"
    file.write_text("[1]", encoding="utf-8")
    assert "holds a list; expected an object" in _error([str(file)])
    file.write_text('{"seed": 1, "seed": 2, "seed": 3}', encoding="utf-8")
    assert _error([str(file)]).count("'seed' occurs more than once") == 1
