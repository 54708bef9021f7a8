"""The plan of a run beside what the run takes: stand-ins for a GPU."""

from __future__ import annotations

import logging
import re

import paddle
import pytest

from pypkg.config import Settings
from pypkg.device.capabilities import Capabilities
from pypkg.models.architecture.registry import load_config
from pypkg.planner import memory as memory_terms
from pypkg.planner.time import step_time
from pypkg.planner.time.gpus import GPUS, gpu_of_device
from pypkg.training.reporting import planned
from pypkg.training.reporting.planned import (
    PlanReporter,
    compare_with_capacity,
    likely_term,
    plan_of_run,
)

GIB = 2**30
A100 = Capabilities(
    device="gpu", device_name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0),
    memory_bytes=79 * GIB, paddle="3.3.1", ops_backend="compiled", compiled_ops="",
)  # fmt: skip
CPU = Capabilities(
    device="cpu", device_name="Xeon", compute_capability=None, memory_bytes=24 * GIB,
    paddle="3.3.1", ops_backend="compiled", compiled_ops="",
)  # fmt: skip
LLAMA = load_config("meta-llama/Llama-3.2-1B")
TINY = load_config("llama-58m")
SETTINGS = Settings(bf16=True, max_seq_length=2048, per_device_train_batch_size=1)


@pytest.fixture
def plan():
    found = plan_of_run(SETTINGS, LLAMA, A100)
    assert found is not None and found.time is not None
    return found


def metrics(plan, memory: float = 1.0, speed: float = 1.0) -> dict[str, float]:
    return {
        "peak_memory_gib": memory * plan.memory.peak / GIB,
        "tokens_per_second_per_device": speed * plan.time.tokens_per_second,
    }


def test_capacity_at_start(plan, caplog):
    with caplog.at_level(logging.INFO, logger="pypkg"):
        compare_with_capacity(plan, A100.memory_bytes)
        compare_with_capacity(plan, 16 * GIB)
    first, second = caplog.records
    assert first.levelname == "INFO" and "GiB of tensors, room for 76.2; plan " in first.message
    assert second.levelname == "WARNING" and "moments take most" in second.message


def test_once_after_ten_steps(plan, caplog):
    reporter = PlanReporter(plan, first_step=100)
    with caplog.at_level(logging.INFO, logger="pypkg"):
        reporter.report(109, metrics(plan))
        reporter.report(110, {"eval_loss": 3.0})
        assert caplog.records == []
        reporter.report(110, metrics(plan, 1.09, 0.91))
        reporter.report(120, metrics(plan, 2.0))
    assert [each.levelname for each in caplog.records] == ["INFO", "INFO"]
    assert "tokens/s per GPU, measured" in caplog.records[1].message


def test_a_deviation_names_a_term(plan, caplog):
    with caplog.at_level(logging.INFO, logger="pypkg"):
        PlanReporter(plan, 0).report(10, metrics(plan, 1.2, 0.7))
    memory, speed = caplog.records
    assert memory.levelname == speed.levelname == "WARNING"
    # Moments take most memory, but their size is known to the byte.
    assert "off by 20 %" in memory.message and memory.message.endswith("likely in workspace")
    assert "off by 30 %" in speed.message and speed.message.endswith("likely in matrix products")


def test_every_term_has_an_error():
    assert set(memory_terms.TERM_ERRORS) == set(memory_terms.TERMS)
    assert set(step_time.TERM_ERRORS) == set(step_time.TERMS)


def test_the_likely_term_has_the_largest_error():
    terms = {"moments": 40.0, "activations": 9.0, "workspace": 1.0}
    assert likely_term(terms, memory_terms.TERM_ERRORS) == "activations"
    assert likely_term({**terms, "workspace": 2.0}, memory_terms.TERM_ERRORS) == "workspace"


def test_speed_is_compared_without_evaluation_and_checkpoints(plan):
    """As the log counts it: over the time of training steps."""
    saving = Settings(**{**vars(SETTINGS), "save_strategy": "steps", "save_steps": 10})
    assert plan_of_run(saving, LLAMA, A100).time == plan.time
    assert not {"evaluation", "checkpoints"} & set(plan.time.terms)


def test_a_cpu_is_compared_with_the_memory_of_the_machine(caplog, monkeypatch):
    settings = Settings(max_seq_length=2048, per_device_train_batch_size=1)
    found = plan_of_run(settings, LLAMA, CPU)
    assert found.time is None
    peak = found.memory.peak
    with caplog.at_level(logging.INFO, logger="pypkg"):
        compare_with_capacity(found, 24 * GIB)
        monkeypatch.setattr(planned, "_ranks_here", lambda: 4)
        compare_with_capacity(found, 24 * GIB)
    one, four = caplog.records
    assert one.message == f"plan {peak / GIB:.3g} GiB of tensors; the machine has 24 GiB"
    assert four.message.startswith(f"plan {4 * peak / GIB:.3g} GiB of tensors in 4 ranks; ")


def test_a_cpu_is_measured_by_what_paddle_allocates(caplog):
    found = plan_of_run(Settings(max_seq_length=64, per_device_train_batch_size=1), TINY, CPU)
    reporter = PlanReporter(found, 0)
    held = paddle.zeros([found.memory.peak // 4])
    with caplog.at_level(logging.INFO, logger="pypkg"):
        reporter.report(10, {"peak_memory_gib": 77.0, "tokens_per_second_per_device": 1.0})
    (record,) = caplog.records
    assert record.levelname == "INFO" and re.match(r"plan \S+ GiB, measured [01]\.", record.message)
    del held


def test_what_a_toy_model_takes_beside_its_plan_is_no_deviation(caplog, monkeypatch):
    config = TINY.replace(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=64)
    found = plan_of_run(Settings(max_seq_length=64, per_device_train_batch_size=1), config, CPU)
    reporter = PlanReporter(found, 0)
    measured = found.memory.peak * 4 // 3
    monkeypatch.setattr(planned.core, "host_memory_stat_peak_value", lambda *_: measured)
    with caplog.at_level(logging.INFO, logger="pypkg"):
        reporter.report(10, {"peak_memory_gib": 77.0, "tokens_per_second_per_device": 1.0})
    assert [each.levelname for each in caplog.records] == ["INFO"]


def test_where_nothing_is_planned(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="pypkg")
    assert plan_of_run(SETTINGS, LLAMA, CPU) is None  # bfloat16 on a CPU
    assert "bf16 or fp16" in caplog.text
    monkeypatch.setenv("PADDLE_NNODES", "2")
    assert plan_of_run(SETTINGS, LLAMA, A100).time is None
    with caplog.at_level(logging.INFO, logger="pypkg"):
        stored = Settings(**{**vars(SETTINGS), "use_flash_attention": False})
        assert plan_of_run(stored, LLAMA, A100) is None
    assert "use_flash_attention" in caplog.text


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA L40S", 44.4, "l40s"),
    ],
)
def test_known_devices(name, gib, known):
    assert gpu_of_device(name, int(gib * GIB)) == GPUS[known]


@pytest.mark.parametrize("name", ["NVIDIA A100-PCIE-40GB", "NVIDIA H100 PCIe", "Tesla V100"])
def test_devices_that_the_table_lacks(name):
    assert gpu_of_device(name, 32 * GIB) is None
