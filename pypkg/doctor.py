"""``pypkg doctor [CONFIG.json] [--key value ...]``: whether the machines can carry a run.

Exit codes: 0 all is well, 1 warnings, 2 errors, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pypkg.config import Settings, listed
from pypkg.config.reading.parser import read_settings
from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.device.threads import configure_cpu, import_paddle
from pypkg.errors import UserError
from pypkg.files.file_handles import raise_limit
from pypkg.parallel import mesh
from pypkg.parallel.launch import watchdog
from pypkg.parallel.launch.launcher import end_with_launcher, launch, take_nproc

if TYPE_CHECKING:  # it needs Paddle
    from pypkg.training.doctor.findings import Finding

# Settings that every run has, where only the machines are examined.
_ANY_RUN = {"model_name_or_path": "any", "input_dir": "any", "output_dir": "any", "max_steps": 1}
_HELP = """\
usage: pypkg doctor [CONFIG.json] [--key value ...] [--nproc N]

Says whether the machines can carry a run: one line for each finding, with a way to mend it.
Without a configuration it examines the machines alone: devices, versions, operators, links,
limits. With one, also what the run reads and writes. It trains nothing and leaves nothing behind.

  --device NAME  cpu or gpu; by default gpu if Paddle finds one
  --nproc N      starts N CPU processes. For all GPUs of all machines, put
                 python -m paddle.distributed.launch ... before: pypkg doctor CONFIG.json
  --key value    a setting of pypkg pretrain

exit codes: 0 all is well, 1 warnings, 2 errors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(_HELP, end="")
        return 0
    end_with_launcher()
    configure_logging(mesh.launched_rank())
    raise_limit()
    return exit_code(lambda: _run(arguments), "interrupted")


def _run(arguments: Sequence[str]) -> int:
    rest, processes = take_nproc(arguments)
    device = _device(rest) if _names_no_run(rest) else None
    settings = _settings(rest, max(processes, mesh.launched_processes()))
    if processes > 1:
        with tempfile.TemporaryDirectory(prefix="pypkg-doctor-") as logs:  # nothing is left behind
            return launch(rest, processes, Path(logs), "pypkg.doctor")
    watchdog.start()
    watchdog.compare_settings(settings.to_json() if settings else json.dumps({}))
    configure_cpu(settings.num_threads if settings else 0)
    try:
        import_paddle()
    except ModuleNotFoundError as error:
        raise UserError(
            f"Paddle cannot be imported: {error}. Install it in the environment of {sys.executable}"
        ) from error
    findings = _examine(settings, device)
    code = _report(findings)
    watchdog.leave()
    return code


def _settings(arguments: Sequence[str], processes: int) -> Settings | None:
    """Those of the run; None where only a device is named.

    Raises:
        UserError: as ``pypkg pretrain``.
    """
    from pypkg.training.start.start_up import load_run_settings  # needs NumPy, unlike the help

    if _names_no_run(arguments):
        return None
    return load_run_settings(arguments, processes)


def _names_no_run(arguments: Sequence[str]) -> bool:
    """Whether there is no setting but the device, so that machines alone are examined."""
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return set(options) <= {"--device"} and (not arguments or arguments[0].startswith("--"))


def _device(arguments: Sequence[str]) -> str | None:
    """The device, where it is all that is given.

    Raises:
        UserError: there is no such device.
    """
    reading = read_settings(arguments, _ANY_RUN)
    if reading.problems:
        raise UserError(listed(reading.problems, "problems in the settings"))
    return reading.settings.device


def _examine(settings: Settings | None, device: str | None) -> list[Finding]:
    from pypkg.device.capabilities import probe, resolve
    from pypkg.training.doctor.examination import examine
    from pypkg.training.start.layout import degrees
    from pypkg.training.start.sources import model_config

    processes = mesh.launched_processes()
    if settings is None:
        capabilities, config, dtype = probe(device), None, "float32"
        wanted = mesh.Degrees(data=processes)
    else:
        plan = resolve(settings, probe(settings.device, settings.ops_backend))
        capabilities, dtype = plan.capabilities, plan.dtype
        config = model_config(settings, None)
        wanted = degrees(settings, processes)
    with watchdog.starting_fleet():
        mesh.initialize(wanted)
    return examine(capabilities, settings, config, dtype)


def _report(findings: Sequence[Finding]) -> int:
    """Prints the findings on the first rank and returns the exit code."""
    from pypkg.training.doctor.findings import Severity, counted, exit_code

    if mesh.launched_rank() == 0:
        for finding in findings:
            print(finding.labelled())
        counts = [sum(each.severity == kind for each in findings) for kind in Severity]
        warnings, errors = counts[Severity.WARNING], counts[Severity.ERROR]
        print(f"{counted(warnings, 'warning')}, {counted(errors, 'error')}")
    return exit_code(findings)


if __name__ == "__main__":
    sys.exit(main())
