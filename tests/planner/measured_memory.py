"""The peak of allocated bytes of this process in a training step, exact to the byte."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle.base import core
from planned_memory import config_of, settings_of

from pypkg.config import Settings
from pypkg.models import from_config
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.training.run import _update_options
from pypkg.training.step.activations import set_activations
from pypkg.training.step.engine import Engine
from pypkg.training.tp_sharding import ModelTpSharding


def allocated() -> int:
    return core.host_memory_stat_current_value("Allocated", 0)


def peak() -> int:
    return core.host_memory_stat_peak_value("Allocated", 0)


def restart_peak() -> None:
    core.host_memory_stat_reset_peak_value("Allocated", 0)


def make_engine(config: ModelConfig, settings: Settings, dtype: str = "float32") -> Engine:
    return _engine_of(_model(config, dtype), config, settings, dtype)


def _model(config: ModelConfig, dtype: str = "float32") -> paddle.nn.Layer:
    with paddle.utils.unique_name.guard():
        return from_config(config, dtype, seed=1)


def _engine_of(
    model: paddle.nn.Layer, config: ModelConfig, settings: Settings, dtype: str = "float32"
) -> Engine:
    set_activations(model, settings)
    model.train()
    tp_sharding = ModelTpSharding(config)
    options = _update_options(settings, dtype)
    wrapped, updater = distribute(model, options, mesh.current(), tp_sharding)
    return Engine(wrapped, updater, labels_vary=False)


def batches_of(config: ModelConfig, settings: Settings) -> list[dict[str, np.ndarray]]:
    shape = (settings.per_device_train_batch_size, settings.max_seq_length)
    batch = {name: np.full(shape, 9) for name in ("input_ids", "labels")}
    if config.prefix_lm:  # as the objective of prefix models
        positions = (shape[0], 2, shape[1]) if config.position_encoding_2d else shape
        batch["position_ids"] = np.zeros(positions, np.int64)
        batch["prefix_lengths"] = np.full(shape[:1], 7, np.int32)
    return [batch] * settings.gradient_accumulation_steps


def measure(cases: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Peaks of the passes and of the update, in bytes beyond what there was before the model.

    Args:
        cases: that differ in their granularity alone; one model is trained under each in turn.
    """
    config, settings = config_of(cases[0]), settings_of(cases[0])
    gc.collect()
    before = allocated()
    model = _model(config)
    engine, batches = _engine_of(model, config, settings), batches_of(config, settings)
    _steps(engine, batches, 1)  # makes the optimizer's state
    found = []
    for case in cases:
        set_activations(model, settings_of(case))
        # Stage 3 predicts the order of layers from the step before, which recompute changes.
        _steps(engine, batches, int(settings.sharding_stage == 3))
        restart_peak()
        loss = engine.forward_backward(batches)
        passes = peak() - before
        restart_peak()
        engine.update(1e-3)
        found.append({"passes": passes, "update": peak() - before})
        del loss
    return found


def _steps(engine: Engine, batches: list[dict[str, np.ndarray]], count: int) -> None:
    for _ in range(count):
        engine.forward_backward(batches)
        engine.update(1e-3)
