"""Process groups that find their own members.

Every gloo group of Paddle 3.3.1 meets under the same keys of the one store, so several groups
connect to one another's members. Here each group gets a store of its own, which its first member
serves and which is not needed any more once all have the group.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import Any, TypeAlias

from paddle.base import core

ProcessGroup: TypeAlias = core.ProcessGroupGloo

_STORE_TIMEOUT = 900  # seconds
_create = ProcessGroup.create


@dataclass
class Group:
    """What is known of a process group beyond what it says itself.

    Attributes:
        process_group: kept alive, since groups are found by identity.
        number: the same for all members; tells groups apart.
        store: of this group alone; kept alive, since other members may still be asking it.
        mailboxes: where the members receive messages, by rank.
    """

    process_group: ProcessGroup
    number: int
    store: core.TCPStore
    mailboxes: list[str]


_groups: dict[int, Group] = {}  # by the identity of the process group


def group_of(process_group: ProcessGroup) -> Group:
    return _groups[id(process_group)]


def group_numbered(number: int) -> Group:
    return next(group for group in _groups.values() if group.number == number)


def install(mailbox_address: str) -> None:
    """Makes groups this way from now on.

    Args:
        mailbox_address: where this process receives messages.
    """

    def create(store: core.TCPStore, rank: int, size: int, number: int = 0) -> ProcessGroup:
        own = _make_store(store, number) if rank == 0 else _find_store(store, number)
        process_group = _create(own, rank, size, number)
        own.set(_mailbox_key(rank), mailbox_address)
        mailboxes = [own.get(_mailbox_key(each)).decode() for each in range(size)]
        _groups[id(process_group)] = Group(process_group, number, own, mailboxes)
        return process_group

    replaced: Any = ProcessGroup
    replaced.create = staticmethod(create)


def _mailbox_key(rank: int) -> str:
    return f"mailbox/{rank}"


def _port_key(number: int) -> str:
    return f"pypkg/group/{number}"


def _find_store(store: core.TCPStore, number: int) -> core.TCPStore:
    port = int(store.get(_port_key(number)))
    return core.TCPStore("127.0.0.1", port, False, 0, _STORE_TIMEOUT)


def _make_store(store: core.TCPStore, number: int) -> core.TCPStore:
    """On a free port of this machine, which another process may take before we do."""
    for _ in range(20):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with contextlib.suppress(Exception):  # Paddle's own errors, of several types
            own = core.TCPStore("127.0.0.1", port, True, 0, _STORE_TIMEOUT)
            store.set(_port_key(number), str(port))
            return own
    raise RuntimeError("no free port for the store of a process group")
