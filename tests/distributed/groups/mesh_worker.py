"""One rank of test_mesh.py: the members of its groups.

Arguments: a JSON object of Degrees, and the rank, if any, that dawdles while it makes its groups.
"""

from __future__ import annotations

import json
import os
import sys
import time

from distributed_testing import report

from pypkg.parallel import mesh


def dawdle() -> None:
    """When connected to the other members of a group, but not through with its store."""
    from pypkg.parallel.gloo import groups

    create = groups._create

    def slow(*arguments):
        process_group = create(*arguments)
        time.sleep(0.4)
        return process_group

    groups._create = slow


if __name__ == "__main__":
    if sys.argv[2:] == [os.environ["PADDLE_TRAINER_ID"]]:
        dawdle()
    made = mesh.initialize(mesh.Degrees(**json.loads(sys.argv[1])))
    names = ("data", "pipeline", "sharding", "context", "tensor", "replicas")
    groups = {name: getattr(made, name) for name in names}
    report(
        {
            "rank": made.rank,
            "sample_shard": made.sample_shard,
            "token_shard": made.token_shard,
            **{name: None if group is None else group.ranks for name, group in groups.items()},
        }
    )
