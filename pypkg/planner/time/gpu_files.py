"""The GPU that ``--gpu`` names: an entry of the table, a JSON file, or a measured result.

``make gpu-day`` leaves docs/gpu_days/DATE.json, whose times become achieved rates here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.planner.time.gpus import GPUS, Gpu, Product, gpu_of_device

_TEXTS = ("name", "source", "products")  # fields that are no numbers
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
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError("it holds no JSON object")
        if "parts" in given:
            return _checked(measured_gpu(given, str(path)))
        return _checked(_described_gpu(given, path))
    except OSError as error:
        raise UserError(f"--gpu {name}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Gpu))
        raise UserError(
            f"--gpu {name} is not the description of a GPU: {error}. Expected a result of make "
            f'gpu-day, or a JSON object with "like", one of {", ".join(GPUS)}, and any of {fields}'
        ) from error


def _described_gpu(given: dict[str, Any], path: Path) -> Gpu:
    like = given.pop("like", None)
    if like is not None and like not in GPUS:
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
    name, *rest = (word.strip() for word in day["gpus"].splitlines()[0].split(","))
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
    return sum(row[work] for row in rows) / sum(row["median"] * 1e-3 for row in rows)


def _checked(gpu: Gpu) -> Gpu:
    numbers = {name: value for name, value in vars(gpu).items() if name not in _TEXTS}
    for each in gpu.products:
        numbers |= {f"products: {name}": value for name, value in vars(each).items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{name} is {value!r}, not a number above 0")
        if name.endswith("_efficiency") and value > 1:
            raise ValueError(f"{name} is {value!r}, above 1")
    return gpu
