"""Whether this version can do what the settings ask, and what it will not take notice of."""

from __future__ import annotations

import json
from typing import Any

from pypkg.config.known_keys import NO_EFFECT, REFUSED, KnownKey
from pypkg.config.parser import listed
from pypkg.config.settings import Settings
from pypkg.errors import UserError


def check_supported(settings: Settings, world_size: int = 1) -> None:
    """Refuses what this version does not implement, before anything is started.

    Raises:
        UserError: names every such setting with its value, the reason and a way out.
    """
    problems = []
    if world_size != 1:
        problems.append(
            f"the run was launched with {world_size} processes, but this version trains in one; "
            "start it without a launcher, or with one process"
        )
    problems += [_refusal(row, value) for row, value in _asked_for(REFUSED, settings)]
    for name in ("evaluation_strategy", "save_strategy"):
        if getattr(settings, name) == "epoch":
            problems.append(
                f'{name} is "epoch", but the length of a run is set in steps; set it to "steps"'
            )
    if not (settings.do_train or settings.do_eval or settings.do_predict):
        problems.append(
            "do_train, do_eval and do_predict are all false, so there is nothing to do; set "
            "do_train to true"
        )
    if problems:
        raise UserError(listed(problems, "settings are not possible in this version"))


def notices(settings: Settings) -> list[str]:
    """Lines for the log: the given settings that change nothing, and why."""
    return [f"{row.name} has no effect: {row.why}" for row, _ in _asked_for(NO_EFFECT, settings)]


def _asked_for(rows: tuple[KnownKey, ...], settings: Settings) -> list[tuple[KnownKey, Any]]:
    """Rows whose key was given with a value other than a neutral one."""
    given = settings.other_keys
    return [(r, given[r.name]) for r in rows if r.name in given and given[r.name] not in r.neutral]


def _refusal(row: KnownKey, value: Any) -> str:
    way_out = row.way_out
    if not way_out:
        neutral = row.neutral[0]
        way_out = "leave it out" if neutral is None else f"set it to {json.dumps(neutral)}"
    return f"{row.name} is {json.dumps(value)}, but {row.why}; {way_out}"
