"""A process of ``train-step`` or ``generate``: runs a step of a baseline for each line it reads.

The Python of PaddleNLP's environment runs this file by its path and has no pypkg.

Protocol: the argument is a JSON object. Standard output has one JSON object per line, first the
rate of a matrix product, then the result of each step. The process ends with its standard input.
A step calls the function given to it between its backward pass and its update.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Step = Callable[[Callable[[], None]], float]

_NOT_MEASURED = 0.0  # the limit is the fastest product of all processes
_LEARNING_RATE, _BETAS, _EPSILON, _WEIGHT_DECAY, _MAX_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


def make_weights(task: Mapping[str, Any]) -> tuple[float, Step]:
    """Writes the random initial weights of all baselines."""
    _start_paddle(task)
    from pypkg.bench.ops.frameworks import PaddleFramework
    from pypkg.bench.ops.limits import matmul_rate
    from pypkg.models import from_config, save_pretrained
    from pypkg.models.architecture.registry import load_config

    model = from_config(load_config(task["config"]), seed=0)
    save_pretrained(model, task["folder"])
    return matmul_rate(PaddleFramework()), _no_step


def train_pypkg(task: Mapping[str, Any]) -> tuple[float, Step]:
    """Our model and optimizer, as the trainer uses them."""
    _start_paddle(task)
    import paddle

    from pypkg import ops
    from pypkg.bench.ops.frameworks import PaddleFramework
    from pypkg.bench.ops.limits import matmul_rate
    from pypkg.models import from_pretrained
    from pypkg.parallel import mesh
    from pypkg.parallel.optimizer.distribute import distribute
    from pypkg.parallel.optimizer.factory import UpdateOptions

    rate = matmul_rate(PaddleFramework())
    if task["autocast"]:
        ops.set_matmul_precision("bfloat16")
    model = from_pretrained(task["folder"])
    model.train()
    options = UpdateOptions(*_BETAS, _EPSILON, _WEIGHT_DECAY, _MAX_NORM)
    wrapped, updater = distribute(model, options, mesh.current())
    input_ids, labels = (paddle.to_tensor(each) for each in _batch(task, model.config.vocab_size))

    def step(update_begins: Callable[[], None]) -> float:
        loss = wrapped.forward_backward([{"input_ids": input_ids, "labels": labels}], updater.scale)
        update_begins()
        updater.step(_LEARNING_RATE)
        return float(loss)

    return rate, step


def train_transformers(task: Mapping[str, Any]) -> tuple[float, Step]:
    """The model of transformers with SDPA, and torch's fused AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    from pypkg.bench.ops.frameworks import TorchFramework
    from pypkg.bench.ops.limits import matmul_rate

    rate = matmul_rate(TorchFramework(task["threads"]))
    model = AutoModelForCausalLM.from_pretrained(
        task["folder"], dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=_BETAS, eps=_EPSILON, fused=True)
    batch = _batch(task, model.config.vocab_size)
    input_ids, labels = (torch.from_numpy(each) for each in batch)

    def step(update_begins: Callable[[], None]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=task["autocast"]):
            # shift_labels means that the labels are already those of the next tokens.
            loss = model(input_ids, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        update_begins()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return rate, step


def train_paddlenlp(task: Mapping[str, Any]) -> tuple[float, Step]:
    """The model of PaddleNLP and its Trainer, called as its loop over batches calls it."""
    import paddle
    from paddlenlp.trainer import Trainer, TrainingArguments
    from paddlenlp.transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        task["folder"], dtype="float32", convert_from_torch=True
    )
    arguments = TrainingArguments(
        output_dir=task["folder"],
        device="cpu",
        learning_rate=_LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        adam_epsilon=_EPSILON,
        weight_decay=_WEIGHT_DECAY,
        max_grad_norm=_MAX_NORM,
    )
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=1)  # a constant rate has no end
    batch = _batch(task, model.config.vocab_size)
    inputs = dict(zip(("input_ids", "labels"), (paddle.to_tensor(each) for each in batch)))

    def step(update_begins: Callable[[], None]) -> float:
        loss = trainer.training_step(model, inputs)
        update_begins()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.clear_grad()
        return loss.item()

    return _NOT_MEASURED, step


def generate_pypkg(task: Mapping[str, Any]) -> tuple[float, Step]:
    """Our generation; a step continues all prompts, and its update begins at the second token."""
    _start_paddle(task)
    from pypkg.models import from_pretrained
    from pypkg.models.generate import stream
    from pypkg.models.sampling import Sampling

    model = from_pretrained(task["folder"])
    prompts = _batch(task, model.config.vocab_size)[0].tolist()

    def step(first_is_there: Callable[[], None]) -> float:
        made: list[list[int | None]] = []
        for tokens in stream(model, prompts, task["new"], Sampling(temperature=0.0)):
            if not made:
                first_is_there()
            made.append(tokens)
        return _checksum(np.array(made).T)

    return _NOT_MEASURED, step


def generate_transformers(task: Mapping[str, Any]) -> tuple[float, Step]:
    """The generation of transformers, as ``generate_pypkg``."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        task["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    prompts = torch.from_numpy(_batch(task, model.config.vocab_size)[0])

    class Streamer(BaseStreamer):
        def __init__(self, first_is_there: Callable[[], None]) -> None:
            self._puts, self._first_is_there = 0, first_is_there

        def put(self, value: Any) -> None:
            self._puts += 1  # the prompts are the first
            if self._puts == 2:
                self._first_is_there()

        def end(self) -> None:
            pass

    def step(first_is_there: Callable[[], None]) -> float:
        with torch.no_grad():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=task["new"],
                max_new_tokens=task["new"],
                eos_token_id=None,
                pad_token_id=0,
                streamer=Streamer(first_is_there),
            )
        return _checksum(made[:, prompts.shape[1] :].numpy())

    return _NOT_MEASURED, step


def _checksum(tokens: np.ndarray) -> float:
    """Of int64 [batch, tokens]."""
    return float((tokens.ravel() * np.arange(1, tokens.size + 1)).sum())


_STACKS = {
    "make_weights": make_weights,
    "pypkg": train_pypkg,
    "transformers": train_transformers,
    "paddlenlp": train_paddlenlp,
    "generate_pypkg": generate_pypkg,
    "generate_transformers": generate_transformers,
}


def _start_paddle(task: Mapping[str, Any]) -> None:
    from pypkg.device.threads import configure_cpu, import_paddle

    configure_cpu(task["threads"])
    import_paddle()


def _batch(task: Mapping[str, Any], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocab_size, (task["batch"], task["seq"] + 1))
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


def _no_step(_: Callable[[], None]) -> float:
    raise RuntimeError("this process does not train")


def main(argument: str) -> None:
    # The output of frameworks must not mix with the lines of the protocol.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        task = json.loads(argument)
        rate, step = _STACKS[task["stack"]](task)
        print(json.dumps({"matmul_rate": rate}), file=answers)
        for _ in sys.stdin:
            print(json.dumps(_timed(step)), file=answers)


def _timed(step: Step) -> dict[str, float]:
    """The answer of one step."""
    times = [time.perf_counter()]
    loss = step(lambda: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    start, update, end = times
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "loss": loss,
        "seconds": end - start,
        "update_seconds": end - update,
        "peak_rss_bytes": peak,
    }


if __name__ == "__main__":
    # The folder of a script is first on the path, where it would hide packages of equal names.
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) != folder]
    main(sys.argv[1])
