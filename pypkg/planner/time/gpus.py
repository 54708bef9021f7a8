"""The GPUs that the planner knows: memory and peak rates of data sheets, and efficiencies."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Product:
    """The rate of a matrix product [rows, inputs] x [inputs, outputs] in bfloat16."""

    rows: int
    inputs: int
    outputs: int
    flops_per_second: float

    def distance(self, shape: tuple[int, int, int]) -> float:
        """Squared distance of two shapes, in the logarithms of their sizes."""
        own = (self.rows, self.inputs, self.outputs)
        return sum(log(x / y) ** 2 for x, y in zip(own, shape, strict=True))


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU. Rates are dense and per second; an efficiency is the part of a rate that is reached.

    Attributes:
        memory_mib: MiB of memory, as nvidia-smi shows it.
        matmul_flops: FLOP/s of matrix products in bfloat16 and float16.
        matmul_flops_float32: of float32 products outside tensor cores.
        bandwidth: bytes of device memory, read or written.
        link: bytes to other GPUs of the machine, in each direction.
        matmul_efficiency: fitted to PaddleNLP's Llama-2-7b run on A100, for all GPUs.
        attention_efficiency: share of matmul_flops in flash attention, forward and backward.
        bandwidth_efficiency: bandwidth efficiency of operators that move memory.
        link_efficiency: link efficiency of collectives.
        products: rates by shape, where they were measured; they take the place of
            matmul_efficiency.
        source: source of the figures.
    """

    name: str
    memory_mib: int
    matmul_flops: float
    matmul_flops_float32: float
    bandwidth: float
    link: float
    matmul_efficiency: float = 0.635
    attention_efficiency: float = 0.5
    bandwidth_efficiency: float = 0.9
    link_efficiency: float = 0.75
    products: tuple[Product, ...] = ()
    source: str

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * _MIB

    def product_rate(self, element_bytes: int, shape: tuple[int, int, int] | None = None) -> float:
        """FLOP/s that matrix products reach.

        Args:
            shape: rows, inputs and outputs, for the rate of the nearest shape that was measured.
        """
        if self.products and shape is not None and element_bytes == 2:
            return min(self.products, key=lambda each: each.distance(shape)).flops_per_second
        peak = self.matmul_flops if element_bytes == 2 else self.matmul_flops_float32
        return peak * self.matmul_efficiency

    def attention_rate(self, element_bytes: int) -> float:
        """FLOP/s that flash attention reaches."""
        peak = self.matmul_flops if element_bytes == 2 else self.matmul_flops_float32
        return peak * self.attention_efficiency

    @property
    def memory_rate(self) -> float:
        """Bytes per second that operators move."""
        return self.bandwidth * self.bandwidth_efficiency


_A100: dict[str, Any] = {"matmul_flops": 312e12, "matmul_flops_float32": 19.5e12}
# FlashAttention-2 reaches 50 to 73 % of an A100 (Dao, arXiv:2307.08691, abstract) and 35 % of an
# H100 (Shah et al., arXiv:2407.08608, abstract). A800, H800 and H200 have their processors. Ours
# has not been timed on a GPU. For Ada, TVM (tl_doc/flash_perf.md in apache/tvm) gives
# FlashAttention on an RTX 4090, causal, head dim 128: 151.2 TFLOP/s forward and 99.2 backward, so
# 110 for both. An L40S has 142 such multiprocessors, not 128: 122 of its 362 TFLOP/s. That is a
# lower bound: tensor cores of an RTX 4090 sum in float32 at half the rate of an L40S.
_HOPPER: dict[str, Any] = {
    "matmul_flops": 989e12,
    "matmul_flops_float32": 67e12,
    "attention_efficiency": 0.35,
}
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100-40g", memory_mib=40960, bandwidth=1.555e12, link=300e9, **_A100,
            source="NVIDIA A100 data sheet, SXM"),
        Gpu(name="a100-80g", memory_mib=81920, bandwidth=2.039e12, link=300e9, **_A100,
            source="NVIDIA A100 data sheet, SXM"),
        Gpu(name="a800-80g", memory_mib=81920, bandwidth=2.039e12, link=200e9, **_A100,
            source="NVIDIA A100 data sheet, SXM; NVLink as the press reports it for A800"),
        Gpu(name="h100-80g", memory_mib=81559, bandwidth=3.35e12, link=450e9, **_HOPPER,
            source="NVIDIA H100 data sheet, SXM"),
        Gpu(name="h800-80g", memory_mib=81559, bandwidth=3.35e12, link=200e9, **_HOPPER,
            source="NVIDIA H100 data sheet, SXM; NVLink as the press reports it for H800"),
        Gpu(name="h200", memory_mib=143771, bandwidth=4.8e12, link=450e9, **_HOPPER,
            source="NVIDIA H200 data sheet, SXM"),
        Gpu(name="l40s", memory_mib=46068, bandwidth=864e9, link=32e9, matmul_flops=362e12,
            matmul_flops_float32=91.6e12, attention_efficiency=0.34,
            source="NVIDIA L40S data sheet; PCIe 4.0 x16"),
    )
}  # fmt: skip


def gpu_of_device(name: str, memory: int) -> Gpu | None:
    """The entry of a device, by the name and the bytes of memory that CUDA reports.

    None for a GPU that the table lacks, such as another form factor.
    """
    if "PCIe" in name or "NVL" in name:
        return None
    for gpu in GPUS.values():
        model = gpu.name.partition("-")[0].upper()
        if model in name and abs(memory / gpu.memory - 1) < 0.1:
            return gpu
    return None
