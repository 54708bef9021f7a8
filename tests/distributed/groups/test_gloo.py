"""The gloo adapter: collectives, messages and operators, in the world and in subgroups."""

from __future__ import annotations

from pathlib import Path

import paddle
import pytest
from distributed_testing import run_ranks

from pypkg.errors import UserError
from pypkg.parallel.gloo.install import install

WORKER = Path(__file__).with_name("gloo_worker.py")


@pytest.mark.parametrize("nproc", [2, 4])
def test_against_numpy(nproc):
    for rank, results in enumerate(run_ranks(WORKER, nproc, timeout=120)):
        assert len(results) > 70
        assert [check for check, passed in results.items() if not passed] == [], rank


def test_another_paddle_is_refused(monkeypatch):
    monkeypatch.setattr(paddle, "__version__", "4.0.0")
    with pytest.raises(UserError, match=r"need Paddle 3\.3.*this is Paddle 4\.0\.0"):
        install()
