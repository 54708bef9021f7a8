"""Checks that the machines of a run can connect to each other, as NCCL and gloo need.

Both listen on ports that the system chooses. Behind a firewall that opens only known ports the
rendezvous succeeds, and then the first collective hangs.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pypkg.parallel import endpoints, mesh
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.training.doctor.findings import Finding, Severity, counted, place_of

Address = tuple[str, int]

_TIMEOUT = 5.0  # seconds for a connection
_AT_ONCE = 32  # concurrent attempts


def port_findings(hosts: Sequence[str]) -> list[Finding]:
    """Connects the first rank of each machine to those of all others. All ranks must call this.

    Args:
        hosts: host of each rank.
    """
    rank = mesh.current().rank
    leaders = sorted(hosts.index(host) for host in set(hosts))
    with contextlib.ExitStack() as stack:
        listener = None
        if rank in leaders:
            listener = stack.enter_context(socket.create_server(("", 0), backlog=1024))
        addresses = from_all_ranks(
            lambda: (endpoints.own_host(), listener.getsockname()[1]) if listener else None
        )
        known = {leader: addresses[leader] for leader in leaders}
        unreached = from_all_ranks(lambda: unreachable(known) if rank in leaders else {})
    return list(judge(dict(enumerate(unreached)), hosts))


def unreachable(addresses: Mapping[int, Address | None]) -> dict[int, str]:
    """The ranks whose address refuses a connection, with the reason.

    Args:
        addresses: by rank.
    """

    def problem(address: Address | None) -> str:
        assert address is not None
        try:
            socket.create_connection(address, _TIMEOUT).close()
        except OSError as error:
            return f"{address[0]}:{address[1]}: {error.strerror or error}"
        return ""

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = dict(zip(addresses, pool.map(problem, addresses.values()), strict=True))
    return {rank: text for rank, text in found.items() if text}


def judge(unreached: Mapping[int, Mapping[int, str]], hosts: Sequence[str]) -> Iterator[Finding]:
    """The findings.

    Args:
        unreached: for each rank, the ranks that it did not reach, with the reason.
        hosts: host of each rank.
    """
    targets = sorted({target for found in unreached.values() for target in found})
    for target in targets:
        by = [rank for rank, found in unreached.items() if target in found]
        yield Finding(
            Severity.ERROR, "ports", f"no connection to {unreached[by[0]][target]}",
            place_of(by, len(hosts)),
            "Open all ports between the machines, or name the network that joins them: "
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
        )  # fmt: skip
    if not targets:
        machines = len(set(hosts))
        said = "the machine reaches itself" if machines == 1 else "each reaches the others"
        yield Finding(Severity.OK, "ports", f"{counted(machines, 'machine')}; {said}")
