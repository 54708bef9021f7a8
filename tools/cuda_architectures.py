"""The GPU architectures that a build compiles for.

CMake runs this file, and setup.py imports it. ``PYPKG_CUDA_ARCHITECTURES`` names the architectures
in CMake's notation, separated by ";", "," or spaces: 80-real is machine code for compute capability
8.0, 90-virtual is PTX, which the driver compiles for later devices, and 90 is both. Without the
variable, the defaults are those that the nvcc at hand knows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

VARIABLE = "PYPKG_CUDA_ARCHITECTURES"
OLDEST = 80  # cp.async and bfloat16 tensor cores

# The first nvcc that knows an architecture (CUDA release notes). "a" is code for one architecture
# with its special instructions, "f" for its family.
_FIRST_NVCC = {
    "80": (11, 0), "86": (11, 1), "87": (11, 4), "89": (11, 8), "90": (11, 8), "90a": (12, 0),
    "100": (12, 8), "100a": (12, 8), "120": (12, 8), "120a": (12, 8),
    "103": (12, 9), "103a": (12, 9), "121": (12, 9), "121a": (12, 9),
    "100f": (12, 9), "103f": (12, 9), "120f": (12, 9), "121f": (12, 9),
    "110": (13, 0), "110a": (13, 0), "110f": (13, 0),
}  # fmt: skip
_DEFAULTS = ("80", "86", "89", "90a", "100", "120")
_FORM = re.compile(r"(\d{2,3}[af]?)(-real|-virtual)?")

Version = tuple[int, int]


class ArchitectureError(ValueError):
    """An architecture that this nvcc or this package cannot compile for."""


def default_architectures(nvcc: Version) -> list[str]:
    """Machine code for each of the usual architectures, and PTX of the highest that nvcc knows."""
    known = [each for each in _DEFAULTS if _FIRST_NVCC[each] <= nvcc]
    if nvcc < _FIRST_NVCC["90a"] and nvcc >= _FIRST_NVCC["90"]:
        known.append("90")  # without the Hopper kernels
    highest = max((int(each.rstrip("a")) for each in known), default=0)
    if not highest:
        raise ArchitectureError(
            f"nvcc {_dotted(nvcc)} does not know compute capability 8.0; that takes nvcc 11.0"
        )
    return [*(f"{each}-real" for each in known), f"{highest}-virtual"]


def parse_architectures(text: str, nvcc: Version) -> list[str]:
    """The architectures that ``text`` names.

    Raises:
        ArchitectureError: an entry of another form, one below 8.0, or one that this nvcc does not
            know.
    """
    entries = re.split(r"[;,\s]+", text.strip(";, \t\n"))
    for entry in entries:
        match = _FORM.fullmatch(entry)
        if match is None:
            raise ArchitectureError(
                f"{VARIABLE} has the entry {entry!r}; expected numbers such as 80-real, 90a-real "
                "or 120-virtual, separated by ;"
            )
        name = match.group(1)
        if int(name.rstrip("af")) < OLDEST:
            raise ArchitectureError(
                f"{VARIABLE} has the entry {entry!r}, but the CUDA kernels need compute capability "
                "8.0 or higher. V100 and T4 run the reference operators: build with "
                "PYPKG_WITH_CUDA=0."
            )
        if name not in _FIRST_NVCC:
            raise ArchitectureError(
                f"{VARIABLE} has the entry {entry!r}; known are {', '.join(_FIRST_NVCC)}"
            )
        if nvcc < _FIRST_NVCC[name]:
            raise ArchitectureError(
                f"{VARIABLE} has the entry {entry!r}, which takes nvcc "
                f"{_dotted(_FIRST_NVCC[name])} or newer; found nvcc {_dotted(nvcc)}"
            )
    return entries


def find_nvcc() -> str | None:
    """The nvcc that CMake takes: of CUDACXX, CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME")
    places = os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"
    return next((found for each in places if each and (found := shutil.which(each))), None)


def nvcc_version(nvcc: str) -> Version:
    """The (major, minor) version; raises ArchitectureError if ``nvcc`` does not print one."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise ArchitectureError(f"{nvcc} --version does not tell a release: {text.strip()!r}")
    return int(release.group(1)), int(release.group(2))


def chosen_architectures() -> list[str]:
    """The architectures in the environment variable, else the defaults of the nvcc found.

    Raises:
        ArchitectureError: there is no nvcc, or ``parse_architectures`` refuses the variable.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise ArchitectureError("nvcc was found neither in CUDACXX or CUDA_HOME nor on PATH")
    version = nvcc_version(nvcc)
    asked = os.environ.get(VARIABLE, "").strip()
    return parse_architectures(asked, version) if asked else default_architectures(version)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def main() -> int:
    try:
        print(";".join(chosen_architectures()))
    except ArchitectureError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
