"""``--gpu FILE``: fields of a GPU, and results of ``make gpu-day``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.models.architecture.registry import load_config
from pypkg.parallel.mesh import Degrees
from pypkg.planner.time.gpu_files import load_gpu
from pypkg.planner.time.gpus import GPUS, Product
from pypkg.planner.time.step_time import Cluster, plan_time

H100 = GPUS["h100-80g"]
SHAPES = [(4096, 4096, 12288, 0.7), (4096, 11008, 4096, 0.6), (4096, 4096, 32000, 0.75)]


def row(op: str, shape: str, pass_: str, milliseconds: float, **work: float) -> dict[str, Any]:
    """A row as bench/ops/gpu/case.py writes it, the fields that matter."""
    return {
        "op": op, "shape": shape, "pass": pass_, "dtype": "bfloat16", "baseline": "pypkg",
        "median": milliseconds, "flops": 0, "bytes": 0, **work,
    }  # fmt: skip


def day_of(times: dict[str, Any] | None, gpus: str = "") -> dict[str, Any]:
    parts = [{"name": "build", "report": None}, {"name": "time", "report": times}]
    return {
        "date": "2026-01-02 03:04", "parts": parts,
        "gpus": gpus or "NVIDIA H100 80GB HBM3, 550.54, 9.0, 81559 MiB",
    }  # fmt: skip


TIMES = {
    "limits": {"matmul_flops_per_second": 700e12, "copy_bytes_per_second": 2.9e12},
    "products": [
        {"rows": m, "inputs": k, "outputs": n, "flops_per_second": share * 989e12}
        for m, k, n, share in SHAPES
    ],
    "rows": [
        row("flash_attention", "1x4096x32x128 causal", "forward", 1.0, flops=4e11),
        row("flash_attention", "1x4096x32x128 causal", "backward", 4.0, flops=10e11),
        row("flash_attention", "1x512x32x128 causal", "forward", 1.0, flops=1e9),
        row("flash_attention", "1x512x32x128 causal", "backward", 1.0, flops=1e9),
        row("flash_attention", "1x4096x32x128 full", "forward", 1.0, flops=8e11),
        row("swiglu", "[8192, 11008]", "forward", 1.0, bytes=2.4e9),
        row("rms_norm", "[8192, 4096]", "forward", 1.0, bytes=2.0e9),
        {**row("swiglu", "[8192, 11008]", "forward", 9.0, bytes=2.4e9), "baseline": "torch"},
        {**row("swiglu", "[8192, 11008]", "forward", 9.0, bytes=2.4e9), "dtype": "float32"},
    ],
}


def written(folder: Path, content: Any) -> str:
    file = folder / "day.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_rates_of_a_day(tmp_path):
    file = written(tmp_path, day_of(TIMES))
    gpu = load_gpu(file)
    assert gpu == replace(
        H100,
        matmul_efficiency=700 / 989,
        attention_efficiency=pytest.approx(14e11 / 5e-3 / 989e12),  # of the longest causal shape
        bandwidth_efficiency=pytest.approx(4.4e9 / 2e-3 / 3.35e12),
        products=tuple(Product(**each) for each in TIMES["products"]),
        source=f"{file}, measured on 2026-01-02 03:04",
    )


def test_a_step_takes_the_rates_of_its_shapes(tmp_path):
    gpu = load_gpu(written(tmp_path, day_of(TIMES)))
    for m, k, n, share in SHAPES:  # the nearest shape
        assert gpu.product_rate(2, (2 * m, k, n - 8)) == share * 989e12
    assert gpu.product_rate(4, SHAPES[0][:3]) == gpu.matmul_flops_float32 * 700 / 989
    settings = Settings(bf16=True, max_seq_length=4096, per_device_train_batch_size=1)
    config = load_config("meta-llama/Llama-2-7b")

    def products(*each: Product) -> float:
        step = plan_time(settings, config, Degrees(), Cluster(replace(gpu, products=each), 8, 1e9))
        return step.terms["matrix products"]

    one = Product(rows=1, inputs=1, outputs=1, flops_per_second=5e14)
    assert products(one) == pytest.approx(2 * products(replace(one, flops_per_second=1e15)))


def test_what_a_day_has_not_measured_is_that_of_the_table(tmp_path):
    gpu = load_gpu(written(tmp_path, day_of({"rows": TIMES["rows"][-4:-3]})))
    assert gpu.attention_efficiency == H100.attention_efficiency and gpu.products == ()
    assert gpu.matmul_efficiency == H100.matmul_efficiency
    assert gpu.bandwidth_efficiency == pytest.approx(2.4e12 / 3.35e12)


@pytest.mark.parametrize(
    ("day", "words"),
    [
        (day_of(None), "the day ended before the part `time`"),
        (day_of({"rows": []}), "has no times"),
        (day_of(TIMES, "Tesla V100-SXM2-32GB, 550.54, 7.0, 32768 MiB"), "none of a100-40g"),
        (day_of(TIMES, "unknown"), "none of a100-40g"),
        (day_of({"rows": [row("swiglu", "[1, 8]", "forward", 0.0, bytes=1.0)]}), "not above 0"),
    ],
)
def test_days_that_have_no_rates(tmp_path, day, words):
    with pytest.raises(UserError, match=words):
        load_gpu(written(tmp_path, day))


def test_a_gpu_of_a_file(tmp_path):
    file = tmp_path / "ours.json"
    file.write_text(json.dumps({"like": "a100-80g", "matmul_efficiency": 0.7}))
    assert load_gpu(str(file)) == replace(
        GPUS["a100-80g"], name="ours", source=str(file), matmul_efficiency=0.7
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"like": "a100"}', "'a100'"),
        ('{"like": "h200", "matmul_efficiency": 70}', "0.001 to 1 as a share"),
        ('{"like": "h200", "link": 400}', "link is 400; expected 1e.08 to 1e.14 bytes a second"),
        ('{"like": "h200", "matmul_flops": 989}', "matmul_flops is 989; expected 1e.12"),
        ('{"like": "h200", "memory_mib": 141}', "memory_mib is 141; expected 4096"),
        ('{"like": "h200", "link": Infinity}', "link is inf"),
        (f'{{"like": "h200", "link": 1{"0" * 400}}}', "0...; expected"),
        ('{"like": "h200", "link": 1, "link": 4e11}', "occurs more than once"),
        ('{"like": ["h200"]}', "\"like\" is"),
        ('{"like": "h200", "name": 5}', "name is 5, not a line of text"),
        ('{"like": "h200", "source": "a\\nb"}', "not a line of text"),
        ('{"like": "h200", "products": [{"rows": 0, "inputs": 1, "outputs": 1, '
         '"flops_per_second": 1e12}]}', "products: rows is 0"),
        ("[" * 100_000, "Expected a result of make gpu-day"),
        ('{"like": "h200", "bandwidth": "fast"}', "not a number above 0"),
        ('{"like": "h200", "speed": 1}', "speed"),
        ('{"like": "h200", "products": [{"rows": 1}]}', "products|inputs"),
        ('{"like": "h200", "products": 7}', "not the description of a GPU"),
        ('{"parts": []}', "it lacks the key 'gpus'"),
        ('{"parts": [], "gpus": ""}', "which is none of a100-40g"),
        ("[1]", "must hold a JSON object"),
        ("{", "is not JSON"),
    ],
)  # fmt: skip
def test_files_that_describe_no_gpu(tmp_path, content, words):
    file = tmp_path / "gpu.json"
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        load_gpu(str(file))


def test_a_gpu_that_is_not_known():
    with pytest.raises(UserError, match="one of a100-40g, a100-80g"):
        load_gpu("a100")
    with pytest.raises(UserError, match="No such file"):
        load_gpu("none.json")
