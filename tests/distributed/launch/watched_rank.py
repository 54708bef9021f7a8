"""A watched rank without Paddle: reports a step every 0.1 s until the file STOP appears.

Arguments: the file STOP, and the number of the rank whose main thread fails, as a collective does,
when it has been stopped (SIGSTOP) and goes on.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pypkg.parallel.launch import watchdog


def main() -> int:
    stop = Path(sys.argv[1])
    watchdog.start()
    watchdog.compare_settings("{}")
    stop.with_name(f"started{os.environ['PADDLE_TRAINER_ID']}").touch()
    step, ticked = 0, time.monotonic()
    while not stop.exists():
        step += 1
        watchdog.at(step, "update")
        time.sleep(0.1)
        now = time.monotonic()
        if now - ticked > 5:  # its peers have gone, as a collective would notice
            text = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"
            print(f"error: {watchdog.failed(text, 1, 'Traceback: many lines')}", file=sys.stderr)
            return 1
        ticked = now
    watchdog.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
