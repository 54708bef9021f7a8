"""The page as a file, the server of ``--watch``, and the command line."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_testing import metrics, write_run

from pypkg.report.__main__ import main
from pypkg.report.collect import collect
from pypkg.report.page import render
from pypkg.report.server import PageServer
from pypkg.training.reporting.reporters import JsonLinesReporter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def document_in(page: str) -> dict:
    (text,) = re.findall(
        r'<script type="application/json" id="document">(.*?)</script>', page, re.DOTALL
    )
    return json.loads(text)


def test_the_page_holds_the_document_and_loads_nothing(folder):
    document = collect([folder], points=100)
    page = render(document)
    assert document_in(page) == json.loads(document.to_json())
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](?!data:)", page)
    assert not re.search(r"@import|url\((?![\"']?data:)", page)
    assert page.count("<!--") == 0  # every part is in its place


def test_what_a_run_wrote_ends_no_script(folder):
    page = render(collect([folder], points=100))
    assert "<script>alert" not in page
    texts = [sample["text"] for sample in document_in(page)["runs"][0]["samples"]]
    assert " </script><script>alert(1)</script>" in texts


def test_the_command_writes_one_file_for_several_runs(folder, tmp_path, capsys):
    other = write_run(tmp_path / "two", learning_rate=3e-4)
    page = tmp_path / "page.html"
    assert main([str(folder), str(other), str(folder), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: 2 runs\n"
    runs = document_in(page.read_text(encoding="utf-8"))["runs"]
    assert [run["name"] for run in runs] == ["one", "two"]


def test_the_page_is_beside_the_run_by_default(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--points", "4"]) == 0
    page = document_in((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    assert max(len(curve["values"]) for curve in page["runs"][0]["curves"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "missing is no folder"),
        (["RUN", "--points", "1"], "--points is 1; expected 4 or more"),
        (["RUN", "--watch", "--output", "page.html"], "--output has no effect with --watch"),
        (["RUN", "--output", "RUN/metrics.jsonl/page.html"], "page.html"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, arguments, words):
    assert main([each.replace("RUN", str(folder)) for each in arguments]) == 2
    line, section = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert section.startswith("see docs/guides/troubleshooting.md#")


@contextmanager
def served(folder: Path) -> Iterator[http.client.HTTPConnection]:
    with PageServer(lambda: collect([folder], points=100, is_live=True), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        finally:
            server.shutdown()
            thread.join()


def answer(connection: http.client.HTTPConnection, path: str, **headers: str) -> tuple[int, str]:
    connection.request("GET", path, headers=headers)
    found = connection.getresponse()
    return found.status, found.read().decode()


def test_the_server_gives_the_page_and_newer_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("pypkg.report.server._LEAST_SECONDS", 0.0)
    folder = write_run(tmp_path / "run")
    with served(folder) as connection:
        code, page = answer(connection, "/")
        assert code == 200 and document_in(page)["is_live"]
        reporter = JsonLinesReporter(folder / "metrics.jsonl", last_step=60)
        reporter.report(62, metrics(62, 0.05))
        reporter.close()
        code, text = answer(connection, "/document.json")
        assert code == 200 and json.loads(text)["runs"][0]["step"] == 62
        assert answer(connection, "/metrics.jsonl")[0] == 404


def test_the_server_answers_to_this_machine_alone(folder):
    with served(folder) as connection:
        assert connection.host == "127.0.0.1"
        for host, code in (("localhost:9", 200), ("[::1]:9", 200), ("evil.example:9", 403)):
            assert answer(connection, "/document.json", Host=host)[0] == code


def test_a_port_that_is_taken(folder, capsys):
    with PageServer(lambda: collect([folder], points=10), 0) as server:
        assert main([str(folder), "--watch", "--port", str(server.server_port)]) == 2
    assert f"port {server.server_port}" in capsys.readouterr().err
