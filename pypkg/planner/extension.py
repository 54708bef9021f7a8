"""The passes of a deep model in a long pipeline from those of a few layers and micro batches.

All layers of a chunk are alike. While one of them runs, each of the others has either saved tensors
or gradients, and what the running one allocates does not depend on their number. So the peak of
each part of a chunk is linear in the number of layers and in the place of the layer among them; and
likewise in the number of micro batches that are in flight. Three layers are a first, a last, and
one that is neither. Chunks of an interleaved stage grow by the same number of layers, and at the
ends of the pipeline the micro batches in flight grow with the number of stages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from pypkg.planner.step import Peaks, StepPlan, run_passes
from pypkg.planner.tape import Part, Peak

_LAYERS, _STARTUP, _STAGES = 3, 2, 3


def extended_passes(plan: StepPlan) -> Peaks:
    """``run_passes(plan)``, of which not all that is alike is run."""
    pipeline = min(plan.degrees.pipeline, 2)
    degrees = replace(plan.degrees, data=1, sharding=1, pipeline=pipeline, virtual_stages=1)
    update = replace(plan.update, data=1, offloads=False)
    # A dict and a list, which no key of a cache may hold; sizes do not depend on either.
    config = replace(plan.config, rope_scaling=None, eos_token_id=None)
    return _passes(replace(plan, config=config, degrees=degrees, update=update))


@functools.lru_cache(maxsize=8192)
def _passes(plan: StepPlan) -> Peaks:
    """``extended_passes`` of a plan without what passes do not depend on."""
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
    # Buckets of stage 2 do not end with layers.
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
    """The peaks with ``steps`` more layers in each chunk; of those in the middle only the first and
    the last.

    Args:
        fewer: layers of each chunk in ``few``; in ``more`` each has one layer more.
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
    """at + steps * (after_one - at), for each term."""
    return _weighted((1 - steps, at), (steps, after_one))


def _weighted(*summands: tuple[int, Peak]) -> Peak:
    """The sum of peaks times their factors, for each term."""
    names = dict.fromkeys(name for _, peak in summands for name in peak.terms)
    terms = {
        name: sum(factor * peak.terms.get(name, 0) for factor, peak in summands) for name in names
    }
    return Peak(sum(terms.values()), terms)
