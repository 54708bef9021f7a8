"""The baselines of ``python -m pypkg.bench preprocess``; each runs in a Python of its own.

``tokenizers`` is the library alone: texts are in memory, and ids are converted to lists and
discarded. ``tokenizers-inside`` leaves the ids in the library, where they are not usable.
``paddlenlp`` does the work of PaddleNLP's create_pretraining_data.py for each line of a file, with
the tokenizer and the .bin/.idx builder of the installed PaddleNLP; its wheels do not contain the
script, so that its loop is reproduced here. Each baseline prints one line of JSON at its end. The
clock starts after the imports; PaddleNLP's workers load their tokenizer after that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

_LINES_PER_TASK = 256  # as in create_pretraining_data.py
_REPEATED = re.compile(r"(.)\1{100,}")
_BATCH_CHARACTERS = 1 << 20


class _Clock:
    """Measures the time since its creation."""

    def __init__(self) -> None:
        self._seconds, self._cpu = time.perf_counter(), sum(os.times()[:4])

    def read(self) -> dict[str, float]:
        """Seconds on the clock, and processor seconds of this process and its ended children."""
        return {
            "seconds": time.perf_counter() - self._seconds,
            "cpu_seconds": sum(os.times()[:4]) - self._cpu,
        }


def time_tokenizers(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(options.tokenizer, "tokenizer.json"))
    with open(options.input, encoding="utf-8") as lines:
        batches = list(_batches(_prepared(line) for line in lines))
    clock = _Clock()
    tokens = 0
    for batch in batches:
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        if options.baseline == "tokenizers":
            tokens += sum(len(encoding.ids) for encoding in encodings)
        else:
            tokens += sum(len(encoding) for encoding in encodings)
    return {**clock.read(), "tokens": tokens, "version": tokenizers.__version__}


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _prepared(line: str) -> str:
    return _REPEATED.sub(r"\1", json.loads(line)["text"]).strip()


def time_paddlenlp(options: argparse.Namespace) -> dict[str, Any]:
    import numpy
    import paddlenlp
    from paddlenlp.data import indexed_dataset

    clock = _Clock()
    builder = indexed_dataset.make_builder(options.output + ".bin", "mmap", numpy.uint16)
    tokens = 0
    with (
        multiprocessing.Pool(options.workers, _load, (options.tokenizer,)) as pool,
        open(options.input, encoding="utf-8") as lines,
    ):
        for ids in pool.imap(_encode, lines, _LINES_PER_TASK):
            if ids:
                builder.add_item(ids)
                builder.end_document()
                tokens += len(ids)
        pool.close()
        pool.join()  # after it, the processor time of the workers counts
    builder.finalize(options.output + ".idx")
    return {**clock.read(), "tokens": tokens, "version": paddlenlp.__version__}


_tokenizer: Any  # PaddleNLP's, in each worker process


def _load(folder: str) -> None:
    global _tokenizer
    from paddlenlp.transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(folder)


def _encode(line: str) -> list[int]:
    ids = _tokenizer.convert_tokens_to_ids(_tokenizer.tokenize(_prepared(line)))
    return [*ids, _tokenizer.eos_token_id] if ids else []


_BASELINES = {
    "tokenizers": time_tokenizers,
    "tokenizers-inside": time_tokenizers,
    "paddlenlp": time_paddlenlp,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("baseline", choices=tuple(_BASELINES))
    for name in ("input", "tokenizer", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    result = _BASELINES[options.baseline](options)
    sys.stdout.flush()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
