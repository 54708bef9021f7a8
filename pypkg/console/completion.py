"""``pypkg completion SHELL``: prints a completion script for bash, zsh or fish.

The script is static, so a TAB starts no Python: it holds the commands, and the options that the
``--help`` of each one names. Other words complete to files.

    bash   source <(pypkg completion bash)                 in ~/.bashrc
    zsh    source <(pypkg completion zsh)                  in ~/.zshrc, after compinit
    fish   pypkg completion fish | source                  in ~/.config/fish/config.fish
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Mapping, Sequence

from pypkg.__main__ import COMMANDS
from pypkg.config.settings import setting_fields
from pypkg.console.command_line import exit_code

_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_ANY_SETTING = "--key"  # stands in a help text for every setting of pretrain

_BASH = """\
_pypkg() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands} --help --version"
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    case $current in -*) ;; *) words= ;; esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _pypkg pypkg
"""
_BASH_CASE = '      {name}) words="{options}" ;;'
# zsh runs bash's completion functions.
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n" + _BASH
_FISH_COMMAND = "complete -c pypkg -n __fish_use_subcommand -f -a {name} -d '{summary}'"
_FISH_OPTION = "complete -c pypkg -n '__fish_seen_subcommand_from {name}' -l {option}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="pypkg completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(arguments).shell
    return exit_code(lambda: _print(completion_script(shell)), "interrupted")


def _print(text: str) -> int:
    print(text, end="")
    return 0


def completion_script(shell: str) -> str:
    """The script for ``shell``, one of bash, zsh and fish."""
    options = {name: options_of(name) for name in COMMANDS if name != "completion"}
    return _fish(options) if shell == "fish" else _bash(_BASH if shell == "bash" else _ZSH, options)


def options_of(name: str) -> list[str]:
    """The options that ``pypkg name --help`` names, each once, in its order.

    A command whose help says ``--key value`` takes all settings as well.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[name].module).main(["--help"])
    found = _OPTION.findall(text.getvalue())
    if _ANY_SETTING in found:
        found += [f"--{field.name}" for field in setting_fields()]
    return [option for option in dict.fromkeys(found) if option != _ANY_SETTING]


def _bash(template: str, options: Mapping[str, Sequence[str]]) -> str:
    cases = [
        _BASH_CASE.format(name=name, options=" ".join(words)) for name, words in options.items()
    ]
    cases.append(_BASH_CASE.format(name="completion", options="bash zsh fish"))
    return template.format(commands=" ".join(COMMANDS), cases="\n".join(cases))


def _fish(options: Mapping[str, Sequence[str]]) -> str:
    lines = [
        _FISH_COMMAND.format(name=command.name, summary=command.summary)
        for command in COMMANDS.values()
    ]
    lines += [
        _FISH_OPTION.format(name=name, option=word.removeprefix("--"))
        for name, words in options.items()
        for word in words
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
