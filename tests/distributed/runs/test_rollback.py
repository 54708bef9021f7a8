"""A run that goes back in process ends as one that skips the same samples by hand, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed_testing import run_ranks
from training_testing import small_workplace

from pypkg.training.ledger import events

WORKER = Path(__file__).with_name("rollback_worker.py")
LAYOUTS = {
    "data": {"logging_steps": 3},
    "tensor": {"tensor_parallel_degree": 2, "distributed_dataloader": True},
    "pipeline": {"pipeline_parallel_degree": 2},
    "stage1": {"sharding": "stage1", "max_grad_norm": 0},
    "stage2": {"sharding": "stage2", "offload_optim": True},
    "stage3": {"sharding": "stage3", "eval_steps": 2},
    "asynchronous": {"use_async_save": True},
}


@pytest.mark.slow
def test_under_every_layout(tmp_path: Path) -> None:
    workplace = small_workplace(tmp_path)
    common = workplace.command(max_steps=8, save_steps=2, eval_steps=4, hidden_dropout_prob=0.1)[3:]
    place = common.index("--output_dir")
    del common[place : place + 2]
    codes = run_ranks(WORKER, 2, [tmp_path, json.dumps(LAYOUTS), *common], timeout=150)
    assert codes == [[0] * 2 * len(LAYOUTS)] * 2
    for name in LAYOUTS:
        healed, by_hand = tmp_path / name, tmp_path / f"{name}-by-hand"
        (event,) = [each for each in events(healed) if each["event"] == "rollback"]
        assert (event["step"], event["to_step"]) == (6, 4), name
        assert event["reason"] == "the loss is nan"
        assert results(healed) == results(by_hand), name


def results(output_dir: Path) -> dict[str, object]:
    """The last checkpoint's tensors and state, and what was logged but times."""
    checkpoint = output_dir / "checkpoint-8"
    found: dict[str, object] = {
        file.name: file.read_bytes()
        for file in checkpoint.iterdir()
        if file.suffix == ".safetensors" or file.name == "trainer_state.json"
    }
    kinds = {name.split("-")[0].split(".")[0] for name in found}
    assert kinds == {"model", "optimizer", "trainer_state"}
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    names = ("global_step", "loss", "eval_loss", "learning_rate", "grad_norm", "consumed_tokens")
    return found | {"rows": [[row.get(name) for name in names] for row in rows]}
