"""Recompute and dropout of a model, from the settings."""

from __future__ import annotations

import paddle

from pypkg.config import Settings
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.layers.recompute import ATTENTION, ATTENTION_BLOCK, FULL, Recompute


def set_activations(model: paddle.nn.Layer, settings: Settings) -> None:
    """Sets recompute and dropout of ``model``, a whole model or a pipeline stage."""
    model.use_recompute(recompute_choice(settings))
    model.use_dropout(settings.hidden_dropout_prob)


def dropout_notice(settings: Settings, config: ModelConfig) -> str | None:
    """A log line if PaddleNLP would train the model with dropout and this run does not; else None.

    PaddleNLP's run_pretrain gives GPT and OPT models, the models with learned positions, its
    default 0.1 of hidden_dropout_prob and attention_probs_dropout_prob.
    """
    if config.position_embedding != "learned" or settings.hidden_dropout_prob > 0:
        return None
    return (
        f"no dropout: hidden_dropout_prob is 0. PaddleNLP trains {config.model_type} models with "
        "0.1 where hidden_dropout_prob and attention_probs_dropout_prob are left out"
    )


def recompute_choice(settings: Settings) -> Recompute | None:
    """The parts that layers recompute; None if they recompute nothing.

    Raises:
        ValueError: no layer supports recompute_granularity.
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
