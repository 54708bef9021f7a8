"""``python -m pypkg.models``: prints docs/models.md, the list of families and known models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pypkg.models.docs_page import models_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argparse.ArgumentParser(
        prog="pypkg models",
        description="Prints docs/models.md: the model families, and the known names with sizes.",
    ).parse_args(arguments)
    print(models_page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
