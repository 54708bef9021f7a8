"""Parses ``profiler_options``, PaddleNLP's string "batch_range=[10,20]; profile_path=DIR; ..."."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RANGE = re.compile(r"\[?(\d+),(\d+)\]?")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
# Keys of PaddleNLP that are rejected, and what to use instead.
_REFUSED = {
    "timer_only": "skip_profile_timer false measures times without a trace",
    "tracer_option": "PaddleNLP does not use it either",
    "exit_on_finished": "max_steps ends a run",
}


@dataclass(frozen=True)
class ProfilerOptions:
    """Which steps are profiled, and how.

    Attributes:
        first, stop: the range of steps of this process, counted from 0, without ``stop``.
        folder: for the results; None: output_dir/profile.
        targets: devices whose events are recorded: "cpu", "gpu" or "all".
        sorted_key: the time by which operators are sorted: "total", "max", "min" or "ave".
        record_shapes: whether the trace contains the shapes of the operators' inputs.
    """

    first: int = 10
    stop: int = 20
    folder: str | None = None
    targets: str = "all"
    sorted_key: str = "total"
    record_shapes: bool = False


def parse_profiler_options(text: str) -> ProfilerOptions:
    """Parses ``text``.

    Raises:
        ValueError: the text is invalid; the message completes "profiler_options is TEXT: ...".
    """
    found: dict[str, object] = {}
    for part in filter(None, re.sub(r"\s", "", text).split(";")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"it holds {part!r}; expected key=value")
        if key in _REFUSED:
            raise ValueError(f"it holds {key}, which has no effect here; leave it out: "
                             f"{_REFUSED[key]}")  # fmt: skip
        if key not in _READERS:
            raise ValueError(f"it holds {key!r}; expected {', '.join(_READERS)}")
        found |= _READERS[key](value)
    return ProfilerOptions(**found)  # type: ignore[arg-type]


def _range(value: str) -> dict[str, object]:
    match = _RANGE.fullmatch(value)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"batch_range is {value}; expected two steps, the first below the second, such as "
            "[10,20]"
        )
    return {"first": int(match[1]), "stop": int(match[2])}


def _folder(value: str) -> dict[str, object]:
    if not value:
        raise ValueError("profile_path is empty; expected a folder")
    return {"folder": value}


def _targets(value: str) -> dict[str, object]:
    return {"targets": _one_of("state", value.lower(), ("cpu", "gpu", "all"))}


def _sorted_key(value: str) -> dict[str, object]:
    return {"sorted_key": _one_of("sorted_key", value, ("total", "max", "min", "ave"))}


def _record_shapes(value: str) -> dict[str, object]:
    return {"record_shapes": _TRUTH[_one_of("record_shapes", value.lower(), tuple(_TRUTH))]}


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{key} is {value!r}; expected one of {', '.join(choices)}")
    return value


_READERS = {
    "batch_range": _range,
    "state": _targets,
    "sorted_key": _sorted_key,
    "profile_path": _folder,
    "record_shapes": _record_shapes,
}
