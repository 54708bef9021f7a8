"""What has been tokenized of a corpus: a file pair per unit, kept until all units are there."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.data.corpus.files import MAX_SEQUENCE_TOKENS
from pypkg.data.corpus.mapping import map_file
from pypkg.data.preprocess.filters import DIGEST_BYTES
from pypkg.errors import UserError
from pypkg.files import OutputFile, write_file

logger = logging.getLogger("pypkg")

_STAMP = "fingerprint"
_OWN_NAMES = re.compile(r"(fingerprint|\d{6}\.(bin|npz))(\.tmp)?")


@dataclass
class FileShard:
    """The documents of one unit.

    Attributes:
        tokens: [tokens] of all documents, in file order.
        sizes: int32 [sequences].
        sequences: int32 [documents], number of sequences in each.
        text_bytes: int64 [documents], of UTF-8.
        digests: uint8 [documents, 16], or [documents, 0] where nobody asked for them.
        dropped: documents left out, by reason.
        mended: documents in which what is not UTF-8 was replaced.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    sequences: np.ndarray
    text_bytes: np.ndarray
    digests: np.ndarray
    dropped: Counter[str] = field(default_factory=Counter)
    mended: int = 0


class FileShardFolder:
    """``<prefix>.parts``: the finished units of a run that was told the same."""

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.path = Path(prefix + ".parts")
        self.dtype = dtype

    def begin(self, fingerprint: str, num_units: int) -> list[int]:
        """Makes the folder, or empties one that was made differently.

        Returns:
            Numbers of the units that are not done yet.

        Raises:
            UserError: there is such a folder that holds something else.
        """
        stamp = self.path / _STAMP
        foreign = sorted(f.name for f in self.path.glob("*") if not _OWN_NAMES.fullmatch(f.name))
        if foreign:
            raise UserError(
                f"{self.path} is where the file shards of {self.path.stem} go, but holds "
                f"{foreign[0]}, which does not belong to them; move it away, or choose another "
                "--output_prefix"
            )
        if self.path.exists() and (
            not stamp.is_file() or stamp.read_bytes() != fingerprint.encode()
        ):
            logger.info("%s is of other input or options: removed", self.path)
            self.remove()
        if not stamp.exists():
            write_file(stamp, fingerprint.encode())
        return [number for number in range(num_units) if self.load(number) is None]

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Removes the folder if no unit is finished."""
        if not any(self.path.glob("*.npz")):
            self.remove()

    def load(self, number: int) -> FileShard | None:
        """A finished unit; None if it is not finished, or its files are damaged."""
        token_file, index_file = _files(self.path, number)
        try:
            with np.load(index_file, allow_pickle=False) as arrays:
                shard = FileShard(
                    np.zeros(0, self.dtype),
                    arrays["sizes"],
                    arrays["sequences"],
                    arrays["text_bytes"],
                    arrays["digests"],
                    dropped=Counter(json.loads(arrays["dropped"].tobytes())),
                    mended=int(arrays["mended"]),
                )
            num_bytes = int(shard.sizes.sum(dtype=np.int64)) * self.dtype.itemsize
            if token_file.stat().st_size != num_bytes:
                return None
            shard.tokens = map_file(token_file).view(self.dtype)
            return shard
        except Exception:  # whatever a damaged file makes NumPy raise: the unit is done again
            return None


class FileShardWriter:
    """Writes a unit; it counts as finished when :meth:`finish` has returned."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self._token_file, self._index_file = _files(folder, number)
        self._out = OutputFile(self._token_file)
        self._dtype = dtype
        self._sizes: list[np.ndarray] = []
        self._sequences: list[np.ndarray] = []
        self._text_bytes: list[np.ndarray] = []
        self._digests: list[bytes] = []

    def add(
        self,
        tokens: np.ndarray,
        sizes: list[int],
        sequences: list[int],
        text_bytes: list[int],
        digests: list[bytes],
    ) -> None:
        """Adds documents; see :class:`FileShard` for what describes them.

        Raises:
            UserError: a sequence is too long for the format.
        """
        if max(sizes, default=0) > MAX_SEQUENCE_TOKENS:
            raise UserError(
                f"a document has {max(sizes)} tokens; the format allows {MAX_SEQUENCE_TOKENS} in "
                "a sequence. Split it with --doc_spliter or --split_sentences"
            )
        self._out.write(tokens.astype(self._dtype, copy=False).data)
        self._sizes.append(np.array(sizes, np.int32))
        self._sequences.append(np.array(sequences, np.int32))
        self._text_bytes.append(np.array(text_bytes, np.int64))
        self._digests += digests

    def finish(self, dropped: Counter[str], mended: int) -> None:
        self._out.publish()
        digests = np.frombuffer(b"".join(self._digests), np.uint8)
        sequences = np.concatenate([np.zeros(0, np.int32), *self._sequences])
        arrays: dict[str, Any] = {
            "sizes": np.concatenate([np.zeros(0, np.int32), *self._sizes]),
            "sequences": sequences,
            "text_bytes": np.concatenate([np.zeros(0, np.int64), *self._text_bytes]),
            "digests": digests.reshape(len(sequences), DIGEST_BYTES if len(digests) else 0),
            "dropped": np.frombuffer(json.dumps(dropped).encode(), np.uint8),
            "mended": np.int64(mended),
        }
        contents = io.BytesIO()
        np.savez(contents, **arrays)
        write_file(self._index_file, contents.getvalue())

    def discard(self) -> None:
        self._out.discard()


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06}.bin", folder / f"{number:06}.npz"
