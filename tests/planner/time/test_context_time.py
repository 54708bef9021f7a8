"""Time where ranks divide the tokens of samples: by arithmetic, and in a search."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pypkg.config import Settings
from pypkg.models.architecture.registry import load_config
from pypkg.parallel.mesh import Degrees
from pypkg.planner.output.text import layout_of
from pypkg.planner.search.best import search
from pypkg.planner.time.gpus import GPUS
from pypkg.planner.time.step_time import Cluster, StepTime, plan_time

LLAMA = load_config("meta-llama/Llama-3.1-8B")  # 32 heads of queries and 8 of keys
GPU = GPUS["h100-80g"]
NODES = Cluster(GPU, gpus_per_node=8, network=100e9)
RATE = GPU.link * GPU.link_efficiency
LENGTH = 32768
GIVEN = {
    "max_seq_length": LENGTH, "per_device_train_batch_size": 1, "bf16": True,
    "save_strategy": "no", "evaluation_strategy": "no",
}  # fmt: skip
ONE = Degrees()


def planned(degrees: Degrees = ONE, cluster: Cluster = NODES, **settings) -> StepTime:
    return plan_time(Settings(**{**GIVEN, **settings}), LLAMA, degrees, cluster)


@pytest.mark.parametrize("ring", [False, True])
def test_the_work_is_divided(ring):
    whole, part = planned(), planned(Degrees(context=4, ring=ring))
    for term in ("matrix products", "attention"):
        assert part.terms[term] == pytest.approx(whole.terms[term] / 4)
    assert part.tokens == whole.tokens == LENGTH and part.world_size == 4


@pytest.mark.parametrize(("degree", "keys"), [(2, 8), (16, 16)])
def test_heads_are_exchanged_both_ways_twice(degree, keys):
    """Queries, keys and values there and the output back; keys are repeated for more ranks."""
    part = planned(Degrees(context=degree))
    size = 2 * LENGTH / degree * (2 * 32 + 2 * keys) * 128
    rate = NODES.rate(1, degree)
    wanted = 32 * 2 * size * (degree - 1) / degree / rate
    assert part.terms["context communication"] == pytest.approx(wanted)
    again = planned(Degrees(context=degree), recompute=True, recompute_granularity="full_attn")
    assert again.terms["context communication"] == pytest.approx(1.5 * wanted)
    core = planned(Degrees(context=degree), recompute=True, recompute_granularity="core_attn")
    assert core.terms["context communication"] == pytest.approx(wanted)


def test_a_ring_sends_beside_attention():
    """What is left within a machine is the last message, float32 gradients of keys and values."""
    ring = Degrees(context=4, ring=True)
    pair = 2 * LENGTH / 4 * 8 * 128
    last = 32 * 4 * pair / RATE
    assert planned(ring).terms["context communication"] == pytest.approx(last)
    slow = Cluster(replace(GPU, link=1e6), 8, 1e9)
    found = planned(ring, slow)
    messages = 32 * pair * (3 * (2 + 2 + 4) + 4) / (1e6 * GPU.link_efficiency)
    hidden = found.terms["attention"] * 3 / 4
    assert found.terms["context communication"] == pytest.approx(messages - hidden)


def test_gradients_are_summed_over_replicas_and_context():
    n = LLAMA.num_parameters()
    found = planned(Degrees(context=2, data=2)).terms["gradient communication"]
    assert found == pytest.approx(2 * 2 * n * 3 / 4 / RATE)


def test_a_search_divides_long_samples_alone():
    base = Settings(**GIVEN)
    long = search(base, LLAMA, 8, 8, NODES).fitting
    assert {plan.degrees.ring for plan in long if plan.degrees.context > 1} == {False, True}
    for plan in long:
        assert plan.degrees.world_size == 8
        assert LENGTH // plan.degrees.context >= 8192
        settings, degrees = plan.settings, plan.degrees
        assert (settings.context_degree, settings.ring) == (degrees.context, degrees.ring)
    named = [layout_of(plan) for plan in long]
    assert any("(ring)" in each for each in named) and any("(heads)" in each for each in named)
    short = search(replace(base, max_seq_length=8192), LLAMA, 8, 8, NODES).fitting
    assert {plan.degrees.context for plan in short} == {1}
