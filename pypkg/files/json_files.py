"""Reads JSON files that contain an object, with an error for keys that occur twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files.links import check_link

_MOST_LEVELS = 100


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of ``pairs``; an ``object_pairs_hook`` for ``json.loads``.

    Raises:
        ValueError: a key occurs twice. Programs differ in the value that they would use.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} occurs more than once; keep one of them")
        found[key] = value
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. A byte order mark of UTF-8 is skipped.

    Raises:
        UserError: the file is missing, cannot be read, is not JSON or not an object, or has a key
            twice.
    """
    check_link(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: it is not UTF-8 text ({error.reason})") from error
    except (ValueError, RecursionError) as error:  # a doubled key, or Python's limits
        raise UserError(f"{path} is not usable JSON: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if _is_deeper(value, _MOST_LEVELS):  # functions that traverse or print a value recurse
        raise UserError(f"{path} is not usable JSON: it has more than {_MOST_LEVELS} levels")
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects of ``value`` are nested more than ``levels`` deep."""
    level = [value]
    for _ in range(levels + 1):
        held = [each for each in level if isinstance(each, (dict, list))]
        level = [v for each in held for v in (each.values() if isinstance(each, dict) else each)]
    return bool(level)
