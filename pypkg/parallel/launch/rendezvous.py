"""The rendezvous of the ranks before fleet starts: its endpoint, time limits, and checks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pypkg.errors import UserError
from pypkg.parallel import endpoints
from pypkg.parallel.launch.clock import RunningClock

ENDPOINT = "PYPKG_WATCH_ENDPOINT"
# Settings that may differ between machines: data locations and host resources.
_LOCAL_SETTINGS = {"input_dir", "data_cache", "num_threads", "disable_tqdm"}
_MOST_HOSTS = 4  # number of hosts that a message names


@dataclass(frozen=True)
class Limits:
    """Time limits, in seconds.

    Attributes:
        start: until all ranks have joined and sent equal settings.
        silence: time without a heartbeat. A thread of every rank sends heartbeats continuously,
            except while other code holds Python's interpreter lock. The end of a process is
            detected at once, the loss of a network connection after this time. Ranks and
            coordinator apply the same limit to each other.
        hang: time in which no rank makes progress, like NCCL's timeout; 0 disables the limit.
    """

    start: float = 300.0
    silence: float = 300.0
    hang: float = 1800.0

    @property
    def heartbeat_interval(self) -> float:
        """Seconds between two heartbeats."""
        return min(1.0, self.silence / 4, self.hang / 4 or 1.0)

    def clock(self) -> RunningClock:
        """A new clock, to measure the time without a heartbeat."""
        return RunningClock(max(self.silence / 8, self.heartbeat_interval))


def limits() -> Limits:
    """The limits of PYPKG_START_SECONDS, PYPKG_SILENCE_SECONDS and PYPKG_HANG_SECONDS, or defaults.

    Raises:
        UserError: a variable is not a number, or too small.
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
                "above 0" + (", or 0 for no limit" if name == "hang" else "")
            )
    return Limits(**found)


def rendezvous_endpoint() -> tuple[str, int]:
    """Host and port of rank 0's coordinator; equal on every rank.

    PYPKG_WATCH_ENDPOINT sets it. The default is one of the first machine's endpoints other than
    PADDLE_MASTER: the launcher has chosen free ports, and fleet listens at PADDLE_MASTER only. If
    there is none, it is the port after that of PADDLE_MASTER.

    Raises:
        UserError: the environment has no endpoints, or the given one is not host:port.
    """
    master = os.environ.get("PADDLE_MASTER", "")
    known = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    first_host = known[0].rpartition(":")[0]
    free = [e for e in known if e and e != master and e.rpartition(":")[0] == first_host]
    given = os.environ.get(ENDPOINT)
    host, _, port = (given or (free[0] if free else master)).rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"several processes were started, but {ENDPOINT} is {given!r}, PADDLE_MASTER "
            f"{master!r} and PADDLE_TRAINER_ENDPOINTS {','.join(known)!r}; expected host:port. "
            "Start them with --nproc or python -m paddle.distributed.launch."
        )
    return host, int(port) + (0 if given or free else 1)


def fleet_endpoint() -> tuple[str, tuple[str, int]]:
    """The endpoint of fleet's store on rank 0: name of the variable that sets it, (host, port).

    The variables have the precedence of ``paddle.distributed.init_parallel_env``.

    Raises:
        UserError: the variable is not host:port.
    """
    environment = os.environ
    name, given = "PADDLE_MASTER", environment.get("PADDLE_MASTER", "")
    if environment.get("MASTER_ADDR") and environment.get("MASTER_PORT"):
        name = "MASTER_ADDR and MASTER_PORT"
        given = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    elif not given:
        name = "PADDLE_TRAINER_ENDPOINTS"
        given = environment.get(name, "").split(",")[0]
    host, _, port = given.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{name} is {given!r}; expected host:port, the address of rank 0")
    return name, (host, int(port))


def comparable(settings_json: str, version: str) -> dict[str, Any]:
    """The settings that must be equal on all ranks, by name."""
    settings = json.loads(settings_json)
    kept = {name: value for name, value in settings.items() if name not in _LOCAL_SETTINGS}
    return {**kept, "the version of pypkg": version}


def differences(settings: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """One line for each setting that differs between ranks.

    Args:
        settings: the result of ``comparable``, by rank.
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


def missing(joined: set[int], size: int, seconds: float) -> str:
    """The error message for ranks that have not joined within ``seconds``."""
    absent = sorted(set(range(size)) - joined)
    return (
        f"of {size} ranks, {named(sorted(joined))} joined within {seconds:g} s; missing: "
        f"{named(absent)}. Look at the output of the missing ranks. PYPKG_START_SECONDS sets this "
        f"limit.{loopback_hint()}"
    )


def loopback_hint() -> str:
    """A hint that all endpoints are on the loopback interface; empty if they are not."""
    host_of = endpoints.hosts()
    machines = endpoints.launched_machines()
    if machines < 2 or not host_of or not all(map(endpoints.is_loopback, host_of)):
        return ""
    return (
        f" The launcher was told of {machines} machines, but all endpoints "
        f"are on {host_of[0]}, which other machines do not reach: give paddle.distributed.launch "
        "--host ADDRESS with the address of each machine."
    )


def named(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0 and 3", "ranks 0 to 7", "no rank".

    In a run on several hosts, with their names: "ranks 0 to 7 (10.0.0.1) and rank 8 (10.0.0.2)".
    """
    host_of = endpoints.hosts()
    if len(set(host_of)) < 2 or not ranks or ranks[-1] >= len(host_of):
        return _listed(ranks)
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(host_of[rank], []).append(rank)
    if len(by_host) > _MOST_HOSTS:
        return _listed(ranks)
    return " and ".join(f"{_listed(own)} ({host})" for host, own in by_host.items())


def _listed(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) < 2:
        return f"rank {ranks[0]}" if ranks else "no rank"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
