"""``python -m pypkg.bench preprocess``: from JSON lines to .bin/.idx, beside PaddleNLP.

The text is Python's standard library, the tokenizer a byte-level BPE trained on it. Everything
that writes a corpus has to write the same one, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pypkg.bench.ops.case import OURS, BenchmarkError
from pypkg.bench.timing import interleave, summarize
from pypkg.data.tokenizers.train_bpe import train_tokenizer
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

TOKENIZERS = "tokenizers alone"
_INSIDE = "tokenizers alone, ids not taken out"
_Sample = tuple[float, float]  # seconds on the clock, and of all processors together
_WORKER = Path(__file__).with_name("preprocess_baselines.py")
# What AutoTokenizer of PaddleNLP makes of a byte-level BPE: the class that a tokenizer_config.json
# names. The first is its default for GPT, in Python; the second reads tokenizer.json.
_PADDLENLP_CLASSES = ("GPTTokenizer", "Qwen2TokenizerFast")


def run_preprocess(options: argparse.Namespace) -> dict[str, Any]:
    """The measurements that the command line asks for.

    Raises:
        UserError: the interpreter for PaddleNLP cannot be run.
        BenchmarkError: a baseline failed, or its corpus is not that of the others.
    """
    if options.paddlenlp is not None:
        _run([options.paddlenlp, "--version"])
    with tempfile.TemporaryDirectory(prefix="pypkg-bench-") as name:
        folder = Path(name)
        documents, text_bytes = _write_text(folder / "text.jsonl", options.megabytes * 1_000_000)
        _make_tokenizer(folder, options.vocab_size)
        return {
            "kind": "preprocess",
            "device": "cpu",
            "workers": options.threads,
            **_measure(folder, options, documents, text_bytes),
            "workload": f"{documents} documents, {text_bytes / 1e6:.1f} MB of text as JSON lines: "
            "the source of Python's standard library, repeated; a byte-level BPE of "
            f"{options.vocab_size} entries trained on it; {options.threads} workers or threads",
        }


def _measure(
    folder: Path, options: argparse.Namespace, documents: int, text_bytes: int
) -> dict[str, Any]:
    workers, notes = options.threads, []
    results: dict[str, dict[str, Any]] = {}

    def baseline(name: str, python: str, kind: str, tokenizer: str) -> Callable[[], _Sample]:
        def run() -> _Sample:
            results[name] = _run_baseline(python, kind, folder, tokenizer, name, workers)
            return results[name]["seconds"], results[name]["cpu_seconds"]

        return run

    def ours() -> _Sample:
        results[OURS], sample = _run_ours(folder, workers)
        return sample

    runs = {
        OURS: ours,
        TOKENIZERS: baseline(TOKENIZERS, sys.executable, "tokenizers", "tokenizer"),
        _INSIDE: baseline(_INSIDE, sys.executable, "tokenizers-inside", "tokenizer"),
    }
    samples = interleave(runs, options.rounds, pause=0.5)
    if options.paddlenlp is None:
        notes.append("--paddlenlp was not given: PaddleNLP was left out")
    else:
        slow = {
            (name := f"PaddleNLP, {each}"): baseline(name, options.paddlenlp, "paddlenlp", each)
            for each in _PADDLENLP_CLASSES
        }
        samples |= interleave(slow, 1, pause=0.5)
    _check_same(folder, results, documents)
    rows = [
        {
            "baseline": name,
            **asdict(summarize([seconds for seconds, _ in pairs])),
            "cpu_seconds": summarize([cpu for _, cpu in pairs]).median,
            "text_bytes": text_bytes,
            "tokens": results[name]["tokens"],
        }
        for name, pairs in samples.items()
    ]
    notes += [
        f"{name}: version {result['version']}"
        for name, result in results.items()
        if "version" in result
    ]
    return {"rows": rows, "notes": notes}


def _write_text(file: Path, num_bytes: int) -> tuple[int, int]:
    """Returns the number of documents and the bytes of their text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    documents = written = 0
    with open(file, "w", encoding="utf-8") as out:
        while written < num_bytes:
            before = written
            for path in sources:
                try:
                    text = path.read_text(encoding="utf-8").strip()
                except UnicodeDecodeError:  # tests of other encodings
                    continue
                # GPTTokenizer and tokenizers treat these differently where they stand in a text.
                if not text or any(token in text for token in ("<s>", "</s>", "<unk>")):
                    continue
                out.write(json.dumps({"text": text}) + "\n")
                documents, written = documents + 1, written + len(text.encode())
                if written >= num_bytes:
                    break
            if written == before:
                raise UserError(f"there are no sources of the standard library in {library}")
    return documents, written


def _make_tokenizer(folder: Path, vocab_size: int) -> None:
    """One tokenizer in the folders ``tokenizer`` and, in PaddleNLP's forms, ``<class>``."""
    with open(folder / "text.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    train_tokenizer(iter(sorted(set(texts))), vocab_size, folder / "tokenizer", "benchmark")
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    for name in _PADDLENLP_CLASSES:
        target = folder / name
        target.mkdir()
        (target / "tokenizer.json").write_text(json.dumps(tokenizer))
        (target / "vocab.json").write_text(json.dumps(model["vocab"]))
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]))
        tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        config = {"tokenizer_class": name, "pad_token": "</s>", **tokens}
        (target / "tokenizer_config.json").write_text(json.dumps(config))


def _run_ours(folder: Path, workers: int) -> tuple[dict[str, Any], _Sample]:
    """The summary, and the times of the whole command, with the start of all processes."""
    prefix = folder / "ours"
    for file in folder.glob("ours.*"):
        file.unlink()
    start, cpu = time.perf_counter(), _cpu_seconds_of_children()
    values = {
        "input_path": folder / "text.jsonl",
        "tokenizer_name_or_path": folder / "tokenizer",
        "output_prefix": prefix,
        "max_repeated_len": 100,
        "workers": workers,
    }
    options = ["--append_eos", "--strip", *_arguments(values)]
    _run([sys.executable, "-m", "pypkg.preprocess", *options])
    sample = (time.perf_counter() - start, _cpu_seconds_of_children() - cpu)
    return json.loads(Path(f"{prefix}.meta.json").read_text()), sample


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _run_baseline(
    python: str, baseline: str, folder: Path, tokenizer: str, name: str, workers: int
) -> dict[str, Any]:
    values = {
        "input": folder / "text.jsonl",
        "tokenizer": folder / tokenizer,
        "output": folder / name,
        "workers": workers,
    }
    output = _run([python, str(_WORKER), baseline, *_arguments(values)])
    logger.info("%s: %s", name, output.splitlines()[-1])
    return json.loads(output.splitlines()[-1])


def _arguments(values: Mapping[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}; see --paddlenlp") from error
    if done.returncode != 0:
        raise BenchmarkError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return done.stdout


def _check_same(folder: Path, results: dict[str, dict[str, Any]], documents: int) -> None:
    ours = results[OURS]
    if results[TOKENIZERS]["tokens"] + documents != ours["tokens"]:
        raise BenchmarkError(
            f"{TOKENIZERS} gives {results[TOKENIZERS]['tokens']} tokens of {documents} documents, "
            f"pypkg with an eos for each {ours['tokens']}"
        )
    for name in results:
        for suffix in (".bin", ".idx"):
            theirs = folder / f"{name}{suffix}"
            if theirs.exists() and theirs.read_bytes() != (folder / f"ours{suffix}").read_bytes():
                raise BenchmarkError(f"{name} writes another {suffix} than pypkg")
