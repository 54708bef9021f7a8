"""The parallel strategies on the GPUs of this machine, over NCCL: make gpu-smoke

Runs every column and combination of the capability matrix that fits the GPUs present, on models of
several kinds, in bfloat16 (float32 master weights) and, where asked, float32, each against the same
steps on one GPU, and writes a report. First, our attention and Paddle's flash attention are
compared, each as the second opinion on the other, and what has to be exact is checked: main
gradients, and gradients that are the same in every run. Needs paddlepaddle-gpu.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "matrix"))
sys.path.insert(0, str(Path(__file__).parents[2] / "distributed" / "testing"))
sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from pypkg.device.threads import import_paddle

import_paddle()  # with the flags of a run, which ranks inherit
from exactness import check_exactness  # noqa: E402
from matrix_cells import LAYOUTS  # noqa: E402
from run_matrix import LIMITS, Conditions, run_layout  # noqa: E402
from second_opinion import compare_attention  # noqa: E402

ROWS = ["LLaMA2-70B", "BaiChuan-13B", "GPT3", "Bloom-176B", "ChatGLM-6B", "GLM-130B"]
# bfloat16 has 8 bits: a unit in the last place is 2^-8 = 4e-3. Losses are means over thousands of
# roundings, parameters follow the float32 master weights and differ by a rounding or a few.
BFLOAT16_LIMITS = {"loss_diff": 5e-3, "grad_norm_diff": 5e-2, "parameter_diff": 3e-2}
# Sums of float32 products in another order, TF32 off.
FLOAT32_LIMITS = {name: 10 * limit for name, limit in LIMITS.items()}


def environment(rank: int) -> dict[str, str]:
    """Each rank on a GPU of its own, talking over NCCL."""
    return {
        "FLAGS_selected_gpus": str(rank),
        "PYPKG_MATRIX_DEVICE": f"gpu:{rank}",
        "PADDLE_DISTRI_BACKEND": "nccl",
    }


def second_opinion() -> list[dict]:
    """Our attention against Paddle's on the first GPU."""
    from pypkg import ops

    rows = compare_attention(ops.flash_attention, ops.paddle_flash_attention, 1024, (64, 128, 256))
    passed = sum(row["passed"] for row in rows)
    print(f"our attention against Paddle's: {passed} of {len(rows)} agree", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--report", type=Path, default=Path("runs/gpu_smoke.json"))
    options = parser.parse_args()

    import paddle

    if not paddle.is_compiled_with_cuda() or not paddle.device.cuda.device_count():
        print(f"no GPU: Paddle {paddle.__version__} sees none here; nothing was run")
        return 2
    gpus = paddle.device.cuda.device_count()
    device = paddle.device.cuda.get_device_name()
    fitting = [name for name, each in LAYOUTS.items() if each.degrees.world_size <= gpus]
    print(f"{gpus} x {device}: {len(fitting)} of {len(LAYOUTS)} layouts fit", flush=True)
    attention, exact = second_opinion(), check_exactness()
    cells: dict[str, dict[str, dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.dtypes:
            limits = FLOAT32_LIMITS if dtype == "float32" else BFLOAT16_LIMITS
            conditions = Conditions(dtype, limits, environment, fork=False)
            for name in fitting:
                own = Path(folder) / dtype
                found = run_layout(name, options.rows, own, conditions)
                cells[f"{name}, {dtype}"] = found
                passed = sum(cell["passed"] for cell in found.values())
                print(f"{name}, {dtype}: {passed} of {len(found)}", flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": device,
        "gpus": gpus,
        "paddle": paddle.__version__,
        "cuda": paddle.version.cuda(),
        "left_out": sorted(set(LAYOUTS) - set(fitting)),
        "attention": attention,
        "exactness": exact,
        "cells": cells,
    }
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n")
    failed = [f"attention {row['case']}" for row in attention if not row["passed"]]
    failed += [f"exactness {row['case']}" for row in exact if not row["passed"]]
    failed += [
        f"{name}: {row}" for name, row_cells in cells.items()
        for row, cell in row_cells.items() if not cell["passed"]
    ]  # fmt: skip
    print(f"report: {options.report}; " + (f"failed: {failed}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
