"""What runs where: decided from made-up devices, and probed on this one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from pypkg.config import Settings
from pypkg.device.capabilities import Capabilities, _describe_compiled_ops, probe, resolve
from pypkg.errors import UserError


def device(name: str, capability: tuple[int, int] | None, backend: str) -> Capabilities:
    return Capabilities(
        device="cpu" if capability is None else "gpu",
        device_name=name,
        compute_capability=capability,
        memory_bytes=80 * 2**30,
        paddle="3.3.1 with CUDA 12.6",
        ops_backend=backend,
        compiled_ops="built for Paddle 3.3.1, CUDA 12.6",
    )


CPU = device("EPYC", None, "compiled")
CPU_REFERENCE = device("EPYC", None, "reference")
V100 = device("V100", (7, 0), "reference")
A100 = device("A100", (8, 0), "compiled")
H100 = device("H100", (9, 0), "compiled")
H100_TRITON = device("H100", (9, 0), "triton")
H100_PADDLE = dataclasses.replace(H100, paddle_flash_attention=True)


@pytest.mark.parametrize(
    ("capabilities", "dtype", "reasons"),
    [
        (CPU, "float32", ["training in bfloat16 needs a GPU, and the device is a CPU"]),
        (CPU_REFERENCE, "float32", ["bfloat16 needs a GPU"]),
        (V100, "float32", ["bfloat16 needs compute capability 8.0, and V100 has 7.0"]),
        (A100, "bfloat16", []),
        (H100, "bfloat16", []),
        (H100_TRITON, "bfloat16", []),
    ],
    ids=lambda value: getattr(value, "device_name", None),
)
def test_left_to_default_the_device_decides(capabilities, dtype, reasons):
    plan = resolve(Settings(), capabilities)
    assert (plan.dtype, plan.attention) == (dtype, "auto")
    assert plan.device == capabilities.device
    assert len(plan.reasons) == len(reasons)
    for given, expected in zip(plan.reasons, reasons):
        assert expected in given
        assert given in plan.describe()


def test_what_was_asked_for_and_cannot_be_is_refused_with_every_reason():
    with pytest.raises(UserError) as caught:
        resolve(Settings(bf16=True, use_flash_attention=True), V100)
    text = str(caught.value)
    assert text.startswith("2 settings")
    assert "bf16 is true, but bfloat16 needs compute capability 8.0, and V100 has 7.0" in text
    assert "use_flash_attention is true, but flash attention needs compute capability" in text
    with pytest.raises(UserError, match="bf16 is true, but training in bfloat16 needs a GPU"):
        resolve(Settings(bf16=True), CPU)
    with pytest.raises(UserError, match=r"use_flash_attention is true, but .* reference"):
        resolve(Settings(use_flash_attention=True), CPU_REFERENCE)


@pytest.mark.parametrize(
    ("settings", "capabilities", "expected"),
    [
        ({"attention_backend": "paddle"}, CPU, "Paddle's flash attention needs a GPU"),
        ({"attention_backend": "paddle"}, V100, "needs compute capability 8.0, and V100 has 7.0"),
        ({"attention_backend": "paddle"}, H100, "Paddle was built without flash attention"),
        ({"attention_backend": "pypkg"}, H100_TRITON, "needs compiled operators, not the triton"),
        ({"attention_backend": "pypkg"}, V100, "needs compute capability 8.0, and V100 has 7.0"),
        ({"attention_backend": "pypkg", "use_flash_attention": False}, H100, "leave one of them"),
        ({"attention_backend": "reference", "use_flash_attention": True}, H100, "leave one of"),
    ],
)
def test_an_attention_that_cannot_be_is_refused(settings, capabilities, expected):
    with pytest.raises(UserError, match=expected):
        resolve(Settings(**settings), capabilities)


def test_what_was_asked_for_and_can_be_is_done():
    plan = resolve(Settings(bf16=True, use_flash_attention=True), H100)
    assert (plan.dtype, plan.attention) == ("bfloat16", "flash")
    for name in ("auto", "pypkg", "reference"):
        assert resolve(Settings(attention_backend=name), H100).attention == name
    assert resolve(Settings(attention_backend="paddle"), H100_PADDLE).attention == "paddle"


def test_float16_is_taken_only_when_asked_for():
    for capabilities in (V100, A100):
        assert resolve(Settings(fp16=True), capabilities).dtype == "float16"
    with pytest.raises(UserError, match="fp16 is true, but training in float16 needs a GPU"):
        resolve(Settings(fp16=True), CPU)


@pytest.mark.parametrize("name, dtype", [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_cpu_takes_16_bits_only_where_it_is_the_device_that_was_asked_for(name, dtype):
    plan = resolve(Settings(**{name: True}, device="cpu"), CPU)
    assert plan.dtype == dtype
    assert "operators compute in float32" in plan.describe()
    assert resolve(Settings(device="cpu"), CPU).dtype == "float32"
    with pytest.raises(UserError, match=f'{name} is true, but .*, or device to "cpu" to compute'):
        resolve(Settings(**{name: True}), CPU)
    with pytest.raises(UserError, match=f'matmul_precision is "bfloat16", .* in {dtype}; leave'):
        resolve(Settings(**{name: True}, device="cpu", matmul_precision="bfloat16"), CPU)


def test_stochastic_rounding_is_for_bfloat16():
    plan = resolve(Settings(bf16=True, device="cpu", stochastic_rounding=True), CPU)
    assert plan.dtype == "bfloat16"
    with pytest.raises(UserError, match=r"stochastic_rounding is true.* in float32; set bf16"):
        resolve(Settings(device="cpu", stochastic_rounding=True), CPU)


def test_what_was_turned_off_is_off_without_comment():
    for capabilities in (CPU, V100, H100):
        plan = resolve(Settings(bf16=False, use_flash_attention=False), capabilities)
        assert (plan.dtype, plan.attention, plan.reasons) == ("float32", "reference", ())


def test_description_is_one_line_that_says_it_all():
    line = resolve(Settings(), V100).describe()
    assert "\n" not in line
    assert line.startswith("device: V100 (compute capability 7.0, 80 GiB); Paddle 3.3.1 with CUDA")
    assert "operators: reference (compiled: built for Paddle 3.3.1, CUDA 12.6)" in line
    assert "; float32; bfloat16 needs " in line
    assert "compute capability" not in resolve(Settings(), CPU).describe()


def test_build_info(tmp_path):
    file = tmp_path / "build_info.json"
    assert _describe_compiled_ops(file) == "not built"
    file.write_text('{"paddle_version": null, "cuda_version": "13.0"}', encoding="utf-8")
    assert _describe_compiled_ops(file) == "not built"
    file.write_text('{"paddle_version": "3.3.1", "cuda_version": "13.0"}', encoding="utf-8")
    assert _describe_compiled_ops(file) == "built for Paddle 3.3.1, CUDA 13.0"
    file.write_text('{"paddle_version": "3.3.1", "cuda_version": null}', encoding="utf-8")
    assert _describe_compiled_ops(file) == "built for Paddle 3.3.1, CPU only"


def test_probe_of_this_machine():
    found = probe("cpu")
    assert found.device == "cpu"
    assert found.compute_capability is None
    assert found.device_name in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert 0 < found.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.ops_backend in ("compiled", "reference")
    assert found.paddle.startswith("3.")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    import paddle

    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    with pytest.raises(UserError, match=r'device is "gpu", but .* is the build for CPUs; set '):
        probe("gpu")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="sees no GPU"):
        probe("gpu")
