from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    if shutil.which("g++") is None:
        pytest.skip("the emulated kernels need g++")
    import build_emulated

    return build_emulated.load()
