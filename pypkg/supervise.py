"""``pypkg supervise -- LAUNCH LINE``: starts a run again after a crash or the loss of a host.

It watches the process that the launch line starts. After a crash (exit code 1, a signal) it waits
and starts the line again, which resumes from the newest checkpoint. It gives up when no attempt has
written a checkpoint yet, or --max_restarts restarts in a row have brought no new one. A mistake in
the settings (exit code 2) is not repeated. SIGTERM and Ctrl-C stop the run for good; SIGUSR1, ahead
of the time limit of a Slurm job, stops it and queues the job again. On several hosts each runs this
around its own launch line, and all see the same output_dir.

The exit code is that of the last attempt.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pypkg.config.reading.parser import read_settings
from pypkg.console.logs import configure_logging
from pypkg.console.troubleshooting import error_text
from pypkg.errors import UserError
from pypkg.parallel.launch.launcher import take_nproc
from pypkg.training.supervisor import Policy, Supervisor

# Settings with which a run does not resume from its newest checkpoint.
_ANEW = ("overwrite_output_dir", "resume_from_checkpoint", "ignore_load_lr_and_optim")
# The word of a launch line after which the arguments of pretrain follow.
_COMMANDS = ("pretrain", "pypkg.pretrain", "run_pretrain.py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    own, command = _split(given)
    options = _parser().parse_args(own)
    configure_logging()
    try:
        if not command:
            raise UserError("there is no launch line; give it after --, such as -- pypkg pretrain")
        for name in ("max_restarts", "backoff", "max_backoff"):
            if not 0 <= getattr(options, name) < sys.maxsize:
                raise UserError(f"--{name} is {getattr(options, name)}; expected 0 or more")
        output_dir = options.output_dir or _output_dir(command)
        policy = Policy(options.max_restarts, options.backoff, options.max_backoff)
        return Supervisor(command, output_dir, policy).run()
    except UserError as error:
        print(error_text(str(error)), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg supervise",
        usage="pypkg supervise [OPTIONS] -- LAUNCH LINE",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=3,
        metavar="N",
        help="restarts in a row without a new checkpoint (default 3; 0: none)",
    )
    parser.add_argument(
        "--backoff",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="before a restart; doubled without a new checkpoint (default 10)",
    )
    parser.add_argument(
        "--max_backoff",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="before a restart at most (default 600)",
    )
    parser.add_argument("--output_dir", type=Path, metavar="DIR",
                        help="of the run; by default that of the launch line")  # fmt: skip
    return parser


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after the first "--"."""
    if "--" not in given:
        return given, []
    place = given.index("--")
    return given[:place], given[place + 1 :]


def _output_dir(command: Sequence[str]) -> Path:
    """The ``output_dir`` of the settings in a launch line.

    Raises:
        UserError: the line is not one of pretrain, its settings cannot be read, or it would not
            resume from the newest checkpoint.
    """
    places = [i for i, word in enumerate(command) if os.path.basename(word) in _COMMANDS]
    if not places:
        raise UserError(
            f"the launch line {' '.join(command)!r} names none of {', '.join(_COMMANDS)}, so its "
            "output_dir is not known; give --output_dir before --"
        )
    words, _ = take_nproc(command[places[0] + 1 :])
    reading = read_settings(words)
    if "output_dir" in reading.bad:
        raise UserError("the launch line has no valid output_dir; give --output_dir before --")
    for name in _ANEW:
        if value := getattr(reading.settings, name):
            raise UserError(
                f"{name} is {value!r} in the launch line, so every restart would lose what the run "
                "has done. Start the run once without pypkg supervise, then take the setting out."
            )
    return Path(reading.settings.output_dir)


if __name__ == "__main__":
    sys.exit(main())
