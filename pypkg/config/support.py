"""Finds settings that this version does not support, and settings that have no effect."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from pypkg.config.known_keys import NO_EFFECT, REFUSED, KnownKey
from pypkg.config.options.suboptions import (
    FUSED_GRAD_ADD,
    OF_SEQUENCE_PARALLEL,
    REDUCE_ONCE,
    STAGE_OF_WORD,
    SUB_OPTIONS,
    SubOption,
)
from pypkg.config.reading.parser import listed
from pypkg.config.settings import Settings, setting_fields
from pypkg.errors import UserError


def check_supported(settings: Settings) -> None:
    """Rejects settings that this version does not implement, before anything is started.

    training/start/layout.py checks whether the layout fits the model and the number of processes.

    Raises:
        UserError: names every such setting with its value, the reason and a way out.
    """
    if problems := support_problems(settings):
        raise UserError(listed(problems, "settings are not possible in this version"))


# PaddleNLP adds "eval_" to a name without it. Perplexity ranks models in the same order as loss.
_METRICS = tuple(
    prefix + name for prefix in ("", "eval_") for name in ("loss", "ppl", "perplexity")
)


def support_problems(settings: Settings, skip: Collection[str] = ()) -> list[str]:
    """The settings that this version does not implement, one sentence each.

    Args:
        skip: names of settings with a known problem.
    """
    problems = [_refusal(row, value) for row, value in _asked_for(REFUSED, settings)]
    problems += [
        f"{option.setting} holds {option.name}, but {option.why}; leave it out"
        for option in _sub_options(settings)
        if option.refused
    ]
    metric = settings.metric_for_best_model
    if settings.load_best_model_at_end and metric not in (None, *_METRICS):
        problems.append(
            f"metric_for_best_model is {json.dumps(metric)}, but an evaluation computes only loss "
            'and perplexity; set it to "loss"'
        )
    if settings.load_best_model_at_end and settings.greater_is_better:
        problems.append(
            "greater_is_better is true, but models are compared by their loss; set it to false"
        )
    tasks = ("do_train", "do_eval", "do_predict")
    if not any(getattr(settings, name) or name in skip for name in tasks):
        problems.append(
            "do_train, do_eval and do_predict are all false, so there is nothing to do; set "
            "do_train to true"
        )
    return problems


def notices(settings: Settings) -> list[str]:
    """Lines for the log: the given settings that have no effect, and why."""
    found = [(row.name, row.why) for row, _ in _asked_for(NO_EFFECT, settings)]
    found += _without_what_they_belong_to(settings)
    idle = {name for name, _ in found}
    if "tensor_parallel_config" not in idle:
        found += _idle_tensor_words(settings)
    found += _words_without_their_stage(settings)
    found += [
        (f"{option.setting} {option.name}", option.why)
        for option in _sub_options(settings)
        if option.setting not in idle and option.why and not option.refused
    ]
    return [f"{name} has no effect: {why}" for name, why in found]


def notices_of_float32(settings: Settings) -> list[str]:
    """Lines for the log of a run in float32: the given settings that matter only in 16 bits."""
    if not settings.amp_master_grad:
        return []
    word = FUSED_GRAD_ADD in settings.tensor_parallel_config
    adding = {
        "enable_linear_fused_grad_add": settings.enable_linear_fused_grad_add,
        f"tensor_parallel_config {FUSED_GRAD_ADD}": word and settings.tensor_parallel_degree > 1,
    }
    return [
        "amp_master_grad has no effect: gradients are float32 without it",
        *(
            f"{name} has no effect: it matters only with bf16 or fp16"
            for name, is_given in adding.items()
            if is_given
        ),
    ]


def _sub_options(settings: Settings) -> list[SubOption]:
    return [option for option in SUB_OPTIONS if option.name in getattr(settings, option.setting)]


def _without_what_they_belong_to(s: Settings) -> list[tuple[str, str]]:
    """Settings with a value other than their default whose feature is off, and the reason."""
    tensor, pipeline = s.tensor_parallel_degree > 1, s.pipeline_parallel_degree > 1
    belongs_to = {
        "recompute_granularity": (s.recompute, "recompute"),
        "recompute_use_reentrant": (s.recompute, "recompute"),
        "no_recompute_layers": (s.recompute, "recompute"),
        "pp_recompute_interval": (
            s.recompute and pipeline,
            "recompute and pipeline_parallel_degree above 1",
        ),
        **_of_schedules(s.lr_scheduler_type),
        **_of_optimizers(s.optim),
        "scale_loss": (s.fp16, "fp16"),
        "enable_linear_fused_grad_add": (s.amp_master_grad, "amp_master_grad"),
        "metric_for_best_model": (s.load_best_model_at_end, "load_best_model_at_end"),
        "greater_is_better": (s.load_best_model_at_end, "load_best_model_at_end"),
        "tensor_parallel_config": (tensor, "tensor_parallel_degree above 1"),
        "sequence_parallel_config": (s.sequence_parallel, "sequence_parallel"),
        "pipeline_parallel_config": (pipeline, "pipeline_parallel_degree above 1"),
        "sharding_parallel_config": (s.sharding_stage > 0, "sharding"),
    }
    defaults = {spec.name: spec.default for spec in setting_fields()}
    found = []
    if s.sharding and s.wanted_sharding_degree == 1:
        found.append(("sharding", "sharding_parallel_degree is 1, so nothing is divided"))
    return found + [
        (name, f"it matters only with {what}")
        for name, (is_on, what) in belongs_to.items()
        if not is_on and getattr(s, name) != defaults[name]
    ]


def _of_schedules(kind: str) -> dict[str, tuple[bool, str]]:
    """For each setting of a schedule: whether ``kind`` reads it, and the schedule that does."""
    only = {
        "lr_end": "polynomial",
        "power": "polynomial",
        "num_cycles": "cosine_with_restarts",
        "lr_wsd_decay_steps": "warmup_stable_decay",
        "lr_wsd_decay_style": "warmup_stable_decay",
    }
    return {name: (kind == of, f"lr_scheduler_type {of}") for name, of in only.items()}


def _of_optimizers(optim: str) -> dict[str, tuple[bool, str]]:
    """For each setting of an optimizer: whether ``optim`` reads it, and the optimizers that do."""
    has_betas, has_epsilon = optim != "adafactor", optim not in ("adafactor", "lion")
    return {
        "adam_beta1": (has_betas, "another optim than adafactor"),
        "adam_beta2": (has_betas, "another optim than adafactor"),
        "adam_epsilon": (has_epsilon, "another optim than adafactor and lion"),
        "muon_momentum": (optim == "muon", "optim muon"),
    }


def _idle_tensor_words(s: Settings) -> list[tuple[str, str]]:
    """Words of tensor_parallel_config that other settings make ineffective, and the reason."""
    found = {
        word: f"{'with' if of_sequence else 'without'} sequence_parallel"
        for word, of_sequence in OF_SEQUENCE_PARALLEL.items()
        if of_sequence != s.sequence_parallel
    }
    if not s.amp_master_grad:
        found[FUSED_GRAD_ADD] = "with amp_master_grad"
    return [
        (f"tensor_parallel_config {word}", f"it matters only {when}")
        for word, when in found.items()
        if word in s.tensor_parallel_config
    ]


def _words_without_their_stage(s: Settings) -> list[tuple[str, str]]:
    """Words of sharding_parallel_config without effect in this layout, and the reason."""
    found = []
    for word in s.sharding_parallel_config:
        stage = STAGE_OF_WORD.get(word)
        if stage is None or s.sharding_stage == 0:
            continue
        if s.sharding_stage != stage:
            why = f"it matters only with sharding stage{stage}"
        elif s.pipeline_parallel_degree > 1 and word in REDUCE_ONCE:
            why = "the schedule of a pipeline needs whole gradients at its end"
        else:
            continue
        found.append((f"sharding_parallel_config {word}", why))
    return found


def _asked_for(rows: tuple[KnownKey, ...], settings: Settings) -> list[tuple[KnownKey, Any]]:
    """The rows whose key was given with a value that is not neutral, and the value."""
    given = settings.other_keys
    return [(r, given[r.name]) for r in rows if r.name in given and given[r.name] not in r.neutral]


def _refusal(row: KnownKey, value: Any) -> str:
    way_out = row.way_out
    if not way_out:
        neutral = row.neutral[0]
        way_out = "leave it out" if neutral is None else f"set it to {json.dumps(neutral)}"
    return f"{row.name} is {json.dumps(value)}, but {row.why}; {way_out}"
