"""``python -m pypkg.bench data-index``: the construction of index maps, against baselines.

PaddleNLP and Megatron-LM shuffle with NumPy. C++ helpers build their sample indices and blends:
fast_dataindex for PaddleNLP, a module of its own for Megatron-LM. All baselines get the same
documents and must build the same maps, bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pypkg import _native
from pypkg.bench.ops.case import OURS, BenchmarkError
from pypkg.bench.timing import interleave, summarize
from pypkg.data.index.maps import build_index_maps, build_sample_index, plan_index_maps, shuffle

logger = logging.getLogger("pypkg")

MEAN_TOKENS = 400  # mean size of a document; sizes have an exponential distribution
BLENDED = 8  # corpora
_SEED = 1234
_NUMPY = "NumPy"

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Corpus:
    """The input of the maps: one epoch of documents in a shuffled order."""

    sizes: np.ndarray
    documents: np.ndarray
    tokens: int
    seq_length: int

    @property
    def samples(self) -> int:
        return (self.tokens - 1) // self.seq_length


@dataclass(frozen=True)
class Step:
    """One object to build, and the function of each baseline that builds it."""

    name: str
    work: str
    builders: dict[str, Callable[[], Arrays]]


@dataclass(frozen=True)
class Sample:
    """One run of a builder: seconds, and the largest growth of the process in bytes."""

    seconds: float
    peak: int


def run_data_index(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that the command line requests.

    Raises:
        BenchmarkError: a baseline builds other maps.
    """
    baselines, notes = find_baselines(options.site_packages)
    rows = []
    for step in steps(make_corpus(options.documents, options.seq), baselines):
        logger.info("%s, %s", step.name, step.work)
        rows += measure(step, options.rounds)
    return {
        "kind": "data-index",
        "device": "cpu",
        "documents": options.documents,
        "seq_length": options.seq,
        "mean_tokens": MEAN_TOKENS,
        "baselines": {name: version for name, (_, version) in baselines.items()},
        "notes": notes,
        "rows": rows,
    }


def make_corpus(num_documents: int, seq_length: int) -> Corpus:
    """A corpus of documents with random sizes, in random order."""
    random = np.random.default_rng(_SEED)
    sizes = 1 + random.exponential(MEAN_TOKENS - 1, num_documents).astype(np.int32)
    documents = np.arange(num_documents, dtype=np.int32)
    random.shuffle(documents)
    return Corpus(sizes, documents, int(sizes.sum(dtype=np.int64)), seq_length)


def steps(corpus: Corpus, baselines: dict[str, tuple[ModuleType, str]]) -> Iterator[Step]:
    """Yields the measured steps."""
    documents, samples = f"{len(corpus.sizes):,} documents", f"{corpus.samples:,} samples"
    for name, count in (("document order", len(corpus.sizes)), ("sample order", corpus.samples)):
        builders = {OURS: shuffle, _NUMPY: lambda array, random: random.shuffle(array)}
        yield Step(
            name,
            f"{count:,} shuffled",
            {
                each: functools.partial(_shuffled, count, builder)
                for each, builder in builders.items()
            },
        )
    yield Step(
        "sample beginnings",
        f"{samples} of {corpus.seq_length} tokens in {documents}",
        {
            OURS: lambda: (
                build_sample_index(
                    corpus.sizes, corpus.documents, corpus.seq_length, corpus.samples
                ),
            ),
            **{
                name: functools.partial(_their_samples, corpus, corpus.documents, module)
                for name, (module, _) in baselines.items()
            },
        },
    )
    yield Step(
        "all index maps",
        f"{samples} of {corpus.seq_length} tokens in {documents}",
        {
            OURS: functools.partial(_our_maps, corpus),
            **{
                f"{_NUMPY} + {name}": functools.partial(_their_maps, corpus, module)
                for name, (module, _) in baselines.items()
            },
        },
    )
    weights = np.random.default_rng(_SEED).random(BLENDED)
    weights /= weights.sum()
    yield Step(
        "blend",
        f"{samples} from {BLENDED} corpora",
        {
            OURS: lambda: _native.build_blending_indices(weights, corpus.samples),
            **{
                name: functools.partial(_their_blend, weights, corpus.samples, module)
                for name, (module, _) in baselines.items()
            },
        },
    )


def measure(step: Step, rounds: int) -> list[dict[str, Any]]:
    """Times a step; returns a row for each baseline.

    Raises:
        BenchmarkError: the baselines build different maps.
    """
    expected = step.builders[OURS]()
    nbytes = sum(array.nbytes for array in expected)
    for name, builder in step.builders.items():
        for ours, theirs in zip(expected, builder(), strict=True):
            if not np.array_equal(ours, theirs):
                raise BenchmarkError(f"{step.name}: {name} builds something else than {OURS}")
    del expected, ours, theirs
    runs = {name: functools.partial(_time, builder) for name, builder in step.builders.items()}
    return [
        {
            "step": step.name,
            "work": step.work,
            "baseline": name,
            **vars(summarize([sample.seconds for sample in samples])),
            "map_bytes": nbytes,
            "peak_bytes": max(sample.peak for sample in samples),
        }
        for name, samples in interleave(runs, rounds).items()
    ]


def find_baselines(folders: Sequence[Path]) -> tuple[dict[str, tuple[ModuleType, str]], list[str]]:
    """The C++ helpers of PaddleNLP and Megatron-LM.

    Args:
        folders: further site-packages folders to search.

    Returns:
        (module, version) of each helper that is installed, and notes on missing ones.
    """
    path = [*sys.path, *map(str, folders)]
    names = {
        "fast_dataindex": ("fast_dataindex.helpers", "fast_dataindex"),
        "megatron-core": ("megatron.core.datasets.helpers_cpp", "megatron-core"),
    }
    baselines, notes = {}, []
    for name, (module, distribution) in names.items():
        found = _load_extension(module, path)
        if found is None:
            notes.append(f"{name} is not installed; --site-packages names a folder with it")
            continue
        (installed, *_) = importlib.metadata.distributions(name=distribution, path=path)
        baselines[name] = (found, installed.version)
    return baselines, notes


def _load_extension(name: str, path: Sequence[str]) -> ModuleType | None:
    """Loads an extension module without its packages, whose imports may be slow."""
    *packages, last = name.split(".")
    for folder in path:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(folder, *packages, last + suffix)
            if file.is_file():
                spec = importlib.util.spec_from_file_location(name, file)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return None


def _shuffled(count: int, shuffle_with: Callable[..., None]) -> Arrays:
    numbers = np.arange(count, dtype=np.int32)
    shuffle_with(numbers, np.random.RandomState(_SEED))
    return (numbers,)


def _our_maps(corpus: Corpus) -> Arrays:
    plan = plan_index_maps(
        corpus.sizes, 0, len(corpus.sizes), corpus.samples, corpus.seq_length, _SEED
    )
    return build_index_maps(corpus.sizes, plan).arrays()


def _their_maps(corpus: Corpus, module: ModuleType) -> Arrays:
    random = np.random.RandomState(_SEED)
    documents = np.arange(len(corpus.sizes), dtype=np.int32)
    random.shuffle(documents)
    (samples,) = _their_samples(corpus, documents, module)
    order = np.arange(len(samples) - 1, dtype=np.uint32)
    random.shuffle(order)
    return documents, samples, order


def _their_samples(corpus: Corpus, documents: np.ndarray, module: ModuleType) -> Arrays:
    arguments = (corpus.sizes, documents, corpus.seq_length, 1, corpus.tokens)
    with _silent():
        if hasattr(module, "build_sample_idx"):
            return (module.build_sample_idx(*arguments),)
        return (module.build_sample_idx_int32(*arguments, True, 1),)


def _their_blend(weights: np.ndarray, size: int, module: ModuleType) -> Arrays:
    datasets, samples = np.empty(size, np.int16), np.empty(size, np.int64)
    module.build_blending_indices(datasets, samples, weights, len(weights), size, False)
    return datasets, samples


def _time(builder: Callable[[], Arrays]) -> Sample:
    before = _reset_peak()
    start = time.perf_counter()
    result = builder()
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM") - before
    del result
    return Sample(seconds, peak)


def _reset_peak() -> int:
    """Resets the recorded peak of the process; returns its present size in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory is reused without being counted
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@contextmanager
def _silent() -> Iterator[None]:
    """Suppresses the output of C++ code to standard output."""
    sys.stdout.flush()
    saved = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nothing)
