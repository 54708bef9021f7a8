"""What the compiler says about the CUDA kernels, where nvcc is present: no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
SOURCES = sorted(KERNELS.glob("*.cu"), key=lambda path: path.stat().st_size, reverse=True)
ARCHITECTURES = ("80", "90a")
# Float32 attention is there to be exact, not fast; its widest backward does not fit in registers.
MAY_SPILL = re.compile(r"key_gradient_kernelIfLi128E")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@dataclass(frozen=True)
class Compiled:
    source: Path
    architecture: str
    object_file: Path
    log: str


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(job: tuple[Path, str]) -> Compiled:
        source, arch = job
        target = folder / f"{source.stem}_{arch}.o"
        flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings"]
        arch_flag = f"arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *flags, "-gencode", arch_flag, "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        return Compiled(source, arch, target, result.stderr)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, [(s, a) for s in SOURCES for a in ARCHITECTURES]))


def test_kernels_do_not_spill(compiled: list[Compiled]):
    """Registers that overflow into local memory cost several times an arithmetic instruction."""
    pattern = re.compile(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores"
    )
    seen, spilling = 0, []
    for unit in compiled:
        for kernel, stack, spills in pattern.findall(unit.log):
            seen += 1
            if (int(stack) or int(spills)) and not MAY_SPILL.search(kernel):
                spilling.append(f"sm_{unit.architecture} {kernel}: {stack} stack, {spills} spilled")
    assert seen > 100, "the compiler's report was not understood"
    assert not spilling, "\n".join(spilling)


def test_attention_uses_tensor_cores_and_asynchronous_copies(compiled: list[Compiled]):
    if shutil.which("cuobjdump") is None or shutil.which("nvdisasm") is None:
        pytest.skip("cuobjdump or nvdisasm is not on PATH")
    attention = {"flash_attention_forward", "flash_attention_backward"}
    for unit in compiled:
        if unit.source.stem not in attention:
            continue
        command = ["cuobjdump", "-sass", str(unit.object_file)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kernels = re.split(r"\n\s*Function : ", sass)[1:]
        assert kernels
        for kernel in kernels:
            name, tensor_cores = kernel.split("\n", 1)[0], "HMMA.16816.F32" in kernel
            assert tensor_cores == ("IfLi" not in name), f"sm_{unit.architecture} {name}"
            assert "LDGSTS" in kernel, f"sm_{unit.architecture} {name}"
            assert "LDL" not in kernel or MAY_SPILL.search(name), f"sm_{unit.architecture} {name}"
