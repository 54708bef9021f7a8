"""Compiles the Triton kernels as their launchers would start them, without a GPU.

Prints a JSON list: for each launch and compute capability what it takes of a
multiprocessor and how it loads.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pypkg.ops.triton import cross_entropy, gated_activation, kernels, rms_norm, rotary_embedding
from pypkg.ops.triton.launch import COMPILER_OPTIONS

CAPABILITIES = (80, 90)
MULTIPROCESSORS = 132
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64"}


@dataclass(frozen=True)
class Tensor:
    """What a launcher asks of a tensor; the memory is imagined, and aligned."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()

    def data_ptr(self) -> int:
        return 4096

    def stride(self, dim: int) -> int:
        return self.strides[dim]


@dataclass(frozen=True)
class Launch:
    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


def record(name: str, call: Any) -> list[Launch]:
    """The launches that a call makes, instead of making them."""
    launches: list[Launch] = []

    def instead(kernel: Any, grid: Any, *arguments: Any, stream: Any, **constants: Any) -> None:
        warps = constants.pop("num_warps")
        launches.append(Launch(f"{name} {kernel.__name__}", kernel, arguments, constants, warps))

    for module in (cross_entropy, gated_activation, rms_norm, rotary_embedding):
        module.launch = instead
    rms_norm.multiprocessors = lambda: MULTIPROCESSORS
    call()
    return launches


def launches() -> Iterator[Launch]:
    """Sizes of models, in bfloat16; one of each operator in the other dtypes."""
    for dtype in ("bfloat16", "float16", "float32"):
        sizes = (128, 4096, 5120, 8192, 16384) if dtype == "bfloat16" else (4096,)
        for cols in sizes:
            yield from rms_norm_launches(dtype, cols)
        yield from rotary_launches(dtype, 128, 128, False)
        if dtype == "bfloat16":
            yield from rotary_launches(dtype, 128, 64, True)
            yield from rotary_launches(dtype, 96, 24, False)
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield from gated_launches(dtype, 11008, activation)
        vocabularies = (32000, 64000, 125696, 151936) if dtype == "bfloat16" else (32000,)
        for vocabulary in vocabularies:
            yield from cross_entropy_launches(dtype, vocabulary)


def rms_norm_launches(dtype: str, cols: int) -> list[Launch]:
    x, weight = Tensor(dtype, (8192, cols)), Tensor(dtype, (cols,))
    floats = Tensor("float32", (8192,))
    plain = lambda: kernels.rms_norm_forward(x, weight, x, floats)  # noqa: E731
    added = lambda: kernels.rms_norm_forward(x, weight, x, floats, x, x)  # noqa: E731
    gradients = (x, weight, floats, x, x)
    back = lambda: kernels.rms_norm_backward(x, x, weight, floats, *gradients)  # noqa: E731
    name = f"rms_norm {dtype} {cols}"
    return [
        *record(name, plain),
        *record(f"{name} residual", added),
        *record(name, back),
    ]


def rotary_launches(dtype: str, head_dim: int, rotary_dim: int, interleaved: bool) -> list[Launch]:
    q, k = (Tensor(dtype, (1, 8192, heads, head_dim)) for heads in (32, 8))
    table, positions = Tensor("float32", (8192, rotary_dim // 2)), Tensor("int64", (1, 8192))
    style = "interleaved" if interleaved else "half"
    return record(
        f"rotary {dtype} {rotary_dim} of {head_dim} {style}",
        lambda: kernels.rotary_embedding(
            q, k, table, table, q, k, positions, interleaved=interleaved
        ),
    )


def gated_launches(dtype: str, cols: int, activation: str) -> list[Launch]:
    packed = Tensor(dtype, (8192, cols), (2 * cols, 1))
    out = Tensor(dtype, (8192, cols), (cols, 1))
    name = f"{activation} {dtype} {cols}"
    forward, backward = kernels.gated_activation_forward, kernels.gated_activation_backward
    return [
        *record(name, lambda: forward(packed, packed, out, activation)),
        *record(name, lambda: backward(packed, packed, out, packed, packed, activation)),
    ]


def cross_entropy_launches(dtype: str, cols: int) -> list[Launch]:
    logits, labels = Tensor(dtype, (8192, cols)), Tensor("int64", (8192,))
    floats = Tensor("float32", (8192,))
    name = f"cross_entropy {dtype} {cols}"
    forward, backward = kernels.cross_entropy_forward, kernels.cross_entropy_backward
    return [
        *record(name, lambda: forward(logits, labels, *[floats] * 5)),
        *record(name, lambda: backward(logits, labels, floats, floats, logits)),
    ]


def source(launch: Launch) -> ASTSource:
    """The kernel with the types that Triton gives these arguments: None and 1 are constants,
    addresses and sizes that are multiples of 16 are known to be."""
    types, constants, facts = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        if index >= len(launch.arguments):
            types[name], constants[(index,)] = "constexpr", launch.constants[name]
            continue
        value = launch.arguments[index]
        if value is None or (isinstance(value, int) and value == 1):
            types[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = "*" + _TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            facts[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, types, constants, facts)


def compile_one(launch: Launch, capability: int) -> dict[str, Any]:
    target = GPUTarget("cuda", capability, 32)
    options = {**COMPILER_OPTIONS, "num_warps": launch.warps}
    compiled = triton.compile(source(launch), target=target, options=options)
    ptx = compiled.asm["ptx"]
    return {
        "name": launch.name,
        "capability": capability,
        "warps": launch.warps,
        "loads": Counter(re.findall(r"ld\.global[\w.:]*?\.((?:v\d\.)?b\d+)", ptx)),
        "stores": Counter(re.findall(r"st\.global[\w.:]*?\.((?:v\d\.)?b\d+)", ptx)),
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of local memory: registers that spill, and arrays."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    return {"registers": int(registers), "local_bytes": int(stack) + int(local)}


def main() -> None:
    jobs = [(launch, capability) for launch in launches() for capability in CAPABILITIES]
    with ThreadPoolExecutor(2) as pool:
        json.dump(list(pool.map(lambda job: compile_one(*job), jobs)), sys.stdout)


if __name__ == "__main__":
    main()
