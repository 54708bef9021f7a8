"""The command that a result is recorded with can be typed on another machine."""

from __future__ import annotations

import pytest

from pypkg.bench.environment import describe_run


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        (["ops", "--op", "rotary"], "ops --op rotary"),
        (
            ["data-index", "--site-packages", "/a/b", "--rounds", "3"],
            "data-index --site-packages FOLDER --rounds 3",
        ),
        (["preprocess", "--paddlenlp=/a/bin/python"], "preprocess --paddlenlp=PYTHON"),
    ],
)
def test_paths_are_left_out(arguments, recorded):
    assert describe_run(arguments, 2)["command"] == f"python -m pypkg.bench {recorded}"
