"""Checks of what a run reads and writes: corpora, tokenizer, output_dir, speed of the disk."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from pypkg.config import Settings
from pypkg.data import IndexedDataset
from pypkg.data.datasets.build import resolve_input_dir
from pypkg.errors import UserError
from pypkg.models import ModelConfig
from pypkg.parallel import endpoints, mesh
from pypkg.parallel.comm.collective import from_all_ranks, from_first_rank
from pypkg.training.checkpoint.lock import refuse_if_in_use
from pypkg.training.doctor.facts import nearest_folder
from pypkg.training.doctor.findings import Finding, Severity, counted, finding_of
from pypkg.training.doctor.machine import Needs
from pypkg.training.feed.same_data import check_same_data
from pypkg.training.start.output_dir import find_places, require_on_all_ranks
from pypkg.training.start.sources import grown_vocab_size, tokenizer_of
from pypkg.training.start.verify_data import verify_corpora

_PROBE_BYTES = 256 * 2**20
_BLOCK = b"\x5a" * (8 * 2**20)
_LONG = 600.0  # seconds for one checkpoint above which the disk is reported as slow


def input_findings(settings: Settings, config: ModelConfig, needs: Needs) -> list[Finding]:
    """Findings about corpora, tokenizer, output_dir and its disk. Every rank must call this."""
    found = [finding_of("data", lambda: _data(settings))]
    if not found[0].severity:
        found.append(finding_of("checksums", lambda: _checksums(settings)))
    found.append(_tokenizer(settings, config))
    if settings.saves and settings.do_train:
        found.append(finding_of("output_dir", lambda: _output_dir(settings)))
        if not found[-1].severity:
            found += _disk_rate(Path(settings.output_dir), needs)
    return found


def _data(settings: Settings) -> str:
    """Opens every corpus on every rank and compares the corpora of the ranks.

    Raises:
        UserError: a corpus cannot be read, or differs between machines.
    """
    corpora: list[IndexedDataset] = []

    def open_all() -> None:
        corpora.extend(IndexedDataset(prefix) for prefix in _prefixes(settings))

    from_all_ranks(open_all)
    check_same_data(corpora)
    tokens = sum(each.num_tokens for each in corpora)
    same = ", the same on all ranks" if mesh.current().world_size > 1 else ""
    return f"{counted(len(corpora), 'corpus', 'corpora')} with {tokens:,} tokens{same}"


def _prefixes(settings: Settings) -> list[str]:
    weighted = settings.blend_by == "weights"
    parts = resolve_input_dir(settings.input_dir, weighted=weighted)
    return parts if len(parts) == 1 else parts[1::2]


def _checksums(settings: Settings) -> str:
    """Verifies the checksums of all corpora on the first rank of each machine."""
    hosts = endpoints.hosts()
    is_first_here = not hosts or hosts.index(endpoints.own_host()) == mesh.current().rank
    from_all_ranks(lambda: verify_corpora(settings) if is_first_here else None)
    where = f", on {counted(len(set(hosts)), 'machine')}" if len(set(hosts)) > 1 else ""
    return f"no corpus differs from its manifest{where}"


def _tokenizer(settings: Settings, config: ModelConfig) -> Finding:
    check = "tokenizer"
    try:
        tokenizer = tokenizer_of(settings)
    except UserError as error:
        return Finding(Severity.ERROR, check, str(error))
    if tokenizer is None:
        return Finding(Severity.OK, check, "there is none beside the model")
    size, vocabulary = tokenizer.vocab_size, config.vocab_size
    if size > vocabulary and settings.continue_training:
        return Finding(
            Severity.ERROR, check,
            f"it has {size:,} entries, and the weights of the model {vocabulary:,}",
            remedy="Enlarge the vocabulary with pypkg convert, or take the model's own tokenizer",
        )  # fmt: skip
    if size > vocabulary:
        return Finding(
            Severity.WARNING, check,
            f"it has {size:,} entries, so vocab_size is raised from {vocabulary:,} to "
            f"{grown_vocab_size(tokenizer):,}",
            remedy="Set vocab_size in config.json to keep the sizes that were planned",
        )  # fmt: skip
    return Finding(Severity.OK, check, f"{size:,} entries, vocab_size {vocabulary:,}")


def _output_dir(settings: Settings) -> str:
    """Checks that all ranks can write output_dir, or the nearest folder above it that exists.

    Raises:
        UserError: another run writes there, a rank may not write, or a rank sees another folder.
    """
    folder = Path(settings.output_dir)
    from_first_rank(lambda: refuse_if_in_use(folder))
    existing = from_first_rank(lambda: nearest_folder(folder))
    require_on_all_ranks(lambda: _require_writable(existing))
    if mesh.current().world_size == 1:
        return f"{existing} can be written"
    places = find_places(existing, settings.allow_local_output)
    folders = counted(len(places.leaders), "folder")
    return f"{existing} can be written; {folders} for all ranks"


def _require_writable(folder: Path) -> None:
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir cannot be made in {folder}, which this process may not write. Set "
            "output_dir to a folder you may write."
        )


def _disk_rate(output_dir: Path, needs: Needs) -> Iterator[Finding]:
    """Measures the write rate of rank 0. Ranks that write at the same time share this rate.

    No more is written than a checkpoint has, so that a small disk takes it if it takes the run.
    """
    size = min(_PROBE_BYTES, needs.checkpoint or _PROBE_BYTES)
    try:
        rate = from_first_rank(lambda: write_rate(nearest_folder(output_dir), size))
    except UserError as error:
        yield Finding(Severity.ERROR, "disk rate", str(error))
        return
    seconds = needs.checkpoint / rate
    text = f"{rate / 1e9:.2g} GB/s, so a checkpoint takes {seconds:.2g} s if one rank writes it"
    if seconds > _LONG:
        yield Finding(
            Severity.WARNING, "disk rate", text,
            remedy="Use a faster disk, or use_async_save, which trains on while it writes",
        )  # fmt: skip
    else:
        yield Finding(Severity.OK, "disk rate", text)


def write_rate(folder: Path, size: int) -> float:
    """Write rate in bytes per second, with fsync, of a temporary file of ``size`` bytes.

    Raises:
        UserError: the file cannot be written.
    """
    probe = folder / f".write-test-{secrets.token_hex(8)}"
    started = time.perf_counter()
    try:
        with probe.open("wb") as file:
            for start in range(0, size, len(_BLOCK)):
                file.write(_BLOCK[: size - start])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{folder} takes no file of {size / 1e6:.0f} MB: {error.strerror}. Free some space, or "
            "set output_dir to another folder."
        ) from error
    finally:
        probe.unlink(missing_ok=True)
    return size / (time.perf_counter() - started)
