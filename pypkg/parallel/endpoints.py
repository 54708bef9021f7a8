"""On which host each rank runs: the endpoints, host:port, that the launcher set."""

from __future__ import annotations

import ipaddress
import os

_LOOPBACK = "127.0.0.1"


def own_host() -> str:
    """Host at which other ranks reach this process (PADDLE_CURRENT_ENDPOINT)."""
    return _host(os.environ.get("PADDLE_CURRENT_ENDPOINT", "")) or _LOOPBACK


def hosts() -> list[str]:
    """Host of each rank, by rank (PADDLE_TRAINER_ENDPOINTS); empty without a launcher."""
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "")
    return [_host(each) for each in endpoints.split(",") if each]


def launched_machines() -> int:
    """Number of machines that the launcher was told of (PADDLE_NNODES); 1 without a launcher."""
    return int(os.environ.get("PADDLE_NNODES", "1"))


def is_loopback(host: str) -> bool:
    """Whether ``host`` names the machine on which it is looked up, whichever that is."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(endpoint: str) -> str:
    return endpoint.rpartition(":")[0]
