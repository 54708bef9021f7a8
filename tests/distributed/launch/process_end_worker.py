"""One of four ranks: the others go while rank 1, which serves a group's store, is inside exit().

Arguments: the exit code of rank 1.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

from distributed_testing import report

RANK = int(os.environ["PADDLE_TRAINER_ID"])
LIBRARY = ctypes.CDLL(None)

if RANK == 1:
    # Registered before Paddle is loaded, hence called after Paddle's destructors.
    LIBRARY.__cxa_atexit(LIBRARY.sleep, ctypes.c_void_p(4), None)

from pypkg.parallel import mesh  # noqa: E402

mesh.initialize(mesh.Degrees(tensor=2, pipeline=2))
report(None)
if RANK != 1:
    time.sleep(2)
    sys.exit(0)
LIBRARY.printf(b"a line that C holds back\n")
print("a line that Python holds back")
sys.exit(int(sys.argv[1]))
