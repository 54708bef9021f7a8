"""The compiled module of csrc/python. Its docstrings give the signatures."""

from typing import Any

def __getattr__(name: str) -> Any: ...
