"""One process of a job, for test_index_cache: builds a dataset and reports what it did as JSON.

Arguments: a JSON object with prefix, and optionally data_cache, share_folder, time_limit, rank,
local_rank, build_seconds (what building takes), start_after (a file to wait for), built_file
(touched when building begins), head_start (seconds that the first process has before any other
builds), file_size_limit (of what the process may write), user (to become), fail (what building
raises).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from pypkg.data import build_datasets
from pypkg.data.index import cache
from pypkg.data.index.cache import IndexCache
from pypkg.errors import UserError


def main() -> None:
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    built = 0
    build = cache.build_index_maps

    def slow_build(*arguments):
        nonlocal built
        built += 1
        if "built_file" in options:
            Path(options["built_file"]).touch()
        time.sleep(options.get("build_seconds", 0))
        if "fail" in options:
            raise UserError(options["fail"])
        return build(*arguments)

    cache.build_index_maps = slow_build
    cache._HEAD_START = options.get("head_start", cache._HEAD_START)
    if "file_size_limit" in options:
        limit = options["file_size_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "user" in options:
        # Python's library may be out of reach for that user: all of it is loaded before.
        build_datasets([options["prefix"]], "1", 8, (1, 0, 0), 3)
        os.setgid(options["user"])
        os.setuid(options["user"])
    print("ready", flush=True)
    while "start_after" in options and not os.path.exists(options["start_after"]):
        time.sleep(0.005)
    index_cache = IndexCache(
        options.get("data_cache"),
        options.get("share_folder", False),
        options.get("time_limit", 60),
        rank=options.get("rank", 0),
        local_rank=options.get("local_rank", 0),
    )
    report = {}
    try:
        (dataset, _, _), _ = build_datasets(
            [options["prefix"]], "1", 8, (200, 0, 0), 3, cache=index_cache
        )
        texts = dataset.read(np.arange(len(dataset)))
        report["samples"] = hashlib.sha256(texts).hexdigest()
    except UserError as error:
        report["error"] = str(error)
    print(json.dumps({**report, "built": built}), flush=True)


if __name__ == "__main__":
    main()
