"""Threads, memory and signals as a command line on a terminal has them.

Threads and memory are set before any test imports Paddle. A process started in the background by
a shell ignores SIGINT, and so would those that it starts in turn; tests send it to theirs.
"""

import signal

from pypkg.threads import configure_cpu, import_paddle

signal.signal(signal.SIGINT, signal.default_int_handler)
configure_cpu()
import_paddle()
