"""Extrapolates the passes of a deep model in a long pipeline from a few layers and micro batches.

All layers of a chunk are equal. While one of them runs, each other layer holds either saved tensors
or gradients, and what the running layer allocates does not depend on their number. So the peak of
each part of a chunk is linear in the number of layers and in the index of the layer, and likewise
in the number of micro batches in flight. Three layers suffice: the first, the last, and one in
between. All chunks of an interleaved stage grow by the same number of layers. On the first and the
last stage the micro batches in flight grow with the number of stages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from pypkg.planner.step import Peaks, StepPlan, run_passes
from pypkg.planner.tape import Part, Peak

_LAYERS, _STARTUP, _STAGES = 3, 2, 3


def extended_passes(plan: StepPlan) -> Peaks:
    """The result of ``run_passes(plan)``, computed from a smaller step where that is exact."""
    pipeline = min(plan.degrees.pipeline, 2)
    degrees = replace(plan.degrees, data=1, sharding=1, pipeline=pipeline, virtual_stages=1)
    update = replace(plan.update, data=1, offloads=False)
    # The fields that are a dict or a list cannot be part of a cache key. No size depends on them.
    config = replace(plan.config, rope_scaling=None, eos_token_id=None)
    return _passes(replace(plan, config=config, degrees=degrees, update=update))


@functools.lru_cache(maxsize=8192)
def _passes(plan: StepPlan) -> Peaks:
    """``extended_passes`` of a plan reduced to the fields that passes depend on; cached."""
    layers = [len(chunk.layers) for chunk in plan.chunks]
    if plan.interleaving is None and plan.startup > _STARTUP + 1:
        few, more = (_passes(replace(plan, startup=_STARTUP + each)) for each in (0, 1))
        steps = plan.startup - _STARTUP
        return {key: _linear(few[key], more[key], steps) for key in few}
    place = plan.interleaving
    if place is not None and place.scales and place.stages > _STAGES + 1:
        few, more = (
            _passes(replace(plan, interleaving=place.scaled(_STAGES + each))) for each in (0, 1)
        )
        return {key: _linear(few[key], more[key], place.stages - _STAGES) for key in few}
    kinds = {kind for chunk in plan.recompute for kind in chunk}
    # Buckets of stage 2 span layer boundaries.
    if min(layers) <= _LAYERS + 1 or plan.stage == 2 or len(kinds) > 1:
        return run_passes(plan)
    fewer = [each - min(layers) + _LAYERS for each in layers]
    few, more = (_passes(_with_layers(plan, [n + each for n in fewer])) for each in (0, 1))
    return _deeper(few, more, fewer, min(layers) - _LAYERS)


def _with_layers(plan: StepPlan, layers: Sequence[int]) -> StepPlan:
    chunks = tuple(
        replace(chunk, layers=range(sum(layers[:number]), sum(layers[: number + 1])))
        for number, chunk in enumerate(plan.chunks)
    )
    recompute = tuple(each[:n] for each, n in zip(plan.recompute, layers, strict=True))
    return replace(plan, chunks=chunks, recompute=recompute)


def _deeper(few: Peaks, more: Peaks, fewer: Sequence[int], steps: int) -> Peaks:
    """The peaks with ``steps`` more layers in each chunk.

    Of the added middle layers only the first and the last get peaks.

    Args:
        fewer: number of layers of each chunk in ``few``; ``more`` has one layer more in each.
    """
    found: dict[tuple[str, Part], Peak] = {}
    for (phase, part), peak in few.items():
        chunk, place = part if isinstance(part, tuple) else (0, "")
        if place == 0 or isinstance(place, str):
            found[phase, part] = _linear(peak, more[phase, part], steps)
        elif place == fewer[chunk] - 1:
            after = more[phase, (chunk, fewer[chunk])]
            found[phase, (chunk, place + steps)] = _linear(peak, after, steps)
        elif place == 1:
            first = _linear(peak, more[phase, part], steps)
            last = fewer[chunk] + steps - 2
            per_place = _linear(more[phase, part], more[phase, (chunk, 2)], last - 1)
            found[phase, part] = first
            found[phase, (chunk, last)] = _weighted(
                (1, first), (1, per_place), (-1, more[phase, part])
            )
    return found


def _linear(at: Peak, after_one: Peak, steps: int) -> Peak:
    """Extrapolates each term linearly: at + steps * (after_one - at)."""
    return _weighted((1 - steps, at), (steps, after_one))


def _weighted(*summands: tuple[int, Peak]) -> Peak:
    """The sum of peaks times their factors, for each term."""
    names = dict.fromkeys(name for _, peak in summands for name in peak.terms)
    terms = {
        name: sum(factor * peak.terms.get(name, 0) for factor, peak in summands) for name in names
    }
    return Peak(sum(terms.values()), terms)
