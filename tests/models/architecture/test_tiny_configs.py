"""The tiny configuration of every family makes a model, of the size that is counted for it."""

from __future__ import annotations

import math

import paddle
import pytest
from tiny_configs import KEYS, TEXT_TOKENS, tiny

from pypkg.models import from_config


@pytest.mark.parametrize("family", KEYS)
def test_a_model_has_the_parameters_that_are_counted(family: str) -> None:
    config = tiny(family)
    model = from_config(config, seed=0)
    assert sum(int(each.size) for each in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("family", KEYS)
def test_random_weights_know_nothing(family: str) -> None:
    """Their loss is that of a guess; rows of unit length in a normed head guess less evenly."""
    config = tiny(family)
    model = from_config(config, seed=0)
    paddle.seed(0)
    tokens = paddle.randint(4, TEXT_TOKENS, [2, 65])
    loss = float(model.loss(tokens[:, :-1], tokens[:, 1:]))
    assert loss == pytest.approx(math.log(config.vocab_size), abs=1.0 if config.norm_head else 0.3)
