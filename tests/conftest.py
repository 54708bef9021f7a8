"""Threads and memory as the command lines set them, before any test imports Paddle."""

from pypkg.threads import configure_cpu, import_paddle

configure_cpu()
import_paddle()
