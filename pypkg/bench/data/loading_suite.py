"""``python -m pypkg.bench data-loading``: the rate of random samples from a cached file, and the
time that a training loop waits for its batches.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.bench.ops.case import OURS, BenchmarkError
from pypkg.bench.timing import interleave, summarize
from pypkg.data import (
    Batch,
    BatchLoader,
    BlankInfilling,
    IndexedDatasetWriter,
    Packing,
    TimedIterator,
    build_train_valid_test_datasets,
    causal,
)
from pypkg.data.datasets.base import BatchRows
from pypkg.data.datasets.gpt import GPTDataset

logger = logging.getLogger("pypkg")

SEQ_LENGTH = 4096
BATCH = 8
TOKENS_PER_SECOND = 1_000_000  # consumption of the training loop
_MEAN_DOCUMENT = 1000
_VOCAB_SIZE = 32_000


def run_data_loading(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that the command line requests.

    Raises:
        BenchmarkError: a baseline reads other tokens.
    """
    with tempfile.TemporaryDirectory(prefix="pypkg-bench-") as name:
        prefix = str(Path(name) / "corpus")
        documents = _write_corpus(prefix, options.megatokens * 1_000_000)
        dataset = build_train_valid_test_datasets([prefix], "1", SEQ_LENGTH, (1, 0, 0), 42)[0]
        assert isinstance(dataset, GPTDataset)
        dataset.corpus.tokens.sum(dtype=np.int64)  # reads every page into memory
        return {
            "kind": "data-loading",
            "device": "cpu",
            "workload": f"{dataset.corpus.num_tokens / 1e6:.0f} M tokens of two bytes in "
            f"{documents:,} documents of {_MEAN_DOCUMENT} tokens on average (log-normal), in the "
            f"page cache; samples of {SEQ_LENGTH + 1} tokens in random order, micro batches of "
            f"{BATCH}",
            "tokens_per_second": TOKENS_PER_SECOND,
            "notes": [],
            "rows": _random_reads(dataset, options),
            "waits": _waits(dataset, options),
        }


def _write_corpus(prefix: str, tokens: int) -> int:
    """Writes random documents; returns their number."""
    rng = np.random.default_rng(0)
    spread = 1.0
    count = max(1, tokens // _MEAN_DOCUMENT)
    sizes = rng.lognormal(np.log(_MEAN_DOCUMENT) - spread**2 / 2, spread, count).astype(int) + 1
    ids = rng.integers(0, _VOCAB_SIZE, int(sizes.sum()), dtype=np.uint16)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in np.split(ids, np.cumsum(sizes)[:-1]):
            writer.add_document(document)
        writer.commit()
    return count


def _random_reads(dataset: GPTDataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples per second of each baseline."""
    order = np.random.default_rng(1).integers(0, len(dataset), options.samples // BATCH * BATCH)
    batches = order.reshape(-1, BATCH)
    baselines: dict[str, Callable[[], None]] = {
        OURS: lambda: _read(dataset, batches),
        f"{OURS}, two threads": lambda: _read_in_threads(dataset, batches),
        f"{OURS}, with document_starts": lambda: _read_with_starts(dataset, batches),
        "NumPy, sample by sample": lambda: _read_by_numpy(dataset, order),
        "NumPy, one slice of the file per sample": lambda: _slice_by_numpy(dataset, order),
    }
    expected = dataset.read(order[:64])
    found = np.stack([_numpy_sample(dataset, int(sample)) for sample in order[:64]])
    if not np.array_equal(expected, found):
        raise BenchmarkError("the samples are not those that NumPy cuts from the file")

    def timed(run: Callable[[], None]) -> Callable[[], float]:
        def seconds() -> float:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        return seconds

    times = interleave({name: timed(run) for name, run in baselines.items()}, options.rounds)
    rows = []
    for name, seconds in times.items():
        rates = summarize([order.size / value for value in seconds])
        rows.append({"baseline": name, "samples_per_second": rates.median, "rounds": rates.count})
        logger.info("%s: %.3f M samples/s", name, rates.median / 1e6)
    return rows


def _read(dataset: GPTDataset, batches: np.ndarray) -> None:
    out = np.empty((BATCH, SEQ_LENGTH + 1), np.int64)
    rows = np.arange(BATCH)
    for samples in batches:
        dataset.read_into(samples, BatchRows(out, rows))


def _read_with_starts(dataset: GPTDataset, batches: np.ndarray) -> None:
    out = np.empty((BATCH, SEQ_LENGTH + 1), np.int64)
    starts = np.empty(out.shape, np.int32)
    rows = np.arange(BATCH)
    for samples in batches:
        dataset.read_into(samples, BatchRows(out, rows, starts))


def _read_in_threads(dataset: GPTDataset, batches: np.ndarray) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: _read(dataset, part), np.array_split(batches, 2)))


def _read_by_numpy(dataset: GPTDataset, order: np.ndarray) -> None:
    for sample in order.tolist():
        _numpy_sample(dataset, sample)


def _numpy_sample(dataset: GPTDataset, sample: int) -> np.ndarray:
    """Assembles a sample like Megatron-LM and PaddleNLP."""
    row = dataset.shuffle_idx[sample]
    position, begin = dataset.sample_idx[row].tolist()
    last, end = dataset.sample_idx[row + 1].tolist()
    corpus, pieces = dataset.corpus, []
    for at in range(position, last + 1):
        document = corpus[dataset.doc_idx[at]]
        first = begin if at == position else 0
        stop = end + 1 if at == last else len(document)
        pieces.append(document[first:stop])
    return np.concatenate(pieces).astype(np.int64)


def _slice_by_numpy(dataset: GPTDataset, order: np.ndarray) -> None:
    """Reads the file at random positions without any index: the cost of reading alone."""
    tokens = dataset.corpus.tokens
    for sample in order.tolist():
        first = sample * SEQ_LENGTH
        tokens[first : first + SEQ_LENGTH + 1].astype(np.int64)


def _waits(dataset: GPTDataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the waits of a loop that consumes TOKENS_PER_SECOND."""
    infilling = BlankInfilling(SEQ_LENGTH, 1, 2, 3, 4, two_dimensional=True, seed=0)
    packing = Packing(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    objectives: dict[str, dict[str, Any]] = {
        "next token": {"objective": causal},
        "next token, documents apart": {"objective": causal, "packing": packing},
        "blanks of GLM": {"objective": infilling},
    }
    rows: list[dict[str, Any]] = []
    for name, what in objectives.items():
        for threads in (0, 1):
            loader = BatchLoader(dataset, BATCH, vocab_size=_VOCAB_SIZE, threads=threads, **what)
            waits = _wait_of(iter(loader), options.steps)
            rows.append({"objective": name, "threads": threads, "steps": len(waits)})
            rows[-1] |= {"mean": float(np.mean(waits)), "largest": float(np.max(waits))}
            logger.info("%s, %d threads: %.3f ms", name, threads, 1e3 * rows[-1]["mean"])
    return rows


def _wait_of(batches: Iterator[Batch], steps: int) -> list[float]:
    """Seconds waited for each micro batch; matrix products occupy every core in between."""
    timed = TimedIterator(batches)
    factors = np.ones((2, 512, 512), np.float32)
    waits = []
    next(timed)
    timed.seconds_per_item()
    deadline = time.perf_counter()
    for _ in range(steps):
        deadline += BATCH * SEQ_LENGTH / TOKENS_PER_SECOND
        while time.perf_counter() < deadline:
            np.matmul(*factors)
        next(timed)
        waits.append(timed.seconds_per_item())
    return waits
