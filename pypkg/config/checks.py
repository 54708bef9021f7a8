"""Finds invalid values and invalid combinations of settings before anything is started."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from pypkg.config.options.profiler_options import parse_profiler_options
from pypkg.config.parallel_checks import PARALLEL_CHECKS
from pypkg.config.settings import Settings, setting_fields


def value_problems(
    settings: Settings, given: Collection[str], skip: Collection[str] = ()
) -> list[str]:
    """The invalid values and combinations in ``settings``, one sentence each.

    Args:
        given: names of the settings that were given; the others have their default.
        skip: names of settings with a known problem; checks that involve them are left out.
    """
    problems = []
    bad = set(skip)
    for spec in setting_fields():
        if spec.name in bad:
            continue
        value = getattr(settings, spec.name)
        problem = None
        if spec.name in given:
            problem = _range_problem(spec, value)
        elif spec.metadata["required"]:
            problem = f"{spec.name} is missing: the {spec.metadata['help']}"
        if problem:
            problems.append(problem)
            bad.add(spec.name)
    for names, check in (*_TOGETHER, *PARALLEL_CHECKS):
        if bad.isdisjoint(names):
            problems.extend(check(settings))
    return problems


def _range_problem(spec: dataclasses.Field, value: Any) -> str | None:
    rules = spec.metadata
    if rules["required"] and value == "":
        return f'{spec.name} is ""; expected the {rules["help"]}'
    for each in value if isinstance(value, tuple) else (value,):
        if rules["choices"] and each not in rules["choices"]:
            return f"{spec.name} is {each!r}; expected one of {', '.join(rules['choices'])}"
        limit = _limit_passed(rules, each)
        if limit:
            return f"{spec.name} is {each}; expected {limit}"
    return None


def _limit_passed(rules: Mapping[str, Any], value: Any) -> str | None:
    limits = [
        ("at_least", "at least", lambda limit: value >= limit),
        ("above", "more than", lambda limit: value > limit),
        ("at_most", "at most", lambda limit: value <= limit),
        ("below", "less than", lambda limit: value < limit),
    ]
    for rule, words, holds in limits:
        if rules[rule] is not None and not holds(rules[rule]):
            return f"{words} {rules[rule]}"
    return None


# Schedules that reach min_learning_rate at decay_steps, and all that end at min_learning_rate.
_TO_A_STEP = ("linear", "cosine", "cosine_with_restarts", "warmup_stable_decay")
_TO_MIN_LEARNING_RATE = (*_TO_A_STEP, "inverse_sqrt")


def _check_min_learning_rate(s: Settings) -> Iterator[str]:
    if s.lr_scheduler_type in _TO_MIN_LEARNING_RATE and s.min_learning_rate > s.learning_rate:
        yield (
            f"min_learning_rate ({s.min_learning_rate}) is above learning_rate "
            f"({s.learning_rate}); lower the first or raise the second"
        )


def _check_warmup(s: Settings) -> Iterator[str]:
    if s.warmup_steps > s.max_steps:
        yield (
            f"warmup_steps ({s.warmup_steps}) is above max_steps ({s.max_steps}), so learning_rate "
            "would never be reached; lower warmup_steps or raise max_steps"
        )
    elif (
        s.lr_scheduler_type in (*_TO_A_STEP, "polynomial")
        and s.decay_steps is not None
        and s.warmup > s.decay_steps
    ):
        yield (
            f"the warm-up of {s.warmup:g} steps is longer than decay_steps ({s.decay_steps:g}); "
            "lower warmup_steps or warmup_ratio, or raise decay_steps"
        )


def _check_constant(s: Settings) -> Iterator[str]:
    if s.lr_scheduler_type == "constant" and s.warmup > 0:
        yield (
            f"lr_scheduler_type is 'constant', which has no warm-up, but the warm-up is "
            f"{s.warmup:g} steps; use 'constant_with_warmup', or set warmup_steps and "
            "warmup_ratio to 0"
        )


def _check_polynomial(s: Settings) -> Iterator[str]:
    if s.lr_scheduler_type == "polynomial" and s.lr_end >= s.learning_rate:
        yield (
            f"lr_end ({s.lr_end}) is not below learning_rate ({s.learning_rate}); lower the first "
            "or raise the second"
        )


def _check_restarts(s: Settings) -> Iterator[str]:
    if s.lr_scheduler_type == "cosine_with_restarts" and s.num_cycles % 1 != 0:
        yield (
            f"num_cycles is {s.num_cycles}, but lr_scheduler_type is 'cosine_with_restarts', which "
            "takes whole cycles; set num_cycles to 1 or more, or lr_scheduler_type to 'cosine'"
        )


def _check_stable_decay(s: Settings) -> Iterator[str]:
    if s.lr_scheduler_type != "warmup_stable_decay" or s.decay_steps is None:
        return
    if s.lr_wsd_decay_steps is None:
        yield (
            "lr_scheduler_type is 'warmup_stable_decay', but lr_wsd_decay_steps is not set; set it "
            "to the steps of the decay, such as a tenth of max_steps"
        )
    elif s.warmup + s.lr_wsd_decay_steps > s.decay_steps:
        yield (
            f"the warm-up of {s.warmup:g} steps and lr_wsd_decay_steps ({s.lr_wsd_decay_steps:g}) "
            f"are longer than decay_steps ({s.decay_steps:g}); lower one of the first two"
        )


def _check_split(s: Settings) -> Iterator[str]:
    try:
        shares = [float(part) for part in s.split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    usable = 1 <= len(shares) <= 3 and all(math.isfinite(x) and x >= 0 for x in shares)
    if not usable or sum(shares) == 0:
        yield (
            f"split is {s.split!r}; expected up to three shares, none negative, not all zero, for "
            "training, validation and test, such as '949,50,1'; missing ones are 0"
        )


def _check_profiler_options(s: Settings) -> Iterator[str]:
    if s.profiler_options is None:
        return
    try:
        options = parse_profiler_options(s.profiler_options)
    except ValueError as error:
        yield f"profiler_options is {s.profiler_options!r}: {error}"
        return
    if options.first >= s.max_steps > 0:
        yield (
            f"profiler_options start at step {options.first} (counted from 0), but max_steps is "
            f"{s.max_steps}; lower the first number of batch_range, or raise max_steps"
        )


def _check_evaluation(s: Settings) -> Iterator[str]:
    if s.do_eval and s.evaluation_strategy == "no":
        yield (
            "do_eval is true but evaluation_strategy is 'no'; set do_eval to false or "
            "evaluation_strategy to 'steps'"
        )
    if s.eval_on_start and s.evaluation_strategy == "no":
        yield (
            "eval_on_start is true, but evaluation_strategy is 'no', so the run does not evaluate; "
            "set do_eval to true, or leave eval_on_start out"
        )
    if s.eval_iters == 0:
        yield "eval_iters is 0; expected at least 1, or -1 for the whole split"
    elif s.max_evaluate_steps > 0 and s.eval_iters is not None:
        yield from _both_evaluation_lengths(s, s.eval_iters)


def _both_evaluation_lengths(s: Settings, eval_iters: int) -> Iterator[str]:
    if s.whole_splits or eval_iters > s.max_evaluate_steps:
        yield (
            f"eval_iters ({eval_iters}) is above max_evaluate_steps ({s.max_evaluate_steps}); set "
            "only one of them"
        )


def _check_best_model(s: Settings) -> Iterator[str]:
    if not s.load_best_model_at_end:
        return
    if "no" in (s.evaluation_strategy, s.save_strategy):
        yield (
            "load_best_model_at_end is true, but there is nothing to choose from: "
            f"evaluation_strategy is {s.evaluation_strategy!r} and save_strategy "
            f"{s.save_strategy!r}; set both to 'steps', or load_best_model_at_end to false"
        )
    elif s.save_interval % s.evaluation_interval:
        yield (
            "load_best_model_at_end is true, but not every checkpoint has an evaluation: they are "
            f"{s.save_interval} and {s.evaluation_interval} steps apart; make save_steps a "
            "multiple of eval_steps"
        )


def _check_skipped_steps(s: Settings) -> Iterator[str]:
    for interval in s.skip_data_intervals:
        if len(interval) != 2 or not 1 <= interval[0] <= interval[1]:
            yield (
                f"skip_data_intervals holds {list(interval)}; expected [first, last], two steps "
                "from 1 on in ascending order"
            )
        elif interval[1] >= s.max_steps:
            yield (
                f"skip_data_intervals holds {list(interval)}, but the last step of the run, "
                f"max_steps ({s.max_steps}), must train; end the interval before it, or set "
                f"max_steps to {interval[0] - 1}"
            )


def _check_resume(s: Settings) -> Iterator[str]:
    if s.overwrite_output_dir and s.resume_from_checkpoint:
        yield (
            "overwrite_output_dir is true, which starts anew, but resume_from_checkpoint is "
            f"{s.resume_from_checkpoint!r}; set only one of them"
        )


def _check_ramp(s: Settings) -> Iterator[str]:
    if s.rampup_batch_size and len(s.rampup_batch_size) != 3:
        yield (
            f"rampup_batch_size is {list(s.rampup_batch_size)}; expected three numbers: batch size "
            "of the first steps, increment, and samples of the whole ramp"
        )


def _check_mup(s: Settings) -> Iterator[str]:
    if s.mup_base_width is not None and s.optim in ("adafactor", "muon"):
        yield (
            f"mup_base_width is {s.mup_base_width}, but its factors of the learning rate are for "
            f"AdamW and Lion, and optim is {s.optim!r}; leave mup_base_width out, or choose "
            "another optim"
        )


def _check_blend(s: Settings) -> Iterator[str]:
    if s.blend_temperature != 1.0 and s.blend_by != "temperature":
        yield (
            f"blend_temperature is {s.blend_temperature:g}, but blend_by is {s.blend_by!r}; set "
            "blend_by to 'temperature', or leave blend_temperature out"
        )


def _check_sample_prompts(s: Settings) -> Iterator[str]:
    asked = bool(s.sample_prompts)
    for name in ("sample_steps", "sample_tokens"):
        if asked and getattr(s, name) == 0:
            yield (
                f"sample_prompts are given, but {name} is 0, so no text is written; set {name} to "
                "1 or more, or leave sample_prompts out"
            )
    if s.sample_steps and not asked:
        yield (
            f"sample_steps is {s.sample_steps}, but there are no sample_prompts to continue; give "
            "some, or set sample_steps to 0"
        )


# Each check with the settings that it reads.
_TOGETHER: tuple[tuple[tuple[str, ...], Callable[[Settings], Iterator[str]]], ...] = (
    (("min_learning_rate", "learning_rate", "lr_scheduler_type"), _check_min_learning_rate),
    (("profiler_options", "max_steps"), _check_profiler_options),
    (
        ("warmup_steps", "warmup_ratio", "max_steps", "decay_steps", "lr_scheduler_type"),
        _check_warmup,
    ),
    (("lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_steps"), _check_constant),
    (("lr_scheduler_type", "lr_end", "learning_rate"), _check_polynomial),
    (("lr_scheduler_type", "num_cycles"), _check_restarts),
    (
        (
            *("lr_scheduler_type", "lr_wsd_decay_steps", "decay_steps", "max_steps"),
            *("warmup_steps", "warmup_ratio"),
        ),
        _check_stable_decay,
    ),
    (("split",), _check_split),
    (
        ("do_eval", "eval_on_start", "evaluation_strategy", "eval_iters", "max_evaluate_steps"),
        _check_evaluation,
    ),
    (
        (
            "load_best_model_at_end",
            "evaluation_strategy",
            "save_strategy",
            "save_steps",
            "eval_steps",
            "logging_steps",
            "max_steps",
        ),
        _check_best_model,
    ),
    (("skip_data_intervals", "max_steps"), _check_skipped_steps),
    (("overwrite_output_dir", "resume_from_checkpoint"), _check_resume),
    (("blend_by", "blend_temperature"), _check_blend),
    (("rampup_batch_size",), _check_ramp),
    (("mup_base_width", "optim"), _check_mup),
    (("sample_prompts", "sample_steps", "sample_tokens"), _check_sample_prompts),
)
