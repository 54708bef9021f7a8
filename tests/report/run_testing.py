"""output_dirs of runs that never ran, written by what writes them in a run; no Paddle."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pypkg.config import Settings
from pypkg.files.checksums import file_records
from pypkg.parallel.mesh import Degrees
from pypkg.training.checkpoint.folders import SETTINGS_FILE, STATE_FILE
from pypkg.training.checkpoint.manifest import Manifest, listed_files, put_manifest
from pypkg.training.ledger import record
from pypkg.training.reporting.reporters import METRICS_FILE, JsonLinesReporter
from pypkg.training.reporting.run_info import RunInfo, write_run_info
from pypkg.training.state import TrainerState

TOKENS_PER_STEP = 1024
LAYOUT = Degrees(data=2, pipeline=2, tensor=2)


def settings(**changes: Any) -> Settings:
    given = {"model_name_or_path": "llama-58m", "max_steps": 60, "logging_steps": 2}
    return Settings(
        **given
        | {"do_train": True, "do_eval": True, "save_steps": 20, "sample_prompt": "def "}
        | changes
    )


def metrics(step: int, rate: float) -> dict[str, float]:
    loss = 2 + 3 * math.exp(-step * rate)
    return {
        "loss": loss,
        "learning_rate": 1e-3 * (1 - step / 120),
        "grad_norm": 5.0 if step == 32 else 0.5 + 0.1 * math.sin(step),
        "tokens_per_second_per_device": 900.0 + step % 7,
        "peak_memory_gib": 1.5,
        "consumed_tokens": step * TOKENS_PER_STEP,
        "data_wait_seconds_per_step": 0.001,
        "loss/books": loss - 0.1,
        "loss/code": loss + 0.1,
        "mfu": 0.31,
    }


def write_run(folder: Path, rate: float = 0.05, **changes: Any) -> Path:
    """A run of 60 steps with everything that a page shows; ``changes`` are of the settings."""
    folder.mkdir(parents=True)
    chosen = settings(output_dir=str(folder), **changes)
    reporter = JsonLinesReporter(folder / METRICS_FILE, last_step=0)
    for step in range(2, 61, 2):
        reporter.report(step, metrics(step, rate))
        if step % 10 == 0:
            loss = metrics(step, rate)["loss"] + 0.2
            reporter.report(step, {"eval_loss": loss, "eval_perplexity": math.exp(loss)})
    reporter.close()
    write_run_info(folder, info(chosen))
    record(folder, "rollback", step=32, reason="the gradient norm is 5", to_step=20, steps=[32, 32])
    record(
        folder,
        "layout_changed",
        step=40,
        before={"data": 1, "tensor": 2},
        after={"data": 2, "tensor": 2},
    )
    record(folder, "restart", step=None, exit_code=137)
    for step in (20, 40, 60):
        write_checkpoint(folder, step)
    damaged = folder / "checkpoint-40" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    texts = [{"step": step, "prompt": "Once", "text": f" upon {step} times"}
             for step in (20, 40)]  # fmt: skip
    texts.append({"step": 40, "prompt": "<b>", "text": " </script><script>alert(1)</script>"})
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    (folder / "summary.json").write_text(
        json.dumps({"global_step": 60, "sample": "def main(): pass"}), encoding="utf-8"
    )
    return folder


def info(chosen: Settings) -> RunInfo:
    return RunInfo(
        settings=json.loads(chosen.to_json()),
        model={"model_type": "llama", "num_hidden_layers": 6, "parameters": 58_000_000},
        layout=asdict(LAYOUT),
        hosts=["first"] * 4 + ["second"] * 4,
        environment={"pypkg": "0.1.0", "Paddle": "3.3.1", "device": "a GPU of a test"},
        plan={
            "peak_bytes": 2 * 2**30,
            "memory_terms": {"weights": 2**29, "activations": 2**30},
            "tokens_per_second_per_device": 1000.0,
            "step_terms": {"compute": 0.5, "communication": 0.1},
        },
    )


def write_checkpoint(output_dir: Path, step: int) -> None:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(1000 + step))
    (folder / SETTINGS_FILE).write_text(settings().to_json(), encoding="utf-8")
    state = TrainerState(global_step=step, consumed_tokens=step * TOKENS_PER_STEP)
    (folder / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
    manifest = Manifest(
        step,
        0,
        step * TOKENS_PER_STEP,
        None,
        layout=asdict(LAYOUT),
        files={
            name: found for name in listed_files(folder)
            for found in file_records([folder / name]).values()
        },
    )  # fmt: skip
    put_manifest(folder, manifest)
