"""Checks of machines: versions, clocks, cores, memory, limits, disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median

from pypkg.config import Settings
from pypkg.models import ModelConfig
from pypkg.parallel.launch.rendezvous import named
from pypkg.planner.time.update_time import saved_bytes
from pypkg.training.doctor.facts import Facts
from pypkg.training.doctor.findings import Finding, Severity, by_value, counted, place_of

_CLOCKS_APART = 2.0  # seconds; logs and locks of output_dir compare times of machines
# What NCCL's user guide gives a container of several GPUs ("Troubleshooting": --shm-size=1g, and
# --ulimit memlock=-1). Docker's default is 64 MiB.
_SHARED_MEMORY = 2**30
_MAY_DIFFER = ("python", "driver_cuda", "device_name")  # the slowest device sets the pace
_FILES = 1024
_GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """What a run requires of its machines, in bytes.

    Attributes:
        checkpoint: size of one checkpoint; 0: none is written.
        kept: number of checkpoints on the disk at once, including the one that is being written;
            None: no limit.
        staged: host memory of each rank for asynchronous checkpoints.
        tensors: host memory of each rank for the tensors of a step; 0 on a GPU, or if unknown.
    """

    checkpoint: int = 0
    kept: int | None = None
    staged: int = 0
    tensors: int = 0


def needs_of(settings: Settings, config: ModelConfig, dtype: str) -> Needs:
    """The needs of a run.

    Its checkpoint holds the weights and, unless the settings leave it out, the optimizer state.
    """
    if not settings.do_train or not settings.saves:
        return Needs()
    weight = 4 if dtype == "float32" else 2
    state = 0 if settings.ignore_save_lr_and_optim else saved_bytes(settings, weight)
    limit = settings.save_total_limit
    return Needs(
        checkpoint=config.num_parameters() * (weight + state),
        kept=limit + 1 if limit else None,
        staged=settings.async_save_bytes or 0,
    )


def machine_findings(facts: Sequence[Facts], needs: Needs) -> list[Finding]:
    """What the facts of all ranks, by rank, say about their machines."""
    found = [*_versions(facts), *_clocks(facts), *_disk(facts[0], needs)]
    for fact, ranks in by_value(facts, lambda fact: fact.host):
        found += _machine(fact, needs, place_of(ranks, len(facts)))
    if not found:
        machines = counted(len({fact.host for fact in facts}), "machine")
        found = [Finding(Severity.OK, "machines", f"{machines} with {counted(len(facts), 'rank')}")]
    return found


def _versions(facts: Sequence[Facts]) -> Iterator[Finding]:
    for name, shown in (
        ("package", "pypkg"), ("paddle", "Paddle"), ("python", "Python"),
        ("kernel_sources", "kernels from sources"), ("kernels_cuda", "CUDA of the kernels"),
        ("architectures", "GPU architectures of the kernels"), ("driver_cuda", "GPU drivers"),
        ("device_name", "devices"),
    ):  # fmt: skip
        forms = [(getattr(fact, name), ranks) for fact, ranks in by_value(facts, attrgetter(name))]
        if len(forms) > 1:
            listed = "; ".join(f"{str(form)[:24]} on {named(ranks)}" for form, ranks in forms)
            severity = Severity.WARNING if name in _MAY_DIFFER else Severity.ERROR
            yield Finding(
                severity, "versions", f"{shown} differ: {listed}",
                remedy="Install the same on every machine",
            )  # fmt: skip


def _clocks(facts: Sequence[Facts]) -> Iterator[Finding]:
    times = [fact.clock for fact in facts]
    apart = max(times) - min(times)
    if apart > _CLOCKS_APART and len({fact.host for fact in facts}) > 1:
        early, late = times.index(min(times)), times.index(max(times))
        told = _strays(facts) or f"{named([early])} is {apart:.1f} s behind {named([late])}"
        yield Finding(
            Severity.WARNING, "clocks", told,
            remedy="Synchronise the machines, with chrony for example",
        )  # fmt: skip


def _strays(facts: Sequence[Facts]) -> str:
    """The machines whose clocks are not that of the most; empty if there is no such clock."""
    machines = list(by_value(facts, attrgetter("host")))
    usual = median(fact.clock for fact, _ in machines)
    apart = [(fact.clock - usual, ranks) for fact, ranks in machines]
    strays = [(seconds, ranks) for seconds, ranks in apart if abs(seconds) > _CLOCKS_APART]
    if 2 * len(strays) >= len(apart):
        return ""
    return "; ".join(
        f"{named(ranks)}: {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the others"
        for seconds, ranks in strays
    )


def _disk(fact: Facts, needs: Needs) -> Iterator[Finding]:
    if not needs.checkpoint or fact.disk_free is None:
        return
    free, one = fact.disk_free, needs.checkpoint
    shown = (
        f"{free / 1e9:.3g} GB are free where output_dir is, and a checkpoint takes {one / 1e9:.3g}"
    )
    if free < one:
        yield Finding(
            Severity.ERROR, "disk", f"{shown} GB",
            remedy="Free some space, or set output_dir to another disk",
        )  # fmt: skip
    elif needs.kept is not None and free < one * needs.kept:
        yield Finding(
            Severity.WARNING, "disk",
            f"{shown} GB; with save_total_limit {needs.kept - 1} there are up to {needs.kept}",
            remedy="Free some space, or lower save_total_limit",
        )  # fmt: skip


def _machine(fact: Facts, needs: Needs, where: str) -> Iterator[Finding]:
    yield from _cores(fact, where)
    yield from _memory(fact, needs, where)
    if fact.open_files is not None and fact.open_files < _FILES:
        yield Finding(
            Severity.WARNING, "open files", f"the limit is {fact.open_files}", where,
            f"Raise it to {_FILES} or more: ulimit -n",
        )  # fmt: skip
    if fact.device == "gpu" and fact.locked_memory is not None and fact.locked_memory < _GIB:
        yield Finding(
            Severity.WARNING, "locked memory",
            f"the limit is {fact.locked_memory / 2**20:.3g} MiB, too low for InfiniBand", where,
            "Raise it: ulimit -l unlimited, or docker run --ulimit memlock=-1",
        )  # fmt: skip


def _cores(fact: Facts, where: str) -> Iterator[Finding]:
    busy = fact.ranks * (fact.threads if fact.device == "cpu" else 1)
    if busy > fact.cores:
        each = f" with {counted(fact.threads, 'thread')} each" if fact.device == "cpu" else ""
        share = "shares" if fact.ranks == 1 else "share"
        yield Finding(
            Severity.WARNING, "cores",
            f"{counted(fact.ranks, 'rank')}{each} {share} {counted(fact.cores, 'core')}", where,
            "Start fewer ranks, lower num_threads, or allow the processes more cores",
        )  # fmt: skip


def _memory(fact: Facts, needs: Needs, where: str) -> Iterator[Finding]:
    shared, several = fact.shared_memory, fact.device == "gpu" and fact.ranks > 1
    if several and shared is not None and shared < _SHARED_MEMORY:
        yield Finding(
            Severity.WARNING, "shared memory",
            f"/dev/shm has {shared / 2**20:.0f} MiB free, less than the 1 GiB that NCCL asks for",
            where, "Enlarge it: docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm",
        )  # fmt: skip
    staged = fact.ranks * needs.staged
    if fact.host_free is not None and fact.host_free < staged:
        yield Finding(
            Severity.ERROR, "memory",
            f"{fact.host_free / _GIB:.3g} GiB are free, and use_async_save with async_save_memory "
            f"takes up to {staged / _GIB:.3g} for {counted(fact.ranks, 'rank')}", where,
            "Lower async_save_memory, or leave out use_async_save",
        )  # fmt: skip
    tensors = fact.ranks * needs.tensors
    if fact.host_free is not None and fact.host_free < tensors:
        yield Finding(
            Severity.WARNING, "memory",
            f"{fact.host_free / _GIB:.3g} GiB are free, and the tensors of "
            f"{counted(fact.ranks, 'rank')} take up to {tensors / _GIB:.3g}; the kernel may end "
            "the run without a message", where,
            "Lower per_device_train_batch_size and raise gradient_accumulation_steps, set "
            "recompute, or start fewer ranks",
        )  # fmt: skip
