"""Checks of devices: GPU, driver and CUDA versions, kernels, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pypkg.ops.dispatch.library import architecture_runs, split_architectures
from pypkg.training.doctor.facts import Facts
from pypkg.training.doctor.findings import Finding, Severity, by_value, counted, place_of

_USED_BY_OTHERS = 2**31  # bytes; a context of CUDA and NCCL's buffers take less


def device_findings(facts: Sequence[Facts]) -> list[Finding]:
    """What the facts of all ranks, by rank, say about their devices."""
    found: list[Finding] = []
    for fact, ranks in by_value(facts, _kind):
        where = place_of(ranks, len(facts))
        problems = list(_problems(fact, where))
        described = f"{fact.device_name}, {fact.device_memory / 2**30:.0f} GiB"
        found += problems or [Finding(Severity.OK, "device", described, where)]
    for rank, fact in enumerate(facts):
        found += _memory(fact, place_of([rank], len(facts)))
    return found


def _kind(fact: Facts) -> tuple:
    return (fact.host, fact.device_name, fact.capability, fact.driver_cuda, fact.paddle_cuda,
            fact.kernels_cuda, fact.architectures, fact.ops_backend, fact.gpus)  # fmt: skip


def _problems(fact: Facts, where: str) -> Iterator[Finding]:
    if fact.device == "cpu":
        if fact.gpus and fact.paddle_cuda is None:
            yield Finding(
                Severity.WARNING, "device",
                f"the machine has {counted(fact.gpus, 'GPU')}, but the installed Paddle is the "
                "build for CPUs",
                where, "Install paddlepaddle-gpu",
            )  # fmt: skip
        return
    yield from _versions(fact, where)
    yield from _kernels(fact, where)


def _versions(fact: Facts, where: str) -> Iterator[Finding]:
    if (
        fact.driver_cuda
        and fact.paddle_cuda
        and fact.driver_cuda[0] < _version(fact.paddle_cuda)[0]
    ):
        served = ".".join(map(str, fact.driver_cuda))
        yield Finding(
            Severity.ERROR, "driver",
            f"it serves CUDA {served} at most, and Paddle was built with {fact.paddle_cuda}",
            where, "Install a newer driver, or the Paddle of an older CUDA",
        )  # fmt: skip
    ours, theirs = fact.kernels_cuda, fact.paddle_cuda
    if ours and theirs and _version(ours)[0] != _version(theirs)[0]:
        yield Finding(
            Severity.ERROR, "CUDA",
            f"the kernels were built with CUDA {ours}, and Paddle with {theirs}",
            where, f"Build them again with the nvcc of CUDA {_version(theirs)[0]}",
        )  # fmt: skip


def _kernels(fact: Facts, where: str) -> Iterator[Finding]:
    if fact.ops_backend != "compiled":
        yield Finding(
            Severity.WARNING, "kernels",
            f"the operators are the {fact.ops_backend} ones, which need more time and memory",
            where, "Build the compiled ones: pip install . in this environment",
        )  # fmt: skip
    elif fact.capability and fact.architectures and not _runs_on(fact):
        yield Finding(
            Severity.ERROR, "kernels",
            f"they were compiled for {fact.architectures}, and {fact.device_name} has compute "
            f"capability {fact.capability[0]}.{fact.capability[1]}",
            where, f"Build them with PYPKG_CUDA_ARCHITECTURES={_number(fact.capability)}",
        )  # fmt: skip


def _runs_on(fact: Facts) -> bool:
    """Whether the device runs one of the architectures of the kernels."""
    assert fact.capability and fact.architectures
    architectures = split_architectures(fact.architectures)
    return any(architecture_runs(each, fact.capability) for each in architectures)


def _memory(fact: Facts, where: str) -> Iterator[Finding]:
    if fact.device != "gpu" or fact.device_free is None:
        return
    used = fact.device_memory - fact.device_free
    if used > _USED_BY_OTHERS:
        yield Finding(
            Severity.WARNING, "GPU memory",
            f"{used / 2**30:.1f} GiB of {fact.device_memory / 2**30:.0f} are in use already",
            where, "End the processes that nvidia-smi lists",
        )  # fmt: skip


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _number(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]
