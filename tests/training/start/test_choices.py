"""A choice that a setting offers and no code honours is an error, not another choice's effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pypkg.config import Settings
from pypkg.data.datasets.blend import blend_weights
from pypkg.data.datasets.order import SampleOrder
from pypkg.device.capabilities import probe
from pypkg.models.layers.attention import BACKENDS
from pypkg.ops import set_matmul_precision
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.zero.stages import ZERO_STAGES
from pypkg.training.checkpoint.verify import verify
from pypkg.training.reporting.trackers import TrackedRun, make_reporters
from pypkg.training.start.layout import degrees
from pypkg.training.step.activations import recompute_choice
from pypkg.training.step.engine import Engine
from pypkg.training.step.schedule import learning_rate

NEW = "of_tomorrow"
TRACKED = TrackedRun(Path("runs"), "run", 0, {})


def settings(**values: Any) -> Settings:
    return Settings(max_steps=10, decay_steps=10, **values)


def topology(s: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setattr("paddle.distributed.fleet.init", lambda **_: None)
    monkeypatch.setattr("pypkg.parallel.process_end.skip_destructors", lambda: None)
    monkeypatch.setattr("pypkg.parallel.gloo.install.install", lambda: None)
    mesh.initialize(degrees(s, 2))


# Where each setting with choices is honoured: a call that comes to the choice.
HONOURED: dict[str, Callable[..., Any]] = {
    "lr_scheduler_type": lambda s: learning_rate(s, 5),
    "report_to": lambda s, tmp_path: make_reporters(s.report_to, tmp_path, TRACKED),
    "evaluation_strategy": lambda s: s.evaluates,
    "save_strategy": lambda s: s.saves,
    "device": lambda s: probe(s.device),  # paddle.set_device's message names what it takes
    "sharding": lambda s: ZERO_STAGES[s.sharding_stage],
    "hybrid_parallel_topo_order": topology,
    "recompute_granularity": lambda s: recompute_choice(dataclasses.replace(s, recompute=True)),
    "blend_by": lambda s: blend_weights([], [], s.blend_by, s.blend_temperature),
    "sample_order": lambda s: SampleOrder(s.sample_order, "1", 8, 0, [], []),
    "ops_backend": lambda s: probe("cpu", s.ops_backend),
    "attention_backend": lambda s: BACKENDS[s.attention_backend],
    "loss_normalization": lambda s: Engine(None, None, normalization=s.loss_normalization),
    "verify_checkpoint": lambda s, tmp_path: verify(tmp_path, s.verify_checkpoint),
    "matmul_precision": lambda s: set_matmul_precision(s.matmul_precision),
}
# Words of PaddleNLP's *_config settings; each has a row in config/suboptions.py, which refuses it,
# says that it has no effect, or names the setting that it stands for.
SUBOPTIONS = {
    "tensor_parallel_config", "sequence_parallel_config", "pipeline_parallel_config",
    "sharding_parallel_config", "data_parallel_config",
}  # fmt: skip


def test_every_setting_with_choices_is_in_the_table():
    chosen = {f.name for f in dataclasses.fields(Settings) if f.metadata.get("choices")}
    assert chosen == HONOURED.keys() | SUBOPTIONS


@pytest.mark.parametrize("name", HONOURED)
def test_a_choice_without_a_branch_raises(name, tmp_path, monkeypatch):
    (field,) = (f for f in dataclasses.fields(Settings) if f.name == name)
    is_list = isinstance(field.default, tuple)
    new = "stage9" if name == "sharding" else NEW
    s = settings(**{name: (new,) if is_list else new})
    call = HONOURED[name]
    wanted = call.__code__.co_varnames[1 : call.__code__.co_argcount]
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    message = {"sharding": "9", "device": "device must be"}.get(name, NEW)
    with pytest.raises(Exception, match=message):
        call(s, **{each: given[each] for each in wanted})


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_each_schedule_differs_from_the_others(kind):
    def rates(of: str) -> list[float]:
        s = settings(lr_scheduler_type=of, warmup_steps=2)
        return [learning_rate(s, step) for step in range(10)]

    others = {"linear", "cosine", "constant"} - {kind, kind.removesuffix("_with_warmup")}
    assert all(rates(kind) != rates(other) for other in others)
