"""A plan as tables for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Sequence
from typing import Any

from pypkg.planner.memory import TERMS, RankMemory
from pypkg.planner.search.best import Found, reason
from pypkg.planner.search.plan import OUTSIDE, Plan, what_would_do

_GIB = 2**30
# Settings that a search changes, in the order of a launch line.
CHANGED = (
    "tensor_parallel_degree", "sequence_parallel", "pipeline_parallel_degree", "virtual_pp_degree",
    "sep_parallel_degree", "context_parallel_degree", "sharding", "sharding_parallel_degree",
    "sharding_degree", "data_parallel_degree", "per_device_train_batch_size",
    "gradient_accumulation_steps", "recompute", "recompute_granularity",
)  # fmt: skip


def describe(plan: Plan, tokens: float | None, price: float | None) -> list[str]:
    """A plan as lines of text.

    Args:
        tokens: tokens of the whole run; None: days and price are left out.
        price: price of a GPU hour; None: the price is left out.
    """
    return [*_head(plan), "", *_memory(plan), "", *_time(plan), *_cost(plan, tokens, price)]


def layout_of(plan: Plan) -> str:
    """Degrees, stage and recompute in a few words. "pipeline 8 x 2" has two chunks in a stage."""
    d, s = plan.degrees, plan.settings
    pipeline = f"{d.pipeline} x {d.virtual_stages}" if d.virtual_stages > 1 else str(d.pipeline)
    parts = [
        f"{name} {degree}"
        for name, degree in (("data", d.data), ("pipeline", pipeline), ("tensor", d.tensor))
        if degree not in (1, "1")
    ]
    if d.context > 1:
        parts.append(f"context {d.context} ({'ring' if d.ring else 'heads'})")
    if d.sharding > 1:
        parts.append(f"sharding {d.sharding} (stage{s.sharding_stage})")
    if d.sequence_parallel:
        parts.append("sequence parallel")
    if s.recompute:
        parts.append(f"recompute {s.recompute_granularity}")
    return ", ".join(parts) or "one process"


def _head(plan: Plan) -> list[str]:
    config, s, gpu = plan.config, plan.settings, plan.cluster.gpu
    batches = "micro batch" if s.gradient_accumulation_steps == 1 else "micro batches"
    context = plan.degrees.context
    of = "a rank" if context == 1 else f"for each {context} ranks"
    return [
        f"model   {config.model_type}, {config.num_parameters() / 1e6:,.1f} M parameters",
        f"GPUs    {plan.degrees.world_size} x {gpu.name}, {gpu.memory / _GIB:.1f} GiB each, "
        f"{plan.cluster.gpus_per_node} a machine ({gpu.source})",
        f"layout  {layout_of(plan)}",
        f"batch   {s.gradient_accumulation_steps} {batches} of "
        f"{s.per_device_train_batch_size} x {s.max_seq_length} tokens {of}, "
        f"{plan.time.tokens:,} tokens a step",
    ]


def _memory(plan: Plan) -> list[str]:
    """A table of the memory terms; the columns are pipeline stages."""
    ranks = largest_of_each_stage(plan)
    several = len(ranks) > 1
    width = 9 if several else 8  # "backward" and a space between stages
    lines = ["memory of a rank, GiB" + (", by pipeline stage" if several else "")]
    if several:
        lines.append(f"{'':<18}" + "".join(f"{rank.pipeline_rank:>{width}}" for rank in ranks))
    for name in (each for each in TERMS if any(each in rank.terms for rank in ranks)):
        cells = "".join(f"{rank.terms.get(name, 0) / _GIB:>{width}.2f}" for rank in ranks)
        lines.append(f"{name:<18}{cells}")
    lines.append(f"{'peak':<18}" + "".join(f"{rank.peak / _GIB:>{width}.2f}" for rank in ranks))
    lines.append(f"{'in the':<18}" + "".join(f"{rank.peak_phase:>{width}}" for rank in ranks))
    usable = (
        f"{plan.capacity / _GIB:.1f} GiB for tensors, "
        f"with {OUTSIDE / _GIB:.1f} for context, NCCL and fragments"
    )
    if plan.fits:
        lines.append(f"fits: {-plan.short / _GIB:.1f} GiB are left of {usable}")
    else:
        lines.append(f"does not fit: {reason(plan)}; there are {usable}")
        way = what_would_do(plan)
        lines.append(
            "no single change makes it fit; --search looks for layouts"
            if way is None
            else f"{way[0]} would do: {way[1].largest.peak / _GIB:.1f} GiB, "
            f"{way[1].time.tokens_per_second:,.0f} tokens/s per GPU"
        )
    return lines


def largest_of_each_stage(plan: Plan) -> list[RankMemory]:
    """The largest rank of each pipeline stage."""
    stages: dict[int, RankMemory] = {}
    for rank in plan.memory.ranks:
        held = stages.get(rank.pipeline_rank)
        if held is None or rank.peak > held.peak:
            stages[rank.pipeline_rank] = rank
    return list(stages.values())


def _time(plan: Plan) -> list[str]:
    step = plan.time
    lines = ["time of a step, ms"]
    for name, seconds in step.terms.items():
        lines.append(f"{name:<26}{1e3 * seconds:>10,.1f}{100 * seconds / step.seconds:>7.1f} %")
    lines.append(f"{'step':<26}{1e3 * step.seconds:>10,.1f}")
    lines.append(
        f"{step.tokens_per_second:,.0f} tokens/s per GPU, give or take "
        f"{100 * plan.uncertainty:.0f} %; MFU {100 * plan.mfu:.1f} %"
    )
    return lines


def _cost(plan: Plan, tokens: float | None, price: float | None) -> list[str]:
    if tokens is None:
        return []
    line = f"{tokens:,.0f} tokens: {plan.time.days(tokens):,.1f} days"
    if price is not None:
        line += f", {plan.time.price(tokens, price):,.0f} at {price:g} a GPU hour"
    return [line]


def describe_search(found: Found, tokens: float | None, price: float | None) -> list[str]:
    """A search as lines of text: the layouts that fit, and why others do not.

    Args:
        tokens, price: as in ``describe``.
    """
    lines = [
        f"{'':>3} {'tokens/s':>8}{'MFU %':>7}{'GiB':>7} {'days' if tokens else '':>8} "
        f"{'price' if price and tokens else '':>11}  micro batch, layout"
    ]
    for number, plan in enumerate(found.fitting, 1):
        days = f"{plan.time.days(tokens):,.1f}" if tokens else ""
        cost = f"{plan.time.price(tokens, price):,.0f}" if price and tokens else ""
        lines.append(
            f"{number:>3} {plan.time.tokens_per_second:>8,.0f}{100 * plan.mfu:>7.1f}"
            f"{plan.largest.peak / _GIB:>7.1f} {days:>8} {cost:>11}  "
            f"{_batches(plan)}, {layout_of(plan)}"
        )
    if not found.fitting:
        lines = ["no layout fits these GPUs"]
    for title, misses in (
        ("faster, but too large:", found.faster),
        ("too large with all of recompute, nearest first:", found.too_large),
    ):
        if misses:
            lines.append(title)
        for miss in misses:
            lines.append(f"  {_batches(miss.plan)}, {layout_of(miss.plan)}: {miss.reason}")
    if found.too_large_by_state:
        lines.append(
            f"{found.too_large_by_state} others: weights and optimizer state alone are too large"
        )
    return lines


def _batches(plan: Plan) -> str:
    """Micro batches of a step, and sequences of each."""
    s = plan.settings
    return f"{s.gradient_accumulation_steps} x {s.per_device_train_batch_size}"


def changed_keys(plan: Plan, base: Any) -> dict[str, Any]:
    """The settings in which a plan differs from ``base``, as a JSON file has them."""
    found = {}
    for name in CHANGED:
        value = getattr(plan.settings, name)
        if value != getattr(base, name):
            found[name] = " ".join(value) if isinstance(value, tuple) else value
    return found


def launch_line(plan: Plan, arguments: Sequence[str], changes: dict[str, Any]) -> str:
    """The command that starts the run with ``changes``.

    Args:
        arguments: of ``pypkg pretrain`` before the changes.
    """
    kept = shlex.join(_without(arguments, changes)) or "CONFIG.json"
    node = min(plan.cluster.gpus_per_node, plan.degrees.world_size)
    nodes = plan.degrees.world_size // node
    several = f"--nnodes {nodes} --rank N --master HOST:PORT " if nodes > 1 else ""
    gpus = ",".join(map(str, range(node)))
    words = " ".join(f"--{name} {json.dumps(value) if isinstance(value, (bool, str)) else value}"
                     for name, value in changes.items())  # fmt: skip
    return (
        f'python -m paddle.distributed.launch {several}--gpus "{gpus}" run_pretrain.py '
        f"{kept} {words}".rstrip()
    )


def _without(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """The command line without the settings of these names and their values."""
    kept, leaves_out = [], False
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            leaves_out = name in names or name.removeprefix("no_") in names
        if not leaves_out:
            kept.append(word)
    return kept


def as_json(plan: Plan, tokens: float | None, price: float | None) -> dict[str, Any]:
    """A plan as a JSON object; sizes in bytes, times in seconds."""
    step = plan.time
    found: dict[str, Any] = {
        "model": plan.config.model_type,
        "parameters": plan.config.num_parameters(),
        "gpus": plan.degrees.world_size,
        "gpu": dataclasses.asdict(plan.cluster.gpu),
        "degrees": dataclasses.asdict(plan.degrees),
        "settings": {name: getattr(plan.settings, name) for name in CHANGED},
        "fits": plan.fits,
        "capacity_bytes": plan.capacity,
        "ranks": [
            {
                "pipeline_rank": rank.pipeline_rank,
                "tensor_rank": rank.tensor_rank,
                "peak_bytes": rank.peak,
                "peak_phase": rank.peak_phase,
                "terms": dict(rank.terms),
            }
            for rank in plan.memory.ranks
        ],
        "step_seconds": step.seconds,
        "step_terms": dict(step.terms),
        "tokens_per_step": step.tokens,
        "tokens_per_second_per_gpu": step.tokens_per_second,
        "uncertainty": plan.uncertainty,
        "mfu": plan.mfu,
    }
    if tokens is not None:
        found["days"] = step.days(tokens)
        if price is not None:
            found["price"] = step.price(tokens, price)
    return found


def search_as_json(
    found: Found, base: Any, tokens: float | None, price: float | None
) -> dict[str, Sequence[Any]]:
    """A search as a JSON object: each layout that fits, with the keys that it changes."""
    return {
        "fitting": [
            {**as_json(plan, tokens, price), "changed_keys": changed_keys(plan, base)}
            for plan in found.fitting
        ],
        "too_large": [
            {
                "layout": layout_of(miss.plan),
                "short_bytes": miss.plan.short,
                "reason": miss.reason,
                "remedy": miss.way and miss.way[0],
            }
            for miss in (*found.faster, *found.too_large)
        ],
    }
