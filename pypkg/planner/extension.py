"""The step of a deep model from those of three and four layers.

All layers of a chunk are alike. While one of them runs, each of the others has either saved tensors
or gradients, and what the running one allocates does not depend on their number. So the peak of each
part of a chunk is linear in the number of layers, and in the place of the layer among them. Three
layers are a first, a last, and one that is neither.
"""

from __future__ import annotations

from dataclasses import replace

from pypkg.planner.step import UPDATE, StepMemory, StepPlan, run_step, run_update
from pypkg.planner.tape import Part, Peak

_FEW = 3
_Peaks = dict[tuple[str, Part], Peak]


def extended_step(plan: StepPlan) -> StepMemory:
    """``run_step(plan)``, without running all layers where they are alike."""
    layers = len(plan.chunk.layers)
    if layers <= _FEW + 1 or not _are_alike(plan):
        return run_step(plan)
    few, more = (_passes(plan, count) for count in (_FEW, _FEW + 1))
    update = run_update(plan)
    return StepMemory({**_extended(few, more, layers), **update.peaks}, update.state)


def _are_alike(plan: StepPlan) -> bool:
    """Whether layers differ by their place alone. Buckets of stage 2 do not end with layers."""
    granularities = {plan.recompute.get(number, "") for number in plan.chunk.layers}
    return plan.stage != 2 and len(granularities) == 1


def _passes(plan: StepPlan, layers: int) -> _Peaks:
    start = plan.chunk.layers.start
    chunk = replace(plan.chunk, layers=range(start, start + layers))
    found = run_step(replace(plan, chunk=chunk)).peaks
    return {key: peak for key, peak in found.items() if key[0] != UPDATE}


def _extended(few: _Peaks, more: _Peaks, layers: int) -> _Peaks:
    """The peaks of ``layers`` layers; of those in the middle only the first and the last."""
    steps, found = layers - _FEW, {}
    for (phase, part), peak in few.items():
        if part == 1:
            first = _linear(peak, more[phase, 1], steps)
            per_place = _linear(more[phase, 1], more[phase, 2], layers - _FEW)
            found[phase, 1] = first
            found[phase, layers - 2] = _sum(first, per_place, more[phase, 1])
        elif part == _FEW - 1:
            found[phase, layers - 1] = _linear(peak, more[phase, _FEW], steps)
        else:
            found[phase, part] = _linear(peak, more[phase, part], steps)
    return found


def _linear(at: Peak, after_one: Peak, steps: int) -> Peak:
    """at + steps * (after_one - at), for each term."""
    terms = {
        name: at.terms.get(name, 0)
        + steps * (after_one.terms.get(name, 0) - at.terms.get(name, 0))
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
