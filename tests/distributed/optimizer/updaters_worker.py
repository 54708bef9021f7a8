"""One rank of test_updaters.py: five updates under a layout against the same in one process.

Arguments: a folder for files, JSON of a list of cases (see test_updaters.py).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from delayed import Trace, delayed
from distributed_testing import REPO, report
from paddle.distributed.fleet.base import topology
from plain_adamw import build_adamw, clip_by_global_norm, optimizer_state
from whole_values import SlicesOf, slices_of, whole_parameters, whole_state
from written_checkpoint import write_and_read

sys.path.insert(0, str(REPO / "tests" / "models"))
from tiny_configs import tiny

from pypkg.models import from_config
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.decoder import Decoder
from pypkg.models.generate import generate
from pypkg.models.layers.recompute import Recompute
from pypkg.models.sampling import Sampling
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import mean_over_token_shards
from pypkg.parallel.optimizer.clipping import layer_of
from pypkg.parallel.optimizer.data_parallel import gradient_of
from pypkg.parallel.optimizer.distribute import DistributedModel, distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.parallel.optimizer.updater import Updater
from pypkg.parallel.optimizer.zero.sliced_layers import SlicedLayers
from pypkg.parallel.optimizer.zero.stages import ZeroStage2
from pypkg.training.step.normalization import loss_weights
from pypkg.training.tp_sharding import ModelTpSharding

SEED, ROWS, SEQUENCE, STEPS, RATE = 3, 8, 16, 5, 1e-3
ADAMW = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.5}
MAX_NORM = 0.7
CHECKED = (
    "memory", "overlapped", "scaler", "kept", "read", "read_weights", "read_state", "num_bytes",
    "same_tensors", "share_together", "share_apart", "converted", "weights_kept", "state_kept",
)  # fmt: skip
CHANGES = {"multi_query": ("chatglm2", {"num_key_value_heads": 1})}


def config_of(family: str) -> ModelConfig:
    name, changes = CHANGES.get(family, (family, {}))
    return tiny(name).replace(**changes)


def new_model(
    config: ModelConfig, wholes: Mapping | None = None, dtype: str = "float32"
) -> Decoder:
    """Under every layout the same: from ``wholes``, or random, with vectors away from 1 and 0."""
    model = from_config(config, dtype, seed=SEED)
    tp_sharding = ModelTpSharding(config)
    shapes = tp_sharding.shapes()
    for name, parameter in model.named_parameters():
        if wholes is not None:
            parameter.set_value(tp_sharding.read(name, slices_of(wholes[name])))
        elif parameter.ndim == 1:
            whole = np.full(shapes[name], parameter[0].item(), np.float32)
            whole += np.random.default_rng(len(name)).normal(0, 0.1, whole.shape)
            own = paddle.to_tensor(tp_sharding.read(name, slices_of(whole)))
            parameter.set_value(own.astype(parameter.dtype))
    return model


def batch_of(config: ModelConfig, step: int, unequal: bool) -> dict[str, np.ndarray]:
    """One global batch; with ``unequal``, rows have 0 to 12 labels that count, else all 12."""
    generator = np.random.default_rng(100 + step)
    shape = [ROWS, SEQUENCE]
    batch = {name: generator.integers(8, 4000, shape) for name in ("input_ids", "labels")}
    batch["labels"][:, ::5] = -100
    if unequal:
        kept = generator.permutation(np.linspace(0, SEQUENCE, ROWS).astype(int))
        batch["labels"][np.arange(SEQUENCE) >= kept[:, None]] = -100
    if config.prefix_lm:
        batch["input_ids"][:, 6:8] = config.gmask_token_id, config.sop_token_id
    return batch


def one_process(family: str, skipped: int | None, unequal: bool, optim: str) -> dict[str, Any]:
    """Losses, norms, final parameters and state of one process; AdamW's is plain Paddle."""
    if optim == "adamw":
        return plain_process(family, skipped, unequal)
    case = {"family": family, "unequal": unequal, "options": {"optim": optim}}
    run = new_run(case)
    losses, norms, _ = train(run, range(STEPS), case)
    parameters = {n: p.numpy() for n, p in run.layer.named_parameters()}
    return {"losses": losses, "norms": norms, "parameters": parameters,
            "state": whole_state(run.updater)}  # fmt: skip


def plain_process(family: str, skipped: int | None, unequal: bool) -> dict[str, Any]:
    """Plain Paddle: losses, norms, final parameters and state; without the update of one step."""
    config = config_of(family)
    model = new_model(config)
    optimizer = build_adamw(model, **ADAMW)
    optimizer.set_lr(RATE)
    losses, norms = [], []
    for step in range(STEPS):
        batch = batch_of(config, step, unequal)
        loss = model.loss(**{name: paddle.to_tensor(value) for name, value in batch.items()})
        loss.backward()
        layer_norms = norms_of_layers(model)
        norms.append(clip_by_global_norm(model.parameters(), MAX_NORM).item())
        if step == skipped:
            norms[-1] = math.inf
        else:
            optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        losses.append(loss.item())
    return {
        "losses": losses,
        "norms": norms,
        "parameters": {n: p.numpy() for n, p in model.named_parameters()},
        "state": {k: v.numpy() for k, v in optimizer_state(optimizer, model).items()},
        "layer_norms": layer_norms,
    }


def norms_of_layers(model: Decoder) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        squares[layer] = squares.get(layer, 0.0) + (parameter.grad**2).sum().item()
    return {layer: math.sqrt(value) for layer, value in squares.items()}


@dataclass
class Trained:
    """A model under a layout: its layer, what trains it, and its updater."""

    config: ModelConfig
    layer: paddle.nn.Layer
    model: DistributedModel
    updater: Updater


def train(run: Trained, steps: range, case: dict) -> tuple:
    """Losses and norms of this layout on the same global batches; and memory of the last step."""
    accumulation = case.get("accumulation", 1)
    config, updater, current = run.config, run.updater, mesh.current()
    losses, norms = [], []
    for step in steps:
        shards = current.sample_shards * accumulation
        whole = batch_of(config, step, case.get("unequal", False))
        rows = {name: np.split(values, shards) for name, values in whole.items()}
        own = range(accumulation * current.sample_shard, accumulation * (current.sample_shard + 1))
        batches = [{k: paddle.to_tensor(parts[i]) for k, parts in rows.items()} for i in own]
        if case.get("unequal"):
            weights = loss_weights([int((rows["labels"][i] != -100).sum()) for i in own])
            assert weights is not None
            for batch, weight in zip(batches, weights, strict=True):
                batch["loss_weight"] = paddle.to_tensor(weight, dtype="float32")
        if case.get("evaluates"):
            evaluate(run, batches[0])
        overflows = step == case.get("skipped") and current.rank == current.world_size - 1
        scale = partial(_scaled, updater, math.inf if overflows else 1.0)
        losses.append(mean_over_token_shards(run.model.forward_backward(batches, scale)).item())
        memory = held_bytes(updater)
        norms.append(updater.step(RATE).item())
        assert all(
            gradient_of(p) is None or not gradient_of(p).astype("float32").any()
            for p in run.layer.parameters()
        )
    return losses, norms, memory


def _scaled(updater: Updater, factor: float, loss: paddle.Tensor) -> paddle.Tensor:
    return updater.scale(loss) * factor


@paddle.no_grad()
def evaluate(run: Trained, batch: dict) -> None:
    """A loss, and tokens that are those of the whole model."""
    run.model.eval()
    run.model.evaluate(batch)
    prompts = [[9, 300, 4], [17]]
    tokens = generate(run.layer, prompts, 3, Sampling(temperature=0.0))
    run.model.train()
    alone = new_model(run.config, whole_parameters(run.config, dict(run.layer.named_parameters())))
    alone.eval()
    assert tokens == generate(alone, prompts, 3, Sampling(temperature=0.0))


def is_kept(run: Trained, case: dict, parameters: dict, state: dict) -> bool:
    """Whether a step that overflows on the last rank leaves parameters and moments as they are."""
    before = {name: value.copy() for name, value in (parameters | state).items()}
    train(run, range(STEPS, STEPS + 1), case | {"skipped": STEPS})
    parameters, state = whole(run)
    after = parameters | state
    return all(
        np.array_equal(after[name], value)
        for name, value in before.items()
        if not name.endswith("_pow_acc")
    )


def held_bytes(updater: Updater) -> dict[str, int]:
    """What this rank holds when an update begins, views of one buffer counted once."""
    zero = updater.zero
    wrapped = zero.loss if isinstance(zero.loss, SlicedLayers) else None
    if wrapped is not None:
        wrapped.wait()
    storages = [s for kinds in getattr(wrapped, "_grad_storages", {}).values()
                for s in (kinds.values() if isinstance(kinds, dict) else [kinds])]  # fmt: skip
    weights = [s.buffer for kinds in getattr(zero._optimizer, "param_storages", {}).values()
               for s in kinds.values()]  # fmt: skip
    gradients = [s.buffer for s in storages]
    if isinstance(zero, ZeroStage2):
        zero.reducer.wait()
        gradients += zero.reducer.buffers()
    for parameter in zero.parameters:
        weights += [parameter, getattr(parameter, "fw_storage", None)]
        gradients += [gradient_of(parameter), getattr(parameter, "bw_storage", None)]
    flow = getattr(wrapped, "_task_flow", None)
    if flow is not None:
        weights += [full for full, _ in flow.full_param.values()]
        gradients += list(flow.full_grad.values())
    groups = {"parameters": weights, "gradients": gradients,
              "state": updater.optimizer.state_tensors()}  # fmt: skip
    return {name: _union_bytes(tensors) for name, tensors in groups.items()}


def _union_bytes(tensors: list) -> int:
    total, end = 0, 0
    held = [t for t in tensors if t is not None and t._is_initialized()]
    for start, size in sorted((t.data_ptr(), t.size * t.element_size()) for t in held):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def difference(values: dict, expected: dict) -> float:
    assert list(values) == list(expected), (list(values), list(expected))
    worst = 0.0
    for name, value in expected.items():
        assert values[name].shape == value.shape, name
        error = np.abs(values[name] - value).max() / max(1.0, np.abs(value).max())
        worst = max(worst, float(error) if np.isfinite(error) else 1e30)
    return worst


def far(values: dict, expected: dict) -> float:
    """The share of elements that are off by more than a hundredth of all updates of AdamW."""
    count = sum(
        int((np.abs(values[k] - v) > 0.01 * STEPS * RATE).sum()) for k, v in expected.items()
    )
    return count / sum(value.size for value in expected.values())


def relative(values: list[float], expected: list[float]) -> float:
    found, wanted = np.array(values), np.array(expected)
    finite = np.isfinite(wanted)
    assert (np.isfinite(found) == finite).all(), values
    return float(np.abs(found[finite] / wanted[finite] - 1).max())


def new_run(case: dict, wholes: Mapping | None = None) -> Trained:
    config = config_of(case["family"])
    options = UpdateOptions(**ADAMW, max_grad_norm=MAX_NORM, **case.get("options", {}))
    if options.loss_scale is not None:
        options = replace(options, loss_scale=LossScale(**options.loss_scale))
    # The same names in all processes, whatever the stages of another layout have made before.
    with paddle.utils.unique_name.guard():
        model = new_model(config, wholes, case.get("dtype", "float32"))
    model.train()
    if "recompute" in case:
        model.use_recompute(Recompute(case["recompute"]))
    tp_sharding = ModelTpSharding(config)
    return Trained(config, model, *distribute(model, options, mesh.current(), tp_sharding))


def run_delayed(case: dict, folder: Path) -> dict[str, Any]:
    """``run_case`` with operations that do nothing until they are waited for."""
    with delayed() as trace:
        result = run_case(case, folder, trace)
    return result | {"overlapped": trace.counts()}


def run_case(case: dict, folder: Path, trace: Trace | None = None) -> dict[str, Any]:
    """Trains under a layout; after two steps under another one, if the case has one."""
    start(case)
    run, read = new_run(case), None
    if trace is not None:
        trace.watch(run.layer)
    first = range(2 if "then" in case else STEPS)
    losses, norms, memory = train(run, first, case)
    parameters, state = whole(run)
    kept = is_kept(run, case, parameters, state) if case.get("overflows") else None
    if "then" in case:
        if mesh.current().rank == 0:
            np.savez(folder / "parameters.npz", **parameters)
            np.savez(folder / "state.npz", **state)
        dist.barrier()
        case = case | {"options": {}} | case["then"]
        start(case)
        with np.load(folder / "parameters.npz") as wholes, np.load(folder / "state.npz") as saved:
            run = new_run(case, wholes)
            source = SlicesOf(saved)
            run.updater.load_state(source)
            held = sum(tensor.size for tensor in run.updater.optimizer.state_tensors())
            read = source.elements / held
        more = train(run, range(2, STEPS), case)
        losses, norms, memory = losses + more[0], norms + more[1], more[2]
        parameters, state = whole(run)
    written = (
        write_and_read(run.layer, run.updater, folder, parameters, state) if "then" in case else {}
    )
    scaler = None if run.updater.scaler is None else run.updater.scaler.state()
    layer_norms = run.updater.layer_norms() if case["options"].get("measures_layers") else None
    return {"losses": losses, "norms": norms, "parameters": parameters, "state": state,
            "layer_norms": layer_norms,
            "memory": memory, "scaler": scaler, "read": read, "kept": kept,
            **written}  # fmt: skip


def whole(run: Trained) -> tuple[dict, dict]:
    """Parameters and optimizer state, complete on every rank."""
    run.updater.wait()
    named = dict(run.layer.named_parameters())
    return whole_parameters(run.config, named), whole_state(run.updater)


def start(case: dict) -> None:
    degrees = mesh.Degrees(**case["degrees"])
    if mesh.current().degrees != degrees:
        topology._HYBRID_PARALLEL_GROUP = None  # lets fleet make the groups of another mesh
        mesh.initialize(degrees)


def compare(result: dict, expected: dict) -> dict[str, float]:
    return {
        "loss": relative(result["losses"], expected["losses"]),
        "norm": relative(result["norms"], expected["norms"]),
        "parameters": difference(result["parameters"], expected["parameters"]),
        "far": far(result["parameters"], expected["parameters"]),
        "state": difference(result["state"], expected["state"]),
        "clipped": min(expected["norms"]) > MAX_NORM,
        "layers": of_layers(result["layer_norms"], expected.get("layer_norms", {})),
    }


def of_layers(norms: dict | None, expected: dict) -> float | None:
    """The largest relative error of the norm of a layer; None if they were not measured."""
    if norms is None:
        return None
    assert list(norms) == list(expected), (list(norms), list(expected))
    return relative(list(norms.values()), list(expected.values()))


def reference(case: dict) -> tuple:
    optim = case.get("options", {}).get("optim", "adamw")
    return case["family"], case.get("skipped"), case.get("unequal", False), optim


def main(folder: Path, cases: list[dict]) -> None:
    expected = {}
    if os.environ["PADDLE_TRAINER_ID"] == "0":  # alone, until the mesh is made
        for case in cases:
            key = reference(case)
            if key not in expected:
                with paddle.utils.unique_name.guard():  # names stay those of the other ranks
                    expected[key] = one_process(*key)
    results = []
    for case in cases:
        result = (run_delayed if case.get("delayed") else run_case)(case, folder)
        compared = compare(result, expected[reference(case)]) if expected else {}
        results.append(compared | {key: result[key] for key in CHECKED if key in result})
    report(results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
