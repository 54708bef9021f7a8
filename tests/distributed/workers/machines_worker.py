"""One rank of test_machines.py: what is said of folders that differ between machines.

Arguments: checkpoints (for a run that writes them), metrics (for one that does not) or data, and an
output folder or a corpus for each rank; "-" where a rank reads none.
"""

from __future__ import annotations

import sys

from distributed_testing import report

from pypkg.data import IndexedDataset
from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.training.feed.same_data import check_same_data
from pypkg.training.start import output_dir

if __name__ == "__main__":
    what, *places = sys.argv[1:]
    place = places[mesh.initialize(mesh.Degrees(data=len(places))).rank]
    output_dir._SECONDS_TO_APPEAR = 0.2
    try:
        if what == "data":
            check_same_data(None if place == "-" else [IndexedDataset(place)])
        else:
            with output_dir.held_output_dir(place, saves=what == "checkpoints"):
                pass
        report("")
    except UserError as error:
        report(str(error))
