"""Threads, memory and signals as a command line on a terminal has them.

Threads and memory are set before any test imports Paddle. A process started in the background by
a shell ignores SIGINT, and so would those that it starts in turn; tests send it to theirs.
"""

import logging
import signal
from collections.abc import Iterator

import pytest
from durations import recorded

from pypkg.device.threads import configure_cpu, import_paddle

signal.signal(signal.SIGINT, signal.default_int_handler)
configure_cpu()
import_paddle()

from pypkg.ops.dispatch import library  # noqa: E402  imports Paddle


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that the workers end at about the same time."""
    seconds = recorded()

    def of_its_file(item: pytest.Item) -> float:
        file = item.path.relative_to(config.rootpath).with_suffix("")
        return seconds.get(".".join(file.parts), 0.0)

    items.sort(key=of_its_file, reverse=True)


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """A command line that a test runs here configures logging and operators for the process."""
    logger, chosen = logging.getLogger("pypkg"), library._chosen
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    library._chosen = chosen
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
