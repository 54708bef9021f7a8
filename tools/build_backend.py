"""setuptools' build backend, extended for ``pip install ".[cpu]"`` on a machine without Paddle.

The operators are compiled against the Paddle they will run in. Installers build a package before
they install its extras, so with the ``cpu`` extra Paddle is not there yet. The backend therefore
requests it as a build requirement, in the version that the extra will install. Without the extra it
requests no Paddle, because it could be the wrong one.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from find_paddle import find_paddle, installer_processes
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

# setuptools has a general remark on editable installs, which installers print even when quiet.
warnings.filterwarnings("ignore", message="Editable installation")

ROOT = Path(__file__).resolve().parent.parent


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _paddle_if_extra_asked()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _paddle_if_extra_asked()


def _paddle_if_extra_asked() -> list[str]:
    if find_paddle().found or not _cpu_extra_asked():
        return []
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^cpu = \["([^"]+)"\]', pyproject, flags=re.MULTILINE)


def _cpu_extra_asked() -> bool:
    """Whether an installer above this process was asked for ``something[...cpu...]``.

    Build hooks do not receive the requested extras. Only the installer's command line has them.
    """
    extra = re.compile(r"\[([^\]]*,)?\s*cpu\s*(,[^\]]*)?\]$")
    return any(
        extra.search(word) for process in installer_processes() for word in process.arguments
    )
