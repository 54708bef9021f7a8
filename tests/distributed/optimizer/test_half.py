"""Training in 16 bits on CPU processes, under every ZeRO stage, tensor and pipeline parallelism.

Operators compute in float32 and all tensors stay in 16 bits (pypkg/ops/dispatch/half_on_cpu.py).
Dtypes, hooks, main gradients, master weights and loss scaling are those of a GPU. The arithmetic of
a GPU is not tested here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from distributed_testing import run_ranks
from test_updaters import case

WORKER = Path(__file__).with_name("half_worker.py")
SCALE = {"initial": 1024.0, "growth_interval": 2}


def half(dtype: str, *arguments: object, **changes: object) -> dict:
    return case(*arguments, **changes) | {"dtype": dtype}


def scaled(*arguments: object, **changes: object) -> dict:
    """In float16, with a step whose gradients overflow on the last rank."""
    own = {"skipped": 2, "loss_scale": SCALE, "unequal": True}
    return half("float16", *arguments, **own, **changes)


BFLOAT16 = [
    half("bfloat16", "llama", 0, 2, data=2, master_grad=True),
    half("bfloat16", "llama", 1, 2, sharding=2, master_grad=True),
    half("bfloat16", "gpt3", 2, 2, sharding=2, master_grad=True),
    half("bfloat16", "llama", 3, 2, sharding=2, master_grad=True),
    half("bfloat16", "bloom", 3, sharding=2),
    half("bfloat16", "multi_query", 0, 2, tensor=2, master_grad=True),
    half("bfloat16", "baichuan2_7b", tensor=2, sequence_parallel=True),
    half("bfloat16", "llama", 0, 2, pipeline=2, master_grad=True),
    half("bfloat16", "bloom", 0, 2, pipeline=2),
]
FLOAT16 = [
    scaled("llama", 0, 2, data=2),
    scaled("llama", 1, 2, sharding=2),
    scaled("llama", 2, 2, sharding=2),
    scaled("llama", 3, 2, sharding=2, master_grad=True),
    scaled("opt", 0, 2, tensor=2, master_grad=True),
    scaled("llama", 0, 2, pipeline=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_training_in_16_bits(cases):
    results = run_ranks(WORKER, 2, [json.dumps(cases)], timeout=240)
    for index, each in enumerate(cases):
        ranks = [rank[index] for rank in results]
        dtype, main_grad = each["dtype"], each["options"].get("master_grad", False)
        for result in ranks:
            gradient = "float32" if main_grad else dtype
            assert result["dtypes"] == [f"{dtype} {gradient} float32"], (each, result["dtypes"])
            assert result["is_resumed"], each
            assert result["losses"] == ranks[0]["losses"], each
        expected = ranks[0]["expected"]
        np.testing.assert_allclose(ranks[0]["losses"], expected["losses"], rtol=2e-3)
        np.testing.assert_allclose(ranks[0]["norms"], expected["norms"], rtol=2e-2)
        if "skipped" in each:  # as in test_updaters.py: grows, halves with the skipped step, grows
            assert [result["scaler"] for result in ranks] == [
                {"scale": 2048.0, "finite_steps": 0, "overflowed_steps": 0, "skipped_steps": 1}
            ] * 2


def adding(*arguments: object, **changes: object) -> dict:
    """Products of linear layers add weight gradients to the float32 sums."""
    own = {"master_grad": True, "adds_weight_gradients": True}
    return half("bfloat16", *arguments, **own, **changes)


ADDING = [
    adding("llama", 0, 2, data=2),
    adding("opt", 1, 2, sharding=2, reduces_once=True),
    adding("llama", 2, 2, sharding=2),
    adding("gpt3", 3, 2, sharding=2, recompute="full"),
    adding("multi_query", 0, 2, tensor=2, recompute="core_attn"),
    adding("baichuan2_7b", tensor=2, sequence_parallel=True, overlap_input_gradients=True),
    adding("bloom", 0, 2, pipeline=2),
]


@pytest.mark.slow
def test_products_that_add_weight_gradients_change_no_bit():
    """On a CPU they round the product to 16 bits first, as without the setting."""
    plain = [each | {"degrees": each["degrees"] | {"adds_weight_gradients": False}}
             for each in ADDING]  # fmt: skip
    results = run_ranks(WORKER, 2, [json.dumps([*ADDING, *plain])], timeout=300)
    for rank in results:
        for each, added, expected in zip(ADDING, rank, rank[len(ADDING) :], strict=False):
            for what in ("losses", "norms", "dtypes"):
                assert added[what] == expected[what], (each, what)
            assert added["is_resumed"], each
            assert added["added_products"] > 0, each
            assert expected["added_products"] == 0, each


# Beside AdamW, and without master weights.
OTHERS = [
    half("bfloat16", "llama", 0, 2, data=2, optim="lion", stochastic_rounding=True),
    half("bfloat16", "llama", 2, sharding=2, optim="adamw_8bit", stochastic_rounding=True),
    half("bfloat16", "llama", 3, sharding=2, optim="adamw_16bit_moment", stochastic_rounding=True),
    half("bfloat16", "multi_query", tensor=2, optim="muon", stochastic_rounding=True),
    half("bfloat16", "multi_query", tensor=2, optim="muon", master_grad=True),
    half("bfloat16", "llama", 0, 2, pipeline=2, optim="adafactor", stochastic_rounding=True),
]


@pytest.mark.slow
def test_other_optimizers_in_16_bits():
    """Replicas round alike, and a run goes on bit for bit."""
    results = run_ranks(WORKER, 2, [json.dumps(OTHERS)], timeout=240)
    for index, each in enumerate(OTHERS):
        ranks = [rank[index] for rank in results]
        for result in ranks:
            assert result["is_resumed"], each
            assert result["losses"] == ranks[0]["losses"], each
        expected = ranks[0]["expected"]
        np.testing.assert_allclose(ranks[0]["losses"], expected["losses"], rtol=2e-3)
        np.testing.assert_allclose(ranks[0]["norms"], expected["norms"], rtol=2e-2)
