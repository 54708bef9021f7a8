"""The GPU that ``--gpu`` names: an entry of the table, a JSON file, or a measured result.

``make gpu-day`` leaves docs/gpu_days/DATE.json, whose times become achieved rates here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files.json_files import read_json
from pypkg.planner.time.gpus import GPUS, Gpu, Product, gpu_of_device

_TEXTS = ("name", "source")
# Of each number: the least, the most, and what it counts. Far beyond any GPU on both sides, so that
# only another unit fails: GB for bytes, TFLOP/s for FLOP/s, per cent for a share.
_LIMITS = {
    "memory_mib": (4096, 10**7, "MiB"),
    "matmul_flops": (1e12, 1e18, "FLOP/s"),
    "matmul_flops_float32": (1e11, 1e18, "FLOP/s"),
    "bandwidth": (1e10, 1e15, "bytes a second"),
    "link": (1e8, 1e14, "bytes a second"),
    "matmul_efficiency": (1e-3, 1, "as a share"),
    "attention_efficiency": (1e-3, 1, "as a share"),
    "bandwidth_efficiency": (1e-3, 1, "as a share"),
    "link_efficiency": (1e-3, 1, "as a share"),
    "rows": (1, 2**63, "rows"),
    "inputs": (1, 2**63, "columns"),
    "outputs": (1, 2**63, "columns"),
    "flops_per_second": (1e6, 1e18, "FLOP/s"),
}
_LONGEST = 30  # characters of a number in a message
_OURS = "pypkg"  # the first version of our kernels in a result
_MEMORY_BOUND = ("rms_norm", "rms_norm+residual", "rotary_embedding", "swiglu", "geglu")


def load_gpu(name: str) -> Gpu:
    """A GPU of the table, or of a JSON file.

    The file is a result of ``make gpu-day``, or has the fields of ``Gpu``, or is
    ``{"like": "a100-80g", ...}`` with those that differ from a GPU of the table.

    Raises:
        UserError: there is no such GPU, or the file is not of that form.
    """
    if name in GPUS:
        return GPUS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(
            f"--gpu is {name!r}; expected one of {', '.join(GPUS)}, or a .json file: a result of "
            "make gpu-day, or fields of such a GPU"
        )
    try:
        given = read_json(path)
    except UserError as error:
        raise UserError(f"--gpu {name} cannot be used: {error}. {_expected()}") from error
    try:
        if "parts" in given:
            return _checked(measured_gpu(given, str(path)))
        return _checked(_described_gpu(given, path))
    except KeyError as error:
        raise UserError(
            f"--gpu {name} is not the description of a GPU: it lacks the key {error}. {_expected()}"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--gpu {name} is not the description of a GPU: {error}. {_expected()}"
        ) from error


def _expected() -> str:
    fields = ", ".join(field.name for field in dataclasses.fields(Gpu))
    return (
        'Expected a result of make gpu-day, or a JSON object with "like", one of '
        f"{', '.join(GPUS)}, and any of {fields}"
    )


def _described_gpu(given: dict[str, Any], path: Path) -> Gpu:
    like = given.pop("like", None)
    if like is not None and like not in list(GPUS):  # also if it is a list
        raise ValueError(f'"like" is {like!r}')
    known = vars(GPUS[like]) if like is not None else {}
    fields = {field.name for field in dataclasses.fields(Gpu)}
    if unknown := sorted(given.keys() - fields - {"products"}):
        raise ValueError(f"it has no field {unknown[0]!r}")
    products = [Product(**each) for each in given.pop("products", ())]
    named = {**known, "name": path.stem, "source": str(path), "products": tuple(products), **given}
    required = [
        field.name for field in dataclasses.fields(Gpu) if field.default is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in named]:
        raise ValueError(f'it lacks {missing[0]!r}, and names no GPU that it is "like"')
    return Gpu(**named)


def measured_gpu(day: Mapping[str, Any], source: str) -> Gpu:
    """The GPU of a result of ``make gpu-day``: the entry of the table with the measured rates.

    A rate that was not measured keeps its value from the table.

    Raises:
        UserError: the table lacks the GPU, or the day has no times.
    """
    first, *_ = day["gpus"].splitlines() or [""]
    name, *rest = (word.strip() for word in first.split(","))
    mib = rest[-1].removesuffix("MiB").strip() if rest else ""
    gpu = gpu_of_device(name, int(mib) * 2**20) if mib.isdigit() else None
    if gpu is None:
        raise UserError(
            f"{source} is of {day['gpus']!r}, which is none of {', '.join(GPUS)}; give --gpu a "
            ".json file with its fields"
        )
    times = next((part["report"] for part in day["parts"] if part["name"] == "time"), None)
    if not times or not times.get("rows"):
        raise UserError(
            f"{source} has no times: the day ended before the part `time`, or that part failed; "
            "run make gpu-day GPU_DAY='--from time'"
        )
    limits = times.get("limits", {})
    changes = {
        "matmul_efficiency": _share(limits.get("matmul_flops_per_second"), gpu.matmul_flops),
        "attention_efficiency": _share(_attention_rate(times["rows"]), gpu.matmul_flops),
        "bandwidth_efficiency": _share(_memory_rate(times["rows"]), gpu.bandwidth),
    }
    measured: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(
        gpu,
        **measured,
        products=tuple(Product(**each) for each in times.get("products", ())),
        source=f"{source}, measured on {day['date']}",
    )


def _share(rate: float | None, peak: float) -> float | None:
    """Of the data sheet; at most all of it."""
    return None if rate is None else min(1.0, rate / peak)


def _attention_rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """FLOP/s of forward and backward together, at the causal shape with most operations."""
    passes: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in _ours(rows, ("flash_attention",)):
        if row["shape"].endswith(" causal"):
            passes.setdefault(row["shape"], {})[row["pass"]] = row
    both = [tuple(each.values()) for each in passes.values() if len(each) > 1]
    largest = max(both, key=lambda each: sum(row["flops"] for row in each), default=())
    return _rate(largest, "flops")


def _memory_rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes per second of the operators that are bound by memory."""
    return _rate(_ours(rows, _MEMORY_BOUND), "bytes")


def _ours(rows: Sequence[Mapping[str, Any]], operators: Sequence[str]) -> list[Mapping[str, Any]]:
    return [
        row
        for row in rows
        if row["op"] in operators and row["baseline"] == _OURS and row["dtype"] == "bfloat16"
    ]


def _rate(rows: Iterable[Mapping[str, Any]], work: str) -> float | None:
    """Work per second of all rows; their medians are milliseconds."""
    rows = list(rows)
    if not rows:
        return None
    seconds = sum(row["median"] * 1e-3 for row in rows)
    if not seconds > 0:
        raise ValueError(f"its times of {rows[0]['op']} are {seconds}, not above 0")
    return sum(row[work] for row in rows) / seconds


def _checked(gpu: Gpu) -> Gpu:
    """``gpu``, if its texts are texts and its numbers can be those of a GPU.

    Raises:
        ValueError: the first that is not.
    """
    for name in _TEXTS:
        text = getattr(gpu, name)
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f"{name} is {text!r}, not a line of text")
    for each in (gpu, *gpu.products):
        for name, value in vars(each).items():
            if name in _LIMITS:
                _check_number(name if each is gpu else f"products: {name}", value, *_LIMITS[name])
    return gpu


def _check_number(name: str, value: object, least: float, most: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} is {value!r}, not a number above 0")
    if not least <= value <= most:
        found = repr(value)
        found = found if len(found) <= _LONGEST else f"{found[:_LONGEST]}..."
        raise ValueError(f"{name} is {found}; expected {least:g} to {most:g} {unit}")
