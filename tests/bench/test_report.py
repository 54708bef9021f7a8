"""The page of benchmarks, from small results made up here."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pypkg.bench.report.page import read_result, render, render_page, write_docs
from pypkg.bench.report.pictures import draw_operator
from pypkg.bench.report.quantities import milliseconds
from pypkg.errors import UserError

_RUN = {
    "date": "2030-01-02T03:04:05+00:00",
    "command": "python -m pypkg.bench ops",
    "machine": {"cpu": "Some CPU", "cores": 4, "threads": 3, "memory_gib": 7.5},
    "versions": {"python": "3.11.7", "paddlepaddle": "3.3.1"},
    "commit": "abcdef123456",
    "device": "cpu",
}


def _row(baseline: str, part: str, median: float, limit: float, **more) -> dict:
    return {
        "op": "swiglu",
        "shape": "m: [2, 3]",
        "dtype": "float32",
        "pass": part,
        "baseline": baseline,
        "median": median,
        "lower_quartile": median,
        "upper_quartile": median,
        "count": 5,
        "bytes": 4_000_000,
        "flops": 0,
        "limit": limit,
        "error": 0.1,
        **more,
    }


@pytest.fixture
def ops_result() -> dict:
    return {
        **_RUN,
        "kind": "ops",
        "backend": "compiled",
        "limits": {
            "copy_bytes_per_second": 2e10,
            "copy_bytes": 2**29,
            "matmul_flops_per_second": 1.5e11,
            "matmul_source": "paddle",
        },
        "counted": {"swiglu": "every byte once"},
        "notes": ["a note"],
        "rows": [
            _row("pypkg", "forward", 0.4, 0.2),
            _row("torch", "forward", 1.0, 0.2),
            _row("pypkg", "forward", 0.5, 0.1, dtype="bfloat16"),
        ],
    }


@pytest.fixture
def step_result() -> dict:
    row = {
        "tokens_per_step": 2000,
        "flops_per_step": 4e11,
        "peak_rss_bytes": 3 * 2**30,
        "first_loss": 10.4,
        "last_loss": 8.25,
    }
    quartiles = {"lower_quartile": 1.5, "upper_quartile": 4.5, "count": 5}
    return {
        **_RUN,
        "kind": "train-step",
        "workload": "a model",
        "matmul_rate": 4e11,
        "matmul_source": "torch",
        "notes": [],
        "rows": [
            {"baseline": "pypkg", "median": 2.0, **quartiles, **row},
            {"baseline": "other", "median": 5.0, **quartiles, **row},
        ],
    }


def _cells(text: str, *begin: str) -> list[str]:
    """The cells of the one table row whose first cells are ``begin``."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    (found,) = [row for row in rows if row[: len(begin)] == list(begin)]
    return found


def test_operator_figures_are_derived_from_the_times(ops_result) -> None:
    text = render(ops_result)
    # 4 MB in 0.4 ms are 10 GB/s; the limit is 0.2 ms; torch takes 2.5 times as long.
    assert _cells(text, "m: [2, 3]", "float32", "forward")[3:] == [
        "0.400",
        "10.0",
        "50 %",
        "2.50 (1.00)",
    ]
    assert _cells(text, "m: [2, 3]", "bfloat16", "forward")[3:] == ["0.500", "8.0", "20 %", "-"]
    for said in ("Some CPU", "3 threads of 4 cores", "abcdef123456", "a note", "every byte once"):
        assert said in text


def test_arithmetic_is_reported_in_flops(ops_result) -> None:
    ops_result["rows"] = [_row("pypkg", "forward", 2.0, 1.0, bytes=0, flops=10**9)]
    text = render(ops_result)
    assert "GFLOP/s" in text and "| GB/s" not in text
    assert _cells(text, "m: [2, 3]")[3:] == ["2.00", "500.0", "50 %"]


def test_training_step_figures(step_result) -> None:
    text = render(step_result)
    assert _cells(text, "pypkg")[1:] == [
        "2.00",
        "1.50-4.50",
        "1000",
        "1.00",
        "50 %",
        "3.00",
        "10.4000",
        "8.2500",
    ]
    assert _cells(text, "other")[3:6] == ["400", "2.50", "20 %"]


def test_page_says_that_cuda_has_not_run_until_it_has(ops_result, step_result) -> None:
    page = render_page([ops_result, step_result])
    assert "compiled, not yet run" in page
    assert "python -m pypkg.bench report" in page
    page = render_page([ops_result, {**ops_result, "device": "NVIDIA H100"}])
    assert "compiled, not yet run" not in page
    assert "## Operators on NVIDIA H100" in page
    assert "## Training step on CPU\n\nNo results yet." in page


def test_page_is_written_from_the_files(tmp_path, ops_result) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "ops-cpu.json").write_text(json.dumps(ops_result))
    page = write_docs(tmp_path)
    assert page == tmp_path / "benchmarks.md"
    assert page.read_text() == render_page([ops_result])


def test_committed_page_and_pictures_are_those_of_the_committed_results(tmp_path) -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    (tmp_path / "benchmarks").mkdir()
    for path in (docs / "benchmarks").glob("*.json"):
        shutil.copy(path, tmp_path / "benchmarks")
    write_docs(tmp_path)

    def made(folder: Path) -> dict[str, str]:
        files = [folder / "benchmarks.md", *(folder / "benchmarks").glob("*.svg")]
        return {path.name: path.read_text(encoding="utf-8") for path in files}

    found, expected = made(docs), made(tmp_path)
    assert len(expected) > 5
    assert sorted(found) == sorted(expected)
    wrong = [name for name in expected if found[name] != expected[name]]
    assert wrong == [], "run `python -m pypkg.bench report`"


def test_a_picture_per_operator(tmp_path, ops_result) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    ops_result["rows"] += [{**_row("pypkg", "forward", 1.0, 0.5), "op": "rms_norm+residual"}]
    ops_result["counted"]["rms_norm+residual"] = "every byte once"
    (folder / "ops-cpu.json").write_text(json.dumps(ops_result))
    (folder / "ops-cpu-gone.svg").write_text("of an operator that is gone")
    page = write_docs(tmp_path).read_text()
    pictures = sorted(path.name for path in folder.glob("*.svg"))
    assert pictures == ["ops-cpu-rms_norm-residual.svg", "ops-cpu-swiglu.svg"]
    for name in pictures:
        assert f"](benchmarks/{name})" in page
        root = ElementTree.fromstring((folder / name).read_text())
        assert root.tag.endswith("svg")
    assert "![" not in render(ops_result)


def test_a_picture_names_everything_and_puts_the_slower_to_the_right(ops_result) -> None:
    rows = [
        _row("pypkg", "forward", 0.4, 0.2),
        _row("a & b", "forward", 1.0, 0.2),
        _row("pypkg", "backward", 4.0, 0.2),
        _row("pypkg", "forward+backward", 4.4, 0.4),
    ]
    root = ElementTree.fromstring(draw_operator(rows, "CPU"))
    said = [element.text for element in root.iter() if element.tag.endswith("text")]
    for text in ("swiglu on CPU", "m: [2, 3]", "forward, float32", "backward, float32", "a & b"):
        assert text in said
    assert {"0.400", "1.00", "2.50", "4.00", "0.200"} <= set(said)
    assert "forward+backward, float32" not in said
    ours = [float(each.get("cx")) for each in root.iter() if each.tag.endswith("circle")]
    (baseline,) = [float(e.get("x")) + 3.5 for e in root.iter() if e.get("stroke-width") == "2"
               and e.tag.endswith("rect")]  # fmt: skip
    assert len(ours) == 2 and ours[0] < baseline
    # Panels share a scale: a factor of ten is the same distance, and ours of backward is 10 times.
    dashed = [float(each.get("x1")) for each in root.iter() if each.get("stroke-dasharray")]
    decade = (ours[1] - dashed[1]) - (ours[0] - dashed[0])
    assert decade * math.log10(2.5) == pytest.approx(baseline - ours[0], abs=0.3)


def test_a_step_is_one_pass_in_the_table_and_in_the_picture(ops_result) -> None:
    rows = [
        _row("pypkg", "step", 2.0, 1.0, op="adamw"),
        _row("torch, fused", "step", 3.0, 1.0, op="adamw"),
    ]
    ops_result |= {"rows": rows, "counted": {"adamw": "28 bytes"}}
    cells = _cells(render(ops_result), "m: [2, 3]", "float32", "step")
    assert cells[3:] == ["2.00", "2.0", "50 %", "1.50 (3.00)"]
    root = ElementTree.fromstring(draw_operator(rows, "CPU"))
    said = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert said.count("step, float32") == 1 and "torch, fused" in said
    assert not any("forward" in text or "backward" in text for text in said)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "weather"}'])
def test_a_file_that_is_no_result(tmp_path, text) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        read_result(path)


def test_no_docs_folder(tmp_path) -> None:
    with pytest.raises(UserError, match="checkout"):
        write_docs(tmp_path / "missing")


def test_milliseconds_have_three_significant_digits() -> None:
    assert [milliseconds(each) for each in (0.1234, 1.234, 12.34, 1234.0)] == [
        "0.123",
        "1.23",
        "12.3",
        "1234",
    ]
