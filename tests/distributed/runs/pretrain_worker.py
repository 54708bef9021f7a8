"""One rank of a run of the command line. Arguments: those of the command line, with {rank} in them
for the number of this process."""

from __future__ import annotations

import os
import sys

from distributed_testing import report

from pypkg.pretrain import main

if __name__ == "__main__":
    rank = os.environ["PADDLE_TRAINER_ID"]
    code = main([argument.replace("{rank}", rank) for argument in sys.argv[1:]])
    report(code)
