"""A rank of a campaign: ``pypkg pretrain`` in a folder, and perhaps in a network namespace.

Arguments: a namespace of ``ip netns``, or "" for the present network; a folder; the settings.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

_CLONE_NEWNET = 0x40000000  # sched.h


def enter_network(namespace: str) -> None:
    """Moves this process, which has one thread, into a network of ``ip netns``; takes root."""
    with open(f"/run/netns/{namespace}", "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


if __name__ == "__main__":
    network, folder, *settings = sys.argv[1:]
    if network:
        enter_network(network)
    os.chdir(folder)
    sys.argv = ["pypkg.pretrain", *settings]
    runpy.run_module("pypkg.pretrain", run_name="__main__", alter_sys=True)
