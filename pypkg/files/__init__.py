"""Files: durable writing, objects in JSON, digests, and where shipped files lie.

Leaves that any module may import; they know nothing of models, data or training. ``atomic.py`` is
the one writer of the package: whatever has to survive a crash goes through its functions, which are
exported here; ``block_file.py`` writes the large files of a checkpoint, whose folder it publishes
later. A format of a file belongs to the room that reads it.
"""

from pypkg.files.atomic import (
    OutputFile,
    append_line,
    new_folder,
    publish_files,
    read_lines,
    replace_folder,
    sync,
    write_file,
)

__all__ = [
    "OutputFile",
    "append_line",
    "new_folder",
    "publish_files",
    "read_lines",
    "replace_folder",
    "sync",
    "write_file",
]
