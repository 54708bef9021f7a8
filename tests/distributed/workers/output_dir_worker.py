"""One rank of test_output_dir.py: what it says of an output folder.

Arguments: a folder for each rank.
"""

from __future__ import annotations

import sys

from distributed_testing import report

from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.training.start import output_dir

if __name__ == "__main__":
    folders = sys.argv[1:]
    made = mesh.initialize(mesh.Degrees(data=len(folders)))
    output_dir._SECONDS_TO_APPEAR = 0.2
    try:
        output_dir.prepare_shared_output_dir(folders[made.rank])
        report("")
    except UserError as error:
        report(str(error))
