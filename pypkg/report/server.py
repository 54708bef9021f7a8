"""Serves the page of runs in progress, to browsers on this machine only."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pypkg.errors import UserError
from pypkg.report.document import Document
from pypkg.report.page import render

logger = logging.getLogger("pypkg")

LOOPBACK = "127.0.0.1"
_LEAST_SECONDS = 1.0  # between two reads of the folders
# Other Host headers are refused: a foreign site can point its name at this machine (DNS rebinding).
_HOSTS = ("localhost", LOOPBACK, "[::1]")


class PageServer(ThreadingHTTPServer):
    """Answers ``/`` with the page and ``/document.json`` with the newest document.

    Args:
        collect: makes the document; called at most once a second.
        port: to listen at; 0 for any free one.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, collect: Callable[[], Document], port: int) -> None:
        self._collect = collect
        self._lock = threading.Lock()
        self._newest: tuple[float, Document] | None = None
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UserError(
                f"port {port} of this machine cannot be listened at: {error.strerror}. Give "
                "another --port, or leave it out."
            ) from error

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def document(self) -> Document:
        """The newest document, at most a second old."""
        with self._lock:
            now = time.monotonic()
            if self._newest is None or now - self._newest[0] >= _LEAST_SECONDS:
                self._newest = now, self._collect()
            return self._newest[1]


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in _HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, "this server answers to localhost alone")
        elif self.path == "/":
            self._answer("text/html", lambda: render(self.server.document()))
        elif self.path == "/document.json":
            self._answer("application/json", lambda: self.server.document().to_json())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, make: Callable[[], str]) -> None:
        try:
            body = make().encode()
        except UserError as error:  # the folder was removed
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)
