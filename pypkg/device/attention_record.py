"""The record of attention kernels on GPUs and their times, which ``attention_backend: auto`` reads.

``make gpu-check`` writes the record when all checks of attention have passed on a GPU. It is JSON:

    {"gpus": {"NVIDIA H100 80GB HBM3": {
        "date": "2026-03-01", "csrc_sha256": "...",
        "head_dims": {"128": {"kernel": "hopper", "milliseconds": 3.1,
                              "other": "Paddle flash", "other_milliseconds": 3.4}}}}}

Times are milliseconds of causal attention in bfloat16, forward and backward together, summed over
the shapes that were timed; the figures above are invented. An entry is valid for the digest of the
sources that it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files import write_file
from pypkg.files.build_info import DIGEST

VARIABLE = "PYPKG_ATTENTION_RECORD"
PADDLE = "Paddle flash"  # the baseline that ``auto`` uses if pypkg's kernels are not faster


@dataclass(frozen=True)
class Timing:
    """Times for one head_dim: of pypkg's faster ``kernel``, and of the ``other`` attention.

    The other is Paddle's flash attention, the alternative of ``auto``; if it was not timed, the
    fastest one in torch.
    """

    kernel: str  # "ampere" or "hopper"
    milliseconds: float
    other: str
    other_milliseconds: float

    @property
    def faster(self) -> bool:
        return self.milliseconds < self.other_milliseconds


def record_path() -> Path:
    """PYPKG_ATTENTION_RECORD, else pypkg/attention.json in the user's cache folder."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pypkg" / "attention.json"


def recorded_timings(gpu: str, sources: str | None) -> dict[int, Timing]:
    """The timings of ``gpu`` by head_dim, if its entry is for kernels with the digest ``sources``.

    Raises:
        UserError: the file is not a record.
    """
    path = record_path()
    try:
        entry = _read(path)["gpus"].get(gpu)
        if entry is None or sources is None or entry[DIGEST] != sources:
            return {}
        return {int(dim): Timing(**timing) for dim, timing in entry["head_dims"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a record of attention kernels ({error!r}). Remove it, or name another "
            f"file in {VARIABLE}; `make gpu-check` on this GPU writes a new one."
        ) from error


def write_timings(gpu: str, sources: str, date: str, timings: Mapping[int, Timing]) -> Path:
    """Replaces the entry of ``gpu``, but not those of other GPUs. Returns the file."""
    path = record_path()
    record = _read(path)
    record["gpus"][gpu] = {
        "date": date,
        DIGEST: sources,
        "head_dims": {str(dim): asdict(timing) for dim, timing in timings.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


def timings_of(rows: Iterable[Mapping[str, Any]], ours: str) -> dict[int, Timing]:
    """Computes the timings from rows of the attention benchmark, by head_dim.

    A head_dim is included if a kernel of pypkg and a baseline have run both passes at the same
    shapes.

    Args:
        rows: of flash_attention: ``shape`` ("4x4096x16x128 causal"), ``pass``, ``dtype``,
            ``baseline`` and ``median`` in milliseconds.
        ours: the ``baseline`` of pypkg's Ampere kernels; that of Hopper kernels is "``ours``,
            hopper".
    """
    kernels = {ours: "ampere", f"{ours}, hopper": "hopper"}
    found: dict[int, dict[str, dict[tuple[str, str], float]]] = {}
    for row in rows:
        sizes, _, mask = row["shape"].partition(" ")
        if row["op"] == "flash_attention" and mask == "causal" and row["dtype"] == "bfloat16":
            versions = found.setdefault(int(sizes.rsplit("x", 1)[1]), {})
            versions.setdefault(row["baseline"], {})[row["shape"], row["pass"]] = row["median"]
    timings: dict[int, Timing] = {}
    for head_dim, versions in found.items():
        wanted = max(map(len, versions.values()))
        totals = {
            name: sum(cases.values())
            for name, cases in versions.items()
            if len(cases) == wanted and {name_of_pass for _, name_of_pass in cases} == _PASSES
        }
        own = {kernels[name]: total for name, total in totals.items() if name in kernels}
        others = {name: total for name, total in totals.items() if not name.startswith(ours)}
        if own and others:
            kernel = min(own, key=own.__getitem__)
            other = PADDLE if PADDLE in others else min(others, key=others.__getitem__)
            timings[head_dim] = Timing(kernel, own[kernel], other, others[other])
    return timings


_PASSES = {"forward", "backward"}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"gpus": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
