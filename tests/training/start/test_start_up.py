"""Problems of a run are all reported at once, if possible without Paddle."""

from __future__ import annotations

import subprocess
import sys

import pytest
from training_testing import ROOT, environment

from pypkg.errors import UserError
from pypkg.training.start.start_up import load_run_settings

GOOD = {
    "model_name_or_path": "llama-58m", "input_dir": "data", "output_dir": "out", "max_steps": 9,
    "do_train": True,
}  # fmt: skip


def problems(processes: int = 1, **changes: object) -> list[str]:
    words = [w for k, v in (GOOD | changes).items() for w in (f"--{k}", str(v))]
    try:
        load_run_settings(words, processes)
    except UserError as error:
        title, *lines = str(error).splitlines()
        if not lines:
            return [title]
        assert title == f"{len(lines)} problems in the settings:"
        return [line.removeprefix("  - ") for line in lines]
    return []


def test_a_good_run_has_no_problem():
    assert problems() == []
    assert problems(2, tensor_parallel_degree=2) == []


def test_problems_of_every_kind_come_in_one_list():
    found = problems(
        seed="x", learnin_rate=1, use_fp8=True, tensor_parallel_config="enable_x", bf16=True,
        model_name_or_path="llama-58n", pipeline_parallel_config="use_dualpipev", warmup_steps=10,
    )  # fmt: skip
    starts = (
        "unknown setting 'learnin_rate'",
        'seed is "x" on the command line',
        "tensor_parallel_config is 'enable_x'",
        "warmup_steps (10) is above max_steps (9)",
        "use_fp8 is true, but",
        "pipeline_parallel_config holds use_dualpipev",
        "'llama-58n' is neither a folder nor a known model",
        "bf16 is true, but training in bfloat16 needs a GPU",
    )
    assert len(found) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in found) == 1, start


def test_a_layout_that_does_not_fit_is_among_them():
    found = problems(3, tensor_parallel_degree=5, use_fp8=True)
    assert found[0].startswith("use_fp8")
    assert "needs 5 processes or a multiple, but 3 were launched" in found[1]
    assert found[2].startswith("num_attention_heads (")
    assert len(found) == len(set(found)) == 5
    unknown = problems(3, tensor_parallel_degree=2, model_name_or_path="nothing")
    assert len(unknown) == 2 and "needs 2 processes" in unknown[1]


def test_a_folder_without_a_model(tmp_path):
    [found] = problems(model_name_or_path=str(tmp_path))
    assert found.startswith(
        f"{tmp_path}/config.json does not exist, so '{tmp_path}' is not a model."
    )


def test_several_limits_of_the_device_are_several_lines():
    found = problems(fp16=True, ops_backend="reference", use_flash_attention=True, use_fp8=True)
    assert [line.split(" is ")[0] for line in found] == ["use_fp8", "fp16", "use_flash_attention"]


def test_weights_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    [found] = problems(continue_training=True)
    assert found.startswith("continue_training is true, but model_name_or_path has no weights")


@pytest.mark.parametrize(
    "extra",
    [
        ["--use_fp8", "--seed", "x", "--model_name_or_path", "nothing"],
        ["--nproc", "3", "--tensor_parallel_degree", "2"],
    ],
)
def test_paddle_is_not_imported_for_them(extra):
    words = [w for k, v in GOOD.items() for w in (f"--{k}", str(v))] + extra
    script = (
        "import sys; from pypkg.pretrain import main; code = main(sys.argv[1:]); "
        "assert 'paddle' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60,
        cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr and "Traceback" not in done.stderr
