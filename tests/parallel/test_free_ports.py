"""Ports for ranks and their groups."""

from __future__ import annotations

import socket

import pytest

from pypkg.parallel import endpoints
from pypkg.parallel.endpoints import free_ports


@pytest.fixture
def connections(tmp_path, monkeypatch):
    """The file with the ports of connections, as of a machine of the test's own."""
    file = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(endpoints, "_EPHEMERAL_PORTS", file)
    return file


def test_no_connection_is_given_such_a_port(connections):
    connections.write_text("20000\t60999\n")
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(10_000 <= port < 20_000 for port in ports)


def test_a_port_that_is_listened_at_is_left_out(connections, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(endpoints, "_FIRST_PORT", port)
        connections.write_text(f"{port + 1} 60999\n")
        assert port not in free_ports(3)


@pytest.mark.parametrize("content", [None, "1024 60999\n"])
def test_the_system_chooses_where_it_leaves_no_room(connections, content):
    if content is not None:
        connections.write_text(content)
    assert len(set(free_ports(4))) == 4
