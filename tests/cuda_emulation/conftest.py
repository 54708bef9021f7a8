from __future__ import annotations

import shutil
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    if shutil.which("g++") is None:
        pytest.skip("the emulated kernels need g++")
    import build_emulated

    return build_emulated.load()
