"""The capabilities of this machine, and which of them a run uses."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypkg.config import Settings, listed
from pypkg.device.threads import cpu_fields
from pypkg.errors import UserError
from pypkg.files.build_info import DIGEST
from pypkg.files.paths import library_dir

# Ampere is the first architecture with bfloat16 tensor cores, and the oldest for which the CUDA
# kernels are compiled.
_MIN_COMPUTE_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """A device and its software.

    Attributes:
        compute_capability: None for a CPU.
        ops_backend: the backend of the operators.
        compiled_ops: a description of the build of the compiled library.
        kernel_sources: the digest of its sources.
        paddle_flash_attention: whether this Paddle has FlashAttention.
    """

    device: str  # "cpu" or "gpu"
    device_name: str
    compute_capability: tuple[int, int] | None
    memory_bytes: int
    paddle: str
    ops_backend: str  # "compiled", "triton" or "reference"
    compiled_ops: str
    kernel_sources: str | None = None
    paddle_flash_attention: bool = False

    def bfloat16_obstacle(self) -> str | None:
        """Why this device cannot train in bfloat16, or None if it can."""
        if self.compute_capability is None:
            return "training in bfloat16 needs a GPU, and the device is a CPU"
        if self.compute_capability < _MIN_COMPUTE_CAPABILITY:
            return f"bfloat16 {self._too_old()}"
        return None

    def float16_obstacle(self) -> str | None:
        """Why this device cannot train in float16, or None if it can."""
        if self.compute_capability is None:
            return "training in float16 needs a GPU, and the device is a CPU"
        return None

    def own_attention_obstacle(self) -> str | None:
        """Why pypkg's flash attention cannot run on this device, or None if it can."""
        if self.compute_capability and self.compute_capability < _MIN_COMPUTE_CAPABILITY:
            return f"flash attention {self._too_old()}"
        if self.ops_backend != "compiled":
            return f"our flash attention needs compiled operators, not the {self.ops_backend} ones"
        return None

    def paddle_attention_obstacle(self) -> str | None:
        """Why Paddle's flash attention cannot run on this device, or None if it can."""
        if self.compute_capability is None:
            return "Paddle's flash attention needs a GPU, and the device is a CPU"
        if self.compute_capability < _MIN_COMPUTE_CAPABILITY:
            return f"Paddle's flash attention {self._too_old()}"
        if not self.paddle_flash_attention:
            return "the installed Paddle was built without flash attention"
        return None

    def _too_old(self) -> str:
        return (
            f"needs compute capability {_dotted(_MIN_COMPUTE_CAPABILITY)}, and {self.device_name} "
            f"has {_dotted(self.compute_capability)}"
        )


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """The device, the dtype of parameters and activations, and the attention of a run.

    ``attention`` is "auto", "flash" (any but the reference), "pypkg", "paddle" or "reference";
    attention_choice.py chooses the implementation from it.
    """

    capabilities: Capabilities
    dtype: str  # "float32", "bfloat16" or "float16"
    attention: str
    reasons: tuple[str, ...] = ()
    matmul_precision: str = "float32"  # of float32 matrices on a CPU

    @property
    def device(self) -> str:
        """The device for paddle.set_device."""
        return self.capabilities.device

    def describe(self) -> str:
        """One line for the log."""
        c = self.capabilities
        capability = f"compute capability {_dotted(c.compute_capability)}, "
        return "; ".join(
            [
                f"device: {c.device_name} ({capability if c.compute_capability else ''}"
                f"{c.memory_bytes / 2**30:.0f} GiB)",
                f"Paddle {c.paddle}",
                f"operators: {c.ops_backend} (compiled: {c.compiled_ops})",
                self.dtype
                + (" with bfloat16 products" if self.matmul_precision == "bfloat16" else ""),
                *self.reasons,
            ]
        )


def probe(device: str | None = None, ops_backend: str | None = None) -> Capabilities:
    """Selects the device of this process and its operators, and returns their capabilities.

    Args:
        device: "cpu" or "gpu"; None: a GPU if Paddle sees one.
        ops_backend: "auto", "compiled", "triton" or "reference"; None: the choice is not changed.

    Raises:
        UserError: the device does not exist, or the backend cannot run.
    """
    import paddle

    cuda = paddle.is_compiled_with_cuda()
    gpus = paddle.device.cuda.device_count() if cuda else 0
    if device == "gpu" and not gpus:
        reason = "sees no GPU" if cuda else "is the build for CPUs"
        raise UserError(
            f'device is "gpu", but the installed Paddle {paddle.version.full_version} {reason}; '
            'set device to "cpu", or install paddlepaddle-gpu on a machine with a GPU'
        )
    device = device or ("gpu" if gpus else "cpu")
    paddle.set_device(device)

    from pypkg import ops

    if ops_backend:
        ops.set_backend(ops_backend)
    if device == "gpu":
        properties = paddle.device.cuda.get_device_properties()
        name, memory = properties.name, properties.total_memory
        capability = (properties.major, properties.minor)
    else:
        name, capability = cpu_fields().get("model name", "CPU"), None
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Capabilities(
        device=device,
        device_name=name,
        compute_capability=capability,
        memory_bytes=memory,
        paddle=f"{paddle.version.full_version}"
        + (f" with CUDA {paddle.version.cuda()}" if cuda else " for CPUs"),
        ops_backend=ops.backend(),
        compiled_ops=_describe_compiled_ops(library_dir() / "build_info.json"),
        kernel_sources=_build_info(library_dir() / "build_info.json").get(DIGEST),
        paddle_flash_attention=device == "gpu" and _has_flash_attention(),
    )


def resolve(settings: Settings, capabilities: Capabilities) -> ExecutionPlan:
    """Chooses dtype and attention of the run: those of the settings, else the best of the device.

    Raises:
        UserError: the device does not support a setting that was given.
    """
    problems: list[str] = []
    reasons: list[str] = []

    dtype = _asked_dtype(settings, capabilities, problems, reasons)
    attention = _asked_attention(settings, capabilities, problems)
    narrow = settings.matmul_precision == "bfloat16"
    if narrow and capabilities.compute_capability is not None:
        problems.append(
            'matmul_precision is "bfloat16", which is for CPUs, but the device is a GPU; set bf16 '
            "to true instead"
        )
    elif narrow and dtype != "float32":
        problems.append(
            'matmul_precision is "bfloat16", which is for float32 tensors, but the run is in '
            f"{dtype}; leave it out"
        )
    if settings.stochastic_rounding and dtype != "bfloat16":
        problems.append(
            "stochastic_rounding is true, which is for bfloat16 parameters, but the run is in "
            f"{dtype}; set bf16 to true, or stochastic_rounding to false"
        )
    if problems:
        raise UserError(listed(problems, "settings that this device cannot follow"))
    return ExecutionPlan(
        capabilities=capabilities,
        dtype=dtype,
        attention=attention,
        reasons=tuple(reasons),
        matmul_precision=settings.matmul_precision,
    )


def _asked_dtype(
    settings: Settings, capabilities: Capabilities, problems: list[str], reasons: list[str]
) -> str:
    """The dtype of parameters and activations. On a CPU, 16 bits need the setting device "cpu".

    A run in 16 bits that finds no GPU is rejected, because it was meant for one.
    """
    if settings.fp16:
        name, dtype, obstacle = "fp16", "float16", capabilities.float16_obstacle()
    else:
        name, dtype, obstacle = "bf16", "bfloat16", capabilities.bfloat16_obstacle()
    asked: bool | None = getattr(settings, name)
    if asked is False:
        return "float32"
    if asked and capabilities.compute_capability is None and settings.device == "cpu":
        reasons.append("operators compute in float32, which takes longer than a run in float32")
        return dtype
    if obstacle and asked:
        way_out = "set it to false to train in float32"
        if capabilities.compute_capability is None:
            way_out += ', or device to "cpu" to compute in float32 on tensors of 16 bits'
        problems.append(f"{name} is true, but {obstacle}; {way_out}")
    elif obstacle:
        reasons.append(obstacle)
    return "float32" if obstacle else dtype


def _asked_attention(settings: Settings, capabilities: Capabilities, problems: list[str]) -> str:
    """The value of ``attention_backend``, or that which ``use_flash_attention`` implies."""
    asked, flash = settings.attention_backend, settings.use_flash_attention
    obstacles = {
        "pypkg": capabilities.own_attention_obstacle(),
        "paddle": capabilities.paddle_attention_obstacle(),
    }
    if flash is not None and asked != "auto" and flash == (asked == "reference"):
        problems.append(
            f"use_flash_attention is {str(flash).lower()}, but attention_backend is {asked!r}; "
            "leave one of them out"
        )
    elif obstacle := obstacles.get(asked):
        problems.append(f"attention_backend is {asked!r}, but {obstacle}; leave it out")
    elif flash and asked == "auto" and None not in obstacles.values():
        problems.append(
            f"use_flash_attention is true, but {', and '.join(filter(None, obstacles.values()))}; "
            "set it to false, or leave it out"
        )
    if flash is False:
        return "reference"
    return "flash" if flash and asked == "auto" else asked


def _has_flash_attention() -> bool:
    """Whether Paddle was built with FlashAttention, by Paddle's own flag."""
    import paddle

    return bool(paddle.framework._global_flags().get("FLAGS_flash_attn_available", False))


def _build_info(file: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return info


def _describe_compiled_ops(build_info: Path) -> str:
    info = _build_info(build_info)
    if not info.get("paddle_version"):
        return "not built"
    flavour = f"CUDA {info['cuda_version']}" if info["cuda_version"] else "CPU only"
    return f"built for Paddle {info['paddle_version']}, {flavour}"


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability or ()))
