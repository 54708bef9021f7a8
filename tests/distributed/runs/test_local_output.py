"""Two ranks, each with an output_dir of its own, as on machines that share no folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed_testing import run_ranks
from training_testing import Workplace, counting_documents, write_corpus, write_model

from pypkg.models.weights.formats.tensor_files import TensorFiles, read_file_shards
from pypkg.training.checkpoint.manifest import read_manifest
from pypkg.training.checkpoint.merge import merge
from pypkg.training.checkpoint.verify import verify
from pypkg.training.ledger import events

WORKER = Path(__file__).with_name("local_output_worker.py")


@pytest.mark.slow
def test_runs_go_on_from_their_parts(tmp_path: Path) -> None:
    common = settings(tmp_path)
    given = ["resuming", tmp_path, *common, "--do_eval", "false"]
    first, second = run_ranks(WORKER, 2, given, timeout=150)
    assert {key: str(said).replace("local0", "local1") for key, said in first.items()} == {
        key: str(said) for key, said in second.items()
    }
    ends = {name: said for name, said in first.items() if isinstance(said, int)}
    assert ends == dict.fromkeys(
        ("shared", "local", "damaged", "missing", "tensor", "rollback", "further"), 0
    ), first  # fmt: skip

    # Saving to parts changes nothing, nor does going on from them, whatever a machine has lost.
    further = losses(tmp_path / "shared")
    expected = results(tmp_path / "shared" / "checkpoint-6")
    for name in ("first", "damaged", "missing"):
        parts = [tmp_path / f"{name}{rank}" for rank in range(2)]
        merged = tmp_path / f"{name}-merged"
        merge([part / "checkpoint-6" for part in parts], merged)
        assert verify(merged).damage == () and results(merged) == expected, name
        of_first_steps = {step: loss for step, loss in further.items() if step <= 6}
        assert losses(parts[0]) == of_first_steps, name
        assert not (parts[1] / "metrics.jsonl").exists() and not events(parts[1])
        for part in parts:
            assert verify(part / "checkpoint-6").damage == ()
            kept = [step for step in (2, 4, 6) if (part / f"checkpoint-{step}").is_dir()]
            assert kept == [4, 6], "each place keeps save_total_limit checkpoints"
            assert not [*part.glob("tmp-*"), *part.glob(".*")]
            manifest = read_manifest(part / "checkpoint-6")
            assert manifest is not None and len(manifest.elsewhere) == 1

    told = [e for e in events(tmp_path / "missing0") if e["event"] == "damaged_checkpoint"]
    assert [each["checkpoint"] for each in told] == ["checkpoint-6"] * 2
    assert "rank 1: model-0" in told[0]["damage"] and "checksum" in told[0]["damage"]
    assert told[1]["damage"] == "rank 1: there is no checkpoint-6"
    assert (tmp_path / "missing0" / "damaged-checkpoint-6.2").is_dir(), "the part of rank 0"

    assert "is not the same folder on all machines" in first["refused"]
    assert "set allow_local_output" in first["refused"]
    # In two TP shards: what a rank needs of a tensor, from the machine that has it.
    merge([tmp_path / f"tensor{rank}" / "checkpoint-8" for rank in range(2)], tmp_path / "eight")
    assert "no checkpoint in output_dir" in first["lost"]
    assert "checkpoint-8: rank 1: there is no checkpoint-8" in first["lost"]
    rollback = [e for e in events(tmp_path / "local0") if e["event"] == "rollback"]
    assert [(each["step"], each["to_step"]) for each in rollback] == [(6, 4)]

    # The whole checkpoint goes on in one process with the samples of both ranks.
    resumed = Workplace(tmp_path, "alone")
    done = resumed.run(
        save_steps=2, decay_steps=8, do_eval=False, max_steps=8, gradient_accumulation_steps=4,
        resume_from_checkpoint=tmp_path / "first-merged",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert resumed.losses() == pytest.approx({step: further[step] for step in (7, 8)}, rel=1e-5)


@pytest.mark.slow
def test_saves_beside_training_the_best_model_and_a_folder_that_vanishes(tmp_path: Path) -> None:
    common = settings(tmp_path)
    first, second = run_ranks(WORKER, 2, ["saving", tmp_path, *common], timeout=150)
    assert [first.pop(name) for name in ("shared", "beside")] == [0, 0], first
    assert [second.pop(name) for name in ("shared", "beside")] == [0, 0], second

    # The parts make what a run without asynchronous saves has in one folder; the best one stays.
    parts = [tmp_path / f"beside{rank}" for rank in range(2)]
    for step in (2, 6):
        name, merged = f"checkpoint-{step}", tmp_path / f"merged-{step}"
        merge([part / name for part in parts], merged)
        assert verify(merged).damage == () and results(merged) == results(
            tmp_path / "shared" / name
        )
    assert json.loads((merged / "trainer_state.json").read_text())["best_checkpoint"] == (
        "checkpoint-2"
    )
    for part in parts:
        assert sorted(each.name for each in part.glob("checkpoint-*")) == [
            "checkpoint-2", "checkpoint-6",
        ]  # fmt: skip
        assert not [*part.glob("tmp-*"), *part.glob(".*")]
    summary = json.loads((parts[0] / "summary.json").read_text())
    assert Path(summary["checkpoint"]).name == "checkpoint-2"

    # A folder that vanishes on the second machine ends both, with its name; the first keeps what
    # was complete. A writer beside training may still end then; the next run removes its folder.
    for name, message in first.items():
        told = second[name]
        assert "rank 1: output_dir" in told and "was removed or replaced" in told, (name, told)
        assert "rank 1" in message and str(tmp_path / "local1") in message, (name, message)
        pattern = "checkpoint-*" if name.startswith("beside") else "*point*"
        assert [each.name for each in (tmp_path / f"{name} 0").glob(pattern)] == ["checkpoint-2"], (
            name
        )


def settings(folder: Path) -> list[str]:
    """Those of all runs, with a corpus and a model."""
    write_corpus(folder / "data" / "corpus", counting_documents())
    write_model(folder / "model")
    workplace = Workplace(folder)
    common = workplace.command(save_steps=2, decay_steps=8, max_rollbacks=1, save_total_limit=2)[3:]
    for name in ("--output_dir", "--max_steps", "--do_eval"):
        place = common.index(name)
        del common[place : place + 2]
    return common


def results(checkpoint: Path) -> dict[str, Any]:
    """All tensors, and the trainer's state."""
    files = TensorFiles(checkpoint)
    found = {name: files.read(name, "float32").tobytes() for name in files.shapes()}
    state = read_file_shards(checkpoint / "optimizer.safetensors.index.json")
    for name, tensor in state.items():
        found[name] = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes]
    return found | {"state": json.loads((checkpoint / "trainer_state.json").read_text())}


def losses(output_dir: Path) -> dict[int, float]:
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {row["global_step"]: row["loss"] for row in rows if "loss" in row}
