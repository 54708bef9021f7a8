"""What the page of a run shows: curves, settings, layout, checkpoints, events, plan."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_testing import LAYOUT, info, settings, write_run

from pypkg.errors import UserError
from pypkg.report.collect import collect, unique_names
from pypkg.report.curves import TokensOfSteps, curves
from pypkg.report.document import Run
from pypkg.report.layout import layout_of
from pypkg.report.parts import plan_rows
from pypkg.report.settings import setting_rows
from pypkg.training.checkpoint.manifest import put_manifest, read_manifest
from pypkg.training.ledger import record
from pypkg.training.reporting.run_info import RUN_INFO_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    (found,) = collect([folder], points=100).runs
    return found


def test_curves_hold_every_logged_value(run):
    found = {curve.name: curve for curve in run.curves}
    assert found["loss"].steps == list(range(2, 61, 2))
    assert found["eval_loss"].steps == list(range(10, 61, 10))
    assert found["eval_loss"].tokens == [step * 1024 for step in range(10, 61, 10)]
    assert max(found["grad_norm"].values) == 5.0
    assert found["loss"].chart == found["eval_loss"].chart == "Loss"
    assert found["loss/books"].chart == found["loss/code"].chart == "Training loss by corpus"
    assert "eval_perplexity" not in found and "consumed_tokens" not in found
    assert [curve.name for curve in run.curves][:2] == ["loss", "eval_loss"]


def test_a_metric_of_a_later_version_has_a_chart_of_its_own():
    (found,) = curves([{"global_step": 1, "new": 2.0}], points=10)
    assert (found.name, found.chart, found.values) == ("new", "new", [2.0])


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    rows = [{"global_step": n, "loss": math.sin(n / 50)} for n in range(5000)]
    rows[1234]["loss"], rows[4321]["loss"] = 9.0, -9.0
    rows[0]["loss"], rows[4999]["loss"] = 0.5, -0.75  # no extremes
    rows[2000]["loss"] = math.nan
    (found,) = curves(rows, points=100)
    assert len(found.values) <= 100 and found.points == 5000
    assert {0, 1234, 4321, 4999} <= set(found.steps)
    assert found.steps == sorted(found.steps)


def test_tokens_lie_between_the_steps_that_tell():
    tokens_at = TokensOfSteps([{"global_step": 10, "consumed_tokens": 100.0}, {"global_step": 20}])
    assert tokens_at([0, 5, 10, 20]) == [0.0, 50.0, 100.0, None]


def test_numbers_that_json_lacks_are_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "loss": NaN}\n', encoding="utf-8")
    page = json.loads(collect([tmp_path], points=10).to_json())
    assert page["runs"][0]["curves"][0]["values"] == [None]


def test_settings_beside_their_defaults(folder, run):
    changed = {row.name: (row.value, row.default) for row in run.settings if row.is_changed}
    assert changed == {
        "model_name_or_path": ("llama-58m", ""),
        "max_steps": ("60", "-1"),
        "logging_steps": ("2", "500"),
        "do_train": ("true", "false"),
        "do_eval": ("true", "false"),
        "output_dir": (str(folder), ""),
        "save_steps": ("20", "500"),
        "sample_prompt": ("def ", ""),
    }


def test_a_setting_of_another_version_counts_as_changed():
    (row,) = [each for each in setting_rows({"of_tomorrow": 3}) if each.name == "of_tomorrow"]
    assert row.is_changed and row.value == "3"


def test_the_layout_places_every_rank_once(run):
    assert run.layout is not None
    assert run.layout.world_size == LAYOUT.world_size == 8
    ranks = [rank for stage in run.layout.stages for group in stage.replicas for rank in group]
    assert sorted(ranks) == list(range(8))
    # Tensor parallelism is the innermost axis, data parallelism the outermost.
    assert run.layout.stages[0].replicas == [[0, 1], [4, 5]]
    assert [stage.title for stage in run.layout.stages] == [
        "stage 0: embedding, layers 0-2", "stage 1: layers 3-5, head"
    ]  # fmt: skip
    assert run.layout.replicas == ["data 0", "data 1"]


def test_an_interleaved_stage_lists_all_its_layers():
    layout = layout_of({"pipeline": 2, "virtual_stages": 2}, 8, [])
    assert layout is not None
    assert [stage.title for stage in layout.stages] == [
        "stage 0: embedding, layers 0-1, layers 4-5", "stage 1: layers 2-3, layers 6-7, head"
    ]  # fmt: skip


def test_a_layout_of_another_version_is_left_out():
    assert layout_of({"data": "many"}, 2, []) is None
    assert layout_of({"topology_order": "of_tomorrow"}, 2, []) is None


def test_checkpoints_with_their_sizes_and_damage(folder, run):
    states = {row.name: (row.step, row.verdict) for row in run.checkpoints}
    assert states == {
        "checkpoint-20": (20, "whole"),
        "checkpoint-40": (40, "damaged"),
        "checkpoint-60": (60, "whole"),
    }
    files = [file for file in (folder / "checkpoint-20").iterdir() if file.name != "manifest.json"]
    assert run.checkpoints[0].num_bytes == sum(file.stat().st_size for file in files)
    assert "model.safetensors" in run.checkpoints[1].damage[0]
    assert run.checkpoints[0].layout == "data 2, pipeline 2, tensor 2"


def test_a_part_of_a_checkpoint_is_not_the_whole(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    checkpoint = copy / "checkpoint-60"
    manifest = read_manifest(checkpoint)
    put_manifest(checkpoint, replace(manifest, elsewhere={"rank 1 (10.0.0.2)": manifest.files}))
    (found,) = collect([copy], points=10).runs
    assert found.checkpoints[-1].verdict == "a whole part"


def test_checksums_find_what_sizes_do_not(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "checkpoint-20" / "model.safetensors"
    weights.write_bytes(b"1" + weights.read_bytes()[1:])
    by_size, by_sum = (
        collect([copy], points=10, checks=checks).runs[0].checkpoints[0].verdict
        for checks in ("sizes", "checksums")
    )
    assert (by_size, by_sum) == ("whole", "damaged")


def test_events_and_checkpoints_stand_at_their_steps(run):
    found = {(mark.kind, mark.step, mark.tokens) for mark in run.marks}
    assert found >= {
        ("rollback", 32, 32 * 1024.0), ("restart", None, None), ("checkpoint", 60, 60 * 1024.0)
    }  # fmt: skip
    texts = {mark.kind: mark.text for mark in run.marks}
    assert texts["rollback"] == "reason the gradient norm is 5, to_step 20, steps [32, 32]"
    # What stays the same is left out.
    assert texts["layout_changed"] == "before data 1, after data 2"


def test_what_came_before_overwriting_is_left_out(tmp_path):
    record(tmp_path, "rollback", step=3)
    record(tmp_path, "overwritten", step=0)
    record(tmp_path, "rollback", step=7)
    assert [mark.step for mark in collect([tmp_path], points=10).runs[0].marks] == [7]


def test_the_plan_beside_what_was_measured(run):
    memory, speed = run.plan
    assert (memory.planned, memory.measured) == (2.0, 1.5)
    assert list(memory.terms) == ["activations", "weights"]
    assert (speed.planned, speed.measured) == (1000.0, 903.0)
    assert speed.terms == {"compute": 0.5, "communication": 0.1} and speed.terms_unit == "s"


@pytest.mark.parametrize(
    ("speeds", "measured"), [([100, 900, 1000], 950), ([100], 100), ([], None)]
)
def test_the_first_speed_is_a_warm_up(speeds, measured):
    rows = [{"tokens_per_second_per_device": float(each)} for each in speeds]
    speed = plan_rows(info(settings()).plan, rows)[1]
    assert speed.measured == measured


def test_samples_and_end(run):
    assert [(sample.step, sample.prompt) for sample in run.samples] == [
        (20, "Once"), (40, "Once"), (40, "<b>"), (60, "def ")
    ]  # fmt: skip
    assert run.samples[-1].text == "main(): pass"
    assert run.ended and run.step == run.max_steps == 60
    assert run.figures["training loss"] == f"{2 + 3 * math.exp(-3):.4f}"
    assert run.problems == []


def test_a_run_that_started_again_has_not_ended(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    later = (copy / "summary.json").stat().st_mtime + 10
    os.utime(copy / RUN_INFO_FILE, (later, later))
    (found,) = collect([copy], points=10).runs
    assert not found.ended and len(found.samples) == 3


def test_settings_come_from_a_checkpoint_where_the_start_left_none(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / RUN_INFO_FILE).unlink()
    (found,) = collect([copy], points=10).runs
    assert found.layout is None and found.plan == [] and found.environment == {}
    saved = json.loads(settings().to_json())
    assert {row.name for row in found.settings} == saved.keys()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ledger.jsonl", '{"event": "rollback"}\n', "is not what was written"),
        ("metrics.jsonl", "[]\n", "line 1 of"),
        ("run_info.json", '{"format": 7}', "is not of format 1"),
        ("run_info.json", '{"format": 1, "settings": []}', "is not what this version writes"),
        ("samples.jsonl", '{"step": 1}\n', "is not a sample"),
        ("summary.json", "{", "is not JSON"),
    ],
)
def test_what_cannot_be_read_is_told_and_the_rest_is_shown(folder, tmp_path, name, text, words):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_text(text, encoding="utf-8")
    (found,) = collect([copy], points=10).runs
    (problem,) = found.problems
    assert words in problem and name in problem
    assert len(found.checkpoints) == 3


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_a_run_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{name}.* output_dir of a\\s+run"):
        collect([tmp_path / name], points=10)


def test_runs_have_names_of_their_own():
    paths = [Path(text) for text in ("/a/x/out", "/a/y/out", "/b/y/out")]
    assert unique_names(paths) == ["a/x/out", "a/y/out", "b/y/out"]
    assert unique_names(paths[:2]) == ["x/out", "y/out"]
    assert unique_names(paths[:1]) == ["out"]
