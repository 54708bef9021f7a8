"""Weights of a model without its head, such as a ``LlamaModel``.

Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pypkg.models.architecture.weight_map import Shape, WeightMap

HEAD = "lm_head.weight"


def lacks_head(
    keys: Mapping[str, Any],
    names: WeightMap,
    parameters: Mapping[str, Sequence[int]],
    found: Mapping[str, Shape],
) -> bool:
    """Whether weights are those of a model that has a head, saved without it.

    config.json has to say so by its class, ``LlamaModel`` for ``LlamaForCausalLM``: elsewhere a
    head that is missing is a mistake.

    Args:
        keys: of config.json.
        names: the map of the weights.
        parameters: shapes of all parameters of the model.
        found: shapes of the tensors that are stored.
    """
    if HEAD not in parameters or names.source_shapes(HEAD, parameters[HEAD]).keys() & found.keys():
        return False
    classes = keys.get("architectures") or []
    return any(str(each).endswith("Model") and "LMHead" not in str(each) for each in classes)
