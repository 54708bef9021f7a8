"""Serves files to the other ranks of a run, which read them as file objects.

A rank offers folders, and the other ranks read ranges of bytes of the files in them. A request is a
line of JSON. The answer is a line of JSON with the number of bytes, followed by the bytes. Each
request contains the secret of its server (``Address``). Nothing here imports Paddle.
"""

from __future__ import annotations

import errno
import hmac
import io
import json
import os
import secrets
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any, NamedTuple

_TIMEOUT = 300.0  # seconds without data, after which a connection fails


class Address(NamedTuple):
    """The address of a server, and the secret that its requests must carry."""

    host: str
    port: int
    secret: str


class FileServer:
    """A server that runs in threads of this process, from its construction until ``close``.

    Attributes:
        address: what other ranks need to open a ``RemoteFile``.

    Args:
        host: IPv4 address of this machine at which other ranks reach it. The system chooses a free
            port.

    Raises:
        OSError: the address is not one of this machine.
    """

    def __init__(self, host: str) -> None:
        self._server = _Server((host, 0), _Handler)
        self.address = Address(host, self._server.server_address[1], self._server.secret)
        threading.Thread(target=self._server.serve_forever, name="pypkg-files", daemon=True).start()

    def offer(self, folder: Path) -> dict[str, int]:
        """Lets other ranks read the files in ``folder``, but not those in its subfolders.

        Returns:
            Size of each file in bytes, by file name; empty if the folder does not exist.
        """
        self._server.folders.add(str(folder))
        if not folder.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}

    def close(self) -> None:
        """Stops accepting connections."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: object) -> None:
        self.secret = secrets.token_hex(16)
        self.folders: set[str] = set()
        super().__init__(*arguments)  # type: ignore[arg-type]


class _Handler(socketserver.StreamRequestHandler):
    """Answers the requests of one connection, until the client closes it."""

    server: _Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            for line in self.rfile:
                self._answer(**json.loads(line))
        except (OSError, ValueError, TypeError):
            pass  # the client has ended, or is not a rank of this run; the connection closes

    def _answer(self, secret: str, path: str, offset: int, count: int) -> None:
        if not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
            raise ValueError("wrong secret")
        if os.path.dirname(path) not in self.server.folders:
            self._send_header(errno=errno.EACCES)
            return
        try:
            with open(path, "rb", buffering=0) as file:
                count = max(0, min(count, os.fstat(file.fileno()).st_size - offset))
                self._send_header(count=count)
                if count:
                    self.connection.sendfile(file, offset, count)
        except FileNotFoundError:
            self._send_header(errno=errno.ENOENT)

    def _send_header(self, **fields: int) -> None:
        self.wfile.write(json.dumps(fields).encode() + b"\n")


class RemoteFile(io.RawIOBase):
    """A file on a server, opened for reading.

    Args:
        address: of the server.
        path: path of the file on the server's machine.
    """

    def __init__(self, address: Address, path: str) -> None:
        self._address, self._path, self._position = address, path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("a remote file only supports seek from its start")
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Reads into ``buffer`` and returns the number of bytes, as ``io.RawIOBase`` defines it.

        Raises:
            OSError: the server cannot be reached, has ended, or cannot read the file.
        """
        target = memoryview(buffer).cast("B")
        try:
            count = _connection(self._address).read(self._path, self._position, target)
        except OSError as error:
            _connections.pop(self._address, None)
            reason = error.strerror or str(error)
            where = f"{self._address.host}:{self._address.port}"
            raise OSError(error.errno or errno.EIO, f"{reason} (served by {where})") from error
        self._position += count
        return count


class _Connection:
    """A connection to a server, for one request at a time."""

    def __init__(self, address: Address) -> None:
        self._secret, self._lock = address.secret, threading.Lock()
        self._socket = socket.create_connection((address.host, address.port), _TIMEOUT)
        self._stream = self._socket.makefile("rb")

    def read(self, path: str, offset: int, target: memoryview) -> int:
        """Reads from ``offset`` into ``target``; returns the number of bytes."""
        wanted = {"secret": self._secret, "path": path, "offset": offset, "count": len(target)}
        with self._lock:
            self._socket.sendall(json.dumps(wanted).encode() + b"\n")
            answer = json.loads(self._stream.readline() or b'{"errno": 104}')
            if "errno" in answer:
                raise OSError(answer["errno"], os.strerror(answer["errno"]))
            done, count = 0, answer["count"]
            while done < count:
                read = self._stream.readinto(target[done:count])
                if not read:
                    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                done += read
        return count


_connections: dict[Address, _Connection] = {}


def disconnect() -> None:
    """Closes the connections to all servers. The next read opens a new connection."""
    _connections.clear()


def _connection(address: Address) -> _Connection:
    if address not in _connections:
        _connections[address] = _Connection(address)
    return _connections[address]
