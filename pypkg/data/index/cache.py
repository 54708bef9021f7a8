"""A cache of index maps on disk, so that one process builds them for all processes.

The folder is ``index-cache/`` beside the data, or the setting ``data_cache``. The name of a set of
maps is a hash of the settings and a fingerprint of the data, so that maps for other data or
settings are never used. If no folder is writable, every process builds the maps in memory.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.index.cache_files import (
    Arrays,
    Layout,
    read_set,
    remove_abandoned,
    set_name,
    write_set,
)
from pypkg.data.index.lock import LOCK_FILE, Wait, try_lock
from pypkg.data.index.maps import IndexMaps, IndexPlan, build_index_maps
from pypkg.data.index.paddlenlp import paddlenlp_description, read_paddlenlp_maps
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

FOLDER = "index-cache"
TIME_LIMIT = 1800.0  # seconds that a process waits for another one that builds
# If the process that should build has not begun after this many seconds, any process builds. It
# may still be starting, have died, or have failed; in the last case the others get the same error.
_HEAD_START = 5.0
_VERSION = 1  # of the contents of the maps; a change of the contents needs a new number


class IndexCache:
    """The folders from which sets of arrays are read, and to which they are written.

    Args:
        data_cache: a folder that is read after the one beside the data, and written instead of it;
            None: only the folder beside the data.
        share_folder: whether all machines see the same folders. If so, rank 0 of the run builds;
            otherwise local rank 0 of each machine.
        time_limit: seconds to wait for another process.
        rank: rank of this process in the run.
        local_rank: local rank of this process on its machine.
    """

    def __init__(
        self,
        data_cache: str | os.PathLike[str] | None = None,
        share_folder: bool = False,
        time_limit: float = TIME_LIMIT,
        *,
        rank: int = 0,
        local_rank: int = 0,
    ) -> None:
        self._data_cache = Path(data_cache) if data_cache else None
        self._time_limit = time_limit
        self._goes_first = (rank if share_folder else local_rank) == 0
        self._fingerprints: dict[tuple[str, int, int], str] = {}
        self._tidied: set[Path] = set()  # folders without files of processes that have died

    def index_maps(
        self,
        corpus: IndexedDataset,
        plan: IndexPlan,
        *,
        name: str,
        num_samples: int,
        splits_string: str,
    ) -> IndexMaps:
        """The index maps of a plan, read from the cache or built.

        Args:
            name, num_samples, splits_string: arguments of the dataset, from which PaddleNLP derives
                its file names.

        Raises:
            UserError: data_cache cannot be written to, or another process builds for too long.
        """
        folders = self._folders(corpus.prefix)
        text = paddlenlp_description(corpus.prefix, name, num_samples, plan, splits_string)
        for folder in folders:
            maps = read_paddlenlp_maps(folder, text, corpus.sizes, plan)
            if maps is not None:
                return maps
        description = {
            "content": "index maps",
            "version": _VERSION,
            "sizes": self._fingerprint(corpus, plan.first, plan.end),
            **asdict(plan),
        }
        layout = plan.layout()
        arrays = self._arrays(
            f"the index maps of {corpus.prefix}",
            folders,
            description,
            layout,
            lambda: dict(zip(layout, build_index_maps(corpus.sizes, plan).arrays())),
        )
        return IndexMaps(*(arrays[key] for key in layout))

    def blending_indices(
        self, weights: np.ndarray, size: int, build: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The indices of a blend, read from ``data_cache`` or built.

        The folder beside the data is not used, because the members of a blend may have different
        folders.

        Args:
            weights: float64 [members].
            size: number of samples of the blend.
            build: computes the two arrays of :class:`BlendedDataset`.
        """
        if self._data_cache is None:
            return build()
        layout: Layout = {
            "index": ((size,), np.dtype(np.int16)),
            "sample_index": ((size,), np.dtype(np.int64)),
        }
        description = {
            "content": "blend",
            "version": _VERSION,
            "weights": weights.tolist(),
            "size": size,
        }
        found = self._arrays(
            "the indices of the blend",
            [self._data_cache],
            description,
            layout,
            lambda: dict(zip(layout, build())),
        )
        return found["index"], found["sample_index"]

    def _arrays(
        self,
        what: str,
        folders: Sequence[Path],
        description: Mapping[str, Any],
        layout: Layout,
        build: Callable[[], Arrays],
    ) -> Arrays:
        """The set with ``description``: read from one of ``folders``, or built and written to the
        last one."""
        name = set_name(description)
        for folder in folders:
            found = read_set(folder, name, layout)
            if found is not None:
                return found
        job = _Job(what, folders[-1], name, description, layout, build)
        problem = _obstacle(job)
        if problem is not None:
            self._cannot_keep(job, problem)
            return build()
        wait = Wait(what, job.folder, self._time_limit)
        while True:
            found = self._build(job) if self._may_build(wait) else job.read()
            if found is not None:
                return found
            wait.pause()

    def _may_build(self, wait: Wait) -> bool:
        return self._goes_first or wait.seconds > _HEAD_START

    def _build(self, job: _Job) -> Arrays | None:
        """The set, read if it exists by now, else built; None while another process builds it."""
        with try_lock(job.folder) as mine:
            found = job.read()
            if found is not None or not mine:
                return found
            if job.folder not in self._tidied:
                self._tidied.add(job.folder)
                remove_abandoned(job.folder)
            built = job.build()
            try:
                write_set(job.folder, job.name, job.description, built)
            except UserError as error:
                self._cannot_keep(job, str(error))
                return built
        return job.read() or built

    def _cannot_keep(self, job: _Job, problem: str) -> None:
        if job.folder == self._data_cache:
            raise UserError(
                f"data_cache cannot keep {job.what}: {problem}. Make room, name another folder, "
                "or leave data_cache out"
            )
        logger.warning(
            "%s are not kept on disk but in the memory of each process: %s. The setting "
            "data_cache names another folder for them",
            job.what,
            problem,
        )

    def _folders(self, prefix: str) -> list[Path]:
        beside = Path(os.path.dirname(prefix)) / FOLDER
        return [beside] if self._data_cache is None else [beside, self._data_cache]

    def _fingerprint(self, corpus: IndexedDataset, first: int, end: int) -> str:
        """A hash of the sizes of the sequences. Maps depend on nothing else in a corpus."""
        key = (corpus.prefix, first, end)
        if key not in self._fingerprints:
            self._fingerprints[key] = hashlib.sha256(corpus.sizes[first:end].data).hexdigest()
        return self._fingerprints[key]


@dataclass(frozen=True)
class _Job:
    """A set of arrays to build and to write to a folder."""

    what: str
    folder: Path
    name: str
    description: Mapping[str, Any]
    layout: Layout
    build: Callable[[], Arrays]

    def read(self) -> Arrays | None:
        return read_set(self.folder, self.name, self.layout)


def _obstacle(job: _Job) -> str | None:
    """The reason why the set cannot be written to the folder; None if there is none.

    The folder is created if it is missing.
    """
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in job.layout.values())
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / LOCK_FILE).open("a").close()
        free = shutil.disk_usage(job.folder).free
    except OSError as error:
        return f"{job.folder} cannot be written to ({error.strerror})"
    if not os.access(job.folder, os.W_OK | os.X_OK):
        return f"{job.folder} cannot be written to"
    if free < needed:
        return f"{job.folder} has {free / 2**20:.0f} MiB free of the {needed / 2**20:.0f} needed"
    return None
