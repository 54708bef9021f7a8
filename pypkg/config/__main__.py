"""``python -m pypkg.config``: prints docs/configuration.md."""

from __future__ import annotations

from pypkg.config.docs_page import configuration_page

if __name__ == "__main__":
    print(configuration_page(), end="")
