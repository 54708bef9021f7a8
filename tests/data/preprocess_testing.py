"""The command line of preprocessing, for its tests."""

from __future__ import annotations

import sys
from pathlib import Path

from pypkg import preprocess
from pypkg.data import IndexedDataset
from pypkg.data.preprocess.input.documents import Problem
from pypkg.data.preprocess.input.files import TextFile, find_text_files, plan_units
from pypkg.data.preprocess.input.readers import read_documents
from pypkg.data.tokenizers.load import load_tokenizer

DOCUMENTS = {
    "b.txt": "The second file.\n",
    "a/z.txt": "One in a folder, déjà vu.",
    "a/skip/no.txt": "in an excluded folder",
    "c.py": "import this\n",
    "d.txt": "",
    "notes.md": "not taken",
}


def arguments(tmp_path, *options, **values):
    values = {
        "input_path": tmp_path / "text",
        "tokenizer_name_or_path": tmp_path / "tokenizer",
        "output_prefix": tmp_path / "out" / "corpus",
        **values,
    }
    return [*options, *(str(x) for name, value in values.items() for x in (f"--{name}", value))]


def run(tmp_path, *options, **values):
    return preprocess.main(arguments(tmp_path, *options, **values))


def texts(tmp_path, tokenizer, prefix="out/corpus"):
    data = IndexedDataset(tmp_path / prefix)
    return [load_tokenizer(tokenizer).decode(data[i].tolist()) for i in range(len(data))]


def outputs(tmp_path):
    folder = tmp_path / "out"
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


ALL = ["corpus.bin", "corpus.idx", "corpus.manifest.json", "corpus.meta.json"]


def command(tmp_path, *options, unit=None, **values):
    """A command line to run; ``unit`` is the least size of its units in bytes."""
    program = ["-m", "pypkg.preprocess"]
    if unit is not None:
        program = [
            "-c",
            "import sys; from pypkg import preprocess; "
            "from pypkg.data.preprocess.input import files; "
            f"files._LEAST_UNIT = {unit}; sys.exit(preprocess.main(sys.argv[1:]))",
        ]
    return [sys.executable, *program, *arguments(tmp_path, *options, **values)]


def text_files(path: Path) -> list[TextFile]:
    """What ``--input_path`` stands for."""
    return find_text_files(path, (".txt",), ()).files


def read(
    path: Path, json_key: str = "text", doc_spliter: str | None = None, replace: bool = False
) -> tuple[list[str], list[Problem], list[int]]:
    """Texts, problems, and the bytes of the file that each text took."""
    texts, problems, taken = [], [], []
    for unit in plan_units(text_files(path), doc_spliter):
        for span in unit:
            for document in read_documents(span, json_key, doc_spliter, problems.append, replace):
                texts.append(document.text)
                taken.append(document.file_bytes)
    return texts, problems, taken
