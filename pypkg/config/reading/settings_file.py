"""Reads a settings file, JSON or YAML, into keys and values."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

from pypkg.errors import UserError

_YAML_NULLS = ("", "~", "null", "Null", "NULL")


class Content(NamedTuple):
    """The content of a settings file.

    Attributes:
        values: by key; if a key occurs several times, its last value.
        doubled: the keys that occur several times.
    """

    values: dict[str, Any]
    doubled: list[str]


def read_file(name: str) -> Content:
    """Reads the settings file ``name``, which ends in .json, .yaml or .yml.

    Values of a YAML file stay text, because versions of YAML differ in what they read as a number
    (``3e-5``) or a boolean (``no``). The type of the setting determines the conversion.

    Raises:
        UserError: the file has another ending, cannot be read, has a syntax error, or is not a
            mapping.
    """
    readers = {".json": _read_json, ".yaml": _read_yaml, ".yml": _read_yaml}
    reader = readers.get(Path(name).suffix)
    if reader is None:
        raise UserError(
            f"the first argument is {name!r}; expected a settings file ending in .json, .yaml or "
            ".yml, or --key value"
        )
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the settings file {name} cannot be read: {error}. Save it as UTF-8."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"the settings file {name} cannot be read: {reason}. Check the path and its "
            "permissions."
        ) from error
    doubled: list[str] = []
    values = reader(name, text, doubled)
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(
            f'{name} holds {found}; expected an object {{"key": value, ...}} with settings'
        )
    return Content({str(key): value for key, value in values.items()}, doubled)


def _read_json(name: str, text: str, doubled: list[str]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _as_dict(pairs, doubled))
    except json.JSONDecodeError as error:
        place = _place(text, error.lineno, error.colno)
        raise UserError(f"{name} is not valid JSON: {error.msg} {place}") from error
    except ValueError as error:  # Python's limit of digits
        raise UserError(
            f"{name} is not usable JSON: it holds a number of more than 4,300 digits"
        ) from error
    except RecursionError as error:
        raise UserError(f"{name} is not usable JSON: {error}") from error


def _read_yaml(name: str, text: str, doubled: list[str]) -> Any:
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            pairs = [
                (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                for key, value in node.value
            ]
            return _as_dict(pairs, doubled)

    try:
        values = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = _place(text, mark.line + 1, mark.column + 1) if mark else ""
        raise UserError(f"{name} is not valid YAML: {error.problem} {place}") from error
    except TypeError as error:
        raise UserError(
            f"{name} is not usable YAML: a list or a mapping stands where a key is expected"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{name} is not usable YAML: {error}") from error
    if not isinstance(values, dict):
        return values
    return {key: None if value in _YAML_NULLS else value for key, value in values.items()}


def _as_dict(pairs: list[tuple[Any, Any]], doubled: list[str]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found and key not in doubled:
            doubled.append(key)
        found[key] = value
    return found


def _place(text: str, line: int, column: int) -> str:
    """The position of a syntax error as text, with the line and a mark below the column.

    Args:
        line, column: counted from 1.
    """
    lines = text.splitlines() or [""]
    shown = lines[min(line, len(lines)) - 1]
    return f"at line {line}, column {column}:\n  {shown}\n  {' ' * (column - 1)}^"
