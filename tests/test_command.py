"""The ``pypkg`` command: its help, dispatch, errors and completion."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pypkg import __version__, config
from pypkg.__main__ import COMMANDS, help_text, main
from pypkg.config.docs_page import explain_settings
from pypkg.config.settings import setting_fields
from pypkg.console.completion import completion_script, options_of
from pypkg.errors import UserError

REPO = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pypkg", *arguments],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT,
    )  # fmt: skip


def test_help_fits_a_terminal_and_names_every_command():
    lines = help_text().splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    for command in COMMANDS.values():
        assert any(re.fullmatch(rf"  {command.name} +{command.summary}", each) for each in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs_the_main_of_its_module(name, monkeypatch):
    given = []
    module = importlib.import_module(COMMANDS[name].module)
    monkeypatch.setattr(module, "main", lambda arguments: given.append(arguments) or 7)
    assert main([name, "a", "--b"]) == 7
    assert given == [["a", "--b"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_bears_its_name(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: pypkg {name}")


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]])
def test_the_help_imports_neither_paddle_nor_numpy(arguments):
    code = (
        f"import sys; from pypkg.__main__ import main; main({arguments}); "
        "print([each for each in ('paddle', 'numpy') if each in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version():
    assert run("--version").stdout == f"pypkg {__version__}\n"


def test_without_a_command_the_help_is_shown_with_exit_code_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out == help_text()


@pytest.mark.parametrize(
    ("arguments", "message", "section"),
    [
        (["pretrian"], "error: 'pretrian' is not a command of pypkg; did you mean pretrain?\n", ""),
        (
            ["zzz"],
            "error: 'zzz' is not a command of pypkg; expected one of preprocess, pretrain,",
            "",
        ),
        (["--zzz"], "error: '--zzz' is not a command of pypkg; expected one of", ""),
        (
            ["config", "zzz"],
            "error: no setting has 'zzz' in its name or meaning;",
            "unknown-setting",
        ),
        (
            ["pretrain", "missing.json"],
            "error: the settings file missing.json cannot be read",
            "settings-file",
        ),
    ],
)
def test_a_mistake_is_one_error_line_and_exit_code_2(arguments, message, section):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    sections = [f"see docs/guides/troubleshooting.md#{section}"] if section else []
    assert done.stderr.splitlines()[1:] == sections


def test_the_installed_script_is_this_command():
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is new in 3.11
    module, function = re.search(r'^pypkg = "(.+):(.+)"$', text, re.M).groups()
    assert getattr(importlib.import_module(module), function) is main


def test_help_names_every_setting_and_fits_80_columns():
    text = config.help_text()
    assert text.startswith("usage: pypkg pretrain [CONFIG.json]")
    assert {f"--{spec.name}" for spec in setting_fields()} <= set(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 60


def test_settings_are_explained_by_name():
    text = explain_settings(["--learning_rate", "warmup_ratio"])
    assert "--learning_rate  [number, 5e-05]\n    " in text
    assert "(more than 0)" in text
    assert re.findall(r"^--(\w+)", text, re.M) == [
        "learning_rate", "min_learning_rate", "warmup_ratio"
    ]  # fmt: skip
    with pytest.raises(UserError, match="no setting has 'zzz' or 'yyy' in its name or meaning"):
        explain_settings(["zzz", "yyy"])


def test_a_word_that_is_in_no_name_is_looked_for_in_the_meanings():
    text = explain_settings(["Validation", "warmup_steps"])
    assert re.findall(r"^--(\w+)", text, re.M)[0] == "split"
    assert {"--split", "--do_eval", "--warmup_steps"} <= set(text.split())
    assert "--eval_steps" not in explain_settings(["eval_iters"])  # its meaning has the word


def test_the_help_has_each_setting_under_its_topic():
    topics = dict(re.findall(r"^(\S.*):\n((?:  --.*\n)+)", config.help_text(), re.M))
    assert topics["What to do"].split()[-1] == "--distributed_dataloader"
    assert topics["Optimizer and learning rate"].split()[:2] == ["--rampup_batch_size", "--optim"]


def test_completion_knows_the_options_of_each_command():
    assert {"--learning_rate", "--nproc"} <= set(options_of("pretrain"))
    assert {"--input_path", "--train_tokenizer"} <= set(options_of("preprocess"))
    for name in ("plan", "doctor"):
        found = options_of(name)
        assert "--learning_rate" in found and "--key" not in found


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pypkg", "pre"], ["preprocess", "pretrain"]),
        (["pypkg", "pretrain", "--warmup_"], ["--warmup_steps", "--warmup_ratio"]),
        (["pypkg", "pretrain", "--warmup_steps", "9"], []),
        (["pypkg", "convert", ""], []),  # left to the completion of files
    ],
)
def test_bash_completes(words, expected):
    script = completion_script("bash") + (
        f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}\n"
        '_pypkg; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_scripts_of_the_other_shells():
    assert completion_script("zsh").endswith(completion_script("bash"))
    fish = completion_script("fish").splitlines()
    assert "complete -c pypkg -n '__fish_seen_subcommand_from pretrain' -l seed" in fish
    assert all(line.startswith("complete -c pypkg ") for line in fish)
