"""Recompute and dropout of a model, from the settings."""

from __future__ import annotations

import paddle

from pypkg.config import Settings
from pypkg.models.layers.recompute import ATTENTION, ATTENTION_BLOCK, FULL, Recompute


def set_activations(model: paddle.nn.Layer, settings: Settings) -> None:
    """Sets recompute and dropout of ``model``, a whole model or a pipeline stage."""
    model.use_recompute(recompute_choice(settings))
    model.use_dropout(settings.hidden_dropout_prob)


def recompute_choice(settings: Settings) -> Recompute | None:
    """What the layers recompute; None: nothing.

    Raises:
        ValueError: no layer knows recompute_granularity.
    """
    if not settings.recompute:
        return None
    if settings.recompute_granularity not in (FULL, ATTENTION_BLOCK, ATTENTION):
        raise ValueError(
            f"recompute_granularity {settings.recompute_granularity!r}: no layer recomputes that"
        )
    is_pipeline = settings.pipeline_parallel_degree > 1
    return Recompute(
        settings.recompute_granularity,
        frozenset(settings.no_recompute_layers),
        settings.pp_recompute_interval if is_pipeline else 1,
        settings.recompute_use_reentrant,
    )
