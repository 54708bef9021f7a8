"""The coordinate check of muP (Yang et al., Tensor Programs V, 2022): what steps change of logits.

Under muP a step changes the logits by the same amount at every width, under the standard
parametrisation by more in a wider model.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.initialization import standard_deviation
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.update_rules import rate_factor

BASE, NARROW, WIDE = 32, 128, 512
VOCABULARY, STEPS, RATE = 64, 4, 1e-2


def config_of(width: int, base: int | None) -> ModelConfig:
    """Heads of one size, whose number grows with the width, as the attention's scale needs."""
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=width // 16, initializer_range=0.1,
        mup_base_width=base,
    )  # fmt: skip


def change_of_logits(width: int, base: int | None, optim: str) -> float:
    """The root mean square over all logits, after some steps on one batch."""
    config = config_of(width, base)
    model = from_config(config, seed=1)
    factors = {
        name: rate_factor(name, shape, width=config.width_factor)
        for name, shape in parameter_shapes(config).items()
    }
    options = UpdateOptions(beta2=0.99, optim=optim, rate_factors=factors)
    wrapped, updater = distribute(model, options, mesh.Mesh())
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (4, 17))
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
    batch = {name: paddle.to_tensor(value) for name, value in batch.items()}

    def logits() -> np.ndarray:
        with paddle.no_grad():
            return model.logits(model.hidden_states(batch["input_ids"])).numpy()

    before = logits()
    for _ in range(STEPS):
        wrapped.forward_backward([batch], updater.scale)
        updater.step(RATE if optim == "adamw" else RATE / 4)
    return float(np.sqrt(((logits() - before) ** 2).mean()))


@pytest.mark.parametrize("optim", ["adamw", "lion"])
def test_coordinate_check(optim):
    """Measured ratios: 0.85 and 0.83 under muP, 2.4 and 2.3 without it."""
    assert change_of_logits(BASE, BASE, optim) == change_of_logits(BASE, None, optim)
    ratio = {
        base: change_of_logits(WIDE, base, optim) / change_of_logits(NARROW, base, optim)
        for base in (BASE, None)
    }
    assert 0.7 < ratio[BASE] < 1.3
    assert ratio[None] > 2.0


def test_deviations_and_rates_of_a_model_that_is_four_times_as_wide():
    config, plain = config_of(128, 32), config_of(128, None)
    expected = {
        "embed_tokens.weight": (1.0, 1.0),
        "layers.1.self_attn.qkv_proj.weight": (0.5, 0.25),
        "layers.0.mlp.down_proj.weight": (0.5, 0.25),
        "lm_head.weight": (0.25, 0.25),
        "norm.weight": (1.0, 1.0),
    }
    for name, (deviation, rate) in expected.items():
        shape = parameter_shapes(config)[name]
        assert rate_factor(name, shape, width=config.width_factor) == rate
        if len(shape) == 2:
            found = standard_deviation(config, name, shape)
            assert found == deviation * standard_deviation(plain, name, shape)
    scales = {"embedding": 3.0, "head": 5.0}
    assert rate_factor("embed_tokens.weight", (8, 8), **scales) == 3.0
    assert rate_factor("embed_tokens.bias", (8,), **scales) == 1.0
    assert rate_factor("lm_head.weight", (8, 8), width=2.0, **scales) == 2.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tie_word_embeddings": True}, "mup_base_width is 32, but muP scales"),
        ({"initialization": "deepnorm"}, "deepnorm, already depends on the width"),
        ({"mup_base_width": 0}, "mup_base_width"),
    ],
)
def test_models_that_it_does_not_fit(changes, words):
    with pytest.raises(UserError, match=words):
        config_of(64, 32).replace(**changes)
