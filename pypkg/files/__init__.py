"""Files: durable writes, JSON objects, checksums, and paths of shipped files.

Any module may import this package; it does not depend on models, data or training. All files that
must survive a crash are written by the functions of ``atomic.py``, which are exported here, except
the large files of a checkpoint: ``block_file.py`` writes them, and their folder is published later.
The format of a file is defined in the package that reads it.
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
