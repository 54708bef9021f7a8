"""``python -m pypkg.pretrain CONFIG.json [--key value ...]``: pre-trains a model.

The settings are PaddleNLP's (docs/configuration.md); the command line wins over the file.
``--dry_run`` plans the run, looks at what it reads and writes, and starts nothing.
``--nproc N`` starts N CPU processes on this machine, the ranks of one run. Exit codes: 0 done; 2 an
invalid setting or file; 130 stopped by Ctrl-C and 143 by SIGTERM, both with a checkpoint saved; 1
another error.
"""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from pypkg.config import Settings, help_text
from pypkg.console import progress
from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging, say
from pypkg.console.troubleshooting import error_text
from pypkg.device.threads import configure_cpu, import_paddle
from pypkg.errors import UserError, memory_shortage
from pypkg.files.file_handles import raise_limit
from pypkg.parallel import mesh
from pypkg.parallel.launch import watchdog
from pypkg.parallel.launch.launcher import end_with_launcher, launch, take_nproc
from pypkg.training.checkpoint.lock import refuse_if_in_use

logger = logging.getLogger("pypkg")
_DRY_RUN = "--dry_run"

_ROOM = "Checkpoints are untouched. Free some space, then start the same command again."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return 0
    from pypkg.training.interrupt import Terminated, raise_on_sigterm
    from pypkg.training.start.start_up import (
        load_run_settings,  # needs NumPy, which the help does not
    )

    progress.begin_start()
    end_with_launcher()
    configure_logging(mesh.launched_rank())
    raise_limit()
    settings = None
    try:
        arguments, processes = take_nproc(arguments)
        if _DRY_RUN in arguments:
            words = [word for word in arguments if word != _DRY_RUN]
            return exit_code(lambda: _dry_run(words, processes), "interrupted")
        if processes > 1:
            settings = load_run_settings(arguments, processes)
            refuse_if_in_use(settings.output_dir)  # the logs of its ranks are there
            return launch(arguments, processes, Path(settings.output_dir) / "log")
        raise_on_sigterm()
        watchdog.start()
        settings = load_run_settings(arguments, mesh.launched_processes())
        watchdog.compare_settings(settings.to_json())
        logger.info(configure_cpu(settings.num_threads))
        with progress.phase("import"):
            for line in import_paddle():
                logger.info(line)
            raise_on_sigterm()  # once more, in place of Paddle's handler
            from pypkg.training.run import run  # uses Paddle, which must have seen the threads

        code = run(settings)
        watchdog.leave()
        return code
    except UserError as error:
        say(error_text(watchdog.failed(str(error), 2)))
        return 2
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, Terminated) else 130
        text = "stopped by SIGTERM" if code == 143 else "interrupted"
        text += "; the last checkpoint is untouched"
        told = watchdog.failed(text, code)
        if text not in told:  # a launcher ends the ranks beside one that has failed
            say(f"error: {told}")
            return 1
        say(text)
        return code
    except Exception as error:
        code_or_none = _say_error(error, settings)
        if code_or_none is None:
            raise
        return code_or_none


def _say_error(error: Exception, settings: Settings | None) -> int | None:
    """Reports an error that is no UserError; None if Python has to print its traceback.

    Args:
        settings: of the run; None if the error came before they were read.
    """
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        say(error_text(watchdog.failed(f"the disk is full: {error}. {_ROOM}", 2)))
        return 2
    if shortage := memory_shortage(error, _less_memory(settings)):
        # Before the end of the first step, the next attempt would repeat it. Later, other programs
        # on the machine may be the cause.
        code = 2 if progress.is_starting() else 1
        say(error_text(watchdog.failed(str(shortage), code)))
        return code
    if not watchdog.is_on():
        return None
    cause = watchdog.failed(f"{type(error).__name__}: {error}", 1, traceback.format_exc())
    say(f"error: {cause}")
    return 1


def _less_memory(settings: Settings | None) -> str:
    given = f", which is {settings.per_device_train_batch_size}," if settings else ""
    return (
        f"Lower per_device_train_batch_size{given} and raise gradient_accumulation_steps by as "
        "much, or set recompute to true; pypkg plan computes the memory of other settings"
    )


def _dry_run(arguments: Sequence[str], processes: int) -> int:
    """On the first rank; others of a launcher have nothing to do."""
    if mesh.launched_rank() > 0:
        return 0
    from pypkg.training.start.start_up import load_run_settings

    ranks = max(processes, mesh.launched_processes())
    if processes > 1:
        arguments = [*arguments, "--device", "cpu"]  # as the launcher of CPU processes
    settings = load_run_settings(arguments, ranks)
    configure_cpu(settings.num_threads)
    import_paddle()
    from pypkg.training.doctor.dry_run import dry_run

    return dry_run(settings, ranks)


if __name__ == "__main__":
    sys.exit(main())
