"""The plan of a run beside what the run takes: stand-ins for a GPU."""

from __future__ import annotations

import logging

import pytest

from pypkg.config import Settings
from pypkg.device.capabilities import Capabilities
from pypkg.models.architecture.registry import load_config
from pypkg.planner.time.gpus import GPUS, gpu_of_device
from pypkg.training.reporting.planned import PlanReporter, compare_with_capacity, plan_of_run

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
    assert "off by 20 %" in memory.message and memory.message.endswith("largest term, moments")
    assert "off by 30 %" in speed.message and speed.message.endswith("matrix products")


def test_where_nothing_is_planned(caplog, monkeypatch):
    assert plan_of_run(SETTINGS, LLAMA, CPU) is None
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
