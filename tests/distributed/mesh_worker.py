"""One rank of test_mesh.py: the members of its groups. Arguments: a JSON object of Degrees."""

from __future__ import annotations

import json
import sys

from distributed_testing import report

from pypkg.parallel import mesh

if __name__ == "__main__":
    made = mesh.initialize(mesh.Degrees(**json.loads(sys.argv[1])))
    groups = {name: getattr(made, name) for name in ("data", "pipeline", "sharding", "tensor")}
    report(
        {
            "rank": made.rank,
            "sample_shard": made.sample_shard,
            **{name: None if group is None else group.ranks for name, group in groups.items()},
        }
    )
