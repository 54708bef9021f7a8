"""Where the ranks meet before anything is started, how long they wait, and what they find out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pypkg.errors import UserError

ENDPOINT = "PYPKG_WATCH_ENDPOINT"
# What may differ: where a machine keeps its data, and what it does them with.
_LOCAL_SETTINGS = {"input_dir", "data_cache", "num_threads", "disable_tqdm"}


@dataclass(frozen=True)
class Limits:
    """How many seconds the ranks wait for one another.

    Attributes:
        start: for all ranks to come and to say that their settings are the same.
        silence: for a sign of life. One comes from a thread of every rank all the time, but not
            while other code holds Python's interpreter lock. A process that ends is noticed at
            once and a machine that is cut off after this time.
        hang: for anything to move forward, as in NCCL; 0 for ever.
    """

    start: float = 300.0
    silence: float = 300.0
    hang: float = 1800.0

    @property
    def beat(self) -> float:
        """Seconds between two signs of life."""
        return min(1.0, self.silence / 4, self.hang / 4 or 1.0)


def limits() -> Limits:
    """The defaults, or PYPKG_START_SECONDS, PYPKG_SILENCE_SECONDS and PYPKG_HANG_SECONDS.

    Raises:
        UserError: one of them is no number, or too small.
    """
    found = {}
    for name in ("start", "silence", "hang"):
        variable = f"PYPKG_{name.upper()}_SECONDS"
        text = os.environ.get(variable)
        if text is None:
            continue
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = -1.0
        if not (found[name] > 0 or (name == "hang" and found[name] == 0)):
            raise UserError(
                f"the environment variable {variable} is {text!r}; expected a number of seconds "
                "above 0" + (", or 0 to wait for ever" if name == "hang" else "")
            )
    return Limits(**found)


def meeting_point() -> tuple[str, int]:
    """Host and port where the first rank listens to the others; the same on every rank.

    It is PYPKG_WATCH_ENDPOINT where that is set. Otherwise one of the first machine's endpoints
    that the launcher has found free; fleet itself listens at PADDLE_MASTER alone. Where there is
    no such endpoint, it is the port behind PADDLE_MASTER.

    Raises:
        UserError: the environment has no endpoints, or the given one is not host:port.
    """
    master = os.environ.get("PADDLE_MASTER", "")
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    first_host = endpoints[0].rpartition(":")[0]
    free = [e for e in endpoints if e and e != master and e.rpartition(":")[0] == first_host]
    given = os.environ.get(ENDPOINT)
    host, _, port = (given or (free[0] if free else master)).rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"several processes were started, but {ENDPOINT} is {given!r}, PADDLE_MASTER "
            f"{master!r} and PADDLE_TRAINER_ENDPOINTS {','.join(endpoints)!r}; expected host:port. "
            "Start them with --nproc or python -m paddle.distributed.launch."
        )
    return host, int(port) + (0 if given or free else 1)


def comparable(settings_json: str, version: str) -> dict[str, Any]:
    """What has to be the same on all ranks."""
    settings = json.loads(settings_json)
    kept = {name: value for name, value in settings.items() if name not in _LOCAL_SETTINGS}
    return {**kept, "the version of pypkg": version}


def differences(settings: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """One line for every setting that is not the same on all ranks.

    Args:
        settings: what ``comparable`` gives, by rank.
    """
    found = []
    for name in sorted({name for each in settings.values() for name in each}):
        ranks: dict[str, list[int]] = {}
        for rank in sorted(settings):
            ranks.setdefault(json.dumps(settings[rank].get(name)), []).append(rank)
        if len(ranks) > 1:
            values = (f"{value} on {named(having)}" for value, having in ranks.items())
            found.append(f"{name} is {' and '.join(values)}")
    return found


def missing(came: set[int], size: int, seconds: float) -> str:
    """The message that not all ranks have come."""
    absent = sorted(set(range(size)) - came)
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    where = [endpoints[rank] for rank in absent if len(endpoints) == size]
    return (
        f"of {size} ranks, {named(sorted(came))} came within {seconds:g} s; missing: "
        f"{named(absent)}" + (f" ({', '.join(where)})" if where else "") + ". Look at the output "
        "of the missing ranks. PYPKG_START_SECONDS sets the time."
    )


def named(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0 and 3", "ranks 0 to 7", "no rank"."""
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) < 2:
        return f"rank {ranks[0]}" if ranks else "no rank"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
