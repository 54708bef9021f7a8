"""File descriptors of a run with a thousand ranks and more."""

from __future__ import annotations

import fcntl
import resource
import socket

import pytest

from pypkg.errors import UserError
from pypkg.files.file_handles import raise_limit
from pypkg.parallel.endpoints import free_ports
from pypkg.parallel.launch.coordinator import Coordinator
from pypkg.parallel.launch.message_stream import MessageStream
from pypkg.parallel.launch.rendezvous import Limits


def test_a_limit_that_is_too_low_for_all_ranks(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(
        UserError, match=r"1016 ranks to rank 0 need about 2\d\d\d open files.*1024"
    ):
        Coordinator(("127.0.0.1", free_ports(1)[0]), 1016, Limits())


def test_a_connection_above_descriptor_1023():
    raise_limit()
    one, other = socket.socketpair()
    with one, other:
        high = fcntl.fcntl(one.fileno(), fcntl.F_DUPFD, 1500)
        stream = MessageStream(socket.socket(fileno=high))
        assert not stream.wait(0)
        other.sendall(b'{"kind": "start"}\n')
        assert stream.wait(5)
        assert stream.receive() == [{"kind": "start"}]
        stream.close()
