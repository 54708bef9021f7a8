"""The doctor's checks that compute, read and write; its command line."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from training_testing import Workplace

from pypkg import ops
from pypkg.config.reading.parser import load_settings
from pypkg.device.capabilities import probe
from pypkg.doctor import _names_no_run, main
from pypkg.errors import UserError
from pypkg.training.doctor import facts, inputs, operators, ports
from pypkg.training.doctor.dry_run import dry_run
from pypkg.training.doctor.examination import warn_at_start
from pypkg.training.doctor.findings import exit_code
from pypkg.training.doctor.inputs import input_findings, write_rate
from pypkg.training.doctor.links import judge, least_rates
from pypkg.training.doctor.machine import Needs, needs_of
from pypkg.training.start.sources import model_config

NAMES = [
    *("rms_norm", "rotary_embedding", "swiglu", "flash_attention", "cross_entropy"),
    "linear_cross_entropy",
]


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(inputs, "_PROBE_BYTES", 10**6)


def run_of(workplace: Workplace, **settings: object):
    loaded = load_settings(workplace.command(**settings)[3:])
    return loaded, model_config(loaded, None)


def test_every_operator_agrees_with_its_reference():
    assert [case[0] for case in operators._cases()] == NAMES
    assert operators.wrong_operators() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_operator_is_named(monkeypatch, name):
    whole = getattr(ops, name)

    def wrong(*inputs, **options):
        result = whole(*inputs, **options)
        return result * 1.5 if not isinstance(result, tuple) else (result[0] * 1.5, *result[1:])

    monkeypatch.setattr(ops, name, wrong)
    (fault,) = operators.wrong_operators()
    assert fault.startswith(f"{name} differs from its reference by ")

    def failing(*inputs, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(ops, name, failing)
    assert operators.wrong_operators() == [f"{name} fails: no kernel image is available"]
    (finding,) = operators.operator_findings()
    assert finding.severity == 2 and "ops_backend" in finding.line()


@pytest.mark.parametrize(
    ("rates", "hosts", "severity", "words"),
    [
        ({(0, 1): 100.0, (2, 3): 90.0}, "aabb", 0, "90 GB/s or more in 2 groups"),
        ({(0, 1): 100.0, (2, 3): 30.0, (4, 5): 90.0}, "aabbcc", 1, "ranks 2 and 3 (b)"),
        ({(0, 1): 6.0}, "aa", 1, "6 GB/s, expected 8 or more"),
        ({(0, 1): 6.0}, "ab", 0, "6 GB/s or more in 1 group"),
        ({(0, 1): 0.5}, "ab", 1, "NCCL_SOCKET_IFNAME"),
        ({(0, 1): 0.0}, "aa", 2, "the sum is wrong"),
    ],
)
def test_links(monkeypatch, rates, hosts, severity, words):
    ends = ",".join(f"{host}:{port}" for port, host in enumerate(hosts))
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", ends)
    least = least_rates(rates, "gpu", hosts)
    found = list(judge("tensor", rates, least, {}, len(hosts)))
    assert exit_code(found) == severity
    assert any(words in each.line() for each in found)


def test_a_link_that_is_missing_within_a_machine():
    """The link of the data sheet is expected within a machine alone."""
    rates = {(0, 1, 2, 3): 20.0}
    assert least_rates(rates, "gpu", "aaaa", link=112.5) == {(0, 1, 2, 3): 112.5}
    assert least_rates(rates, "gpu", "aabb", link=112.5) == {(0, 1, 2, 3): 10.0}
    assert least_rates(rates, "cpu", "aaaa") == {(0, 1, 2, 3): 10.0}


def test_the_slow_link_of_a_group_is_named(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "a:1,a:2,b:3,b:4")
    group = (0, 1, 2, 3)
    pairs = {(0, 1): 90.0, (1, 2): 3.0, (2, 3): 95.0, (3, 0): 85.0}
    (found,) = judge("data", {group: 3.0}, {group: 112.5}, pairs, 4)
    assert (
        "the link from rank 1 (a) to rank 2 (b) has 3 GB/s, and the median one 87.5" in found.what
    )
    (found,) = judge("data", {group: 3.0}, {group: 112.5}, {**pairs, (1, 2): 80.0}, 4)
    assert found.what.endswith("; all its links are alike")


def test_ports_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "a:1,a:2,b:3,b:4")
    hosts = list("aabb")
    (well,) = ports.judge({rank: {} for rank in range(4)}, hosts)
    assert well.severity == 0 and well.what == "2 machines; each reaches the others"
    (found,) = ports.judge({0: {2: "b:40001: timed out"}, 1: {}, 2: {}, 3: {}}, hosts)
    assert found.severity == 2
    assert found.line().startswith("ports: no connection to b:40001: timed out on rank 0 (a)")
    assert "Open all ports" in found.remedy


def test_a_port_at_which_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()[:2]
        assert ports.unreachable({0: address}) == {}
    found = ports.unreachable({0: address, 3: address})
    assert set(found) == {0, 3}
    assert found[3] == f"127.0.0.1:{address[1]}: Connection refused"


def test_a_run_in_order(workplace):
    settings, config = run_of(workplace)
    found = input_findings(settings, config, Needs(checkpoint=1000))
    assert exit_code(found) == 0
    assert [each.check for each in found] == [
        "data", "checksums", "tokenizer", "output_dir", "disk rate",
    ]  # fmt: skip
    assert not workplace.output_dir.exists()
    assert list(workplace.folder.glob(".*")) == []


def problem_of(settings, config, needs=None):
    found = input_findings(settings, config, needs or Needs())
    (problem,) = [each for each in found if each.severity]
    return problem


def test_data_that_is_missing_or_damaged(workplace):
    settings, config = run_of(workplace)
    tokens = workplace.folder / "data" / "corpus.bin"
    content = bytearray(tokens.read_bytes())
    content[0] ^= 1
    tokens.write_bytes(content)
    problem = problem_of(settings, config)
    assert problem.check == "checksums" and "another checksum" in problem.line()
    (workplace.folder / "data" / "corpus.idx").unlink()
    problem = problem_of(settings, config)
    assert problem.check == "data" and problem.severity == 2


def test_a_tokenizer_larger_than_the_model(workplace, monkeypatch):
    monkeypatch.setattr(inputs, "tokenizer_of", lambda _: SimpleNamespace(vocab_size=100))
    settings, config = run_of(workplace)
    problem = problem_of(settings, config)
    assert problem.severity == 1 and "raised from 64 to 128" in problem.line()

    def missing(_):
        raise UserError("tokenizer_name_or_path is 'x', where there is no tokenizer")

    monkeypatch.setattr(inputs, "tokenizer_of", missing)
    assert problem_of(settings, config).severity == 2


def test_an_output_dir_that_cannot_be_used(workplace, monkeypatch):
    settings, config = run_of(workplace)
    monkeypatch.setattr(inputs.os, "access", lambda *_: False)
    problem = problem_of(settings, config)
    assert problem.check == "output_dir" and problem.severity == 2


def test_a_slow_disk(workplace, monkeypatch):
    settings, config = run_of(workplace)
    monkeypatch.setattr(inputs, "write_rate", lambda *_: 1e6)
    problem = problem_of(settings, config, Needs(checkpoint=10**10))
    assert problem.severity == 1 and "a checkpoint takes 1e+04 s" in problem.line()


def test_no_more_is_written_than_a_checkpoint_has(workplace, monkeypatch):
    """A small disk takes the probe if it takes the run."""
    written = []
    monkeypatch.setattr(inputs, "write_rate", lambda folder, size: written.append(size) or 1e9)
    settings, config = run_of(workplace)
    for checkpoint in (1000, 10**9):
        input_findings(settings, config, Needs(checkpoint=checkpoint))
    assert written == [1000, inputs._PROBE_BYTES]


def test_the_probe_of_a_disk_leaves_nothing(tmp_path):
    assert write_rate(tmp_path, 10**7) > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="takes no file of 10 MB: No such file"):
        write_rate(tmp_path / "none", 10**7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device"], "--device has no value"),
        (["--device=tpu"], "device is 'tpu'; expected one of cpu, gpu"),
        (["--device", "cpu", "tpu"], "device is"),
        (["--nproc", "²"], "--nproc is '²'"),
        (["--device", "cpu", "--max_steps", "2"], "model_name_or_path is missing"),
    ],
)
def test_arguments_that_cannot_be(capsys, arguments, words):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_device_alone_names_no_run():
    for arguments in ([], ["--device", "gpu"], ["--device=cpu"]):
        assert _names_no_run(arguments)
    for arguments in (["run.json"], ["cpu"], ["--device", "cpu", "--seed", "1"]):
        assert not _names_no_run(arguments)


def test_bytes_of_a_checkpoint(workplace):
    settings, config = run_of(workplace, save_total_limit=2)
    size = config.num_parameters()
    assert needs_of(settings, config, "float32") == Needs(12 * size, 3)
    assert needs_of(settings, config, "bfloat16") == Needs(14 * size, 3)
    settings, _ = run_of(workplace, optim="lion")
    assert needs_of(settings, config, "bfloat16") == Needs(10 * size)
    settings, _ = run_of(workplace, ignore_save_lr_and_optim=True)
    assert needs_of(settings, config, "bfloat16") == Needs(2 * size)
    settings, _ = run_of(workplace, save_strategy="no")
    assert needs_of(settings, config, "bfloat16") == Needs()


def test_a_run_warns_at_start(workplace, monkeypatch, caplog):
    settings, config = run_of(workplace, device="cpu")
    capabilities = probe("cpu")
    with caplog.at_level("WARNING", logger="pypkg"):
        warn_at_start(capabilities, settings, config, "float32")
        assert [each for each in caplog.records if each.levelname != "INFO"] == []
        monkeypatch.setattr(facts, "free_space", lambda _: 1000)
        warn_at_start(capabilities, settings, config, "float32")
    assert "disk: 1e-06 GB are free where output_dir is" in caplog.text


def test_a_run_on_a_cpu_that_does_not_fit_is_warned_of(workplace, monkeypatch, caplog):
    """The kernel ends it without a message, so the log has to have one before."""
    settings, config = run_of(workplace, device="cpu")
    monkeypatch.setattr(facts, "_free_memory", lambda: 10_000)
    with caplog.at_level("WARNING", logger="pypkg"):
        warn_at_start(probe("cpu"), settings, config, "float32")
    assert "memory: 9.31e-06 GiB are free, and the tensors of 1 rank take up to" in caplog.text
    assert "per_device_train_batch_size" in caplog.text


def test_settings_get_the_errors_of_pretrain(workplace, capsys):
    assert main(workplace.command(max_steps=-5)[3:]) == 2
    assert "max_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_on_two_ranks(workplace):
    command = [sys.executable, "-m", "pypkg.doctor", *workplace.command()[3:], "--nproc", "2"]
    result = workplace.execute(command)
    assert result.returncode in (0, 1), result.stderr  # a machine may have one core
    assert "all-reduce, data axis: " in result.stdout and "GB/s or more in 1 group" in result.stdout
    assert "ports: 1 machine; the machine reaches itself" in result.stdout
    assert "1 corpus with" in result.stdout and "the same on all ranks" in result.stdout
    assert result.stdout.endswith(" errors\n")
    assert not workplace.output_dir.exists()  # nothing is left behind, no logs of ranks either
    (workplace.folder / "data" / "corpus.idx").unlink()
    result = workplace.execute(command)
    assert result.returncode == 2
    assert "error    data: " in result.stdout


def test_a_dry_run(workplace, capsys):
    settings, _ = run_of(workplace, device="cpu")
    assert dry_run(settings, 1) == 0
    out = capsys.readouterr().out
    assert "ok       plan: " in out and "GiB of tensors" in out and "1 corpus with" in out
    assert not workplace.output_dir.exists()
    (workplace.folder / "data" / "corpus.idx").unlink()
    assert dry_run(settings, 1) == 2
    assert "error    data: " in capsys.readouterr().out


def test_a_dry_run_of_what_does_not_fit(workplace, capsys, monkeypatch):
    small = replace(probe("cpu"), memory_bytes=2**18)
    monkeypatch.setattr("pypkg.training.doctor.dry_run.probe", lambda *_: small)
    settings, _ = run_of(workplace, device="cpu")
    assert dry_run(settings, 1) == 2
    assert "error    plan: " in capsys.readouterr().out
    gpu = replace(
        small, device="gpu", device_name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0),
        memory_bytes=79 * 2**30,
    )  # fmt: skip
    monkeypatch.setattr("pypkg.training.doctor.dry_run.probe", lambda *_: gpu)
    monkeypatch.setattr("pypkg.training.doctor.facts._free_gpu_memory", lambda: None)
    settings, _ = run_of(workplace)
    dry_run(settings, 1)
    assert "tokens/s per GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_starts_nothing(workplace):
    command = [*workplace.command(), "--dry_run", "--nproc", "2"]
    result = workplace.execute(command)
    assert result.returncode in (0, 1), result.stderr
    assert "plan: " in result.stdout and not workplace.output_dir.exists()
