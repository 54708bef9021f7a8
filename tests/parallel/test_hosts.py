"""Ranks on several hosts: their names in messages, and the network interface of this one."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque

import numpy as np
import paddle
import pytest

from pypkg.errors import UserError
from pypkg.parallel import endpoints
from pypkg.parallel.gloo.interface import choose_interface
from pypkg.parallel.gloo.p2p import Mailbox, Receipt
from pypkg.parallel.launch.rendezvous import missing, named

TWO_HOSTS = "10.0.0.1:7001,10.0.0.1:7002,10.0.0.1:7003,10.0.0.2:7001"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([], "no rank"),
        ([1], "rank 1 (10.0.0.1)"),
        ([0, 1, 2], "ranks 0 to 2 (10.0.0.1)"),
        ([0, 1, 3], "ranks 0 and 1 (10.0.0.1) and rank 3 (10.0.0.2)"),
    ],
)
def test_names_of_ranks_on_several_hosts(monkeypatch, ranks, words):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", TWO_HOSTS)
    assert named(ranks) == words


def test_many_hosts_are_not_listed(monkeypatch):
    monkeypatch.setenv(
        "PADDLE_TRAINER_ENDPOINTS", ",".join(f"10.0.0.{host}:7001" for host in range(1, 9))
    )
    assert named([0, 1, 2, 3, 4, 5]) == "ranks 0 to 5"


def test_one_host_goes_without_saying(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "10.0.0.1:7001,10.0.0.1:7002")
    assert named([0, 1]) == "ranks 0 and 1"


def test_machines_that_call_themselves_localhost(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "127.0.1.1:7001,127.0.1.1:7002")
    monkeypatch.setenv("PADDLE_NNODES", "2")
    text = missing({0}, 2, 5.0)
    assert "missing: rank 1" in text
    assert "all endpoints are on 127.0.1.1" in text and "--host ADDRESS" in text
    monkeypatch.setenv("PADDLE_NNODES", "1")
    assert "--host" not in missing({0}, 2, 5.0)


@pytest.fixture
def no_interface_chosen(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that the end of the test restores it


def test_the_interface_of_the_endpoint(monkeypatch, no_interface_chosen):
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:7001")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_interface_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "192.0.2.7:7001")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_an_endpoint_of_another_machine(monkeypatch, no_interface_chosen):
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "192.0.2.7:7001")  # for documentation only
    with pytest.raises(UserError, match=r"192\.0\.2\.7.*127\.0\.0\.1 \(lo\).*--host ADDRESS"):
        choose_interface()


def test_a_host_without_an_address(monkeypatch, no_interface_chosen):
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "node-7:7001")
    with pytest.raises(UserError, match=r"'node-7', which cannot be looked up.*--host ADDRESS"):
        choose_interface()


def test_messages_between_mailboxes():
    """They keep their order, dtype and shape, even if another program connects to the port."""
    one, other = Mailbox(), Mailbox()
    host, port = one.address.split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"\0\0\0\x02no")
    arrays = [
        np.arange(6, dtype="float32").reshape(2, 3), np.array([True, False]),
        np.zeros((0, 4), "i8"),
        np.array(2.5), np.arange(1 << 18, dtype="uint16"),
    ]  # fmt: skip
    for array in arrays:
        other.put(one.address, (3, 1), array)
    other.put(one.address, (3, 2), arrays[0])
    for array in arrays:
        found = one.get((3, 1))
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(one.get((3, 2)), arrays[0])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'[3, 1, "f99", [2]]', "f99"),
        (b'[3, 1, "|O", [2]]', "elements of object"),
        (b'[3, 1, "<f4", [-2]]', "negative"),
        (b'[3, 1, "<f4"]', "not enough values"),
        (b"{}" * 3, "Extra data"),
        (None, "it begins with b'GET '"),
    ],
)
def test_what_is_no_message_is_told(line, words, caplog):
    """The mailbox serves the other ranks on."""
    one = Mailbox()
    host, port = one.address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as stranger:
        stranger.sendall(b"GET / HTTP/1.0" if line is None else _prefix(line) + line)
        with contextlib.suppress(ConnectionResetError):  # it has not read all
            assert stranger.recv(1) == b"", "the mailbox closes the connection"
    (told,) = (each.getMessage() for each in caplog.records if each.name == "pypkg")
    assert words in told and "from 127.0.0.1" in told
    Mailbox().put(one.address, (3, 1), np.ones(2))
    assert one.get((3, 1)).tolist() == [1.0, 1.0]


def _prefix(line: bytes) -> bytes:
    return len(line).to_bytes(4, "big")


def test_python_objects_are_not_sent():
    with pytest.raises(TypeError, match="expected numbers"):
        Mailbox().put("127.0.0.1:1", (3, 1), np.array([None]))


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (np.zeros((2, 3)), r"float64 \[2, 3\], but float32 \[6\] is expected"),
        (np.zeros(5, "float32"), r"float32 \[5\], but float32 \[6\] is expected"),
    ],
)
def test_a_message_of_another_kind_than_the_tensor(sent, words):
    """NumPy would round it, or say only that shapes differ."""
    mailbox, tensor = Mailbox(), paddle.zeros([6])
    receipt = Receipt((3, 1), tensor, mailbox, deque())
    mailbox.put(mailbox.address, (3, 1), sent)
    with pytest.raises(RuntimeError, match=f"rank 1 of group 3 has sent {words}"):
        receipt.wait()


def test_the_port_is_what_follows_the_last_colon(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "fe80::1:7001,one.example:7002")
    assert endpoints.hosts() == ["fe80::1", "one.example"]
