"""Fixtures of the model tests: every test of numbers runs on each backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pypkg import ops
from pypkg.models.architecture.config import ModelConfig


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the compiled operators and on the references."""
    before = ops.backend()
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend(before)


@pytest.fixture
def tiny_config() -> ModelConfig:
    """Grouped-query attention, odd sizes, a few thousand parameters."""
    return ModelConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
