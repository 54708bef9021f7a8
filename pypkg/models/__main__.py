"""``python -m pypkg.models``: prints docs/models.md, the families and the known names."""

from __future__ import annotations

from pypkg.models.docs_page import models_page

if __name__ == "__main__":
    print(models_page(), end="")
