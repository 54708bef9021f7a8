"""Patches for code of fleet that requires a GPU although a CPU could run it."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.base import core

_SHARDING = "paddle.distributed.fleet.meta_parallel.sharding.group_sharded_"
_GROUP_SHARDED = (
    "paddle.distributed.sharding.group_sharded",
    *(_SHARDING + name for name in ("optimizer_stage2", "stage2", "stage3", "utils", "storage")),
)


class _Replaced:
    """A module as another module sees it, with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install() -> None:
    """Makes that code run on a CPU. For all other code the device is still a CPU."""
    dist.wait = lambda *_, **__: None  # nothing runs on another stream
    dist.ParallelEnv._device_id = 0  # PipelineLayer reads it
    library: Any = core
    if not hasattr(library, "nccl_version"):
        library.nccl_version = lambda: 21000  # asked whether ReduceOp.AVG exists
    _install_group_sharded()


def _install_group_sharded() -> None:
    """Patches the modules of ZeRO stages 2 and 3."""

    def first_gpu() -> str:
        return "gpu:0"

    device = _Replaced(paddle.device, get_device=first_gpu)
    names = {
        "paddle": _Replaced(paddle, get_device=first_gpu, device=device),
        "core": _Replaced(core, is_compiled_with_cuda=lambda: True),
        "device_guard": lambda *_, **__: contextlib.nullcontext(),
        "cvt_to_device": lambda tensor, *_, **__: tensor,
    }
    for module in map(importlib.import_module, _GROUP_SHARDED):
        for name, value in names.items():
            if hasattr(module, name):
                setattr(module, name, value)
    # On a CPU, fleet's copy to the CPU is the tensor itself, and fleet would then free its storage.
    storage = importlib.import_module(_SHARDING + "storage").ParamStorage
    add = storage.add_rank_params
    storage.add_rank_params = lambda self, parameters, align, convert_gpu=True: add(
        self, parameters, align, False
    )
