"""``train-step --host-time``: what the host does in a step, on one thread.

The matrices are so small that their arithmetic is a minor part: what is timed is the interpreter,
the framework's dispatch and its autograd. On a GPU this time must hide behind the kernels.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pypkg.bench.environment import cpu_device
from pypkg.bench.timing import summarize
from pypkg.bench.train_step.baselines import choose_baselines
from pypkg.bench.train_step.suite import train
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

LAYERS, HIDDEN, TOKENS, VOCABULARY = 28, 64, 16, 1024
BASELINES = ("pypkg", "transformers + torch, float32", "PaddleNLP, float32")
_STEPS_PER_TURN = 10  # without a pause, so that caches are as warm as in training
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 176,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def run_host_time(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that the command line requests; imports no framework.

    Raises:
        UserError: a model or batch is given, a baseline is unknown, or an interpreter has no
            PaddleNLP.
        BenchmarkError: as ``suite.train``.
    """
    if (options.config, options.batch, options.seq) != ("llama-58m", 4, 512):
        raise UserError("--host-time has a model and batch of its own; leave out --config, --batch "
                        "and --seq")  # fmt: skip
    options.baseline = options.baseline or list(BASELINES)
    baselines, notes = choose_baselines(options)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        task = {"config": folder, "batch": 1, "seq": TOKENS, "threads": 1}
        _, samples, _ = train(baselines, task, options.steps, math.log(VOCABULARY), _STEPS_PER_TURN)
    rows = []
    for name, steps in samples.items():
        updates = [each["update_seconds"] for each in steps]
        before = [each["seconds"] - each["update_seconds"] for each in steps]
        rows.append(
            {
                "baseline": name,
                "forward_backward": asdict(summarize(before)),
                "update": asdict(summarize(updates)),
            }
        )
    return {
        "kind": "host-time",
        "device": cpu_device(names_amd=True),
        "layers": LAYERS,
        "workload": f"LLaMA with {LAYERS} layers, hidden size {HIDDEN} and {VOCABULARY} entries, "
        f"{TOKENS} tokens, one thread; {options.steps * _STEPS_PER_TURN} timed steps",
        "notes": notes,
        "rows": rows,
    }
