"""Times Paddle's flash attention at the shapes of `gpu_check.py`, in a process of its own.

torch and Paddle bring CUDA libraries of their own, so gpu_check.py starts this with the Python that
has paddlepaddle-gpu. It prints one JSON object a line: shape, pass ("forward", "backward") and the
milliseconds of each repeat. ``--device cpu`` times our CPU kernels, to try the script out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import paddle

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # nothing is installed on a GPU
from pypkg.ops import flash_attention, paddle_flash_attention

L2_FLUSH_BYTES = 512 << 20  # as pypkg.bench.ops.gpu.timers


def sizes(shape: str) -> tuple[int, int, int, int, int]:
    """Batch, sequence, query heads, key heads and head_dim of e.g. "2x8192x32/8x128 causal"."""
    batch, sequence, heads, head_dim = shape.partition(" ")[0].split("x")
    heads_q, _, heads_k = heads.partition("/")
    return int(batch), int(sequence), int(heads_q), int(heads_k or heads_q), int(head_dim)


def gpu_times(run: Callable[[], object], repeats: int = 25) -> list[float]:
    """Milliseconds by CUDA events; a write to more than the L2 cache precedes each run."""
    flushed = paddle.zeros([L2_FLUSH_BYTES], dtype="int8")
    for _ in range(3):
        run()
    pairs = [
        [paddle.device.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)
    ]
    for start, end in pairs:
        flushed.zero_()
        start.record()
        run()
        end.record()
    paddle.device.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def cpu_times(run: Callable[[], object], repeats: int = 3) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def time_shape(shape: str, device: str) -> dict[str, list[float]]:
    """Milliseconds of the causal forward and backward pass in bfloat16, by pass."""
    batch, sequence, heads_q, heads_k, head_dim = sizes(shape)
    q, k, v, dout = (
        paddle.randn([batch, sequence, heads, head_dim]).astype("bfloat16")
        for heads in (heads_q, heads_k, heads_k, heads_q)
    )
    attention, times = paddle_flash_attention, gpu_times
    if device == "cpu":
        attention, times = flash_attention, cpu_times
    with paddle.no_grad():
        forward = times(lambda: attention(q, k, v))
    for each in (q, k, v):
        each.stop_gradient = False
    out = attention(q, k, v)
    backward = times(lambda: paddle.grad(out, [q, k, v], dout, retain_graph=True))
    return {"forward": forward, "backward": backward}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    args = parser.parse_args()
    paddle.set_device(args.device)
    for shape in args.shapes:
        for pass_name, samples in time_shape(shape, args.device).items():
            print(json.dumps({"shape": shape, "pass": pass_name, "samples": samples}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
