"""Reads settings from a file and the command line, and reports every problem at once.

The syntax is that of PaddleNLP's run_pretrain: an optional first argument that ends in ``.json``,
``.yaml`` or ``.yml``, then ``--key value`` pairs, which override the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pypkg.config.checks import value_problems
from pypkg.config.known_keys import NO_EFFECT, REFUSED
from pypkg.config.reading.settings_file import read_file
from pypkg.config.reading.values import ConversionError, convert, setting_types
from pypkg.config.settings import Settings, setting_fields
from pypkg.errors import UserError

_COMMAND_LINE = "on the command line"
_MOST_SHOWN, _LONGEST_SHOWN = 100, 300  # values, characters


class _Given(NamedTuple):
    value: Any
    origin: str  # "in FILE" or "on the command line"


class Reading(NamedTuple):
    """The result of reading settings.

    Attributes:
        settings: the values; an invalid one is replaced by its default.
        problems: one sentence each.
        bad: names of settings whose values have the wrong type.
    """

    settings: Settings
    problems: list[str]
    bad: set[str]


def load_settings(argv: Sequence[str]) -> Settings:
    """Reads settings from the arguments ``[CONFIG.json] [--key value ...]``.

    null, or the text None, means the default. ``check_supported`` checks whether this version
    supports the settings.

    Args:
        argv: without the program's name.

    Raises:
        UserError: the file cannot be read; or a list of all problems: unknown keys, keys that occur
            twice, wrong types, invalid values.
    """
    settings, problems, _ = read_settings(argv)
    if problems:
        raise UserError(listed(problems, "problems in the settings"))
    return settings


def read_settings(argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Reading:
    """``load_settings`` for callers that report problems together with their own.

    Args:
        defaults: values of settings that ``argv`` does not give; they may be required ones.

    Raises:
        UserError: the file cannot be read.
    """
    problems: list[str] = []
    given: dict[str, _Given] = {}
    arguments = list(argv)
    if arguments and not arguments[0].startswith("--"):
        name = arguments.pop(0)
        content, doubled = read_file(name)
        given.update({key: _Given(value, f"in {name}") for key, value in content.items()})
        problems += [
            f"{key!r} occurs more than once in {name}; keep one of them" for key in doubled
        ]
    given.update(_read_command_line(arguments, problems))
    values, bad = _convert_all(given, problems)
    values = {**(defaults or {}), **values}
    own = {spec.name for spec in setting_fields()} & set(values)
    others = {key: value for key, value in values.items() if key not in own}
    settings = Settings(**{key: values[key] for key in own}, other_keys=others)
    problems += value_problems(settings, own, skip=bad)
    return Reading(settings, problems, bad)


def listed(problems: Sequence[str], title: str) -> str:
    """One message for several problems: each on its own line, unless there is only one."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} {title}:", *(f"  - {each}" for each in problems)])


def _read_command_line(arguments: Sequence[str], problems: list[str]) -> dict[str, _Given]:
    """--key value, --key=value, --key value value (a list), --flag and --no_flag."""
    given: dict[str, _Given] = {}
    types = _known_types()
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            problems.append(f"{argument!r} {_COMMAND_LINE} belongs to no --key")
            continue
        key, equals, text = argument[2:].partition("=")
        values = [text] if equals else []
        while position < len(arguments) and not arguments[position].startswith("--"):
            values.append(arguments[position])
            position += 1
        key = _full_name(key, types)
        if not values and key.startswith("no_") and types.get(key[3:]) is bool:
            key, values = key[3:], ["false"]
        if not values and types.get(key) is bool:
            values = ["true"]
        if not values and key in types:
            problems.append(f"--{key} has no value; expected --{key} VALUE")
            continue
        given[key] = _Given(values[0] if len(values) == 1 else values, _COMMAND_LINE)
    return given


def _full_name(key: str, known: dict[str, Any]) -> str:
    """The only key that starts with ``key``, as in argparse; else ``key`` itself."""
    if key in known:
        return key
    longer = [name for name in known if name.startswith(key)] if key else []
    return longer[0] if len(longer) == 1 else key


def _known_types() -> dict[str, Any]:
    return {**setting_types(), **{row.name: row.type for row in (*NO_EFFECT, *REFUSED)}}


def _convert_all(given: dict[str, _Given], problems: list[str]) -> tuple[dict[str, Any], set[str]]:
    """The converted values, and the names of the settings whose values have the wrong type."""
    types = _known_types()
    values: dict[str, Any] = {}
    bad: set[str] = set()
    for key, (raw, origin) in given.items():
        if key not in types:
            problems.append(_unknown(key, origin, list(types)))
        elif raw is not None and raw != "None":  # otherwise the default
            try:
                values[key] = convert(raw, types[key])
            except ConversionError as error:
                problems.append(f"{key} is {_shown(raw)} {origin}; expected {error}")
                bad.add(key)
    return values, bad


def _shown(raw: Any) -> str:
    """The value as text for a message, limited in size: YAML aliases can expand to huge values."""
    left, count = [raw], 0
    while left:
        each = left.pop()
        count += 1
        if count > _MOST_SHOWN:
            return f"a list or object of more than {_MOST_SHOWN} values"
        if isinstance(each, (dict, list)):
            left += each.values() if isinstance(each, dict) else each
    try:
        text = json.dumps(raw)
    except RecursionError:
        return "a list or object nested too deeply"
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _unknown(key: str, origin: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "'pypkg pretrain --help' lists them"
    return f"unknown setting {key!r} {origin}; {hint}"
