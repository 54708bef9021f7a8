"""Planned memory against the bytes that this process allocates, and against itself."""

from __future__ import annotations

import json
import math
from importlib import import_module
from itertools import product

import pytest
from measured_memory import measure
from planned_memory import (
    GRANULARITIES,
    LAYOUTS,
    RECORD,
    SIZES,
    TOLERANCE,
    case_of,
    config_of,
    error,
    grid,
    key_of,
    plan_of,
    settings_of,
)
from tiny_configs import KEYS

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.models.architecture.parameter_shapes import ParameterShape
from pypkg.parallel.mesh import Degrees
from pypkg.planner import memory, operators
from pypkg.planner.memory import PHASES, plan_memory
from pypkg.planner.operators import Operators
from pypkg.planner.pipeline.interleaving import Interleaving
from pypkg.planner.step import run_passes
from pypkg.planner.tape import Tape
from pypkg.planner.zero import owners

# A family of each kind of norm, MLP, position and table; what takes most differs.
MEASURED = [
    ("llama", "", "state"),
    ("gpt3", "core_attn", "logits"),
    ("baichuan2_13b", "full_attn", "state"),
    ("chatglm", "full", "activations"),
    ("opt_350m", "", "activations"),
    ("qwen3", "core_attn", "activations"),
]
DEEP = {"1": 7, "stage1": 7, "stage3": 7, "tp2+sp": 7, "pp5": 26, "pp4v3": 62}


@pytest.mark.parametrize(("is_sorted", "owner_of"), [(True, [0, 0, 1, 1]), (False, [0, 1, 0, 0])])
def test_the_owner_is_the_rank_with_the_fewest_elements(is_sorted, owner_of) -> None:
    shapes = [ParameterShape(str(size), (size,), None) for size in (1, 5, 3, 3)]
    assert owners(shapes, 2, is_sorted) == owner_of


@pytest.mark.parametrize(("family", "granularity", "size"), MEASURED)
def test_the_plan_is_what_a_process_allocates(family: str, granularity: str, size: str) -> None:
    case = case_of(family, "1", granularity, size)
    (measured,) = measure([case])
    (rank,) = plan_of(case).ranks
    assert rank.peak == pytest.approx(max(measured["passes"], measured["update"]), rel=TOLERANCE)
    assert rank.phases["update"] == pytest.approx(measured["update"], rel=TOLERANCE)
    assert rank.peak == rank.phases[rank.peak_phase] == max(rank.phases[p] for p in PHASES)


def off_the_record(every: int) -> list[tuple[str, float]]:
    """The cells of the record whose plan is not what processes took, of each ``every``-th."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    cases = [case for case in grid(LAYOUTS, SIZES) if key_of(case) in record]
    assert len(cases) == len(record) > 300
    found = [(key_of(case), error(case, record[key_of(case)])) for case in cases[::every]]
    return [(key, off) for key, off in found if abs(off) > TOLERANCE]


def test_plans_are_what_processes_took() -> None:
    # No common divisor with the families or the granularities, so all of them come in turn.
    every = 17
    assert math.gcd(every, len(KEYS) * len(GRANULARITIES)) == 1
    assert off_the_record(every) == []


@pytest.mark.slow
def test_all_plans_are_what_processes_took() -> None:
    assert off_the_record(1) == []


def test_what_takes_most_differs_between_the_sizes() -> None:
    """At each of the sizes of every family it is what the size is named after."""
    for family, size in product(KEYS, SIZES):
        terms = plan_of(case_of(family, "1", "", size)).largest.terms
        found = {name: terms.get(name, 0) for name in ("activations", "logits")}
        found["state"] = sum(terms[name] for name in ("weights", "gradients", "moments"))
        assert max(found, key=lambda name: found[name]) == size, (family, found)


@pytest.mark.parametrize("micro_batches", [4, 12, 16, 18])
def test_a_long_interleaved_pipeline_is_planned_from_a_short_one(
    micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(case_of("llama", "1", "full", "logits", 16))
    settings = Settings(
        max_steps=1, per_device_train_batch_size=1, max_seq_length=64,
        gradient_accumulation_steps=micro_batches,
    )  # fmt: skip
    degrees = Degrees(pipeline=4 if micro_batches == 4 else 6, virtual_stages=2)
    found = plan_memory(settings, config, degrees).ranks
    monkeypatch.setattr(memory, "extended_passes", run_passes)
    monkeypatch.setattr(Interleaving, "shortened", lambda place: place)
    assert found == plan_memory(settings, config, degrees).ranks


def test_interleaved_stages_have_more_micro_batches_in_flight() -> None:
    """2 (p - 1) + (v - 1) p + 1 passes of chunks on the first stage: as Narayanan et al. (2021).

    The first layer of a chunk keeps a little more than others: the output of its first norm.
    """
    config = config_of(case_of("llama", "1", "", "activations", 24))
    settings = Settings(
        max_steps=1, per_device_train_batch_size=8, max_seq_length=128,
        gradient_accumulation_steps=16,
    )  # fmt: skip
    kept = {}
    for chunks in (1, 2, 3):
        degrees = Degrees(pipeline=4, virtual_stages=chunks)
        kept[chunks] = plan_memory(settings, config, degrees).ranks[0].terms["activations"]
    passes = {1: 4, 2: 11 / 2, 3: 15 / 3}  # in units of the layers of a stage
    for chunks in (2, 3):
        expected = passes[chunks] / passes[1]
        assert expected < kept[chunks] / kept[1] < 1.05 * expected


@pytest.mark.parametrize("granularity", ["", "full"])
@pytest.mark.parametrize("layout", DEEP)
def test_a_deep_model_is_planned_from_a_few_layers(
    layout: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The many passes of an interleaved stage take seconds.
    families = ("llama",) if layout == "pp4v3" else ("llama", "glm130b", "opt_350m")
    for family in families:
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


def test_what_is_freed_is_what_was_allocated() -> None:
    """Rounded up, both."""
    tape = Tape(256)
    for size in (1, 255, 256, 257):
        kept = tape.empty(size, "weights")
        assert tape.allocated == (512 if size == 257 else 256)
        kept.clear()
        assert tape.allocated == tape.terms["weights"] == 0


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_chunk_of_the_loss_is_that_of_the_operator(is_gpu) -> None:
    loss = import_module("pypkg.ops.loss.linear_cross_entropy")
    chunk_bytes = loss._CHUNK_BYTES if is_gpu else loss._CPU_CHUNK_BYTES
    tape, vocab, dtype_bytes = Tape(1), 32000, 2 if is_gpu else 4
    ops = Operators(tape, dtype_bytes, is_gpu)
    tokens = 2 * chunk_bytes // (vocab * dtype_bytes)
    hidden, weight = ops.new(tokens * 8), tape.parameter("w", vocab * 8, "weights")
    ops.linear_cross_entropy(hidden, weight, tokens, vocab, is_divided=False)
    (found,) = tape.peaks().values()
    assert found.terms["logits"] == pytest.approx(chunk_bytes, rel=0.01)


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("tokens", [1, 30, 60, 61, 90, 150, 1000, 1020])
def test_chunks_of_the_loss_that_are_alike_are_planned_at_once(monkeypatch, is_gpu, tokens) -> None:
    """As if each of them were planned; a chunk has 30 tokens, so that losses are rounded up."""

    def peak() -> tuple[int, dict[str, int]]:
        tape = Tape(256 if is_gpu else 1)
        ops = Operators(tape, 2 if is_gpu else 4, is_gpu)
        hidden, weight = ops.new(tokens * 8), tape.parameter("w", 100, "weights")
        ops.linear_cross_entropy(hidden, weight, tokens, 10, is_divided=False)
        (found,) = tape.peaks().values()
        return found.total, found.terms

    monkeypatch.setattr(operators, "_GPU_CHUNK_BYTES", 30 * 10 * 2)
    monkeypatch.setattr(operators, "_CPU_CHUNK_BYTES", 30 * 10 * 4)
    planned = peak()
    monkeypatch.setattr(
        operators, "_chunks", lambda tokens, chunk: ((at, 0) for at in range(0, tokens, chunk))
    )
    assert peak() == planned


def test_every_family_is_planned_in_16_bits_for_a_gpu() -> None:
    for family in KEYS:
        for name, layout in LAYOUTS.items():
            case = case_of(family, name, "full_attn", "state")
            settings = settings_of(case, amp_master_grad=True)
            rank = plan_memory(settings, config_of(case), layout.degrees).largest
            assert rank.terms["master weights"] * 2 == rank.terms["moments"], (family, name)


UNPLANNED = {
    "attention_backend": ({"attention_backend": "reference"}, Degrees()),
    "bf16": ({"bf16": True}, Degrees()),
}


@pytest.mark.parametrize("word", UNPLANNED)
def test_what_is_not_planned_is_named(word: str) -> None:
    values, degrees = UNPLANNED[word]
    config = config_of(case_of("llama", "1", "", "state", 4))
    with pytest.raises(UserError, match=word):
        plan_memory(Settings(max_steps=1, **values), config, degrees, "cpu")
