"""Where the golden fixtures are."""

from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
