"""Planned memory against the bytes that this process allocates, and against itself."""

from __future__ import annotations

import pytest
from measured_memory import measure
from planned_memory import LAYOUTS, TOLERANCE, case_of, config_of, plan_of, settings_of
from tiny_configs import KEYS

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.parallel.mesh import Degrees
from pypkg.planner import memory
from pypkg.planner.memory import PHASES, plan_memory
from pypkg.planner.step import run_passes

# A family of each kind of norm, MLP, position and table; what takes most differs.
MEASURED = [
    ("llama", "", "state"),
    ("gpt3", "core_attn", "logits"),
    ("baichuan2_13b", "full_attn", "state"),
    ("chatglm", "full", "activations"),
    ("opt_350m", "", "activations"),
    ("qwen3", "core_attn", "activations"),
]
DEEP = {"1": 7, "stage1": 7, "stage3": 7, "tp2+sp": 7, "pp5": 26}


@pytest.mark.parametrize(("family", "granularity", "size"), MEASURED)
def test_the_plan_is_what_a_process_allocates(family: str, granularity: str, size: str) -> None:
    case = case_of(family, "1", granularity, size)
    measured = measure(case)
    (rank,) = plan_of(case).ranks
    assert rank.peak == pytest.approx(max(measured["passes"], measured["update"]), rel=TOLERANCE)
    assert rank.phases["update"] == pytest.approx(measured["update"], rel=TOLERANCE)
    assert rank.peak == rank.phases[rank.peak_phase] == max(rank.phases[p] for p in PHASES)


@pytest.mark.parametrize("granularity", ["", "full"])
@pytest.mark.parametrize("layout", DEEP)
def test_a_deep_model_is_planned_from_a_few_layers(
    layout: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in ("llama", "glm130b", "opt_350m"):
        case = case_of(family, layout, granularity, "activations", DEEP[layout])
        found = plan_of(case).ranks
        with monkeypatch.context() as patch:
            patch.setattr(memory, "extended_passes", run_passes)
            assert found == plan_of(case).ranks


def test_layers_that_differ_are_planned_one_by_one() -> None:
    case = case_of("llama", "1", "full", "activations", 8)
    config, degrees = config_of(case), Degrees()
    peaks = [
        plan_memory(settings_of(case, no_recompute_layers=skipped), config, degrees, "cpu")
        for skipped in ((), (3,), (3, 4), tuple(range(8)))
    ]
    sizes = [plan.largest.peak for plan in peaks]
    assert sizes == sorted(set(sizes))


def test_every_family_is_planned_in_16_bits_for_a_gpu() -> None:
    for family in KEYS:
        for layout, (degrees, sharding) in LAYOUTS.items():
            case = case_of(family, layout, "full_attn", "state")
            settings = settings_of(case, amp_master_grad=True)
            rank = plan_memory(settings, config_of(case), Degrees(**degrees)).largest
            assert rank.terms["master weights"] * 2 == rank.terms["moments"], (family, sharding)


UNPLANNED = {
    "virtual_pp_degree": ({"virtual_pp_degree": 2}, Degrees(pipeline=2, virtual_stages=2)),
    "attention_backend": ({"attention_backend": "reference"}, Degrees()),
    "bf16": ({"bf16": True}, Degrees()),
}


@pytest.mark.parametrize("word", UNPLANNED)
def test_what_is_not_planned_is_named(word: str) -> None:
    values, degrees = UNPLANNED[word]
    config = config_of(case_of("llama", "1", "", "state", 4))
    with pytest.raises(UserError, match=word):
        plan_memory(Settings(max_steps=1, **values), config, degrees, "cpu")
