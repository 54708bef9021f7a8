"""profiler_options: a window of steps through Paddle's profiler; host and device time of phases."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import paddle
import pytest
from training_testing import Workplace, counting_documents, write_corpus, write_model

from pypkg.config.profiler_options import ProfilerOptions, parse_profiler_options
from pypkg.errors import UserError
from pypkg.training.step import phase_times
from pypkg.training.step.phase_times import PhaseTimes
from pypkg.training.step.profiling import StepProfiler
from pypkg.training.step.rank_times import Times, phase_table


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    write_corpus(tmp_path / "data" / "corpus", counting_documents())
    write_model(tmp_path / "model")
    return Workplace(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ProfilerOptions()),
        ("batch_range=[50, 60]; profile_path=out", ProfilerOptions(50, 60, "out")),
        ("batch_range=3,4;state=CPU;", ProfilerOptions(3, 4, targets="cpu")),
        (
            "sorted_key=max;record_shapes=True",
            ProfilerOptions(sorted_key="max", record_shapes=True),
        ),
    ],
)
def test_options_are_written_as_in_paddlenlp(text, expected):
    assert parse_profiler_options(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_range=[20,10]", r"batch_range is \[20,10\]; expected two steps"),
        ("batch_range=10", "expected two steps"),
        ("steps=3", "'steps'; expected batch_range, state"),
        ("batch_range", "expected key=value"),
        ("state=TPU", "state is 'tpu'; expected one of cpu, gpu, all"),
        ("sorted_key=calls", "expected one of total, max, min, ave"),
        ("record_shapes=maybe", "record_shapes is 'maybe'"),
        ("profile_path=", "profile_path is empty"),
        ("exit_on_finished=True", "exit_on_finished.*max_steps ends a run"),
        ("timer_only=False", "timer_only.*skip_profile_timer"),
    ],
)
def test_options_that_are_wrong(text, words):
    with pytest.raises(ValueError, match=words):
        parse_profiler_options(text)


def test_a_window_of_a_run(workplace):
    done = workplace.run(max_steps=6, profiler_options="batch_range=[2,4]; record_shapes=True")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = workplace.output_dir / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [
        "rank0.memory.jsonl", "rank0.operators.txt", "rank0.trace.json"
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "rank0.memory.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4]
    assert all(min(row["resident"], row["peak"]) > 50 * 2**20 for row in rows)
    events = json.loads((folder / "rank0.trace.json").read_text())["traceEvents"]
    names = [event["name"].split("[")[0] for event in events if "name" in event]
    for phase in ("samples", "forward and backward", "update"):
        assert sum(name.startswith(phase) for name in names) == 2, phase
    assert "Operator Summary" in (folder / "rank0.operators.txt").read_text()
    assert "Operator Summary" not in done.stdout


def profiled(folder: Path, options: ProfilerOptions, steps: int) -> list[str]:
    """Names of the files after ``steps`` steps of one product each."""
    profiler = StepProfiler(options, folder, rank=3)
    for step in range(steps):
        paddle.matmul(paddle.ones([4, 4]), paddle.ones([4, 4]))
        profiler.end_step(step + 1)
    profiler.close()
    return sorted(file.name for file in folder.glob("*"))


def test_a_run_that_ends_within_the_window_leaves_what_it_recorded(tmp_path):
    names = profiled(tmp_path / "out", ProfilerOptions(first=1, stop=9), steps=3)
    assert names == ["rank3.memory.jsonl", "rank3.operators.txt", "rank3.trace.json"]
    assert len((tmp_path / "out/rank3.memory.jsonl").read_text().splitlines()) == 2


def test_a_run_that_ends_before_the_window_leaves_nothing(tmp_path):
    assert profiled(tmp_path / "out", ProfilerOptions(first=5, stop=9), steps=3) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*rank3\.memory\.jsonl"):
        profiled(tmp_path / "out", ProfilerOptions(first=0, stop=1), steps=1)


def test_the_gpu_of_a_run_on_a_cpu_is_an_error(tmp_path):
    with pytest.raises(UserError, match="state=GPU, but the run is on a CPU"):
        StepProfiler(ProfilerOptions(first=0, targets="gpu"), tmp_path, rank=0)


class Event:
    """An event on a device that needs 250 ms for each block."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 250.0


def test_device_times_are_those_between_events(monkeypatch):
    waits = []
    device = SimpleNamespace(
        get_device=lambda: "gpu:0", Event=Event, synchronize=lambda: waits.append(1)
    )
    monkeypatch.setattr(phase_times, "paddle", SimpleNamespace(device=device))
    times = PhaseTimes()
    for _ in range(2):
        with times.measuring("update"):
            pass
    assert times.device == {"update": 0.5} and len(waits) == 2
    assert 0 <= times.host["update"] < 60


def test_the_table_of_phases_has_device_times_of_gpus_alone():
    of_cpu = Times(steps=2, phases=PhaseTimes(host={"samples": 0.2, "update": 1.0}))
    assert phase_table([of_cpu]).splitlines() == [
        "phases: seconds of a step, mean of 2",
        "  rank   samples    update",
        "     0  0.1000 s  0.5000 s",
    ]
    of_gpu = Times(steps=1, phases=PhaseTimes({"samples": 0.1, "update": 0.2}, {"update": 0.3}))
    head, row = phase_table([of_gpu]).splitlines()[1:]
    assert head.split("  ")[-2:] == ["update, host", "update, device"]
    assert row.split() == ["0", "0.1000", "s", "0.2000", "s", "0.3000", "s"]
