"""The benchmark of attention: the work that it counts is that of the masks it times."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares with torch")

from pypkg.bench.ops.gpu.attention import Mask, Shape  # noqa: E402


@pytest.mark.parametrize(
    "mask", ["full", "causal", "alibi", "prefix", "documents", "window", "softcap"]
)
@pytest.mark.parametrize("sequence", [64, 75])
def test_counted_pairs_are_those_of_the_mask(mask, sequence):
    described = Mask(Shape(3, sequence, 4, 2, 64, mask), "cpu")
    j = torch.arange(sequence)
    visible = described.is_visible(j[:, None], j[None]).expand(sequence, sequence)
    assert described.visible_pairs() == 3 * int(visible.sum())
