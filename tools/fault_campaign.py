"""Which damage of checkpoints and corpora is noticed, and what kills leave: docs/reliability.md.

    python tools/fault_campaign.py                             # all, tables on standard output
    python tools/fault_campaign.py --only flips --count 100    # one of them, with fewer faults
    python tools/fault_campaign.py --update                    # tables into docs/reliability.md

The campaigns work on a small run of this package, which is made in a temporary folder:

- ``flips``: one bit of a file, at a random place, is the opposite.
- ``truncations``: a file ends at a random place.
- ``zeros``: up to 4096 bytes from a random place on are zeros.
- ``swaps``: the bytes between two random places are those of the same file of an older checkpoint,
  or of another corpus.
- ``kills``: a run that saves at every step is killed at a random time. Then every folder with the
  name of a checkpoint has to be whole, and none older than the newest one seen before may be the
  newest now. In the end a run goes on, and its weights have to be those of a run that was never
  killed, bit for bit.

A change that leaves a file as it was is no fault and is drawn again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from pypkg.data import IndexedDatasetWriter  # noqa: E402
from pypkg.data.corpus.manifest import MANIFEST_SUFFIX, changed_files  # noqa: E402
from pypkg.data.corpus.validate import validate  # noqa: E402
from pypkg.files import write_file  # noqa: E402
from pypkg.markdown import table  # noqa: E402
from pypkg.training.checkpoint.folders import checkpoints  # noqa: E402
from pypkg.training.checkpoint.manifest import MANIFEST_FILE, listed_files  # noqa: E402
from pypkg.training.checkpoint.verify import verify  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
FAULTS, KILLS = 1000, 40  # of each kind of file, and of a run
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
    """Files that belong together, the same of another time, and what looks for damage.

    Attributes:
        files: by the name that the table gives them.
        others: of the same names.
        checks: by the title of their column; each tells whether something is wrong.
    """

    files: dict[str, Path]
    others: dict[str, Path]
    checks: dict[str, Callable[[], bool]]


def count_noticed(
    place: Place, damage: Damage, count: int, rng: random.Random
) -> dict[str, dict[str, int]]:
    """For each file and each check, how many of ``count`` faults were noticed.

    Files that are the same in both places have no swaps, and are left out.
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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output_dir = folder / "out"
        make_corpus(folder / "data" / "corpus", seed=0)
        text = folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
        self._call(
            "preprocess", "--input_path", text, "--train_tokenizer", _VOCAB_SIZE,
            "--tokenizer_name_or_path", folder / "tokenizer", "--output_prefix", folder / "t",
        )  # fmt: skip
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(_MODEL))

    def command(self, output_dir: Path, **settings: object) -> list[str]:
        given = {
            "model_name_or_path": self.folder / "model", "output_dir": output_dir,
            "tokenizer_name_or_path": self.folder / "tokenizer",
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

    def start(self, output_dir: Path, **settings: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(output_dir, **settings), env=_environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

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


def checkpoint_place(checkpoint: Path, older: Path) -> Place:
    """A checkpoint, with and without its manifest."""
    names = [*listed_files(checkpoint), MANIFEST_FILE]
    bare = checkpoint.parent / "bare" / checkpoint.name
    for name in names[:-1]:
        _link(bare / name, checkpoint / name)
    return Place(
        {name: checkpoint / name for name in names},
        {name: older / name for name in names},
        {
            "checksums": lambda: bool(verify(checkpoint).damage),
            "sizes": lambda: bool(verify(checkpoint, "sizes").damage),
            "no manifest": lambda: bool(verify(bare).damage),
        },
    )


def corpus_place(folder: Path) -> Place:
    """A corpus; without its manifest only what validate finds in the numbers is noticed."""
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
    """Rows of the table of a campaign, one for each file."""
    rows = []
    for place in places:
        for file, noticed in count_noticed(
            place, CAMPAIGNS[name], count, random.Random(f"{name} {seed}")
        ).items():
            if file.endswith(MANIFEST_FILE):
                del noticed["no manifest"]  # where there is none, it has no damage
            cells = [str(noticed.get(title, "")) for title in ("checksums", "sizes", "no manifest")]
            rows.append([name, file, str(count), *cells])
    return rows


@dataclass
class Kills:
    """What was found after kills.

    Attributes:
        damaged: kills after which a folder with the name of a checkpoint was not whole.
        lost: kills after which the newest checkpoint was older than one seen before.
        while_saving: kills that left an unfinished save.
        is_equal: whether the last run had the weights of one that was never killed.
    """

    kills: int = 0
    damaged: int = 0
    lost: int = 0
    while_saving: int = 0
    is_equal: bool = False


def kill_runs(run: Run, count: int, rng: random.Random) -> Kills:
    """Kills a run ``count`` times; it goes on from what the kill before has left."""
    result = Kills()
    settings = {"save_steps": 1, "save_total_limit": 2}
    newest = 0
    for _ in range(count):
        process = run.start(run.output_dir, max_steps=10_000, **settings)
        if rng.random() < 0.8:  # while it trains and saves, else while it starts
            _wait_for_step(run, process, newest + 1)
            newest += 1
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        found = checkpoints(run.output_dir)
        last = found[-1][0] if found else 0
        result.kills += 1
        result.damaged += any(verify(folder).damage for _, folder in found)
        result.lost += last < newest
        result.while_saving += any(run.output_dir.glob("tmp-checkpoint-*"))
        newest = last
    whole = run.folder / "whole"
    steps = newest + 1
    run.finish(run.output_dir, max_steps=steps, **settings)
    run.finish(whole, max_steps=steps, save_steps=steps)
    weights = [
        (folder / f"checkpoint-{steps}" / "model.safetensors").read_bytes()
        for folder in (run.output_dir, whole)
    ]
    result.is_equal = weights[0] == weights[1]
    return result


def _wait_for_step(run: Run, process: subprocess.Popen[bytes], step: int) -> None:
    while not any(found >= step for found, _ in checkpoints(run.output_dir)):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with exit code {process.returncode}")
        time.sleep(0.002)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Damages checkpoints and corpora, and kills runs; tells what is noticed."
    )
    everything = [*CAMPAIGNS, "kills"]
    parser.add_argument("--only", nargs="+", choices=everything, default=everything)
    parser.add_argument("--count", type=int, help=f"faults of a file ({FAULTS}), kills ({KILLS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", action="store_true", help=f"writes the tables to {PAGE.name}")
    options = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8") if options.update else ""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        for name, lines in _tables(run, options.only, options.count, options.seed).items():
            print("\n".join(lines))
            text = _put(text, name, lines)
    if options.update:
        write_file(PAGE, text.encode())
    return 0


def _tables(
    run: Run, campaigns: Sequence[str], count: int | None, seed: int
) -> dict[str, list[str]]:
    """Lines of the tables by their name in the page."""
    tables = {}
    rows: list[list[str]] = []
    names = [name for name in campaigns if name in CAMPAIGNS]
    if names:
        run.finish(run.folder / "damaged", max_steps=8, save_steps=4)
        older, newer = (folder for _, folder in checkpoints(run.folder / "damaged"))
        places = [checkpoint_place(newer, older), corpus_place(run.folder / "corpora")]
        for name in names:
            rows += damage_rows(places, name, count or FAULTS, seed)
        head = ("campaign", "file", "faults", "checksums", "sizes", "no manifest")
        tables["damage"] = table(head, rows, text_columns=2)
    if "kills" in campaigns:
        found = kill_runs(run, count or KILLS, random.Random(seed))
        head = ("kills", "left an unfinished save", "damaged checkpoint", "lost checkpoint", "end")
        end = "weights as without kills" if found.is_equal else "other weights"
        row = [found.kills, found.while_saving, found.damaged, found.lost, end]
        tables["kills"] = table(head, [[str(cell) for cell in row]])
    return tables


def _put(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with the lines between the marks of ``name``."""
    pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
    return re.sub(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
