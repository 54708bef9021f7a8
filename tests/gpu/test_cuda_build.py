"""What the compiler says about the CUDA kernels, where nvcc is present: no GPU is needed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import sass_counts

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
SOURCES = sorted(KERNELS.rglob("*.cu"), key=lambda path: path.stat().st_size, reverse=True)
ARCHITECTURES = ("80", "90a")
# Float32 attention is there to be exact, not fast; its wide backward does not fit in registers.
MAY_SPILL = re.compile(
    r"key_gradient_kernelIfLi(128|256)E|query_gradient_kernelIfLi256E"
    r"|14forward_kernelIfLi256E"
    r"|15backward_kernelI\S*(bfloat16|half)fLi4E"  # two registers, with a weight in float32
    r"|hopper_backward_kernelI\S*Li64ELb1E"  # two registers, with a soft cap
)
ATTENTION = {"flash_attention_forward", "flash_attention_backward"}
HOPPER_ATTENTION = ("flash_attention_forward_sm90", "flash_attention_backward_sm90")
# Waits for products in their sources.
HOPPER_WAITS = {
    "hopper_forward_kernel": 4,
    "hopper_backward_kernel": 4,
}
# That their producer and consumer warps have after setmaxnreg.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# The forms for rows that are not aligned to 16 bytes, and sums over a few rows.
NARROW = {
    "rms_norm": re.compile(r"scalar|reduce_dweight"),
    "rotary_embedding": re.compile(r"Li1E"),
    "gated_activation": re.compile(r"Li1E"),
    "cross_entropy": re.compile(r"(?!)"),
    "adamw": re.compile(r"(?!)"),
}
REGISTERS = 65536  # of a multiprocessor
# Threads that a multiprocessor has to hold, or too few loads are under way to keep its memory
# busy; for attention those of the tiles. The first pattern that is found holds.
THREADS = (
    (re.compile(r"hopper_\w+_kernel"), 3 * 128),
    (re.compile(r"gradient_kernel"), 2 * 128),
    (re.compile(r"flash_attention_forward.*forward_kernel"), 256),
    (re.compile(r"rms_norm.*15backward_kernel"), 512),  # each holds sums and rows to come
    (re.compile(r""), 1024),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]


@dataclass(frozen=True)
class Compiled:
    source: Path
    architecture: str
    object_file: Path
    log: str


def path_with_disassembler() -> str:
    """PATH with cuobjdump, and nvdisasm which it calls, from the packages that tests install."""
    folders = []
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool) is None:
            files = importlib.metadata.files(f"nvidia-cuda-{tool}")
            found = [Path(each.locate()).parent for each in files or () if each.name == tool]
            assert found, f"{tool} is neither on PATH nor in the package nvidia-cuda-{tool}"
            folders.append(str(found[0]))
    return os.pathsep.join([*folders, os.environ["PATH"]])


def kernels_in_sass(unit: Compiled) -> Iterator[tuple[str, str]]:
    """Name and instructions of each kernel of an object file."""
    path = path_with_disassembler()
    command = [shutil.which("cuobjdump", path=path), "-sass", str(unit.object_file)]
    environment = {**os.environ, "PATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    parts = re.split(r"\n\s*Function : ", result.stdout)[1:]
    assert parts
    for part in parts:
        name, _, code = part.partition("\n")
        yield name, code


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(job: tuple[Path, str]) -> Compiled:
        source, arch = job
        target = folder / f"{source.stem}_{arch}.o"
        flags = [f"-I{KERNELS}", "-std=c++17", "-O3"]
        flags += ["-Xptxas", "-v", "-Werror", "all-warnings"]
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


def test_registers_leave_room_for_the_threads_that_are_needed(compiled: list[Compiled]):
    pattern = re.compile(r"Compiling entry function '(\S+)'.*?Used (\d+) registers", re.S)
    seen, crowded = 0, []
    for unit in compiled:
        for kernel, registers in pattern.findall(unit.log):
            seen += 1
            name = f"{unit.source.stem} {kernel}"
            wanted = next(threads for known, threads in THREADS if known.search(name))
            per_thread = -(-int(registers) // 8) * 8  # registers are given out in eights
            if REGISTERS // per_thread < wanted:
                crowded.append(f"sm_{unit.architecture} {name}: {registers}, for {wanted} threads")
    assert seen > 100, "the compiler's report was not understood"
    assert not crowded, "\n".join(crowded)


def test_attention_uses_tensor_cores_and_asynchronous_copies(compiled: list[Compiled]):
    """mma.sync and cp.async; in float32, which is exact, no tensor cores."""
    for unit in compiled:
        if unit.source.stem not in ATTENTION:
            continue
        for name, code in kernels_in_sass(unit):
            if "query_gradient_sum_kernel" in name:  # no product: rounds what others summed
                continue
            tensor_cores = "HMMA.16816.F32" in code
            assert tensor_cores == ("IfLi" not in name), f"sm_{unit.architecture} {name}"
            assert "LDGSTS.E.BYPASS.128" in code, f"sm_{unit.architecture} {name}"
            assert "LDL" not in code or MAY_SPILL.search(name), f"sm_{unit.architecture} {name}"


def test_attention_without_a_soft_cap_holds_nothing_of_it(compiled: list[Compiled]):
    """A capped kernel has two more special functions for each exponential of the plain one."""
    seen = 0
    for unit in compiled:
        if unit.source.stem not in (*ATTENTION, *HOPPER_ATTENTION):
            continue
        kernels = dict(kernels_in_sass(unit))
        for name, code in kernels.items():
            if "Lb0E" not in name or "MUFU.EX2" not in code:
                continue
            seen += 1
            capped = kernels[name.replace("Lb0E", "Lb1E")]
            assert code.count("MUFU.EX2") < capped.count("MUFU.EX2"), name
            assert code.count("MUFU.RCP") < capped.count("MUFU.RCP"), name
            assert code.count(";") < capped.count(";"), name
    assert seen > 50, "the kernels were not found"


# Of a turn of the main loop at head dim 128 in 16 bits, by warp: tensor-core instructions, loads of
# their operands from shared memory, and the most instructions of any kind. docs/kernel_notes.md
# derives the limits of the kernels from these.
TURNS = {
    # 32 queries, 32 keys
    r"14forward_kernelI\S*Li128ELb0E": (128, 48, 850),
    # 16 of 128 keys, 64 queries in two halves
    r"key_gradient_kernelI\S*Li128ELb0ELNS\S*WantedE3E": (320, 192, 1700),
}


def test_turns_of_the_main_loops_of_attention(compiled: list[Compiled]):
    seen = 0
    for unit in compiled:
        if unit.source.stem not in ATTENTION or unit.architecture != "80":
            continue
        for name, code in kernels_in_sass(unit):
            for pattern, (products, loads, most) in TURNS.items():
                if "IfLi" in name or not re.search(pattern, name):
                    continue
                seen += 1
                found = sass_counts.counts(code, inner=2 if "Wanted" in name else 1)
                assert (found["mma"], found["ldmatrix"]) == (products, loads), name
                assert found["all"] <= most, f"{name}: {found}"
    assert seen == 2 * len(TURNS)


def largest_register(code: str) -> int:
    return max(map(int, re.findall(r"\bR(\d+)\b", code)))


def producer_code(code: str) -> str:
    """From where its warps give up registers to their end, and what they call."""
    role = code[code.index("USETMAXREG.DEALLOC") : code.rindex("EXIT")]
    called = [
        re.search(rf"/\*0*{address}\*/.*?\bRET\b", code, re.S).group()
        for address in set(re.findall(r"CALL\S* 0x0*([0-9a-f]+)", role))
    ]
    assert "UTMALDG.4D" in role and "HGMMA" not in role
    return "".join([role, *called])


def test_hopper_attention_uses_wgmma_and_the_copy_engine(compiled: list[Compiled]):
    """Products that run on while the warp goes on, and no more waits than the source has: where the
    compiler finds a hazard it puts a wait after every product, and says so."""
    units = [unit for unit in compiled if unit.source.stem in HOPPER_ATTENTION]
    assert len(units) == len(HOPPER_ATTENTION) * len(ARCHITECTURES)
    seen = set()
    for unit in units:
        assert not re.search("wgmma|setmaxnreg|warning", unit.log)
        for name, code in kernels_in_sass(unit):
            if unit.architecture == "80":
                assert code.count(";") < 50, f"{name} has a body, but no instructions for sm_80"
                continue
            if "query_gradient_sum_kernel" in name:  # no product: rounds what others summed
                continue
            kernel = next(each for each in HOPPER_WAITS if each in name)
            seen.add(kernel)
            assert re.search(r"HGMMA\.64x(64|128)x16\.F32", code), name
            assert "HMMA" not in code, name
            assert ("LDL" not in code and "STL" not in code) or MAY_SPILL.search(name), name
            assert code.count("WARPGROUP.DEPBAR") == HOPPER_WAITS[kernel], name
            assert code.count("USETMAXREG") == 2, name
            assert largest_register(code) < CONSUMER_REGISTERS, name
            assert largest_register(producer_code(code)) < PRODUCER_REGISTERS, name
    assert seen == set(HOPPER_WAITS)


def test_the_driver_is_not_linked(compiled: list[Compiled]):
    """A library that links libcuda does not load on a machine without a driver."""
    for unit in compiled:
        result = subprocess.run(["nm", "-u", unit.object_file], capture_output=True, text=True)
        assert "cudaLaunchKernel" in result.stdout, result.stderr  # of the runtime
        assert not re.search(r"\bcu[A-Z]", result.stdout), unit.source


def test_memory_bound_kernels_move_16_bytes_at_a_time(compiled: list[Compiled]):
    for unit in compiled:
        narrow = NARROW.get(unit.source.stem)
        if narrow is None:
            continue
        for name, code in kernels_in_sass(unit):
            where = f"sm_{unit.architecture} {unit.source.stem} {name}"
            assert ("LDL" not in code and "STL" not in code) or MAY_SPILL.search(name), where
            if narrow.search(name):
                continue
            assert "LDG.E.128" in code, where
            writes_a_row_only = unit.source.stem == "cross_entropy" and "forward" in name
            assert ("STG.E.128" in code) != writes_a_row_only, where
