"""``python -m pypkg.pretrain CONFIG.json [--key value ...]``: pre-trains a model.

The settings are PaddleNLP's (see docs/configuration.md); what stands on the command line wins over
the file. Exit codes: 0 done, 2 a setting or file that cannot be used, 130 stopped by Ctrl-C and
143 by SIGTERM, both with a checkpoint saved.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from pypkg.config import check_supported, help_text, load_settings
from pypkg.errors import UserError
from pypkg.logs import configure_logging
from pypkg.threads import configure_cpu, import_paddle

logger = logging.getLogger("pypkg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return 0
    configure_logging()
    try:
        settings = load_settings(arguments)
        check_supported(settings, world_size=int(os.environ.get("PADDLE_TRAINERS_NUM", "1")))
        logger.info(configure_cpu(settings.num_threads))
        import_paddle()
        from pypkg.training.run import run  # uses Paddle, which must have seen the threads chosen

        return run(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is untouched", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
