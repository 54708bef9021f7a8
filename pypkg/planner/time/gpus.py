"""GPUs that can be planned for: memory and peak rates of data sheets, and efficiencies."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pypkg.errors import UserError

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU. Rates are dense and per second; an efficiency is the part of a rate that is reached.

    Attributes:
        memory_mib: MiB of memory, as nvidia-smi shows it.
        matmul_flops: of matrix products in bfloat16 and float16.
        matmul_flops_float32: of float32 products outside tensor cores.
        bandwidth: bytes of device memory, read or written.
        link: bytes to other GPUs of the machine, in each direction.
        matmul_efficiency: fitted to PaddleNLP's Llama-2-7b run on A100, for all GPUs.
        attention_efficiency: of matmul_flops in flash attention, forward and backward.
        bandwidth_efficiency: of operators that move memory.
        link_efficiency: of collectives.
        source: of the figures.
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
    source: str

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * _MIB

    def product_rate(self, element_bytes: int) -> float:
        """FLOP/s that matrix products reach."""
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


_A100 = {"matmul_flops": 312e12, "matmul_flops_float32": 19.5e12}
# FlashAttention-2 reaches 50 to 73 % of an A100 (Dao, 2023) and 35 % of an H100 (Shah et al.,
# FlashAttention-3, 2024). Ours has not been timed on a GPU.
_HOPPER = {
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
            source="NVIDIA A800 data sheet, SXM"),
        Gpu(name="h100-80g", memory_mib=81559, bandwidth=3.35e12, link=450e9, **_HOPPER,
            source="NVIDIA H100 data sheet, SXM"),
        Gpu(name="h800-80g", memory_mib=81559, bandwidth=3.35e12, link=200e9, **_HOPPER,
            source="NVIDIA H800 data sheet, SXM"),
        Gpu(name="h200", memory_mib=143771, bandwidth=4.8e12, link=450e9, **_HOPPER,
            source="NVIDIA H200 data sheet, SXM"),
        Gpu(name="l40s", memory_mib=46068, bandwidth=864e9, link=32e9, matmul_flops=362e12,
            matmul_flops_float32=91.6e12, source="NVIDIA L40S data sheet; PCIe 4.0 x16"),
    )
}  # fmt: skip


def load_gpu(name: str) -> Gpu:
    """A GPU of the table, or of a JSON file.

    The file has the fields of ``Gpu``, or ``{"like": "a100-80g", ...}`` with those that differ from
    a GPU of the table, such as an efficiency that was measured.

    Raises:
        UserError: there is no such GPU, or the file is not of that form.
    """
    if name in GPUS:
        return GPUS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(
            f"--gpu is {name!r}; expected one of {', '.join(GPUS)}, or a .json file with fields "
            "of such a GPU"
        )
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        like = given.pop("like", None)
        known = dataclasses.asdict(GPUS[like]) if like is not None else {}
        return _checked(Gpu(**{**known, "name": path.stem, "source": str(path), **given}))
    except OSError as error:
        raise UserError(f"--gpu {name}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Gpu))
        raise UserError(
            f"--gpu {name} is not the description of a GPU: {error}. Expected a JSON object with "
            f'"like", one of {", ".join(GPUS)}, and any of {fields}'
        ) from error


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


def _checked(gpu: Gpu) -> Gpu:
    for field in dataclasses.fields(Gpu):
        value = getattr(gpu, field.name)
        if field.name in ("name", "source"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{field.name} is {value!r}, not a number above 0")
        if field.name.endswith("_efficiency") and value > 1:
            raise ValueError(f"{field.name} is {value!r}, above 1")
    return gpu
