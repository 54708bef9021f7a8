"""Lists the tensors of a folder of weights. It reads only headers."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import load_config, stored_weight_map
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.hub import find_weights
from pypkg.models.weights.model_folder import CONFIG_FILE
from pypkg.models.weights.tied_head import as_stored

_HEADINGS = ("tensor", "shape", "dtype", "parameters")


def describe(
    folder: str | Path, download: bool = False, allow_unknown_config: Collection[str] = ()
) -> str:
    """A table of all tensors with shape, dtype and number of parameters, and a summary, as text.

    A tensor that is known not to be a parameter counts as 0 parameters, shown as "-".

    Args:
        folder: of weights, or the name of a model in the Hugging Face cache.
        download: whether to download files that the Hugging Face cache lacks.
        allow_unknown_config: as in ``convert_model``.

    Raises:
        UserError: there are no weights, or a file cannot be read.
    """
    folder = find_weights(folder, download)
    files = TensorFiles(folder)
    specs = files.specs()
    config, family = _family(folder, files, allow_unknown_config)
    names = stored_weight_map(config, files.shapes()) if config else None
    counts = {
        name: 0 if names and names.is_ignored(name) else math.prod(spec.shape)
        for name, spec in specs.items()
    }
    rows = [
        (name, str(list(spec.shape)), spec.dtype, f"{counts[name]:,}" if counts[name] else "-")
        for name, spec in specs.items()
    ]
    widths = [max(len(row[at]) for row in (_HEADINGS, *rows)) for at in range(len(_HEADINGS))]
    rule = tuple("-" * width for width in widths)
    by_dtype: dict[str, int] = {}
    for name, spec in specs.items():
        by_dtype[spec.dtype] = by_dtype.get(spec.dtype, 0) + counts[name]
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in sorted(by_dtype.items()) if count)
    size = sum(spec.num_bytes for spec in specs.values())
    return "\n".join(
        [
            *(_line(row, widths) for row in (_HEADINGS, rule, *rows)),
            "",
            f"folder      {folder}",
            f"family      {family}",
            f"files       {', '.join(path.name for path in files.files)}",
            f"tensors     {len(specs):,}, {size:,} bytes",
            f"parameters  {sum(counts.values()):,} ({dtypes})",
        ]
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    *left, last = (cell.ljust(width) for cell, width in zip(row, widths))
    return "  ".join([*left, last.strip().rjust(widths[-1])])


def _family(
    folder: Path, files: TensorFiles, allow_unknown_config: Collection[str]
) -> tuple[ModelConfig | None, str]:
    """The model's configuration, or None if it cannot be read, and a line of text about it."""
    if not (folder / CONFIG_FILE).is_file():
        return None, f"unknown: no {CONFIG_FILE}"
    try:
        config = as_stored(load_config(folder, allow_unknown_config), files, folder)
    except UserError as error:
        return None, f"unknown: {error}"
    expected = f"{config.num_parameters():,} parameters by its {CONFIG_FILE}"
    return config, f"{config.model_type}, {expected}"
