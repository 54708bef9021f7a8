"""The result of a benchmark, as recorded in JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Result = Mapping[str, Any]
Row = Mapping[str, Any]  # one of its "rows"


def result_name(result: Result) -> str:
    """The name of the file of a result in docs/benchmarks, without suffix."""
    return f"{result['kind']}-{re.sub('[^a-z0-9]+', '-', result['device'].lower()).strip('-')}"


def device_name(result: Result) -> str:
    """The device of the result, for headings."""
    return re.sub("^cpu", "CPU", result["device"])
