"""The attention of a run, on made-up devices and records. No GPU has run ours or Paddle's here."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pypkg.device import attention_record
from pypkg.device.attention_choice import AttentionNeeds, choose_attention
from pypkg.device.attention_record import (
    PADDLE,
    Timing,
    record_path,
    recorded_timings,
    timings_of,
    write_timings,
)
from pypkg.device.capabilities import Capabilities
from pypkg.errors import UserError

SOURCES = "1f" * 32
H100 = Capabilities(
    device="gpu", device_name="H100", compute_capability=(9, 0), memory_bytes=80 * 2**30,
    paddle="3.3.1 with CUDA 12.6", ops_backend="compiled", compiled_ops="built",
    kernel_sources=SOURCES, paddle_flash_attention=True,
)  # fmt: skip
NOT_BUILT = dataclasses.replace(H100, ops_backend="triton")
NO_PADDLE = dataclasses.replace(H100, paddle_flash_attention=False)
V100 = dataclasses.replace(
    H100, device_name="V100", compute_capability=(7, 0), ops_backend="reference"
)
CPU = dataclasses.replace(H100, device="cpu", compute_capability=None, paddle_flash_attention=False)
CPU_REFERENCE = dataclasses.replace(CPU, ops_backend="reference")
PLAIN = AttentionNeeds(dtype="bfloat16", head_dim=128)
FASTER = Timing("hopper", 3.0, "SDPA flash", 4.0)
SLOWER = Timing("ampere", 5.0, "SDPA flash", 4.0)


@pytest.fixture(autouse=True)
def record(tmp_path, monkeypatch):
    file = tmp_path / "below" / "attention.json"
    monkeypatch.setenv(attention_record.VARIABLE, str(file))
    return file


@pytest.mark.parametrize(
    ("needs", "device", "backend", "reason"),
    [
        ({}, CPU, "pypkg", "CPU kernels"),
        ({}, CPU_REFERENCE, "reference", "stores [batch, heads, sequence, sequence]"),
        ({}, H100, "paddle", "no record that our kernels passed `make gpu-check` on this GPU"),
        ({}, NOT_BUILT, "paddle", "our flash attention needs compiled operators"),
        ({}, NO_PADDLE, "pypkg", "Paddle was built without flash attention; no record"),
        ({"alibi": True}, H100, "pypkg", "Paddle's flash attention has no ALiBi; no record"),
        ({"softcap": True}, H100, "pypkg", "no soft cap"),
        ({"dtype": "float32"}, H100, "pypkg", "no float32"),
        ({"alibi": True, "softcap": True}, NOT_BUILT, "reference", "no ALiBi, no soft cap; att"),
        ({"dtype": "float16"}, V100, "reference", "8.0, and V100 has 7.0; Paddle's flash"),
    ],
)
def test_auto_without_a_record(needs, device, backend, reason):
    choice = choose_attention("auto", dataclasses.replace(PLAIN, **needs), device)
    assert (choice.backend, choice.kernel) == (backend, None)
    assert reason in choice.reason
    assert choice.describe() == f"attention: {backend} ({choice.reason})"


def test_auto_takes_ours_where_this_gpu_has_seen_it_faster():
    assert write_timings("H100", SOURCES, "2026-03-01", {128: FASTER, 64: SLOWER}) == record_path()
    choice = choose_attention("auto", PLAIN, H100)
    assert (choice.backend, choice.kernel) == ("pypkg", "hopper")
    assert "3 ms for ours and 4 ms for SDPA flash" in choice.reason
    slower = choose_attention("auto", dataclasses.replace(PLAIN, head_dim=64), H100)
    assert (slower.backend, slower.kernel) == ("paddle", None)
    assert "5 ms for ours" in slower.reason
    others = (
        choose_attention("auto", dataclasses.replace(PLAIN, head_dim=96), H100),
        choose_attention("auto", PLAIN, dataclasses.replace(H100, device_name="H200")),
        choose_attention("auto", PLAIN, dataclasses.replace(H100, kernel_sources="2e" * 32)),
        choose_attention("auto", PLAIN, dataclasses.replace(H100, kernel_sources=None)),
    )
    for other in others:
        assert other.backend == "paddle" and "no record" in other.reason
    write_timings("H200", SOURCES, "2026-03-02", {128: SLOWER})  # another GPU's entry stays
    assert recorded_timings("H100", SOURCES) == {128: FASTER, 64: SLOWER}
    alibi = choose_attention("auto", dataclasses.replace(PLAIN, head_dim=64, alibi=True), H100)
    assert (alibi.backend, alibi.kernel) == ("pypkg", "ampere")


def test_a_choice_by_name_is_followed_or_refused():
    write_timings("H100", SOURCES, "2026-03-01", {128: FASTER})
    assert choose_attention("pypkg", PLAIN, H100).kernel == "hopper"
    assert choose_attention("paddle", PLAIN, H100).backend == "paddle"
    assert choose_attention("reference", PLAIN, H100).backend == "reference"
    with pytest.raises(UserError, match=r"attention_backend is 'paddle', but .* has no ALiBi; set"):
        choose_attention("paddle", dataclasses.replace(PLAIN, alibi=True), H100)
    with pytest.raises(
        UserError, match=r"attention_backend is 'pypkg', but .* not the triton ones"
    ):
        choose_attention("pypkg", PLAIN, NOT_BUILT)
    assert choose_attention("flash", PLAIN, NOT_BUILT).backend == "paddle"
    with pytest.raises(UserError, match=r"use_flash_attention is true, but .*, and .* no ALiBi"):
        choose_attention("flash", dataclasses.replace(PLAIN, alibi=True), NOT_BUILT)


@pytest.mark.parametrize("text", ["{", "[]", '{"gpus": {"H100": {}}}', '{"gpus": 1}'])
def test_a_record_that_is_none_is_an_error(text, record):
    record.parent.mkdir()
    record.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"is not a record of attention kernels .*`make gpu-check"):
        choose_attention("auto", PLAIN, H100)


def test_default_place_of_the_record(monkeypatch, tmp_path):
    monkeypatch.delenv(attention_record.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert record_path() == tmp_path / "pypkg" / "attention.json"
    write_timings("H100", SOURCES, "2026-03-01", {128: FASTER})
    [entry] = json.loads(record_path().read_text())["gpus"].values()
    assert entry["csrc_sha256"] == SOURCES and entry["head_dims"]["128"]["kernel"] == "hopper"


def row(shape: str, name: str, median: float, dtype: str = "bfloat16") -> list[dict]:
    return [
        {"op": "flash_attention", "shape": shape, "pass": which, "dtype": dtype,
         "baseline": name, "median": median}
        for which in ("forward", "backward")
    ]  # fmt: skip


def test_timings_of_a_benchmark():
    """Only causal bfloat16 counts, at shapes that a version and a baseline have both run."""
    first, second = "2x8192x16x128 causal", "4x4096x32/8x128 causal"
    rows = [
        *row(first, "pypkg", 5.0), *row(second, "pypkg", 1.0),
        *row(first, "pypkg, hopper", 2.0), *row(second, "pypkg, hopper", 1.0),
        *row(first, "SDPA flash", 3.0), *row(second, "SDPA flash", 2.0),
        *row(first, "SDPA cudnn", 0.1),  # did not run at every shape
        *row("2x8192x16x128 alibi", "pypkg", 0.1), *row(first, "pypkg", 0.1, "float16"),
        *row("4x4096x32x64 causal", "pypkg", 1.0),  # nothing to compare with
        *row("4x4096x16x96 causal", "pypkg", 1.0),
        *row("4x4096x16x96 causal", "SDPA flash", 3.0)[:1],
    ]  # fmt: skip
    assert timings_of(rows, "pypkg") == {128: Timing("hopper", 6.0, "SDPA flash", 10.0)}


def test_ours_is_compared_with_what_auto_would_take_otherwise():
    """Paddle's, where it was timed at every shape, and not torch's, be that faster or slower."""
    first, second = "2x8192x16x128 causal", "4x4096x32/8x128 causal"
    ours = [*row(first, "pypkg", 4.0), *row(second, "pypkg", 1.0)]
    torch = [*row(first, "SDPA flash", 2.0), *row(second, "SDPA flash", 1.0)]
    paddle = [*row(first, PADDLE, 5.0), *row(second, PADDLE, 2.0)]
    assert timings_of(ours + torch + paddle, "pypkg")[128] == Timing("ampere", 10.0, PADDLE, 14.0)
    assert timings_of(ours + torch + paddle[:2], "pypkg")[128].other == "SDPA flash"
