"""The rate at which the ranks of each axis sum tensors over the links between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from math import inf

import paddle
import paddle.distributed as dist

from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.training.doctor.findings import Finding, Severity, counted, place_of

AXES = ("tensor", "sharding", "data", "pipeline")
_RUNS = 5
_BYTES = {"gpu": 256 * 2**20, "cpu": 4 * 2**20}
_SLOW = 0.5  # of the median rate of an axis
# GB/s that the slowest usual link of GPUs exceeds: PCIe 3 x16 within a machine has 16, a network of
# 10 Gbit/s between machines 1.25.
_LEAST_WITHIN, _LEAST_BETWEEN = 8.0, 1.0


def measure(device: str) -> dict[str, float]:
    """GB/s of each axis with several ranks, on this rank; all ranks have to call this.

    The rate is that of nccl-tests' bus bandwidth: 2 (n - 1) / n x bytes / seconds for n ranks. It
    is the fastest of several sums, so that other work on the machine matters little.
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


def link_findings(device: str, hosts: Sequence[str]) -> list[Finding]:
    """Measures all axes; all ranks have to call this. ``hosts``: of each rank, by rank."""
    current = mesh.current()
    rates = from_all_ranks(lambda: measure(device))
    found: list[Finding] = []
    for axis in AXES:
        if getattr(current.degrees, axis) > 1:
            groups = _groups(current, axis)
            slowest = {group: min(rates[rank][axis] for rank in group) for group in groups}
            found += judge(axis, slowest, device, hosts)
    return found


def judge(
    axis: str, rates: Mapping[tuple[int, ...], float], device: str, hosts: Sequence[str]
) -> Iterator[Finding]:
    """The findings of an axis, of which ``rates`` holds the GB/s of each group of ranks."""
    check, size = f"all-reduce, {axis} axis", len(hosts)
    median = statistics.median(rates.values())
    is_well = True
    for group, rate in rates.items():
        least = 0.0
        if device == "gpu":
            within = len({hosts[rank] for rank in group}) == 1
            least = _LEAST_WITHIN if within else _LEAST_BETWEEN
        if rate == 0:
            is_well = False
            yield Finding(
                Severity.ERROR, check, "the sum is wrong", place_of(group, size),
                "Test the links of these machines, with nccl-tests for example",
            )  # fmt: skip
        elif rate < least or rate < _SLOW * median:
            is_well = False
            yield Finding(
                Severity.WARNING, check,
                f"{rate:.3g} GB/s, expected {max(least, _SLOW * median):.3g} or more; the median "
                f"of the axis is {median:.3g}", place_of(group, size),
                "NCCL_DEBUG=INFO shows the links in use; NCCL_SOCKET_IFNAME and "
                "GLOO_SOCKET_IFNAME select the network",
            )  # fmt: skip
    if is_well:
        groups = counted(len(rates), "group")
        yield Finding(Severity.OK, check, f"{min(rates.values()):.3g} GB/s or more in {groups}")


def _groups(current: mesh.Mesh, axis: str) -> list[tuple[int, ...]]:
    """The ranks that differ on ``axis`` alone, for each group of the axis."""
    groups: dict[tuple, list[int]] = {}
    for rank in range(current.world_size):
        key = current.coordinates(rank)._replace(**{axis: 0})
        groups.setdefault(key, []).append(rank)
    return [tuple(group) for group in groups.values()]
