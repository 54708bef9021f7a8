"""Time of a step: terms by arithmetic, and what follows from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pypkg.config import Settings
from pypkg.models.architecture.registry import load_config
from pypkg.parallel.mesh import Degrees
from pypkg.planner.micro_batch import Batch
from pypkg.planner.time.gpus import GPUS
from pypkg.planner.time.layer_time import LayerTime
from pypkg.planner.time.step_time import Cluster, StepTime, plan_time

LLAMA = load_config("meta-llama/Llama-2-7b")
GPU = GPUS["a100-80g"]
NODES = Cluster(GPU, gpus_per_node=8, network=100e9)
ONE = Degrees()
QUIET = {"save_strategy": "no", "evaluation_strategy": "no", "bf16": True}


def planned(degrees: Degrees = ONE, cluster: Cluster = NODES, **settings) -> StepTime:
    given = {
        "max_seq_length": 4096, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
        **QUIET, **settings,
    }  # fmt: skip
    return plan_time(Settings(**given), LLAMA, degrees, cluster)


def test_operations_of_a_step():
    """The products of a step are the 6 N of the count of FLOPs, without the embedding table."""
    step = planned()
    matrices = LLAMA.num_parameters() - LLAMA.vocab_size * LLAMA.hidden_size
    flops = 6 * matrices * 8 * 4096
    assert step.terms["matrix products"] * GPU.product_rate(2) == pytest.approx(flops, rel=1e-3)
    scores = 14 * 32 * 4096 * 4096 * 4096 / 2  # two products forward, five backward, half masked
    attention = step.terms["attention"] * GPU.attention_rate(2)
    assert attention == pytest.approx(scores * 8, rel=1e-6)
    assert step.tokens == 8 * 4096
    assert set(step.terms) == {
        "matrix products", "attention", "memory-bound operators", "optimizer",
    }  # fmt: skip


def test_a_narrow_window_takes_less():
    whole = LayerTime(LLAMA, GPU, Batch(1, 4096)).core_forward().total
    narrow = LayerTime(LLAMA.replace(sliding_window=512), GPU, Batch(1, 4096))
    # 512 keys for all but the first queries, which see half of that in the mean.
    assert narrow.core_forward().total / whole == pytest.approx(2 * (1 / 8) * (1 - 1 / 16))


def test_recompute_repeats_what_it_names():
    layer = LayerTime(LLAMA, GPU, Batch(1, 4096))
    plain = planned().seconds
    for granularity, part in (
        ("full", layer.forward()),
        ("full_attn", layer.attention_forward()),
        ("core_attn", layer.core_forward()),
    ):
        again = planned(recompute=True, recompute_granularity=granularity).seconds
        assert again - plain == pytest.approx(8 * 32 * part.total)
    kept = planned(recompute=True, no_recompute_layers=tuple(range(16)))
    assert kept.seconds - plain == pytest.approx(8 * 16 * layer.forward().total)


def test_tensor_parallelism_sends_four_times_a_layer():
    step = planned(Degrees(tensor=4))
    size = 2 * 4096 * LLAMA.hidden_size
    count = 8 * (4 * 32 + 2)  # and the head
    wanted = count * 1.5 * size / (GPU.link * GPU.link_efficiency)
    assert step.terms["tensor communication"] == pytest.approx(wanted)


def test_a_pipeline_waits_for_its_stages():
    step = planned(Degrees(pipeline=4))
    work = sum(step.terms[name] for name in ("matrix products", "attention",
                                             "memory-bound operators"))  # fmt: skip
    assert step.terms["pipeline bubble"] == pytest.approx(3 / 8 * work)
    interleaved = planned(Degrees(pipeline=4, virtual_stages=2))
    assert interleaved.terms["pipeline bubble"] < 0.6 * step.terms["pipeline bubble"]
    assert interleaved.terms["pipeline communication"] == pytest.approx(
        2 * step.terms["pipeline communication"]
    )


@pytest.mark.parametrize(
    ("stride", "size", "rate"),
    [
        (1, 8, 300e9),
        (4, 2, 300e9),
        (1, 16, 100e9),  # eight of a machine in one ring: all of its network
        (2, 8, 50e9),
        (8, 2, 12.5e9),
        (16, 4, 12.5e9),
    ],
)
def test_rates_between_machines(stride, size, rate):
    assert NODES.rate(stride, size) == pytest.approx(rate * GPU.link_efficiency)


def test_gradients_by_stage_of_sharding():
    n = LLAMA.num_parameters()
    rate = GPU.link * GPU.link_efficiency
    sent = {
        name: planned(Degrees(**degrees), **settings).terms.get("gradient communication", 0)
        for name, degrees, settings in (
            ("data", {"data": 8}, {}),
            ("stage1", {"sharding": 8}, {"sharding": ("stage1",)}),
            ("stage2", {"sharding": 8}, {"sharding": ("stage2",)}),
            ("stage3", {"sharding": 8}, {"sharding": ("stage3",)}),
        )
    }
    assert sent["data"] == pytest.approx(2 * 2 * n * 7 / 8 / rate)
    hops = 2 * (4 * 32 + 2) * 7 * 5e-6  # a matrix at a time
    assert sent["stage1"] == pytest.approx(sent["data"] + hops)  # reduce and broadcast
    assert sent["stage2"] == pytest.approx(sent["data"] / 2)  # the reduction is hidden
    assert sent["stage3"] == 0
    slow = planned(
        Degrees(sharding=16), replace(NODES, network=5e9), sharding=("stage3",),
    )  # fmt: skip
    assert slow.terms["gradient communication"] > slow.terms["matrix products"]


def test_stage_3_gathers_weights_once_more_for_recompute():
    nodes = replace(NODES, network=5e9)
    step = planned(Degrees(sharding=16), nodes, sharding=("stage3",), recompute=True)
    work = sum(step.terms[name] for name in ("matrix products", "attention",
                                             "memory-bound operators"))  # fmt: skip
    whole = 2 * LLAMA.num_parameters() * 15 / 16 / nodes.rate(1, 16)
    hops = 4 * (4 * 32 + 2) * 15 * 5e-6
    # Three gathers of weights and a reduction of gradients, beside the work of each micro batch.
    wanted = 8 * (4 * whole + hops) - work
    assert step.terms["gradient communication"] == pytest.approx(wanted)


def test_sharding_divides_the_update():
    alone = planned().terms["optimizer"]
    assert planned(Degrees(data=8)).terms["optimizer"] == pytest.approx(alone)
    sharded = planned(Degrees(sharding=8), sharding=("stage1",))
    assert sharded.terms["optimizer"] == pytest.approx(alone / 8)


def test_evaluation_and_checkpoints_are_spread_over_the_steps():
    step = planned(
        evaluation_strategy="steps", eval_steps=100, eval_iters=10, per_device_eval_batch_size=2,
        save_strategy="steps", save_steps=50, max_steps=1000,
    )  # fmt: skip
    assert step.terms["checkpoints"] == pytest.approx(LLAMA.num_parameters() * 14 / 1e9 / 50)
    forward = step.terms["evaluation"] * 100 / 20
    assert forward == pytest.approx(planned().seconds / 8 / 3, rel=0.1)
    assert "checkpoints" not in planned(
        save_strategy="steps", save_steps=50, use_async_save=True, max_steps=1000
    ).terms  # fmt: skip


def test_a_tiny_model_is_bound_by_the_host():
    tiny = load_config("llama-58m")
    settings = Settings(max_seq_length=64, per_device_train_batch_size=1, **QUIET)
    step = plan_time(settings, tiny, Degrees(), NODES)
    assert step.terms["host"] > 0.5 * step.seconds


def test_speed_days_and_price():
    step = StepTime({"matrix products": 2.0}, tokens=8000, world_size=8)
    assert step.tokens_per_second == 500
    assert step.days(4000 * 86400.0) == pytest.approx(1)
    assert step.price(4000 * 86400.0, 2.0) == pytest.approx(2 * 8 * 24)
    assert step.mfu(LLAMA, 4096, 312e12) == LLAMA.flops_per_token(4096) * 500 / 312e12
