"""Weights of a model without its head, such as a ``LlamaModel``.

Nothing here imports Paddle.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pypkg.files.json_files import read_json
from pypkg.models.architecture.weight_map import Shape, WeightMap

HEAD = "lm_head.weight"


logger = logging.getLogger("pypkg.models")


def stored_parameters(
    folder: Path,
    names: WeightMap,
    parameters: Mapping[str, Shape],
    found: Mapping[str, Shape],
) -> dict[str, Shape]:
    """``parameters``, without the head if the weights in ``folder`` lack it; logs a warning then.

    Args:
        names, parameters, found: as in ``lacks_head``.
    """
    if not lacks_head(read_json(folder / "config.json"), names, parameters, found):
        return dict(parameters)
    logger.warning("%s holds a model without its head, which starts with random values", folder)
    return {name: shape for name, shape in parameters.items() if name != HEAD}


def lacks_head(
    keys: Mapping[str, Any],
    names: WeightMap,
    parameters: Mapping[str, Sequence[int]],
    found: Mapping[str, Shape],
) -> bool:
    """Whether weights were saved without the head of the model.

    This is only assumed if config.json names such a class, ``LlamaModel`` instead of
    ``LlamaForCausalLM``. In other cases a missing head is an error.

    Args:
        keys: content of config.json.
        names: the weight map of the weights.
        parameters: shapes of all parameters of the model, by name.
        found: shapes of the stored tensors, by name.
    """
    if HEAD not in parameters or names.source_shapes(HEAD, parameters[HEAD]).keys() & found.keys():
        return False
    classes = keys.get("architectures") or []
    return any(str(each).endswith("Model") and "LMHead" not in str(each) for each in classes)
