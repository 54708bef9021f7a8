"""The pretrain command: it trains, stops, resumes and reports mistakes."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from training_testing import ROOT, VOCAB_SIZE, environment, write_corpus, write_model

from pypkg.training.checkpoint.lock import Holder
from pypkg.training.checkpoint.verify import verify
from pypkg.training.ledger import events


def wait_for_step(workplace, process: subprocess.Popen, step: int) -> None:
    """Until the metrics of ``step`` are written."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        if (workplace.output_dir / "metrics.jsonl").exists() and step in workplace.losses():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come: {workplace.losses()}")


def start(workplace, **settings: object) -> subprocess.Popen:
    """The command line as users start it."""
    return subprocess.Popen(
        workplace.command(**settings), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def assert_user_error(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    for word in words:
        assert word in message


def test_trains_and_reports(workplace):
    settings = {"max_steps": 60, "save_steps": 30, "eval_steps": 30, "save_total_limit": 1}
    done = workplace.execute(workplace.command(num_threads=2, **settings))
    assert done.returncode == 0, done.stderr
    losses, evaluations = workplace.losses(), workplace.losses("eval_loss")
    assert list(losses) == list(range(1, 61))
    assert losses[1] == pytest.approx(np.log(VOCAB_SIZE), abs=0.2)
    assert losses[60] < 1.5
    assert set(evaluations) == {30, 60}
    assert evaluations[60] < 1.5
    assert workplace.steps() == [60]
    summary = json.loads((workplace.output_dir / "summary.json").read_text())
    assert summary["final_loss"] == losses[60]
    assert summary["initial_loss"] == losses[1]
    assert summary["consumed_tokens"] == 60 * 2 * 2 * 16
    assert (workplace.output_dir / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    for word in ("training loss", "validation loss", "perplexity", "tokens/s", "peak memory"):
        assert word in done.stdout
    assert_start_is_told(workplace, done.stderr)
    assert_plan_is_told(done.stderr)
    line = next(line for line in done.stderr.splitlines() if "step 60/60 | loss" in line)
    for word in ("lr ", "grad norm", "tokens/s", "GiB", "MFU", "left"):
        assert word in line


def assert_plan_is_told(log):
    """At start, and after ten steps beside what Paddle has allocated."""
    assert re.search(r"plan \S+ GiB of tensors; the machine has \S+ GiB", log)
    (line,) = [line for line in log.splitlines() if " GiB, measured " in line]
    planned, measured = map(float, re.search(r"plan (\S+) GiB, measured ([0-9.]+)", line).groups())
    assert measured == pytest.approx(planned, rel=0.3), line  # 60 kB are not planned


def assert_start_is_told(workplace, log):
    """In one line of the log, and in the first row of metrics.jsonl alone."""
    (line,) = [line for line in log.splitlines() if "to the end of the first step" in line]
    total = float(re.search(r"start, ([0-9.]+) s", line).group(1))
    told = dict(part.rsplit(" ", 1) for part in line.split("step: ")[1].split(" | "))
    phases = ["import", "ranks", "model", "weights", "optimizer", "data index", "first step"]
    assert list(told) == [*phases, "other"]
    assert sum(map(float, told.values())) == pytest.approx(total, abs=0.05)
    rows = (workplace.output_dir / "metrics.jsonl").read_text().splitlines()
    first, *others = [json.loads(row) for row in rows]
    for name, value in told.items():
        assert first[f"start_{name.replace(' ', '_')}_seconds"] == pytest.approx(
            float(value), abs=0.006
        )
    assert not any(name.startswith("start_") for row in others for name in row)


def test_killed_and_resumed_gives_the_same_floats(make_workplace):
    """SIGKILL between two checkpoints; the losses equal an uninterrupted run's bit for bit."""
    whole, broken = make_workplace("whole"), make_workplace("broken")
    changes = {"dataloader_num_workers": 1, "max_steps": 200, "save_steps": 40, "logging_steps": 1}
    assert whole.run(**changes).returncode == 0
    process = start(broken, **changes)
    wait_for_step(broken, process, 50)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = max(broken.losses())
    assert killed_at < 200
    resumed = broken.run(**changes)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {broken.output_dir}/checkpoint-" in resumed.stderr
    assert broken.losses() == whole.losses()
    assert broken.losses("grad_norm") == whole.losses("grad_norm")
    assert broken.losses("eval_loss") == whole.losses("eval_loss")
    last = "checkpoint-200/model.safetensors"
    assert (broken.output_dir / last).read_bytes() == (whole.output_dir / last).read_bytes()


def test_resume_between_two_log_lines_gives_the_same_mean(make_workplace):
    whole, broken = make_workplace("whole"), make_workplace("broken")
    assert whole.run(logging_steps=5, save_steps=100).returncode == 0
    assert broken.run(logging_steps=5, save_steps=3, max_steps=7, decay_steps=12).returncode == 0
    (broken.output_dir / "checkpoint-7").rename(broken.folder / "aside")
    assert broken.run(logging_steps=5, save_steps=100).returncode == 0
    assert broken.losses()[10] == whole.losses()[10]


@pytest.mark.slow
def test_sigterm_while_checkpoints_are_written_beside_training(workplace):
    """A save is under way at every step; the last one is complete, and nothing else is left."""
    given = {"save_steps": 1, "save_total_limit": 1, "use_async_save": True}
    process = start(workplace, max_steps=100000, eval_steps=100000, **given)
    wait_for_step(workplace, process, 5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    [step] = workplace.steps()
    assert step == max(workplace.losses())
    assert not verify(workplace.output_dir / f"checkpoint-{step}").damage
    assert list(workplace.output_dir.glob("tmp-*")) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_says_how_to_resume(workplace, number, code):
    process = start(workplace, max_steps=100000, save_steps=100000, eval_steps=100000)
    wait_for_step(workplace, process, 5)
    process.send_signal(number)
    while number != signal.SIGINT and process.poll() is None:  # launchers repeat their signal
        process.send_signal(number)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert "the same command goes on from there" in stderr
    [step] = workplace.steps()
    assert step == max(workplace.losses())
    done = workplace.run(max_steps=step + 3, warmup_steps=2)
    assert done.returncode == 0, done.stderr
    assert f"at step {step}" in done.stderr


def test_nan_loss_stops_and_keeps_the_checkpoint(workplace):
    assert workplace.run(max_steps=4).returncode == 0
    checkpoint = workplace.output_dir / "checkpoint-4" / "model.safetensors"
    before = checkpoint.read_bytes()
    diverging = {"learning_rate": 1e38, "min_learning_rate": 1e38, "max_grad_norm": 0}
    done = workplace.run(**diverging, save_steps=100)
    assert_user_error(done, "is nan", "at step", "learning_rate 1e+38", "max_grad_norm 0")
    assert workplace.steps() == [4]
    assert_user_error(workplace.run(**diverging, save_steps=1), "at step", "Lower learning_rate")
    assert checkpoint.read_bytes() == before
    for step in workplace.steps():
        folder = workplace.output_dir / f"checkpoint-{step}"
        state = json.loads((folder / "trainer_state.json").read_text())
        assert all(np.isfinite(state["pending_losses"]))
        with safe_open(folder / "model.safetensors", "numpy") as file:
            assert all(np.isfinite(file.get_tensor(name)).all() for name in sorted(file.keys()))


def test_a_step_that_is_nan_is_not_saved(workplace):
    """The rate makes it so at step 2, and again after going back; step 1 is the only one saved."""
    done = workplace.run(
        learning_rate=3e19, min_learning_rate=3e19, warmup_steps=0, save_steps=1,
        save_total_limit=1,
    )  # fmt: skip
    assert_user_error(done, "is nan at step 5", "max_rollbacks (3)")
    assert workplace.steps() == [1]
    with safe_open(workplace.output_dir / "checkpoint-1" / "model.safetensors", "numpy") as file:
        assert all(np.isfinite(file.get_tensor(name)).all() for name in sorted(file.keys()))
    assert [(e["event"], e["step"]) for e in events(workplace.output_dir)] == [
        ("rollback", 2), ("skipped", 2), ("rollback", 3), ("skipped", 3), ("rollback", 4),
        ("skipped", 4), ("stopped", 5),
    ]  # fmt: skip


def test_disk_full_while_saving(workplace):
    assert workplace.run(max_steps=4).returncode == 0

    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = workplace.execute(workplace.command(max_steps=8), preexec_fn=limit_file_size)
    assert_user_error(done, "checkpoint-8", "checkpoint-4")
    assert workplace.steps() == [4]
    assert not list(workplace.output_dir.glob("tmp-*"))
    assert workplace.run(max_steps=8).returncode == 0
    assert workplace.steps() == [4, 8]


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "per_device_eval_batch_size"])
def test_batch_that_exhausts_memory(workplace, name):
    limit = 2**31  # of the heap and other memory of its own, without libraries

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    settings = {"max_seq_length": 2**10, "eval_steps": 1, name: 2**10}
    done = workplace.execute(workplace.command(**settings), preexec_fn=limit_memory)
    assert_user_error(done, "memory is exhausted: a CPU tensor of ", f"Lower {name}, which is 1024")
    assert not workplace.steps()


def test_overwrite_output_dir_starts_anew(workplace):
    assert workplace.run(max_steps=4).returncode == 0
    first = workplace.losses()
    done = workplace.run(max_steps=4, overwrite_output_dir=True)
    assert done.returncode == 0, done.stderr
    assert "resuming" not in done.stderr
    assert workplace.losses() == first


def test_continue_training_starts_from_the_weights(make_workplace, monkeypatch):
    """Of a folder, or of the Hugging Face cache under the model's name."""
    first, second, third = (make_workplace(name) for name in ("first", "second", "third"))
    assert first.run(max_steps=40, save_steps=40).returncode == 0
    weights = first.output_dir / "checkpoint-40"
    done = second.run(model_name_or_path=weights, continue_training=1, max_steps=2)
    assert done.returncode == 0, done.stderr
    assert second.losses()[1] < first.losses()[1] - 1
    monkeypatch.setenv("HF_HUB_CACHE", str(first.folder))
    model = first.folder / "models--some--model"
    shutil.copytree(weights, model / "snapshots" / "1")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("1")
    done = third.run(model_name_or_path="some/model", continue_training=1, max_steps=2)
    assert done.returncode == 0, done.stderr
    assert third.losses() == second.losses()


def test_continue_training_without_weights(workplace, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(workplace.folder / "cache"))
    done = workplace.run(model_name_or_path="facebook/llama-7b", continue_training=1)
    words = ("continue_training", "model_name_or_path", "facebook/llama-7b", "HF_HOME")
    assert_user_error(done, *words)
    done = workplace.run(continue_training=1)
    assert_user_error(done, str(workplace.folder / "model"), "safetensors")


def test_evaluation_and_test_split_without_training(workplace):
    done = workplace.run(do_train=False, do_predict=True, split="60,20,20")
    assert done.returncode == 0, done.stderr
    summary = json.loads((workplace.output_dir / "summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(np.log(VOCAB_SIZE), abs=0.3)
    assert summary["test_loss"] == pytest.approx(np.log(VOCAB_SIZE), abs=0.3)
    assert workplace.steps() == []


def test_reference_operators_train_alike(make_workplace):
    compiled, reference = make_workplace("compiled"), make_workplace("reference")
    assert compiled.run(ops_backend="compiled").returncode == 0
    done = reference.run(ops_backend="reference", use_flash_attention=False)
    assert done.returncode == 0, done.stderr
    for step, loss in compiled.losses().items():
        assert reference.losses()[step] == pytest.approx(loss, rel=1e-4)


def test_paddles_launcher_runs_the_same_entry(workplace):
    words = workplace.command(max_steps=2)[3:]
    done = workplace.execute(
        [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "1",
         "--log_dir", str(workplace.folder / "log"), str(ROOT / "run_pretrain.py"), *words]
    )  # fmt: skip
    logs = [f.read_text() for f in (workplace.folder / "log").glob("*")]
    assert done.returncode == 0, done.stderr + "".join(logs)
    assert workplace.steps() == [2]


def test_missing_writer_package_is_named(workplace):
    blocked = (
        "import sys; sys.modules['visualdl'] = None; "
        "from pypkg.pretrain import main; sys.exit(main())"
    )
    words = workplace.command(report_to="visualdl")[3:]
    assert_user_error(
        workplace.execute([sys.executable, "-c", blocked, *words]), "visualdl", "pip install"
    )


def damage_magic(folder: Path) -> None:
    file = folder / "data" / "corpus.idx"
    file.write_bytes(b"NOTINDEX" + file.read_bytes()[8:])


def shorten_bin(folder: Path) -> None:
    os.truncate(folder / "data" / "corpus.bin", 100)


def replace_corpus(*documents: np.ndarray):
    return lambda folder: write_corpus(folder / "data" / "corpus", list(documents))


def shrink_vocabulary(folder: Path) -> None:
    write_model(folder / "model", vocab_size=40)


def remove_data(folder: Path) -> None:
    for file in (folder / "data").iterdir():
        file.unlink()


def damage_config(folder: Path) -> None:
    (folder / "model" / "config.json").write_text('{"architectures": ["X"]}')


def hold_output_dir(folder: Path) -> None:
    (folder / "out").mkdir()
    held = json.dumps(asdict(Holder.of_this_process()))
    (folder / "out" / ".lock").write_text(held)


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (remove_data, {}, ["input_dir"]),
        (damage_magic, {}, ["corpus.idx", "magic"]),
        (shorten_bin, {}, ["corpus.bin"]),
        (replace_corpus(), {}, ["corpus"]),
        (replace_corpus(np.arange(5)), {"split": "1,0,0", "do_eval": False}, ["corpus", "tokens"]),
        (replace_corpus(*[np.arange(30)] * 9), {"split": "1,0,0"}, ["validation split", "split"]),
        (shrink_vocabulary, {}, ["corpus.bin", "document", "vocab_size"]),
        (damage_config, {}, ["config.json", "LlamaForCausalLM"]),
        (lambda folder: (folder / "out").write_text(""), {}, ["output_dir"]),
        (hold_output_dir, {}, ["output_dir", "is in use by process", "on", "since"]),
        (lambda folder: None, {"resume_from_checkpoint": "/nowhere"}, ["resume_from_checkpoint"]),
        (lambda folder: None, {"resume_from_checkpoint": "x" * 300}, ["File name too long"]),
        (lambda folder: None, {"tokenizer_name_or_path": "x" * 300}, ["no tokenizer in xxx"]),
        (lambda folder: None, {"model_name_or_path": "facebook/llama-7c"}, ["facebook/llama-7b"]),
        (lambda folder: None, {"bf16": True}, ["bf16"]),
        (lambda folder: None, {"tensor_parallel_degree": 2}, ["tensor_parallel_degree"]),
        (lambda folder: None, {"sample_tokens": 5}, ["tokenizer_name_or_path"]),
    ],
)  # fmt: skip
def test_bad_input_is_told_without_a_traceback(workplace, damage, settings, words):
    damage(workplace.folder)
    assert_user_error(workplace.run(**settings), *words)


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (damage_config, {}, ["config.json", "LlamaForCausalLM"]),  # before Paddle is imported
        (hold_output_dir, {"nproc": 2}, ["is in use by process"]),
        (shrink_vocabulary, {}, ["corpus.bin", "document", "vocab_size"]),  # and after
    ],
)
def test_bad_input_to_a_started_process(workplace, damage, settings, words):
    damage(workplace.folder)
    assert_user_error(workplace.execute(workplace.command(**settings)), *words)
