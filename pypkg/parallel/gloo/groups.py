"""Gloo process groups with one store each.

All gloo groups of Paddle 3.3.1 use the same keys of one store, so that members of one group connect
to members of another. Here each group has its own store, on the host of its first member. The store
is only needed until all members have created the group.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, TypeAlias

from paddle.base import core

from pypkg.parallel.endpoints import free_ports, own_host

ProcessGroup: TypeAlias = core.ProcessGroupGloo

_STORE_TIMEOUT = 900  # seconds
_create = ProcessGroup.create


@dataclass
class Group:
    """A process group with its store and the addresses of its members.

    Attributes:
        process_group: kept alive, because ``group_of`` finds it by identity.
        number: Paddle's id of the group, the same on all members.
        store: the group's store; kept alive, because other members may still connect to it.
        mailboxes: host:port at which each member receives messages, by rank in the group.
    """

    process_group: ProcessGroup
    number: int
    store: core.TCPStore
    mailboxes: list[str]


_groups: dict[int, Group] = {}  # by the identity of the process group


def group_of(process_group: ProcessGroup) -> Group:
    """The ``Group`` of one of Paddle's process groups."""
    return _groups[id(process_group)]


def group_numbered(number: int) -> Group:
    """The ``Group`` with Paddle's id ``number``."""
    return next(group for group in _groups.values() if group.number == number)


def install(mailbox_address: str) -> None:
    """Replaces the method with which Paddle creates gloo groups.

    Args:
        mailbox_address: host:port at which this process receives messages.
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


def _store_key(number: int) -> str:
    return f"pypkg/group/{number}"


def _find_store(store: core.TCPStore, number: int) -> core.TCPStore:
    host, _, port = store.get(_store_key(number)).decode().rpartition(":")
    return core.TCPStore(host, int(port), False, 0, _STORE_TIMEOUT)


def _make_store(store: core.TCPStore, number: int) -> core.TCPStore:
    """Creates the store on a free port of this host; another process may take the port first."""
    host = own_host()
    for _ in range(20):
        port = free_ports(1)[0]
        with contextlib.suppress(Exception):  # Paddle raises errors of several types
            own = core.TCPStore(host, port, True, 0, _STORE_TIMEOUT)
            store.set(_store_key(number), f"{host}:{port}")
            return own
    raise RuntimeError(f"no free port of {host} for the store of a process group")
