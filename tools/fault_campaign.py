"""Measures which damage of checkpoints, corpora and ledgers is noticed (docs/reliability.md).

    python tools/fault_campaign.py                             # all, the table on standard output
    python tools/fault_campaign.py --only flips --count 100    # one of them, with fewer faults
    python tools/fault_campaign.py --update                    # the table into docs/reliability.md
    python tools/fault_campaign.py --json FILE --only flips    # keeps rows in FILE, goes on from it

The campaigns work on small runs of this package, which are made in a temporary folder:

- ``flips``: one random bit of a file is flipped.
- ``truncations``: a file is cut off at a random offset.
- ``zeros``: up to 4096 bytes from a random offset on are zeros.
- ``swaps``: the bytes between two random offsets are replaced by those of the same file of an older
  checkpoint, of another corpus or of another run.

A change that leaves a file as it was is drawn again. ``kill_campaign.py`` covers kills and full
disks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from pypkg.console.markdown import table  # noqa: E402
from pypkg.data import IndexedDatasetWriter  # noqa: E402
from pypkg.data.corpus.manifest import MANIFEST_SUFFIX, changed_files  # noqa: E402
from pypkg.data.corpus.validate import validate  # noqa: E402
from pypkg.data.index.cache_files import read_set, set_name, write_set  # noqa: E402
from pypkg.errors import UserError  # noqa: E402
from pypkg.files import write_file  # noqa: E402
from pypkg.training.checkpoint.folders import STATE_FILE, checkpoints  # noqa: E402
from pypkg.training.checkpoint.manifest import (  # noqa: E402
    MANIFEST_FILE,
    MANIFEST_KEY,
    listed_files,
)
from pypkg.training.checkpoint.verify import verify  # noqa: E402
from pypkg.training.ledger import LEDGER_FILE, events, record  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
FAULTS = 1000  # of each kind of file
_VOCAB_SIZE = 300
_BLOCK = 4096
_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": _VOCAB_SIZE,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16,
}  # fmt: skip

Damage = Callable[[bytes, bytes, random.Random], bytes]  # of a file, given the same of another one


def flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zero(data: bytes, other: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    end = min(first + rng.randint(1, _BLOCK), len(data))
    return data[:first] + bytes(end - first) + data[end:]


def swap(data: bytes, other: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return other
    first, end = sorted(rng.randint(0, max(len(data), len(other))) for _ in range(2))
    return data[:first] + other[first:end] + data[end:]


CAMPAIGNS: dict[str, Damage] = {
    "flips": flip,
    "truncations": truncate,
    "zeros": zero,
    "swaps": swap,
}


@dataclass
class Place:
    """Files to damage, files to swap with, and the checks that should notice.

    Attributes:
        files: by name in the table.
        others: the corresponding files of another run or time, by the same names.
        checks: by title of the column; each returns whether it found damage.
    """

    files: dict[str, Path]
    others: dict[str, Path]
    checks: dict[str, Callable[[], bool]]


def count_noticed(
    place: Place, damage: Damage, count: int, rng: random.Random
) -> dict[str, dict[str, int]]:
    """For each file and each check, how many of ``count`` faults were noticed.

    Swaps of two equal files are left out.
    """
    noticed: dict[str, dict[str, int]] = {}
    for name, file in place.files.items():
        before, other = file.read_bytes(), place.others[name].read_bytes()
        if damage is swap and before == other:
            continue
        noticed[name] = dict.fromkeys(place.checks, 0)
        for _ in range(count):
            while (data := damage(before, other, rng)) == before:
                pass
            file.write_bytes(data)
            for title, is_noticed in place.checks.items():
                noticed[name][title] += is_noticed()
        file.write_bytes(before)
    return noticed


def make_corpus(prefix: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16, loss_mask=True) as writer:
        for _ in range(200):
            tokens = random.integers(0, _VOCAB_SIZE, random.integers(20, 80))
            writer.add_tokens(tokens, (tokens > 9).astype(np.uint8))
            writer.add_sizes(np.array([tokens.size], np.int32), np.ones(1, np.int64))
        writer.commit()


class Run:
    """A run of ``pypkg pretrain`` with a small model in a folder."""

    def __init__(self, folder: Path, has_tokenizer: bool = True) -> None:
        self.folder = folder
        make_corpus(folder / "data" / "corpus", seed=0)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(_MODEL))
        self._tokenizer = folder / ("tokenizer" if has_tokenizer else "model")
        if has_tokenizer:
            self._make_tokenizer(folder)

    def _make_tokenizer(self, folder: Path) -> None:
        text = folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
        self._call(
            "preprocess", "--input_path", text, "--train_tokenizer", _VOCAB_SIZE,
            "--tokenizer_name_or_path", self._tokenizer, "--output_prefix", folder / "t",
        )  # fmt: skip

    def command(self, output_dir: Path, **settings: object) -> list[str]:
        given = {
            "model_name_or_path": self.folder / "model", "output_dir": output_dir,
            "tokenizer_name_or_path": self._tokenizer,
            "input_dir": self.folder / "data", "split": "1,0,0", "max_seq_length": 16,
            "per_device_train_batch_size": 2, "do_train": True, "num_threads": 1,
            "decay_steps": 10_000, "sample_order": "epoch", "learning_rate": 0.01,
            "logging_steps": 1,
        } | settings  # fmt: skip
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        return [sys.executable, "-m", "pypkg", "pretrain", *words]

    def finish(self, output_dir: Path, **settings: object) -> None:
        subprocess.run(
            self.command(output_dir, **settings),
            check=True,
            capture_output=True,
            env=_environment(),
        )

    def _call(self, *words: object) -> None:
        subprocess.run(
            [sys.executable, "-m", "pypkg", *map(str, words)],
            check=True, capture_output=True, env=_environment(),
        )  # fmt: skip


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _link(link: Path, file: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(file)


def checkpoint_place(checkpoint: Path, older: Path, names: Sequence[str]) -> Place:
    """Files of a checkpoint."""
    return Place(
        {name: checkpoint / name for name in names},
        {name: older / name for name in names},
        {
            "checksums": lambda: bool(verify(checkpoint).damage),
            "sizes": lambda: bool(verify(checkpoint, "sizes").damage),
        },
    )


def earlier_place(checkpoint: Path, older: Path, names: Sequence[str]) -> Place:
    """Files of a checkpoint of an earlier version, which had no manifest."""
    folder = checkpoint.parent / "earlier"
    copies = [Path(shutil.copytree(each, folder / each.name)) for each in (older, checkpoint)]
    for copy in copies:
        (copy / MANIFEST_FILE).unlink()
        state = json.loads((copy / STATE_FILE).read_bytes())
        del state[MANIFEST_KEY]
        (copy / STATE_FILE).write_text(json.dumps(state, indent=2))
    return Place(
        {name: copies[1] / name for name in names},
        {name: copies[0] / name for name in names},
        {"no manifest": lambda: bool(verify(copies[1]).damage)},
    )


def ledger_place(folder: Path, other: Path) -> Place:
    """The ledger of a run with a rollback, a restart and a resume, and one with other steps."""
    for output_dir, step in ((folder, 70), (other, 91)):
        record(output_dir, "rollback", step=step, samples=[100, 200], steps=[step - 1, step])
        record(output_dir, "restart", step=step + 9, exit_code=137, fruitless=0, host="a")
        record(output_dir, "resumed", step=step + 10, checkpoint=f"checkpoint-{step + 10}")
    return Place(
        {LEDGER_FILE: folder / LEDGER_FILE},
        {LEDGER_FILE: other / LEDGER_FILE},
        {"checksums": lambda: _is_noticed(lambda: events(folder))},
    )


def index_place(folder: Path) -> Place:
    """Index maps of two corpora, stored as a run stores them beside its data."""
    layout = {"document_index": ((500,), np.dtype(np.int32))}
    name = set_name({"content": "index maps"})
    for seed, each in enumerate((folder, folder / "other")):
        each.mkdir(parents=True)
        values = np.random.default_rng(seed).permutation(500).astype(np.int32)
        write_set(each, name, {"content": "index maps"}, {"document_index": values})
    files = {path.suffix: path for path in sorted(folder.glob(f"{name}*"))}
    return Place(
        {f"index map {suffix}": path for suffix, path in files.items()},
        {f"index map {suffix}": folder / "other" / path.name for suffix, path in files.items()},
        {"checksums": lambda: _is_noticed(lambda: read_set(folder, name, layout))},
    )


def _is_noticed(read: Callable[[], object]) -> bool:
    """Whether reading raises a UserError or logs a warning."""
    warnings: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = warnings.append  # type: ignore[method-assign]
    logger = logging.getLogger("pypkg")
    logger.propagate = False  # thousands of warnings
    logger.addHandler(handler)
    try:
        read()
    except UserError:
        return True
    finally:
        logger.removeHandler(handler)
    return bool(warnings)


def corpus_place(folder: Path) -> Place:
    """A corpus, checked with its manifest, and without it by ``validate`` only."""
    prefixes = [folder / name for name in ("corpus", "other", "bare")]
    make_corpus(prefixes[0], seed=0)
    make_corpus(prefixes[1], seed=1)
    suffixes = (".bin", ".idx", ".lsm", MANIFEST_SUFFIX)
    corpus, _, bare = map(str, prefixes)

    for suffix in suffixes[:-1]:
        _link(Path(bare + suffix), Path(corpus + suffix))
    return Place(
        {f"corpus{suffix}": Path(f"{prefixes[0]}{suffix}") for suffix in suffixes},
        {f"corpus{suffix}": Path(f"{prefixes[1]}{suffix}") for suffix in suffixes},
        {
            "checksums": lambda: bool(changed_files(corpus)),
            "no manifest": lambda: bool(validate(bare, _VOCAB_SIZE)),
        },
    )


def damage_rows(places: Sequence[Place], name: str, count: int, seed: int) -> list[list[str]]:
    """Rows of the table of a campaign, one for each file; a file may be in several places."""
    found: dict[str, dict[str, int]] = {}
    for place in places:
        rng = random.Random(f"{name} {seed}")
        for file, noticed in count_noticed(place, CAMPAIGNS[name], count, rng).items():
            if file.endswith(MANIFEST_SUFFIX):
                noticed.pop("no manifest", None)  # where there is none, it has no damage
            found.setdefault(file, {}).update(noticed)
    return [
        [name, file, str(count), *(str(noticed.get(title, "")) for title in _CHECKS)]
        for file, noticed in found.items()
    ]


_CHECKS = ("checksums", "sizes", "no manifest")


def make_places(run: Run) -> list[Place]:
    """All files to damage, of a run of one process and of a run of two ranks."""
    places = []
    for name, settings in (("one", {}), ("two", {"nproc": 2, "sharding": "stage2"})):
        run.finish(run.folder / name, max_steps=8, save_steps=4, **settings)
        older, newer = (folder for _, folder in checkpoints(run.folder / name))
        names = [*listed_files(newer), MANIFEST_FILE]
        if name == "two":  # the other files are the same as with one process
            names = [each for each in names if "-of-" in each or "index" in each]
        places.append(checkpoint_place(newer, older, names))
        if name == "one":
            places.append(earlier_place(newer, older, names[:-1]))
    places.append(corpus_place(run.folder / "corpora"))
    places.append(ledger_place(run.folder / "ledger", run.folder / "other ledger"))
    places.append(index_place(run.folder / "index"))
    return places


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Damages checkpoints, corpora and ledgers; tells what is noticed."
    )
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument("--count", type=int, default=FAULTS, help=f"faults of a file ({FAULTS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results; those in it are kept")
    parser.add_argument("--update", action="store_true", help=f"writes the table to {PAGE.name}")
    options = parser.parse_args(arguments)
    results: dict[str, list[list[str]]] = {}
    if options.json is not None and options.json.exists():
        results = json.loads(options.json.read_text())
    if missing := [name for name in options.only if name not in results]:
        with tempfile.TemporaryDirectory() as folder:
            places = make_places(Run(Path(folder)))
            for name in missing:
                results[name] = damage_rows(places, name, options.count, options.seed)
                if options.json is not None:
                    write_file(options.json, json.dumps(results, indent=1).encode())
    rows = [row for name in CAMPAIGNS for row in results.get(name, ())]
    lines = table(("campaign", "file", "faults", *_CHECKS), rows, text_columns=2)
    print("\n".join(lines))
    if options.update:
        write_file(PAGE, put_table(PAGE.read_text(encoding="utf-8"), "damage", lines).encode())
    return 0


def put_table(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with the lines between the marks of ``name``."""
    pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
    return re.sub(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
