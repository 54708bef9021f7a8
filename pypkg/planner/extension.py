"""The passes of a deep model in a long pipeline from those of a few layers and micro batches.

All layers of a chunk are alike. While one of them runs, each of the others has either saved tensors
or gradients, and what the running one allocates does not depend on their number. So the peak of
each part of a chunk is linear in the number of layers and in the place of the layer among them; and
likewise in the number of micro batches that are in flight. Three layers are a first, a last, and
one that is neither.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from pypkg.planner.step import Peaks, StepPlan, run_passes
from pypkg.planner.tape import Part, Peak

_LAYERS, _STARTUP = 3, 2


def extended_passes(plan: StepPlan) -> Peaks:
    """``run_passes(plan)``, of which not all that is alike is run."""
    degrees = replace(plan.degrees, data=1, sharding=1, pipeline=min(plan.degrees.pipeline, 2))
    update = replace(plan.update, data=1, offloads=False)
    # A dict and a list, which no key of a cache may hold; sizes do not depend on either.
    config = replace(plan.config, rope_scaling=None, eos_token_id=None)
    return _passes(replace(plan, config=config, degrees=degrees, update=update))


@functools.lru_cache(maxsize=1024)
def _passes(plan: StepPlan) -> Peaks:
    """``extended_passes`` of a plan without what passes do not depend on."""
    layers = len(plan.chunk.layers)
    if plan.startup > _STARTUP + 1:
        few, more = (_passes(replace(plan, startup=_STARTUP + each)) for each in (0, 1))
        steps = plan.startup - _STARTUP
        return {key: _linear(few[key], more[key], steps) for key in few}
    # Buckets of stage 2 do not end with layers.
    if layers <= _LAYERS + 1 or plan.stage == 2 or len(set(plan.recompute)) > 1:
        return run_passes(plan)
    few, more = (_passes(_with_layers(plan, _LAYERS + each)) for each in (0, 1))
    return _deeper(few, more, layers)


def _with_layers(plan: StepPlan, layers: int) -> StepPlan:
    chunk = replace(plan.chunk, layers=range(layers))
    return replace(plan, chunk=chunk, recompute=plan.recompute[:layers])


def _deeper(few: Peaks, more: Peaks, layers: int) -> Peaks:
    """The peaks of ``layers`` layers; of those in the middle only the first and the last."""
    steps = layers - _LAYERS
    found: dict[tuple[str, Part], Peak] = {}
    for (phase, part), peak in few.items():
        if part == 1:
            first = _linear(peak, more[phase, 1], steps)
            per_place = _linear(more[phase, 1], more[phase, 2], steps)
            found[phase, 1] = first
            found[phase, layers - 2] = _sum(first, per_place, more[phase, 1])
        elif part == _LAYERS - 1:
            found[phase, layers - 1] = _linear(peak, more[phase, _LAYERS], steps)
        else:
            found[phase, part] = _linear(peak, more[phase, part], steps)
    return found


def _linear(at: Peak, after_one: Peak, steps: int) -> Peak:
    """at + steps * (after_one - at), for each term."""
    terms = {
        name: at.terms.get(name, 0) + steps * (after_one.terms.get(name, 0) - at.terms.get(name, 0))
        for name in {**at.terms, **after_one.terms}
    }
    return Peak(sum(terms.values()), terms)


def _sum(x: Peak, y: Peak, subtracted: Peak) -> Peak:
    """x + y - subtracted, for each term."""
    terms = {
        name: x.terms.get(name, 0) + y.terms.get(name, 0) - subtracted.terms.get(name, 0)
        for name in {**x.terms, **y.terms}
    }
    return Peak(sum(terms.values()), terms)
