"""Runs of several processes see the samples that one process sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from distributed_testing import run_ranks
from training_testing import Workplace, counting_documents, write_corpus, write_model

WORKER = Path(__file__).parent.parent / "runs" / "pretrain_worker.py"
SETTINGS = {
    "max_steps": 8, "logging_steps": 1, "eval_steps": 4, "save_steps": 4, "num_threads": 1,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2, "learning_rate": 0.01,
    "reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True,
}  # fmt: skip


def make(folder: Path) -> tuple[Workplace, str]:
    """A workplace with two corpora, and their blend."""
    rng = np.random.default_rng(1)
    write_corpus(folder / "data0" / "even", counting_documents())
    write_corpus(folder / "data0" / "noise", [rng.integers(0, 64, 50) for _ in range(40)])
    write_model(folder / "model")
    return Workplace(folder), f"3 {folder}/data0/even 1 {folder}/data0/noise"


def arguments(workplace: Workplace, **settings: object) -> list[str]:
    """Those of ``Workplace.command`` behind python -m pypkg.pretrain."""
    return workplace.command(**SETTINGS | settings)[3:]


def metrics(workplace: Workplace, first: int = 1) -> dict[tuple[int, str], float]:
    """Every loss and gradient norm, by step and name, from step ``first`` on."""
    lines = (workplace.output_dir / "metrics.jsonl").read_text().splitlines()
    return {
        (row["global_step"], name): value
        for row in map(json.loads, lines)
        for name, value in row.items()
        if name.split("/")[0] in ("loss", "eval_loss", "grad_norm") and row["global_step"] >= first
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Workplace:
    """A run of one process."""
    workplace, blend = make(tmp_path_factory.mktemp("whole"))
    assert run_ranks(WORKER, 1, arguments(workplace, input_dir=blend), timeout=90) == [0]
    return workplace


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "accumulation"), [(1, 4, 1), (1, 1, 4), (2, 1, 2), (2, 2, 1)]
)
def test_the_global_batch_alone_decides(tmp_path, whole, ranks, micro_batch, accumulation):
    """Its samples have 12 to 16 labels that count."""
    workplace, blend = make(tmp_path)
    given = {
        "input_dir": blend, "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation, "per_device_eval_batch_size": 2 // ranks,
    }  # fmt: skip
    assert set(run_ranks(WORKER, ranks, arguments(workplace, **given), timeout=120)) == {0}
    assert_same(metrics(workplace), metrics(whole))


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize(("data", "pipeline", "tensor"), [(1, 1, 2), (1, 2, 2), (2, 1, 2)])
def test_one_process_reads_for_all(tmp_path, whole, data, pipeline, tensor):
    """Of each sample shard. Where the others look for the data, there is nothing."""
    workplace, blend = make(tmp_path)
    for shard in range(1, data):  # the first rank of a shard reads
        (tmp_path / f"data{shard * pipeline * tensor}").symlink_to(tmp_path / "data0")
    blend = blend.replace("data0", "data{rank}")
    given = {
        "input_dir": blend, "distributed_dataloader": True, "dataloader_num_workers": 1,
        "tensor_parallel_degree": tensor, "pipeline_parallel_degree": pipeline,
        "gradient_accumulation_steps": 2 // data, "per_device_eval_batch_size": 2 // data,
    }  # fmt: skip
    codes = run_ranks(WORKER, data * pipeline * tensor, arguments(workplace, **given), timeout=120)
    assert set(codes) == {0}
    assert_same(metrics(workplace), metrics(whole))


@pytest.mark.parametrize(
    "given",
    [
        {"sep_parallel_degree": 2, "distributed_dataloader": True},
        {"context_parallel_degree": 2, "recompute": True},
        pytest.param(
            {"context_parallel_degree": 2, "tensor_parallel_degree": 2, "sequence_parallel": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_divide_the_tokens_of_samples(tmp_path, whole, given):
    """From a checkpoint of one process on, in packed documents that cross from rank to rank."""
    workplace, blend = make(tmp_path)
    shutil.copytree(whole.output_dir / "checkpoint-4", workplace.output_dir / "checkpoint-4")
    ranks = 2 * given.get("tensor_parallel_degree", 1)
    run = arguments(workplace, input_dir=blend, **given)
    assert run_ranks(WORKER, ranks, run, timeout=120) == [0] * ranks
    assert_same(metrics(workplace, 5), metrics(whole, 5))


def test_errors_of_the_reader_end_all(tmp_path):
    workplace, _ = make(tmp_path)
    given = {"input_dir": "nowhere", "distributed_dataloader": True, "tensor_parallel_degree": 2}
    assert run_ranks(WORKER, 2, arguments(workplace, **given), timeout=90) == [2, 2]


def test_going_on_with_more_processes_and_smaller_batches(tmp_path):
    """Two processes with batches of one see what one process with batches of two sees."""
    (whole, blend), (resumed, _) = make(tmp_path / "whole"), make(tmp_path / "resumed")
    given: dict[str, object] = {"input_dir": blend}
    assert run_ranks(WORKER, 1, arguments(whole, **given), timeout=90) == [0]
    shutil.copytree(whole.output_dir / "checkpoint-4", resumed.output_dir / "checkpoint-4")
    given |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    assert run_ranks(WORKER, 2, arguments(resumed, **given), timeout=90) == [0, 0]
    assert_same(metrics(resumed, 5), metrics(whole, 5))
    states = [
        json.loads((each.output_dir / "checkpoint-8" / "trainer_state.json").read_text())
        for each in (whole, resumed)
    ]
    assert states[0]["data_order"] == states[1]["data_order"]
    assert states[0]["consumed_samples"] == states[1]["consumed_samples"] == 32
