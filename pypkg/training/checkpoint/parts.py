"""Checkpoints that are spread over machines: checks of all parts, and reading of remote files.

Without a shared output_dir, each machine holds a part of a checkpoint: files with whole tensors,
and a manifest that also lists the files of the other machines. If a rank needs a file that its
machine does not have, it reads the file from a rank of another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pypkg.errors import UserError
from pypkg.files.checksums import FileRecord
from pypkg.models.weights.formats.opening import FileElsewhere, read_elsewhere
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.parallel.comm.file_server import Address, FileServer, RemoteFile, disconnect
from pypkg.parallel.comm.places import Places
from pypkg.parallel.endpoints import own_host
from pypkg.parallel.launch.rendezvous import named
from pypkg.training.checkpoint.folders import is_marked
from pypkg.training.checkpoint.manifest import Manifest
from pypkg.training.checkpoint.verify import Report, changed_files, ordered, survey


class Parts:
    """Access to the checkpoints of a run, whose files may be spread over several ``Places``.

    Every rank creates an instance and calls each method at the same points of the run.

    Args:
        places: the ranks grouped by the output_dir that they see.

    Raises:
        UserError: a rank cannot serve its files to the other ranks.
    """

    def __init__(self, places: Places = Places()) -> None:  # noqa: B008 (it is immutable)
        self.places = places
        self._server: FileServer | None = None
        self._addresses: list[Address] = []
        if not places.is_one:
            self._addresses = places.from_leaders(self._serve)

    def wait(self) -> None:
        """Waits until all ranks have read what they need from other machines."""
        if not self.places.is_one:
            from_all_ranks(lambda: None)

    def close(self) -> None:
        """Stops the file server of this rank. A rank may call this without the others."""
        if self._server is not None:
            self._server.close()
        if not self.places.is_one:
            disconnect()
            read_elsewhere({})

    def verify(
        self, folder: Path, checks: str, on_read: Callable[[int], None] | None = None
    ) -> Report:
        """Checks a checkpoint. The ranks of a place divide its files among themselves.

        Args:
            checks: as in ``verify.verify``, or "no": only checks that every place has the folder.
            on_read: as in ``verify.verify``.

        Returns:
            The report of this rank's place, with the damage found at all places.

        Raises:
            UserError: a later version of this package has written the checkpoint.
        """
        if checks == "no":
            absent = self.places.from_leaders(lambda: is_marked(folder) or self.places.is_one)
            return Report(folder, None, tuple(self._absent(folder, absent)))
        reports = self.places.from_leaders(partial(self._survey, folder))
        share = _share(reports[self.places.index].manifest, self._ranks_here())
        changed = from_all_ranks(lambda: changed_files(folder, share, checks, on_read))
        damage: list[str] = []
        for index, report in enumerate(reports):
            ranks = self.places.ranks(index)
            problems = {name: each for rank in ranks for name, each in changed[rank].items()}
            found = [*ordered(problems), *report.damage]
            damage += found if self.places.is_one else [f"{named(ranks)}: {f}" for f in found]
        if not damage:
            damage += _lacks([report.manifest for report in reports])
        return replace(reports[self.places.index], damage=tuple(damage))

    def check_whole(self, folder: Path, checks: str) -> None:
        """Checks a checkpoint before the run rolls back to it.

        Args:
            checks: as in ``verify``.

        Raises:
            UserError: the checkpoint is damaged.
        """
        if damage := self.verify(folder, checks).damage:
            raise UserError(
                f"the run has to go back to {folder}, which is damaged: {'; '.join(damage)}. Start "
                "the same command again: it resumes from the newest undamaged checkpoint."
            )

    def open(self, folder: Path) -> None:
        """Makes the files of ``folder`` readable that this rank's place does not have.

        They can be read by their local path until the next call.
        """
        if self.places.is_one:
            return
        offered = self.places.from_leaders(lambda: (str(folder), self._offer(folder)))
        here = offered[self.places.index][1]
        elsewhere: dict[Path, FileElsewhere] = {}
        for address, (path, sizes) in zip(self._addresses, offered, strict=True):
            for name, size in sizes.items():
                if name not in here:
                    opener = partial(RemoteFile, address, str(Path(path, name)))
                    elsewhere.setdefault(folder / name, FileElsewhere(size, opener))
        disconnect()  # the servers may have closed idle connections of the last call
        read_elsewhere(elsewhere)

    def _serve(self) -> Address:
        host = own_host()
        try:
            self._server = FileServer(host)
        except OSError as error:
            raise UserError(
                f"allow_local_output: rank {mesh.current().rank} cannot serve files at {host}: "
                f"{error.strerror}. Give each machine its own address with --host."
            ) from error
        return self._server.address

    def _offer(self, folder: Path) -> dict[str, int]:
        assert self._server is not None  # leaders have one if there are several places
        return self._server.offer(folder)

    def _ranks_here(self) -> list[int]:
        return self.places.ranks(self.places.index)

    def _survey(self, folder: Path) -> Report:
        if not self.places.is_one and not is_marked(folder):
            return Report(folder, None, (f"there is no {folder.name}",))
        return survey(folder)

    def _absent(self, folder: Path, is_there: Sequence[bool]) -> Iterator[str]:
        for index, found in enumerate(is_there):
            if not found:
                yield f"{named(self.places.ranks(index))}: there is no {folder.name}"


def _share(manifest: Manifest | None, ranks: Sequence[int]) -> dict[str, FileRecord]:
    """The files that this rank checks. Each of ``ranks`` checks about the same number of bytes."""
    if manifest is None:
        return {}
    shares: dict[int, dict[str, FileRecord]] = {rank: {} for rank in ranks}
    loads = dict.fromkeys(ranks, 0)
    for name, record in sorted(manifest.files.items(), key=lambda each: (-each[1].size, each[0])):
        rank = min(ranks, key=lambda each: (loads[each], each))
        shares[rank][name] = record
        loads[rank] += record.size
    return shares[mesh.current().rank]


def _lacks(manifests: Sequence[Manifest | None]) -> list[str]:
    """The damage of files that no place has, although manifests list them."""
    found = [each for each in manifests if each is not None]
    if len({(m.step, m.consumed_samples, m.consumed_tokens, m.model) for m in found}) > 1:
        return ["the machines hold checkpoints of different steps or models under this name"]
    held = {name: record for each in found for name, record in each.files.items()}
    lost: dict[str, list[str]] = {}
    for manifest in found:
        for writers, files in manifest.elsewhere.items():
            names = [name for name, record in files.items() if held.get(name) != record]
            if names:
                lost[writers] = names
    return [_lost_files(names, writers) for writers, names in lost.items()]


def _lost_files(names: Sequence[str], writers: str) -> str:
    others = f" and {len(names) - 1} other files" if len(names) > 1 else ""
    return (
        f"{names[0]}{others} of this save, which {writers} wrote, {'are' if others else 'is'} on "
        "no machine of the run (with allow_local_output each machine reads its own part; `pypkg "
        "checkpoint merge` joins parts)"
    )
