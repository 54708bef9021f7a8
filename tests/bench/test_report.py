"""The page of benchmarks, from small results made up here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pypkg.bench.report.figures import operator_figure
from pypkg.bench.report.page import read_result, render, render_page, write_docs
from pypkg.bench.report.quantities import milliseconds
from pypkg.bench.report.result import result_name
from pypkg.bench.report.sections import operators
from pypkg.console.svg import svg
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


def _texts(svg: str) -> list[str]:
    """The texts of a figure, in order."""
    root = ElementTree.fromstring(svg)
    return [element.text for element in root.iter() if element.tag.endswith("text")]


def test_committed_page_and_figures_are_those_of_the_committed_results(tmp_path) -> None:
    """Figures are compared by what they say: other versions of matplotlib write other paths."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    (tmp_path / "benchmarks").mkdir()
    for path in (docs / "benchmarks").glob("*.json"):
        shutil.copy(path, tmp_path / "benchmarks")
    page = write_docs(tmp_path)
    assert page.read_text() == (docs / "benchmarks.md").read_text(), "run `make docs`"
    found, expected = (
        {path.name: _texts(path.read_text()) for path in (folder / "benchmarks").glob("*.svg")}
        for folder in (docs, tmp_path)
    )
    assert len(expected) > 5
    assert found == expected, "run `python -m pypkg.bench report`"


def test_a_figure_has_the_same_bytes_each_time(ops_result) -> None:
    assert operators.figures(ops_result) == operators.figures(ops_result)


def test_a_figure_per_operator(tmp_path, ops_result) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    ops_result["rows"] += [{**_row("pypkg", "forward", 1.0, 0.5), "op": "rms_norm+residual"}]
    ops_result["counted"]["rms_norm+residual"] = "every byte once"
    (folder / "ops-cpu.json").write_text(json.dumps(ops_result))
    (folder / "ops-cpu-gone.svg").write_text("of an operator that is gone")
    page = write_docs(tmp_path).read_text()
    figures = sorted(path.name for path in folder.glob("*.svg"))
    assert figures == ["ops-cpu-rms_norm-residual.svg", "ops-cpu-swiglu.svg"]
    for name in figures:
        assert f"](benchmarks/{name})" in page
        root = ElementTree.fromstring((folder / name).read_text())
        assert root.tag.endswith("svg")
    assert "![" not in render(ops_result)


def test_a_figure_names_everything_and_puts_the_slower_to_the_right(ops_result) -> None:
    rows = [
        _row("pypkg", "forward", 0.4, 0.2),
        _row("a & b", "forward", 1.0, 0.2),
        _row("pypkg", "backward", 4.0, 0.2),
        _row("pypkg", "forward+backward", 4.4, 0.4),
    ]
    figure = operator_figure(rows, "CPU")
    said = _texts(svg(figure))
    assert any(each.startswith("swiglu on CPU") for each in said)
    for text in ("m: [2, 3], float32", "forward, ms", "backward, ms", "a & b"):
        assert text in said
    assert {"1.00 (0.400)", "2.50 (1.00)", "1.00 (4.00)"} <= set(said)
    assert "forward+backward, ms" not in said
    forward, backward = figure.axes
    assert forward.get_xlim() == backward.get_xlim()  # panels share a scale
    medians = [line.get_xdata()[0] for line in forward.lines if line.get_marker() in ("o", "s")]
    assert medians == [0.4, 1.0]
    assert list(forward.lines[0].get_xdata()) == [0.2, 0.2]  # the limit


def test_a_step_is_one_pass_in_the_table_and_in_the_figure(ops_result) -> None:
    rows = [
        _row("pypkg", "step", 2.0, 1.0, op="adamw"),
        _row("torch, fused", "step", 3.0, 1.0, op="adamw"),
    ]
    ops_result |= {"rows": rows, "counted": {"adamw": "28 bytes"}}
    cells = _cells(render(ops_result), "m: [2, 3]", "float32", "step")
    assert cells[3:] == ["2.00", "2.0", "50 %", "1.50 (3.00)"]
    said = _texts(svg(operator_figure(rows, "CPU")))
    assert said.count("step, ms") == 1 and "torch, fused" in said
    assert not any("forward" in text or "backward" in text for text in said)


def test_figures_without_matplotlib(monkeypatch, tmp_path, ops_result) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "ops-cpu.json").write_text(json.dumps(ops_result))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("pypkg.bench.report.figures", "pypkg.console.svg"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(UserError, match=r"pip install 'pypkg\[plot\]'"):
        write_docs(tmp_path)


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


def test_a_narrower_instruction_set_has_a_section_of_its_own(ops_result) -> None:
    narrow = {**ops_result, "device": "cpu x86-64-v3"}
    assert result_name(narrow) == "ops-cpu-x86-64-v3"
    page = render_page([ops_result, narrow])
    assert "## Operators on CPU\n" in page and "## Operators on CPU x86-64-v3\n" in page
    assert "ops-cpu-x86-64-v3-swiglu.svg" in page


def _curve(optimizer: str, last: float) -> dict:
    return {
        "optimizer": optimizer,
        "steps": [10, 20, 30],
        "losses": [8.0, 7.0, last],
        "eval_steps": [15, 30],
        "eval_losses": [7.5, last],
        "tokens_per_second": 1234.0,
    }


def test_learning_curves(tmp_path) -> None:
    result = {
        **_RUN,
        "kind": "learning-curves",
        "workload": "a model",
        "differences": {"adamw": {}, "lion": {"learning_rate": 2e-4}},
        "notes": [],
        "rows": [_curve("adamw", 6.0), _curve("lion", 6.25)],
    }
    text = render(result)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    assert cells[0] == ["optimizer", "step 15", "step 30", "tokens/s", "settings"]
    assert cells[-1] == ["lion", "7.500", "6.250", "1,234", "`learning_rate` 0.0002"]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / f"{result_name(result)}.json").write_text(json.dumps(result))
    page = write_docs(tmp_path).read_text()
    assert "(benchmarks/learning-curves-cpu.svg)" in page
    picture = ElementTree.parse(tmp_path / "benchmarks" / "learning-curves-cpu.svg")
    words = "".join(picture.getroot().itertext())
    assert "lion" in words and "nats per token" in words
