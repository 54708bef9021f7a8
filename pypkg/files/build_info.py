"""build_info.json, which describes the build of the compiled libraries beside it.

CMake runs ``python -m pypkg.files.build_info CONFIGURED LIBRARIES`` after each build. It adds the
digest of csrc/ to the file ``CONFIGURED`` of the CMake configuration, and writes build_info.json
into the folder ``LIBRARIES``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pypkg.files import write_file
from pypkg.files.paths import sources_dir

DIGEST = "csrc_sha256"
_SOURCES = {".cc", ".h", ".cu", ".cuh"}


def digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, over the names and contents of the sources below ``folder``."""
    total = hashlib.sha256()
    for file in sorted(each for each in folder.rglob("*") if each.suffix in _SOURCES):
        contents = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\n{contents}\n".encode())
    return total.hexdigest()


def main(arguments: Sequence[str]) -> int:
    configured, libraries = map(Path, arguments)
    sources = sources_dir()
    assert sources is not None, "CMake runs this in a source tree"
    info = json.loads(configured.read_text(encoding="utf-8")) | {DIGEST: digest(sources)}
    write_file(libraries / "build_info.json", (json.dumps(info, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
