"""Converts a JSON value or a text of the command line to the type of a setting."""

from __future__ import annotations

import json
import os
import sys
import types
import typing
from typing import Any

from pypkg.config.settings import Settings, setting_fields

_TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})
_LARGEST_INT = 2**63 - 1
_FALSE = frozenset({"false", "f", "no", "n", "off", "0"})


class ConversionError(ValueError):
    """The value cannot be converted; the message says what was expected, such as "a number"."""


def setting_types() -> dict[str, Any]:
    """The type of each setting, by name; ``X | None`` counts as X."""
    hints = typing.get_type_hints(Settings)
    found = {spec.name: hints[spec.name] for spec in setting_fields()}
    return {
        name: typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        for name, hint in found.items()
    }


def convert(raw: Any, wanted: Any) -> Any:
    """Converts ``raw`` to ``wanted``: bool, int, float, str, or a tuple of one of these.

    Text is converted to numbers and booleans, and 0 and 1 to booleans, because PaddleNLP passes all
    values through the command line.

    Raises:
        ConversionError: ``raw`` has no such value.
    """
    if typing.get_origin(wanted) is tuple:
        return _to_tuple(raw, typing.get_args(wanted)[0])
    return {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}[wanted](raw)


def _to_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    text = str(raw).lower() if isinstance(raw, int | str) else ""
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ConversionError("true or false")


def _to_int(raw: Any) -> int:
    number = _number(raw, "a whole number")
    if isinstance(number, float):
        if not number.is_integer():
            raise ConversionError("a whole number")
        number = int(number)
    if abs(number) > _LARGEST_INT:
        raise ConversionError("a whole number of at most 64 bits")
    return number


def _to_float(raw: Any) -> float:
    return float(_number(raw, "a number"))


def _number(raw: Any, expected: str) -> int | float:
    """A finite number; int if it is written as one."""
    number = raw
    if isinstance(raw, str):
        try:
            number = int(raw)
        except ValueError:
            try:
                number = float(raw)
            except ValueError:
                raise ConversionError(expected) from None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ConversionError(expected)
    if not abs(number) <= sys.float_info.max:  # false for NaN too
        raise ConversionError(expected)
    return number


def _to_str(raw: Any) -> str:
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        raw = str(raw)
    if not isinstance(raw, str):
        raise ConversionError("text")
    try:
        is_possible = b"\0" not in os.fsencode(raw)
    except UnicodeEncodeError:  # a lone surrogate, which JSON escapes can express
        is_possible = False
    if not is_possible:
        raise ConversionError("text without null bytes and lone surrogates, which no path can have")
    return raw


def _to_tuple(raw: Any, element: Any) -> tuple[Any, ...]:
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ConversionError("a list") from error
    items = raw if isinstance(raw, list) else [raw]
    try:
        return tuple(convert(item, element) for item in items)
    except ConversionError as error:
        raise ConversionError(f"a list, each item {error}") from error
