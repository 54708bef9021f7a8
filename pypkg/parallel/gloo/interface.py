"""The network interface that gloo's groups use."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from pypkg.errors import UserError
from pypkg.parallel.endpoints import own_host

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def choose_interface() -> None:
    """Sets GLOO_SOCKET_IFNAME to the interface of this rank's endpoint, unless it is set already.

    Without this variable gloo uses the address to which the host name resolves, or else the
    loopback interface, which other hosts cannot reach.

    Raises:
        UserError: the host of the endpoint cannot be resolved, or no interface has its address.
    """
    if os.environ.get(_VARIABLE):
        return
    host = own_host()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(
            f"PADDLE_CURRENT_ENDPOINT names the host {host!r}, which cannot be looked up "
            f"({error.strerror}); give paddle.distributed.launch --host ADDRESS, an IPv4 address "
            "of this machine"
        ) from error
    if address.startswith("127."):
        os.environ[_VARIABLE] = "lo"
        return
    interfaces = _interfaces()
    for name, found in interfaces.items():
        if found == address:
            os.environ[_VARIABLE] = name
            return
    listed = ", ".join(f"{found} ({name})" for name, found in interfaces.items())
    raise UserError(
        f"PADDLE_CURRENT_ENDPOINT is on {host}, but this machine's addresses are {listed}; give "
        f"paddle.distributed.launch --host ADDRESS with one of them, or set {_VARIABLE} to the "
        "interface that leads to the other machines"
    )


def _interfaces() -> dict[str, str]:
    """IPv4 address of each network interface that has one, by the interface's name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # the interface has no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
