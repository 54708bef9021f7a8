"""Messages between the ranks of a run: JSON objects over a socket, one per line."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from typing import Any

_LONGEST_LINE = 1 << 20
_BEGIN = b'{"kind": "'


class MessageStream:
    """One end of a connection. Any thread may send; only one thread may receive."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait(self, seconds: float) -> bool:
        """Waits up to ``seconds`` for data; returns whether there is any.

        Raises:
            ValueError, OSError: this end is closed.
        """
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def send(self, kind: str, **content: Any) -> None:
        """Sends a message. A closed peer is ignored."""
        line = json.dumps({"kind": kind, **content}).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(line)

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages received since the last call, possibly none; None if the peer has closed."""
        try:
            received = self._socket.recv(1 << 16)
        except OSError:
            return None
        *lines, self._received = (self._received + received).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # the peer is not a rank of this run
            return None
        if not received or len(self._received) > _LONGEST_LINE:
            return messages or None
        if not all(isinstance(message, dict) and "kind" in message for message in messages):
            return None
        return messages

    def has_message(self) -> bool:
        """Whether the received data begins like a message. It is not consumed."""
        try:
            return self._socket.recv(len(_BEGIN), socket.MSG_PEEK) == _BEGIN
        except OSError:
            return False

    def finish(self, seconds: float) -> None:
        """Stops sending, waits up to ``seconds`` until the peer has closed, and closes this end.

        Closing with data unread would reset the connection, and the peer would lose messages that
        it has not received yet.
        """
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError, ValueError):  # this end is closed already
            self._socket.shutdown(socket.SHUT_WR)
            while self.wait(max(deadline - time.monotonic(), 0.0)):
                with contextlib.suppress(BlockingIOError):  # another thread has received it
                    if not self._socket.recv(1 << 16, socket.MSG_DONTWAIT):
                        break
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
