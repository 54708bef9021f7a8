"""Settings of a run: read from JSON and the command line, checked before anything starts."""

from pypkg.config.docs_page import help_text
from pypkg.config.reading.parser import listed, load_settings
from pypkg.config.settings import Settings
from pypkg.config.support import check_supported, notices

__all__ = ["Settings", "check_supported", "help_text", "listed", "load_settings", "notices"]
