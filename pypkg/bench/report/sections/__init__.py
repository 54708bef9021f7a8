"""The sections of the report. A new kind of result is a module here and a line below.

A module has a ``TITLE``, and ``render``, which makes the lines of a section from a result. One with
``figures`` makes pictures too, by file name; its ``render`` takes whether to link to them.
"""

from __future__ import annotations

from types import ModuleType

from pypkg.bench.report.sections import (
    checkpoint,
    data_index,
    data_loading,
    generate,
    host_time,
    learning_curves,
    memory_passes,
    operators,
    preprocess,
    train_step,
)

SECTIONS: dict[str, ModuleType] = {
    "ops": operators,
    "train-step": train_step,
    "host-time": host_time,
    "memory-passes": memory_passes,
    "generate": generate,
    "learning-curves": learning_curves,
    "preprocess": preprocess,
    "data-index": data_index,
    "data-loading": data_loading,
    "checkpoint": checkpoint,
}
