"""The context axis on CPU processes: attention as in one process, balanced work, means of losses.

tests/matrix trains every family under it.
"""

from __future__ import annotations

from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paddle
import pytest
from context_worker import SEQUENCE
from distributed_testing import run_ranks

from pypkg import ops
from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.parallel.context.ring import _RingBlocks
from pypkg.parallel.context.tokens import blocks

WORKER = Path(__file__).with_name("context_worker.py")
LAYOUTS = [
    ("ring", 2),
    ("ring", 3),
    ("heads", 2),
    pytest.param(("ring", 4), marks=pytest.mark.slow),
    pytest.param(("heads", 4), marks=pytest.mark.slow),
]


@cache
def results(kind: str, ranks: int) -> list[dict[str, Any]]:
    """By rank."""
    return run_ranks(WORKER, ranks, [kind, ranks], timeout=120)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_and_its_gradients_are_those_of_one_process(layout):
    """With every mask; float32 sums in another order."""
    for result in results(*layout):
        for case, difference in result["differences"].items():
            assert difference < 5e-6, case


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_has_one_rank(layout):
    tokens = [result["tokens"] for result in results(*layout)]
    assert sorted(chain(*tokens)) == list(range(SEQUENCE))
    assert len({len(each) for each in tokens}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_means_of_losses_do_not_depend_on_where_labels_lie(layout):
    """4 labels of 8 in the first micro batch, and 0 to 7 in the second."""
    for result in results(*layout):
        assert result["means"]["global"] == pytest.approx([(32 + 28) / 12] * 2, rel=1e-6)
        assert result["means"]["micro_batch"] == pytest.approx([(8 + 3.5) / 2] * 2, rel=1e-6)


def test_memory_of_a_rank_depends_on_its_own_tokens_alone():
    """Twice the tokens over twice the ranks take what they took; over the same ranks, more."""
    two, four, longer = (
        max(run_ranks(WORKER, ranks, ["memory", ranks, length], timeout=120))
        for ranks, length in ((2, 512), (4, 1024), (2, 1024))
    )
    assert four < 1.1 * two
    assert longer > 1.5 * two


@pytest.fixture
def ring(monkeypatch):
    """Makes this process a rank of a ring, which sends nothing."""

    def make(ranks: int, rank: int = 0) -> None:
        degrees = mesh.Degrees(context=ranks, ring=True)
        group: Any = SimpleNamespace(rank=rank)
        monkeypatch.setattr(mesh, "_current", mesh.Mesh(degrees, rank, context=group))

    return make


def test_the_ranks_of_a_ring_have_the_first_and_the_last_blocks(ring):
    ring(4)
    assert [blocks(16, rank) for rank in range(4)] == [
        [(0, 2), (14, 16)],
        [(2, 4), (12, 14)],
        [(4, 6), (10, 12)],
        [(6, 8), (8, 10)],
    ]


def test_tokens_that_blocks_cannot_divide(ring):
    ring(4)
    with pytest.raises(UserError, match="12 tokens cannot be cut into 8 equal blocks"):
        blocks(12, 0)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_rank_of_a_ring_has_the_same_work_at_every_step(ring, ranks):
    """Two blocks of keys at a time, which causality hides from neither or both ends; at first,
    when a rank has its own, one of them whole and two by half."""
    for rank in range(ranks):
        ring(ranks, rank)
        ring_blocks = _RingBlocks(paddle.zeros([1, 6, 1, 8]), ops.AttentionMask())
        counts = [len(list(ring_blocks.visible((rank - step) % ranks))) for step in range(ranks)]
        assert counts == [3, *[2] * (ranks - 1)]


def test_a_prefix_hides_nothing(ring):
    ring(2, 0)
    lengths = paddle.to_tensor([20], dtype="int32")
    ring_blocks = _RingBlocks(
        paddle.zeros([1, 12, 1, 8]), ops.AttentionMask(prefix_lengths=lengths)
    )
    assert [len(list(ring_blocks.visible(source))) for source in range(2)] == [4, 4]
