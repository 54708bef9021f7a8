"""Settings of a run: read from a file and the command line, checked before anything starts.

A new setting is a field of ``settings.py`` or of a class from which it inherits. PaddleNLP's keys
that are not settings are rows of ``known_keys.py`` and ``suboptions.py``. Checks of several
settings are in ``checks.py`` and ``parallel_checks.py``. Nothing here imports Paddle or depends on
the model.
"""

from pypkg.config.docs_page import help_text
from pypkg.config.reading.parser import listed, load_settings
from pypkg.config.settings import Settings
from pypkg.config.support import check_supported, notices, notices_of_float32

__all__ = [
    "Settings",
    "check_supported",
    "help_text",
    "listed",
    "load_settings",
    "notices",
    "notices_of_float32",
]
