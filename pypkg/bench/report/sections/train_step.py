"""Training steps of whole models."""

from __future__ import annotations

from pypkg.bench.report.quantities import median_and_quartiles
from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Training step"

_PADDLENLP = (
    "- `PaddleNLP`: LlamaForCausalLM, with the training step and AdamW of its Trainer, in an "
    "environment of its own. Settings of the model and environment variables are the defaults, "
    "with which Paddle uses one thread",
    "- `threads and MKL set`: the same with the variables that pypkg sets before it imports "
    "Paddle, OMP_NUM_THREADS and, for AMD processors, MKL_DEBUG_CPU_TYPE",
)


def render(result: Result) -> list[str]:
    rows = result["rows"]
    ours = rows[0]["median"]
    body = [
        [
            row["baseline"],
            *median_and_quartiles(row),
            f"{row['tokens_per_step'] / row['median']:.0f}",
            f"{row['median'] / ours:.2f}",
            f"{100 * row['flops_per_step'] / row['median'] / result['matmul_rate']:.0f} %",
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
            f"{row['first_loss']:.4f}",
            f"{row['last_loss']:.4f}",
        ]
        for row in rows
    ]
    head = ["baseline", "s/step", "quartiles", "tokens/s", "vs first", "MFU", "peak GiB"]
    head += ["first loss", "last loss"]
    return [
        f"- {result['workload']}",
        "- A step is forward, backward, clipping and AdamW. All baselines begin with the same "
        "weights and see the same batch at every step, so losses should agree",
        "- `buffers kept`: glibc's malloc keeps large buffers instead of returning them to the "
        "system; pypkg sets this for itself",
        *(_PADDLENLP if any(row["baseline"].startswith("PaddleNLP") for row in rows) else ()),
        f"- MFU: (6 N + 12 L h s) x tokens/s / {result['matmul_rate'] / 1e9:.0f} GFLOP/s, the "
        f"fastest float32 matrix product of this run ({result['matmul_source']}). N counts the "
        "embedding too, which is no product, and attention is counted without its mask. So a "
        "small model may exceed 100 %, as may products in bfloat16",
        "- `vs first`: time per step divided by that of the first row; peak GiB: resident set",
        "",
        *table(head, body, text_columns=1),
    ]
