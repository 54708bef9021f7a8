"""torch.distributed.checkpoint in one process, on tensors of as many bytes as a checkpoint has.

The Python of torch's environment runs this file by its path and has no pypkg. Arguments: a folder,
bytes, rounds, threads. It prints one JSON object for each round.
"""

from __future__ import annotations

import json
import shutil
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

_TENSOR = 16 << 20  # bytes of each tensor


def main() -> None:
    folder, size, rounds, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    state = {f"t{i}": torch.rand(_TENSOR // 4) for i in range(-(-size // _TENSOR))}
    for _ in range(rounds):
        _update(state)
        begin = time.perf_counter()
        dcp.save(state, checkpoint_id=f"{folder}/dcp")
        total = time.perf_counter() - begin
        shutil.rmtree(f"{folder}/dcp")
        _update(state)
        begin = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=f"{folder}/dcp")
        stall = time.perf_counter() - begin
        future.result()
        async_total = time.perf_counter() - begin
        shutil.rmtree(f"{folder}/dcp")
        result = {
            "bytes": len(state) * _TENSOR,
            "sync": {"stall": total, "total": total},
            "async": {"stall": stall, "total": async_total},
        }
        print(json.dumps(result), flush=True)


def _update(state: dict[str, torch.Tensor]) -> None:
    """Reads and writes all tensors, as a step of training does before a save."""
    for tensor in state.values():
        tensor.mul_(0.999)


if __name__ == "__main__":
    main()
