"""A process of test_half_memory.py: bytes in bfloat16 of kept tensors and of optimizer state.

Paddle's operators have no 16-bit kernels for a CPU: pypkg/ops/dispatch/half_on_cpu.py runs them in
float32 on copies, which they save. Hooks of saved tensors put the 16-bit tensors in the places of
the copies, as on a GPU.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import paddle
from distributed_testing import REPO, report
from paddle import Tensor

sys.path.insert(0, str(REPO / "tests" / "models"))
sys.path.insert(0, str(Path(__file__).parent))
from measured_memory import allocated, batches_of, make_engine
from planned_memory import config_of, settings_of

from pypkg.models import from_config
from pypkg.ops.dispatch import half_on_cpu
from pypkg.parallel import mesh

_originals: dict[int, weakref.ref[Tensor]] = {}  # by the address of their float32 copies
_plain = half_on_cpu._wide


def wide(value: Any) -> Any:
    copy = _plain(value)
    if copy is not value:
        _originals[copy.data_ptr()] = weakref.ref(value)
    return copy


def pack(saved: Tensor, width: int) -> Any:
    """What a kernel for 16 bits would save; the tensors themselves are not needed again.

    Args:
        width: elements of a residual stream. Statistics in float32 have fewer.
    """
    found = _originals.get(saved.data_ptr(), lambda: None)()
    if saved.dtype != paddle.float32:
        return saved
    if found is not None and found.size == saved.size:
        return found.detach()
    # Else an output in float32, whose 16-bit form the next operator saves.
    return saved if saved.size < width else None


def kept_bytes(case: dict[str, Any]) -> int:
    """What a forward pass of a micro batch leaves behind."""
    config, settings = config_of(case), settings_of(case)
    with paddle.utils.unique_name.guard():
        model = from_config(config, "bfloat16", seed=1)
    batch = {k: paddle.to_tensor(v) for k, v in batches_of(config, settings)[0].items()}
    width = batch["input_ids"].size * config.hidden_size
    for _ in range(2):  # the first pass makes tables
        gc.collect()
        _originals.clear()
        before = allocated()
        hooks = paddle.autograd.saved_tensors_hooks(lambda x: pack(x, width), lambda x: x)
        with hooks:
            loss = model.loss(**batch)
        kept = allocated() - before
        del loss
    return kept


def held_bytes(case: dict[str, Any]) -> int:
    """Weights, optimizer state and tables between two steps."""
    config, settings = config_of(case), settings_of(case)
    gc.collect()
    before = allocated()
    engine, batches = make_engine(config, settings, "bfloat16"), batches_of(config, settings)
    for _ in range(2):
        engine.forward_backward(batches)
        engine.update(1e-3)
    gc.collect()
    return allocated() - before


if __name__ == "__main__":
    half_on_cpu.install()
    half_on_cpu._wide = wide
    mesh.initialize(mesh.Degrees())
    cases = json.loads(sys.argv[1])
    report([{"kept": kept_bytes(case), "held": held_bytes(case)} for case in cases])
