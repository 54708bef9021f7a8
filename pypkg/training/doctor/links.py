"""All-reduce bandwidth of each parallel axis, and of the single links of a slow group."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from math import inf

import paddle
import paddle.distributed as dist

from pypkg.device.capabilities import Capabilities
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.parallel.launch.rendezvous import named
from pypkg.planner.time.gpus import gpu_of_device
from pypkg.training.doctor.findings import Finding, Severity, counted, place_of

Ranks = tuple[int, ...]
Pair = tuple[int, int]  # sender and receiver

AXES = ("tensor", "context", "sharding", "data", "pipeline")
_RUNS = 5
_BYTES = {"gpu": 256 * 2**20, "cpu": 4 * 2**20}
_SLOW = 0.5  # of the median rate of an axis
# GB/s that even a slow link should exceed: PCIe 3 x16 within a machine has 16, a network of
# 10 Gbit/s between machines 1.25.
_LEAST_WITHIN, _LEAST_BETWEEN = 8.0, 1.0


def measure(device: str) -> dict[str, float]:
    """This rank's all-reduce bandwidth in GB/s for each axis with several ranks.

    It is the bus bandwidth of nccl-tests, 2 (n - 1) / n x bytes / seconds for n ranks, of the
    fastest of several runs, so that other load matters little. A wrong sum has the rate 0.

    All ranks must call this.
    """
    current = mesh.current()
    tensor = paddle.ones([_BYTES[device] // 4])
    rates = {}
    for axis in AXES:
        group = getattr(current, axis)
        if group is None:
            continue
        fastest = inf
        for _ in range(_RUNS):
            tensor.fill_(1.0)
            dist.barrier(group)
            started = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            total = tensor[:1].item()  # waits for the device
            fastest = min(fastest, time.perf_counter() - started)
        if total != group.nranks:
            fastest = inf  # a rate of 0: the sum is wrong
        rates[axis] = 2 * (group.nranks - 1) / group.nranks * _BYTES[device] / fastest / 1e9
    return rates


def link_findings(capabilities: Capabilities, hosts: Sequence[str]) -> list[Finding]:
    """Measures all axes. All ranks must call this. ``hosts`` has the host of each rank."""
    current, device = mesh.current(), capabilities.device
    gpu = gpu_of_device(capabilities.device_name, capabilities.memory_bytes)
    link = _SLOW * gpu.link * gpu.link_efficiency / 1e9 if device == "gpu" and gpu else 0.0
    rates = from_all_ranks(lambda: measure(device))
    found: list[Finding] = []
    for axis in AXES:
        if getattr(current.degrees, axis) == 1:
            continue
        groups = _groups(current, axis)
        slowest = {group: min(rates[rank][axis] for rank in group) for group in groups}
        least = least_rates(slowest, device, hosts, link)
        slow = [group for group, rate in slowest.items() if rate < least[group] and len(group) > 2]
        pairs = _pairs_of(axis, device, slow) if slow else {}  # ``slow`` is equal on all ranks
        found += judge(axis, slowest, least, pairs, len(hosts))
    return found


def _pairs_of(axis: str, device: str, slow: Sequence[Ranks]) -> dict[Pair, float]:
    """The rates of all links of the slow groups."""
    takes_part = any(mesh.current().rank in group for group in slow)
    measured = from_all_ranks(lambda: pair_rates(axis, device, takes_part))
    return {pair: rate for found in measured for pair, rate in found.items()}


def least_rates(
    rates: Mapping[Ranks, float], device: str, hosts: Sequence[str], link: float = 0.0
) -> dict[Ranks, float]:
    """Expected minimum rate of each group of an axis, in GB/s.

    Args:
        rates: measured GB/s of each group.
        link: GB/s that the GPUs' links within a machine should reach; 0: unknown.
    """
    half = _SLOW * statistics.median(rates.values())
    least = {}
    for group in rates:
        within = len({hosts[rank] for rank in group}) == 1
        usual = max(_LEAST_WITHIN, link) if within else _LEAST_BETWEEN
        least[group] = max(half, usual if device == "gpu" else 0.0)
    return least


def pair_rates(axis: str, device: str, takes_part: bool) -> dict[Pair, float]:
    """GB/s from each rank of a slow group to the next rank of its ring.

    The receiver measures, and returns the rate. All ranks of the group must call this.

    Args:
        takes_part: whether this rank is in a slow group.
    """
    group = getattr(mesh.current(), axis)
    found: dict[Pair, float] = {}
    if not takes_part or group is None:
        return found
    tensor = paddle.ones([_BYTES[device] // 4])
    for place, sender in enumerate(group.ranks):
        receiver = group.ranks[(place + 1) % group.nranks]
        seconds = []
        for _ in range(_RUNS):
            dist.barrier(group)
            started = time.perf_counter()
            if group.rank == place:
                dist.send(tensor, dst=receiver, group=group)
            elif mesh.current().rank == receiver:
                dist.recv(tensor, src=sender, group=group)
                tensor[:1].item()  # waits for the device
                seconds.append(time.perf_counter() - started)
        if seconds:
            found[sender, receiver] = _BYTES[device] / min(seconds) / 1e9
    return found


def judge(
    axis: str,
    rates: Mapping[Ranks, float],
    least: Mapping[Ranks, float],
    pairs: Mapping[Pair, float],
    size: int,
) -> Iterator[Finding]:
    """The findings of an axis.

    Args:
        rates: GB/s of each group of ranks; 0: its sum is wrong.
        least: GB/s that each should reach.
        pairs: GB/s of single links of slow groups.
        size: number of ranks of the run.
    """
    check = f"all-reduce, {axis} axis"
    median = statistics.median(rates.values())
    is_well = True
    for group, rate in rates.items():
        if rate == 0:
            is_well = False
            yield Finding(
                Severity.ERROR, check, "the sum is wrong", place_of(group, size),
                "Test the links of these machines, with nccl-tests for example",
            )  # fmt: skip
        elif rate < least[group]:
            is_well = False
            yield Finding(
                Severity.WARNING, check,
                f"{rate:.3g} GB/s, expected {least[group]:.3g} or more; the median of the axis is "
                f"{median:.3g}{_slowest_pair(group, pairs)}", place_of(group, size),
                "NCCL_DEBUG=INFO and nvidia-smi topo -m show the links in use; NCCL_SOCKET_IFNAME "
                "and GLOO_SOCKET_IFNAME select the network",
            )  # fmt: skip
    if is_well:
        groups = counted(len(rates), "group")
        yield Finding(Severity.OK, check, f"{min(rates.values()):.3g} GB/s or more in {groups}")


def _slowest_pair(group: Ranks, pairs: Mapping[Pair, float]) -> str:
    """Names the slowest link of a group, if it was measured and others are much faster."""
    own = {pair: rate for pair, rate in pairs.items() if pair[0] in group}
    if not own:
        return ""
    median = statistics.median(own.values())
    (sender, receiver), rate = min(own.items(), key=lambda each: each[1])
    if rate >= _SLOW * median:
        return "; all its links are alike"
    return (
        f"; the link from {named([sender])} to {named([receiver])} has {rate:.3g} GB/s, and the "
        f"median one {median:.3g}"
    )


def _groups(current: mesh.Mesh, axis: str) -> list[Ranks]:
    """The ranks that differ on ``axis`` alone, for each group of the axis."""
    groups: dict[tuple, list[int]] = {}
    for rank in range(current.world_size):
        key = current.coordinates(rank)._replace(**{axis: 0})
        groups.setdefault(key, []).append(rank)
    return [tuple(group) for group in groups.values()]
