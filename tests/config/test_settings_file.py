"""Settings files that cannot be read, and what the error says of them."""

from __future__ import annotations

import json
import re

import pytest
from config_testing import MINIMAL

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
    assert re.search("binary.json cannot be read.* Save it as UTF-8", _error([str(binary)]))
    assert "expected a settings file ending in .json, .yaml" in _error(["run.toml"])
    assert "cannot be read" in _error(["a\0b.json"])


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
    assert "run.json is not usable JSON: it holds a number of more" in _error([str(file)])


def test_not_an_object_and_doubled_keys(tmp_path):
    file = tmp_path / "run.json"
    file.write_text("[1]", encoding="utf-8")
    assert "holds a list; expected an object" in _error([str(file)])
    file.write_text('{"seed": 1, "seed": 2, "seed": 3}', encoding="utf-8")
    assert _error([str(file)]).count("'seed' occurs more than once") == 1


@pytest.mark.parametrize("depth", [50, 500, 900, 100_000])
def test_deep_values_are_no_traceback(tmp_path, depth):
    nested = "[" * depth + "]" * depth
    for name, text in (
        ("run.json", f'{{"max_steps": {nested}}}'),
        ("run.json", '{"a": ' * depth + "1" + "}" * depth),
        ("run.yaml", f"max_steps: {nested}"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert name in _error([str(tmp_path / name)])
    assert "expected a list" in _error(["--report_to", nested])


def test_a_yaml_file_is_read_as_a_json_file_is(tmp_path):
    """Where YAML's own types would differ, as in 3e-5 and no, the setting's type decides."""
    values = {
        **MINIMAL, "do_train": True, "do_eval": "no", "learning_rate": "3e-5", "seed": None,
        "save_strategy": "no", "sharding": "stage1 offload", "no_recompute_layers": [0, 3],
        "skip_data_intervals": [[1, 2], [4, 4]], "report_to": ["visualdl"], "split": "9,1,0",
        "data_cache": None,
    }  # fmt: skip
    file, yaml = tmp_path / "run.json", tmp_path / "run.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    yaml.write_text(
        """\
# A comment.
model_name_or_path: llama-58m
input_dir: data
output_dir: out
max_steps: 100
do_train: true
do_eval: no
learning_rate: 3e-5
seed: ~
save_strategy: no
sharding: stage1 offload
no_recompute_layers: [0, 3]
skip_data_intervals:
  - [1, 2]
  - [4, 4]
report_to:
  - visualdl
split: 9,1,0
data_cache:
""",
        encoding="utf-8",
    )
    assert load_settings([str(yaml)]) == load_settings([str(file)])
    yml = yaml.rename(tmp_path / "run.yml")
    assert load_settings([str(yml), "--seed", "7"]).seed == 7


def test_yaml_that_cannot_be_used(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nmax_steps: [1\nsplit: 1\n", encoding="utf-8")
    text = _error([str(file)])
    assert "run.yaml is not valid YAML" in text
    assert "at line 3, column" in text
    assert text.splitlines()[1] == "  split: 1"
    for content, words in (
        ("", "holds nothing; expected an object"),
        ("- 1", "holds a list; expected an object"),
        ("seed: 1\nseed: 2", "'seed' occurs more than once"),
        ("[1]: 2", "is not usable YAML: a list or a mapping stands where a key is expected"),
        ("seed: *a", "undefined alias"),
        ("seed: \x01", "YAML"),
        ("seed: x", 'seed is "x" in'),
    ):
        file.write_text(content, encoding="utf-8")
        assert words in _error([str(file)])


def test_aliases_that_make_a_value_large(tmp_path):
    """Nine lists, each of nine times the one before: 9^9 values in a file of a few lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "run.yaml").write_text("\n".join([*lines, "seed: *a8", "sharding: *a8"]))
    text = _error([str(tmp_path / "run.yaml")])
    assert "seed is a list or object of more than 100 values" in text
    assert "sharding is a list or object of more than 100 values" in text


def test_a_long_value_is_shown_in_part(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"seed": "9x" * 100_000}))
    assert len(_error([str(tmp_path / "run.json")])) < 1000
