"""Planned memory in bfloat16 against bytes that a process counts; computed in float32 on a CPU.

A CPU has no operator for a whole block in 16 bits, so the plans are those of single operators. What
a block keeps is measured in float32 (measured_memory.json).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from distributed_testing import run_ranks
from planned_memory import case_of, config_of, settings_of
from tiny_configs import KEYS

from pypkg.parallel.mesh import Degrees
from pypkg.planner.layer import Layer
from pypkg.planner.memory import step_plan
from pypkg.planner.step import StepPlan, kept_after_forward, run_update

TOLERANCE = 0.02  # of what is measured
WORKER = Path(__file__).with_name("half_worker.py")
FEW = ("llama", "opt", "baichuan2_7b")


def kept_by_single_operators(step: StepPlan) -> int:
    with (
        mock.patch.object(Layer, "_attends_in_one", False),
        mock.patch.object(Layer, "_has_mlp_in_one", False),
    ):
        return kept_after_forward(step)


def planned(family: str) -> dict[str, int]:
    case = case_of(family, "1", "", "activations")
    step = step_plan(settings_of(case), config_of(case), Degrees(), "cpu", 0, 0)
    step = replace(step, dtype_bytes=2)
    update, state = run_update(step)
    kept = kept_by_single_operators(step)
    return {
        "kept": kept,
        "held": update.terms["weights"] + update.terms.get("tables", 0) + sum(state.values()),
    }


def compare(families: tuple[str, ...]) -> None:
    cases = [case_of(family, "1", "", "activations") for family in families]
    (measured,) = run_ranks(WORKER, 1, [json.dumps(cases)])
    found = {family: planned(family) for family in families}
    for family, each in zip(families, measured, strict=True):
        for what, size in each.items():
            assert found[family][what] == pytest.approx(size, rel=TOLERANCE), (family, what)


def test_kept_tensors_and_state_in_16_bits() -> None:
    compare(FEW)


@pytest.mark.slow
def test_kept_tensors_and_state_of_every_family_in_16_bits() -> None:
    compare(tuple(KEYS))


def test_layers_that_add_weight_gradients_are_no_blocks() -> None:
    case = case_of("llama", "1", "", "activations")
    settings, config = settings_of(case), config_of(case)
    blocks, single = (
        step_plan(settings, config, Degrees(adds_weight_gradients=adds), "gpu", 0, 0)
        for adds in (False, True)
    )
    assert kept_after_forward(blocks) < kept_after_forward(single)
    assert kept_after_forward(single) == kept_by_single_operators(blocks)
    in_float32 = [replace(each, dtype_bytes=4) for each in (blocks, single)]
    assert len(set(map(kept_after_forward, in_float32))) == 1  # there is no sum to add to
