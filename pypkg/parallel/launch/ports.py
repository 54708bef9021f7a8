"""The ports of a run: rank 0 listens, and the other ranks connect."""

from __future__ import annotations

import logging
import socket
import time

from pypkg.errors import UserError
from pypkg.parallel.launch.message_stream import MessageStream
from pypkg.parallel.launch.rendezvous import ENDPOINT, Limits, fleet_endpoint, loopback_hint

logger = logging.getLogger("pypkg")

_SECONDS_BEFORE_A_WARNING = 10.0
_ANOTHER_PROGRAM = "another program answers at this port"
_LOCAL = ("127.0.0.1", "localhost")


def listen(address: tuple[str, int]) -> socket.socket:
    """Opens the coordinator's socket.

    Raises:
        UserError: the port is taken.
    """
    host, port = address
    try:
        return socket.create_server((host if host in _LOCAL else "", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"rank 0 cannot listen at port {port}: {error.strerror}. Another run may use "
            f"it; set {ENDPOINT} to host:port with a free port, the same on all ranks."
        ) from error


def check_fleet_port() -> None:
    """Checks fleet's port on rank 0 before fleet binds it: Paddle aborts on a taken port.

    Raises:
        UserError: another program listens at the port.
    """
    name, (host, port) = fleet_endpoint()
    try:
        socket.create_server((host if host in _LOCAL else "", port)).close()
    except OSError as error:
        raise UserError(
            f"rank 0 cannot listen at port {port} of {name} ({host}:{port}): {error.strerror}. "
            "Another run may use it; start again with a free port."
        ) from error


def join(address: tuple[str, int], rank: int, limits: Limits) -> MessageStream:
    """Connects this rank to the coordinator; returns after the coordinator's first message.

    Another program at the port, or a connection that closes at once, may be the end of an earlier
    run. The rank therefore retries until the start limit.

    Raises:
        UserError: rank 0 cannot be reached within the start limit, or another program holds its
            port.
    """
    host, port = address
    deadline = time.monotonic() + limits.start
    problem = ""
    while True:
        try:
            connection = socket.create_connection(address, timeout=5)
        except OSError as error:
            problem = f"rank 0 cannot be reached: {error.strerror or error}"
        else:
            connection.settimeout(None)
            stream = MessageStream(connection)
            stream.send("join", rank=rank)
            answer = _wait_for_an_answer(stream, deadline, f"{host}:{port}")
            if not answer:
                return stream
            stream.close()
            if problem != _ANOTHER_PROGRAM:  # the time may be up before it answers again
                problem = answer
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {rank} could not join rank 0 at {host}:{port} within {limits.start:g} s: "
                f"{problem}. Is rank 0 running? Its own output may say more. PYPKG_START_SECONDS "
                f"sets this limit, {ENDPOINT} the address.{loopback_hint()}"
            )
        time.sleep(0.2)


def _wait_for_an_answer(stream: MessageStream, deadline: float, where: str) -> str:
    """Waits for the coordinator's first message; returns the problem, empty if it has arrived."""
    warn_at = time.monotonic() + _SECONDS_BEFORE_A_WARNING
    while (now := time.monotonic()) < deadline:
        if stream.wait(0.25):
            return "" if stream.has_message() else _ANOTHER_PROGRAM
        if now > warn_at:
            warn_at = deadline
            logger.warning("%s accepts connections, but rank 0 has not answered yet", where)
    return "something accepts connections at this port but does not answer as rank 0"
