"""Shapes of parameters by arithmetic against those of the layers."""

from __future__ import annotations

import paddle
import pytest
from tiny_configs import KEYS, tiny

from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.models.architecture.parameter_shapes import whole_parameters
from pypkg.models.decoder import DecoderChunk

CHUNKS = {
    "whole": ModelChunk(range(3)),
    "first": ModelChunk(range(1), is_last=False),
    "middle": ModelChunk(range(1, 2), is_first=False, is_last=False),
    "last": ModelChunk(range(2, 3), is_first=False),
}


@pytest.mark.parametrize("part", CHUNKS)
@pytest.mark.parametrize("family", KEYS)
def test_shapes_are_those_of_the_layers(family: str, part: str) -> None:
    config, chunk = tiny(family, 3), CHUNKS[part]
    with paddle.LazyGuard():
        model = DecoderChunk(config, chunk)
    expected = [(name, tuple(each.shape)) for name, each in model.named_parameters()]
    found = list(whole_parameters(config, chunk))
    assert [(each.name, each.shape) for each in found] == expected
    for each in found:
        inside = each.name.startswith("layers.")
        assert each.layer == (int(each.name.split(".")[1]) if inside else None)
