"""Variants of the kernels that differ in a compile-time constant, such as the size of a tile.

A variant is written FILE:CONSTANT=VALUE, as in flash_attention_forward_sm90.cu:kKeys=64, for the
definition `constexpr int kKeys = 128;` in that file of csrc/kernels. It is compiled from a copy of
the sources in which that definition has the value.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


class VariantError(ValueError):
    """A variant that cannot be made, and why."""


@dataclass(frozen=True)
class Variant:
    file: str
    constant: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Variant:
        found = re.fullmatch(r"([\w.]+):(\w+)=(.+)", text)
        if found is None:
            raise VariantError(
                f"a variant reads FILE:CONSTANT=VALUE, as in rms_norm.cu:kMaxThreads=256; "
                f"found {text!r}"
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.constant}={self.value}"

    def write_sources(self, folder: Path) -> None:
        """Makes ``folder`` a copy of what the build needs, with the constant changed.

        Raises:
            VariantError: there is no such file, or not exactly one such definition in it.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        compiled = shutil.ignore_patterns("__pycache__", "_lib", "*.so")
        for name in ("csrc", "pypkg"):  # the build reads the version from the package
            shutil.copytree(ROOT / name, folder / name, ignore=compiled)
        files = {each.name: each for each in (folder / "csrc" / "kernels").rglob("*.cu*")}
        if self.file not in files:
            names = ", ".join(sorted(files))
            raise VariantError(f"{self.file} is none of the kernels' files: {names}")
        path = files[self.file]
        definition = re.compile(rf"(constexpr \w+ {self.constant} = )([^;,]+)([;,])")
        text, count = definition.subn(rf"\g<1>{self.value}\g<3>", path.read_text())
        if count != 1:
            known = ", ".join(re.findall(r"constexpr \w+ (\w+) = ", path.read_text()))
            raise VariantError(
                f"{self.file} defines {self.constant} {count} times; it has {known or 'none'}"
            )
        path.write_text(text)
