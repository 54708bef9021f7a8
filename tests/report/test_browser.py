"""The page in a headless Chromium: what it shows, how it reacts, and how it looks.

Screenshots go to build/report-screenshots, from where continuous integration takes them. They are
for eyes; no test compares pixels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser
from run_testing import metrics, write_run

from pypkg.files import write_file
from pypkg.report.collect import collect
from pypkg.report.page import render
from pypkg.report.server import PageServer
from pypkg.training.reporting.reporters import JsonLinesReporter

PROGRAM = find_browser()
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "report-screenshots"
CURVES = 10  # of a run of run_testing.py
DOMAIN = "charts.plots.map((plot) => [plot.scales.x.min, plot.scales.x.max])"
TABLE = """
[...document.querySelectorAll("#curve-table tbody tr")]
  .map((row) => [...row.cells].map((cell) => cell.textContent))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PROGRAM is None,
        reason="needs Chromium or Chrome (on PATH or in PYPKG_BROWSER); .ci/run asks for it",
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    second = write_run(place / "two", rate=0.08, learning_rate=3e-4, seed=7)
    return [write_run(place / "one"), second]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(tab: Browser) -> Iterator[Browser]:
    """The tab, 1280 pixels wide, whose console has to stay silent."""
    tab.complaints.clear()
    tab.look(1280, 800)
    yield tab
    assert tab.complaints == []


def open_page(browser: Browser, folders: list[Path], file: Path) -> None:
    write_file(file, render(collect(folders, points=100)).encode())
    browser.open(file.as_uri())


def test_the_table_holds_the_curves(browser, folders, tmp_path):
    open_page(browser, folders[:1], tmp_path / "page.html")
    rows = {row[1]: row for row in browser.value(TABLE)}
    assert len(rows) == CURVES
    first, last = (2 + 3 * math.exp(-step * 0.05) for step in (2, 60))
    expected = ["one", "loss", "30", "2", f"{first:.4f}", "60", f"{last:.4f}"]
    assert rows["loss"][:7] == expected
    assert rows["eval_loss"][2:4] == ["6", "10"]
    assert rows["grad_norm"][8] == "5"


def test_every_chart_draws_its_curves(browser, folders, tmp_path):
    open_page(browser, folders, tmp_path / "page.html")
    plotted = browser.value("charts.plots.map((plot) => plot.series.length - 1)")
    assert sum(plotted) == 2 * CURVES
    # A canvas with curves has many colours: a grid alone has few.
    painted = browser.value("""
        [...document.querySelectorAll("canvas")].map((canvas) => {
          const { width, height } = canvas;
          const image = canvas.getContext("2d").getImageData(0, 0, width, height);
          return new Set(new Uint32Array(image.data.buffer)).size;
        })
    """)
    assert len(painted) == len(plotted) and min(painted) > 20
    assert browser.value("document.querySelectorAll('#kinds li').length") == 3


def test_zoom_by_drag_and_by_fields_moves_all_charts(browser, folders, tmp_path):
    open_page(browser, folders[:1], tmp_path / "page.html")
    assert browser.value(DOMAIN) == [[2, 60]] * len(browser.value(DOMAIN))
    box = browser.value("(({x, y, width, height}) => [x, y, width, height])"
                        "(charts.plots[0].over.getBoundingClientRect())")  # fmt: skip
    x, y, width, height = box
    middle = y + height / 2
    browser.drag((x + width / 4, middle), (x + width / 2, middle))
    (low, high), *others = browser.value(DOMAIN)
    assert low == pytest.approx(2 + 58 / 4, abs=0.5) and high == pytest.approx(31, abs=0.5)
    assert others == [[low, high]] * len(others)
    browser.value("document.querySelector('[name=reset]').click()")
    assert browser.value(DOMAIN)[0] == [2, 60]
    browser.value("""
        controls.from.value = 20; controls.to.value = 40;
        controls.to.dispatchEvent(new Event("change"))
    """)
    assert all(domain == [20, 40] for domain in browser.value(DOMAIN))


def change(browser: Browser, name: str, value: Any, event: str = "change") -> None:
    browser.value(f"controls.{name}.value = {value!r}; "
                  f"controls.{name}.dispatchEvent(new Event({event!r}))")  # fmt: skip


def test_axis_smoothing_and_log_scale(browser, folders, tmp_path):
    open_page(browser, folders[:1], tmp_path / "page.html")
    change(browser, "axis", "tokens")
    assert browser.value(DOMAIN)[0] == [2 * 1024, 60 * 1024]
    change(browser, "smoothing", "0.5", "input")
    loss = [metrics(step, 0.05)["loss"] for step in range(2, 61, 2)]
    total = share = 0.0
    for value in loss:  # the average without the bias of its start
        total, share = total / 2 + value / 2, share / 2 + 1 / 2
    series = browser.value("charts.plots[0].series.map((each) => each.label)")
    assert series == ["tokens", "loss, as logged", "loss", "eval_loss, as logged", "eval_loss"]
    assert browser.value("charts.plots[0].data[2].at(-1)") == pytest.approx(total / share)
    browser.value("controls.log.click()")
    assert browser.value("charts.plots.map((plot) => plot.scales.y.distr)") == [3] * 8


def test_runs_are_compared(browser, folders, tmp_path):
    open_page(browser, folders, tmp_path / "page.html")
    shown = browser.value(
        "[...document.querySelectorAll('#setting-table tbody tr')].map((row) => "
        "[...row.cells].map((cell) => cell.textContent))"
    )
    names = [row[0] for row in shown]
    assert names == ["learning_rate", "output_dir", "seed"]
    assert shown[0][1:] == ["5e-05", "0.0003", "5e-05"]
    strokes = browser.value("charts.plots[0].series.slice(1).map((each) => each.stroke())")
    assert strokes[0] == strokes[1] != strokes[2] == strokes[3]


def test_sections_show_what_the_run_left(browser, folders, tmp_path):
    open_page(browser, folders[:1], tmp_path / "page.html")
    text = browser.value("document.querySelector('main').innerText")
    for words in (
        "model.safetensors has 1,039 bytes", "Once upon 40 times", "</script><script>alert(1)",
        "stage 1: layers 3-5, head", "the gradient norm is 5", "75.0 %", "a GPU of a test",
    ):  # fmt: skip
        assert words in text, words
    assert browser.value("document.querySelectorAll('.rank').length") == 8


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("desktop", {"width": 1280, "height": 800}),
        ("dark", {"width": 1280, "height": 800, "dark": True}),
        ("phone", {"width": 390, "height": 844, "mobile": True}),
    ],
)
def test_it_fits_the_screen(browser, folders, tmp_path, name, look):
    browser.look(**look)
    open_page(browser, folders, tmp_path / "page.html")
    assert browser.value("document.documentElement.scrollWidth") <= look["width"]
    assert browser.value(
        "charts.plots.every((plot) => plot.root.getBoundingClientRect().right <= innerWidth)"
    )
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (name != "dark")
    browser.screenshot(SCREENSHOTS / f"{name}.png")


def test_paper_is_white_where_the_screen_is_dark(browser, folders, tmp_path):
    browser.look(1280, 800, dark=True)
    open_page(browser, folders, tmp_path / "page.html")
    browser.call("Emulation.setEmulatedMedia", media="print", features=[
        {"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    browser.wait_for("view.paper")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("charts.plots[0].axes[0].stroke()") == "#404448"
    browser.screenshot(SCREENSHOTS / "print.png")
    browser.look(1280, 800, dark=True)
    browser.wait_for("!view.paper")
    browser.print(SCREENSHOTS / "print.pdf")
    assert (SCREENSHOTS / "print.pdf").read_bytes().startswith(b"%PDF")


def test_a_watched_page_follows_the_run(browser, tmp_path):
    folder = write_run(tmp_path / "run")
    with PageServer(lambda: collect([folder], points=100, is_live=True), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            browser.open(server.address)
            browser.value("setRange([20, 60])")
            reporter = JsonLinesReporter(folder / "metrics.jsonl", last_step=60)
            reporter.report(62, metrics(62, 0.05))
            reporter.close()
            browser.wait_for("page.runs[0].step === 62")
            assert browser.value(TABLE)[0][5] == "62"
            assert browser.value(DOMAIN)[0] == [20, 60]  # the zoom stays
            browser.open("about:blank")
        finally:
            server.shutdown()
            thread.join()
