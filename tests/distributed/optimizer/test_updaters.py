"""Updates under every layout on CPU processes against plain Paddle in one process.

Losses, norms, parameters and optimizer state of five steps, from the same weights and the same
global batches. Gradients are clipped in all of them. With a loss scale, micro batches differ in
their number of labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from distributed_testing import run_ranks

WORKER = Path(__file__).with_name("updaters_worker.py")


def case(family: str, stage: int = 0, accumulation: int = 1, **changes: Any) -> dict:
    """``changes``: degrees, what the worker knows, ``LARGEST_SHARE``, options of the updater."""
    own = {key: changes.pop(key) for key in ("then", "recompute", "evaluates", "skipped",
           "overflows", "unequal", "delayed", "share", "together") if key in changes}  # fmt: skip
    degrees = {key: changes.pop(key) for key in ("data", "pipeline", "sharding", "tensor",
               "sequence_parallel", "overlap_input_gradients", "skip_identity",
               "adds_weight_gradients") if key in changes}  # fmt: skip
    options = {"sharding_stage": stage, **changes}
    return {"family": family, "accumulation": accumulation, "degrees": degrees,
            "options": options, **own}  # fmt: skip


def layout(stage: int = 0, **degrees: int) -> dict:
    return {"degrees": degrees, "options": {"sharding_stage": stage}}


SCALE = {"initial": 1024.0, "growth_interval": 2}
ON_TWO = [
    case("llama", data=2, overflows=True),
    case(
        "multi_query",
        tensor=2,
        accumulation=2,
        master_grad=True,
        overflows=True,
        skip_identity=True,
        adds_weight_gradients=True,
    ),
    case("gpt3", data=2, accumulation=2, offload=True, overflows=True),
    case("bloom", 1, 2, sharding=2, overflows=True, overlaps_weights=True, delayed=True),
    case("opt", 2, 2, sharding=2, recompute="full", evaluates=True, overflows=True, delayed=True),
    case("opt", 3, 2, sharding=2, recompute="full", evaluates=True, overflows=True, delayed=True),
    case("bloom", 1, 2, sharding=2, reduces_once=True, overflows=True),
    case(
        "llama",
        2,
        4,
        sharding=2,
        recompute="full",
        reduces_once=True,
        evaluates=True,
        overlaps_weights=True,
        delayed=True,
    ),
    case("llama", 3, 1, sharding=2, recompute="core_attn", measures_layers=True),
    case("baichuan2_7b", 3, 2, sharding=2, recompute="full_attn", evaluates=True),
    case("baichuan2_7b", 3, 2, sharding=2, delayed=True),
    case("llama", 0, 2, data=2, skipped=2, loss_scale=SCALE, unequal=True),
    case("llama", 1, 2, sharding=2, skipped=2, loss_scale=SCALE, unequal=True),
    case("llama", 2, 2, sharding=2, skipped=2, loss_scale=SCALE, unequal=True),
    case("llama", 3, 2, sharding=2, skipped=2, loss_scale=SCALE, unequal=True),
]
ON_FOUR = [
    case("llama", 1, 2, sharding=2, data=2, offload=True),
    case("llama", 2, 2, sharding=2, data=2, offload=True, reduces_once=True),
    case("llama", 3, 2, sharding=2, data=2, offload=True),
    case("bloom", 1, 2, sharding=2, tensor=2),
    case("baichuan2_7b", 2, 2, sharding=2, tensor=2, sequence_parallel=True, master_grad=True),
    case(
        "multi_query",
        3,
        sharding=2,
        tensor=2,
        master_grad=True,
        overlap_input_gradients=True,
        adds_weight_gradients=True,
        then=layout(3, sharding=2, tensor=2),
    ),
    case("multi_query", 0, tensor=4, sequence_parallel=True),
    case("multi_query", 3, 2, sharding=4),
    case("llama", 0, 2, tensor=2, data=2, measures_layers=True),
    case("llama", 0, 2, tensor=2, data=2, skipped=2, loss_scale=SCALE, unequal=True),
]
# The same models under the other stages, and a tied table that two pipeline stages may write.
MORE_ON_FOUR = [
    case("bloom", 2, 2, sharding=2, tensor=2),
    case("bloom", 3, 2, sharding=2, tensor=2),
    case("baichuan2_7b", 1, 2, sharding=2, tensor=2, sequence_parallel=True, master_grad=True),
    case("baichuan2_7b", 3, 2, sharding=2, tensor=2, sequence_parallel=True, master_grad=True),
    case("multi_query", 1, sharding=2, tensor=2),
    case("multi_query", 2, sharding=2, tensor=2),
    case("bloom", 0, 2, tensor=2, pipeline=2, then=layout(1, sharding=2, pipeline=2), share=1.35),
]
PIPELINES = [
    case("bloom", 1, 2, sharding=2, pipeline=2, overflows=True, overlaps_weights=True),
    case("opt", 0, 2, data=2, pipeline=2, master_grad=True, measures_layers=True),
    case("llama", 1, 2, sharding=2, pipeline=2, skipped=2, loss_scale=SCALE, unequal=True),
    case("multi_query", 0, 2, tensor=2, pipeline=2, then=layout(3, sharding=4)),
    case("multi_query", 3, 2, sharding=4, then=layout(1, sharding=2, pipeline=2)),
]
RESUMED = [
    case("llama", 0, 2, data=2, then=layout(3, sharding=2)),
    case("multi_query", 3, 2, sharding=2, then=layout(tensor=2)),
    case("multi_query", 0, 2, tensor=2, then=layout(1, sharding=2)),
    case("bloom", 1, 2, sharding=2, then=layout(2, sharding=2)),
    case("bloom", 2, 2, sharding=2, then=layout(data=2)),
    # Three equal tables are 72 % of the bytes, and one stage holds two of them.
    case("bloom", 1, 2, sharding=2, then=layout(pipeline=2), share=1.3, together=1.05),
]


# The optimizers beside AdamW. An element is off where rounding decides a sign (lion, and adafactor
# where a gradient is nothing but rounding), or to which neighbour a value of 16 or 8 bits goes.
# "far" is the share of elements that are off by more than 1 % of what AdamW changes in these steps.
FAR = {
    "adamw_16bit_moment": 1e-4,
    "adamw_8bit": 0.05,  # blocks of 256 elements are others
    "lion": 1e-3,
    "adafactor": 1e-3,
    "muon": 2e-3,
}


def of_others(optims: Iterable[str], *layouts: dict) -> list[dict]:
    """Each optimizer under each layout; the keys are those of ``case``."""

    def of(optim: str, layout: dict) -> dict:
        then = layout.get("then")
        if then is None:
            return case(**{"family": "multi_query", **layout, "optim": optim})
        then = then | {"options": then["options"] | {"optim": optim}}
        return case(**{"family": "multi_query", **layout, "optim": optim, "then": then})

    return [of(optim, each) for each in layouts for optim in optims]


# Those that communicate; the slow cases have all of them.
OTHERS_ON_TWO = of_others(("adafactor", "muon"), {"tensor": 2}, {"stage": 3, "sharding": 2})
MORE_OTHERS_ON_TWO = of_others(
    FAR,
    {"tensor": 2},
    {"stage": 3, "sharding": 2},
    {"data": 2, "accumulation": 2},
    {"family": "bloom", "stage": 1, "sharding": 2},
    {"family": "llama", "stage": 2, "sharding": 2, "offload": True},
    {"stage": 3, "sharding": 2, "then": layout(tensor=2)},
    {"tensor": 2, "then": layout(1, sharding=2)},
)
OTHERS_ON_FOUR = of_others(
    FAR,
    {"stage": 3, "sharding": 2, "tensor": 2},
    {"stage": 2, "sharding": 2, "tensor": 2, "sequence_parallel": True},
    {"family": "bloom", "tensor": 4, "offload": True},
    {"family": "llama", "tensor": 2, "pipeline": 2, "accumulation": 2},
    {"family": "llama", "stage": 1, "sharding": 2, "pipeline": 2, "accumulation": 2},
)


# Bytes that a rank writes, relative to the mean: a stage of these pipelines has one layer and the
# embedding or the head, an owner of stages 1 and 2 the state of what fleet gives it.
LARGEST_SHARE = 1.2


@pytest.mark.parametrize(
    ("nproc", "cases"),
    [
        (2, ON_TWO),
        (2, RESUMED),
        (4, ON_FOUR),
        pytest.param(4, MORE_ON_FOUR, marks=pytest.mark.slow),
        (4, PIPELINES),
    ],
    ids=["two", "resumed", "four", "more on four", "pipelines"],
)
def test_same_as_one_process(tmp_path, nproc, cases):
    results = run_ranks(WORKER, nproc, [tmp_path, json.dumps(cases)], timeout=150)
    for index, (each, result) in enumerate(zip(cases, results[0], strict=True)):
        assert result["clipped"], each
        assert result["loss"] < 1e-5, (each, result)
        assert result["norm"] < 1e-4, (each, result)
        assert result["parameters"] < 1e-5, (each, result)
        assert result["state"] < 1e-5, (each, result)
        assert result["kept"] is (True if "overflows" in each else None), each
        if each["options"].get("measures_layers"):
            assert result["layers"] < 1e-4, (each, result)
        if "then" in each:  # a rank reads what it holds, of the rows of the stages' slices as well
            of_case = [rank[index] for rank in results]
            assert all(0.9 < rank["read"] < 1.05 for rank in of_case), (each, of_case)
            for what in ("read_weights", "read_state"):  # from the files
                assert all(0.9 < rank[what] < 1.05 for rank in of_case), (each, what, of_case)
            assert all(rank["weights_kept"] and rank["state_kept"] for rank in of_case), each
            assert all(rank["same_tensors"] for rank in of_case), each
            if "together" in each:  # only on one machine can stages hand each other tensors
                assert of_case[0]["share_together"] < each["together"] < of_case[0]["share_apart"]
            written = [rank["num_bytes"] for rank in of_case]
            assert written == [rank["converted"] for rank in of_case], each
            largest = each.get("share", LARGEST_SHARE) * sum(written) / nproc
            assert max(written) < largest, (each, written)
        if "delayed" in each:
            assert_overlapped(results, index, each["options"])
    for index, each in enumerate(cases):
        if "skipped" not in each:
            continue
        # Grows after steps 0 and 1, halves with the skipped one, grows after steps 3 and 4.
        assert [rank[index]["scaler"] for rank in results] == [
            {"scale": 2048.0, "finite_steps": 0, "overflowed_steps": 0, "skipped_steps": 1}
        ] * nproc


@pytest.mark.parametrize(
    ("nproc", "cases"),
    [
        (2, OTHERS_ON_TWO),
        pytest.param(2, MORE_OTHERS_ON_TWO, marks=pytest.mark.slow),
        pytest.param(4, OTHERS_ON_FOUR, marks=pytest.mark.slow),
    ],
    ids=["two", "more on two", "four"],
)
def test_other_optimizers(tmp_path, nproc, cases):
    """Under each layout as in one process, and resumed under another one."""
    results = run_ranks(WORKER, nproc, [tmp_path, json.dumps(cases)], timeout=150)[0]
    for each, result in zip(cases, results, strict=True):
        assert result["clipped"], each
        assert result["loss"] < 1e-4, (each, result)
        assert result["norm"] < 1e-3, (each, result)
        assert result["far"] < FAR[each["options"]["optim"]], (each, result)
        if "then" in each:
            assert result["weights_kept"] and result["state_kept"], (each, result)


def assert_overlapped(results: list, index: int, options: dict) -> None:
    """Layers compute beside what was started; what comes after them has none left."""
    for rank in results:
        found = rank[index]["overlapped"]
        if options["sharding_stage"] == 3:
            gathers, beside = found["gather"]
            assert 0 < gathers == beside
            reductions, beside = found["reduce_scatter"]
            assert 0.5 * reductions < beside
        if options.get("overlaps_weights"):
            # Not beside: the embedding's, which comes first, and those of the last updates, which
            # no forward pass follows.
            broadcasts, beside = found["broadcast"]
            assert 0.6 * broadcasts < beside < broadcasts


def test_memory_of_each_rank(tmp_path):
    """Bytes of parameters, gradients and optimizer state against the formula, stage by stage."""
    ranks, stages = 2, [0, 1, 2, 3]
    cases = [case("llama", 0, data=2), *(case("llama", s, sharding=2) for s in stages[1:])]
    results = run_ranks(WORKER, ranks, [tmp_path, json.dumps(cases)], timeout=90)
    memory = {stage: [rank[stage]["memory"] for rank in results] for stage in stages}
    whole = memory[0][0]
    bytes_of = 4 * 610_624  # parameters of the tiny LLaMA in float32
    assert whole["parameters"] == whole["gradients"] == bytes_of
    assert 0 <= whole["state"] - 2 * bytes_of < 300  # two moments, and two powers each
    vectors = 4 * 5 * 64  # of the norms, which stage 3 does not divide
    padding = 14 * 256  # fleet aligns each parameter to 256 bytes
    for rank in range(ranks):
        assert memory[0][rank] == whole
        assert memory[1][rank]["parameters"] == memory[2][rank]["parameters"] == bytes_of
        assert memory[1][rank]["gradients"] == bytes_of
        half = bytes_of / 2 + vectors + padding
        for kind, factor in {"parameters": 1, "gradients": 1, "state": 2}.items():
            assert memory[3][rank][kind] <= factor * half
    for stage in (1, 2):
        # Parameters have one owner each; the largest two are about a third of the model.
        states = [memory[stage][rank]["state"] for rank in range(ranks)]
        assert abs(sum(states) - whole["state"]) < 300
        assert max(states) < 0.6 * whole["state"]
    for rank in range(ranks):  # two moments for each gradient
        owned = memory[2][rank]["state"] / 2
        assert owned - 300 < memory[2][rank]["gradients"] <= owned + padding
