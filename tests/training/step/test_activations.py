"""From the settings to the model: recompute and dropout."""

from __future__ import annotations

import math

import paddle
import pytest
from tiny_configs import tiny

from pypkg.config import Settings
from pypkg.models import ModelConfig, from_config
from pypkg.models.layers.recompute import Recompute
from pypkg.training.step.activations import dropout_notice, recompute_choice, set_activations


@pytest.mark.parametrize(
    ("asked", "choice"),
    [
        ({}, None),
        ({"recompute_granularity": "full_attn", "no_recompute_layers": (1,)}, None),
        ({"recompute": True}, Recompute()),
        ({"recompute": True, "recompute_granularity": "core_attn", "no_recompute_layers": (2, 0),
          "recompute_use_reentrant": True},
         Recompute("core_attn", frozenset({0, 2}), use_reentrant=True)),
        ({"recompute": True, "pp_recompute_interval": 3, "pipeline_parallel_degree": 2},
         Recompute(interval=3)),
        ({"recompute": True, "pp_recompute_interval": 0, "pipeline_parallel_degree": 2},
         Recompute(interval=0)),
        ({"recompute": True, "pp_recompute_interval": 0}, Recompute()),  # no pipeline
    ],
)  # fmt: skip
def test_recompute_choice(asked, choice):
    assert recompute_choice(Settings(**asked)) == choice


def test_a_model_follows_its_settings():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    model = from_config(config, seed=1)
    settings = Settings(recompute=True, no_recompute_layers=(1,), hidden_dropout_prob=0.25)
    set_activations(model, settings)
    assert [layer.recompute for layer in model.layers] == [Recompute(
        skipped_layers=frozenset({1})), None, Recompute(skipped_layers=frozenset({1}))]  # fmt: skip
    assert {layer.hidden_dropout for layer in model.layers} == {0.25}
    set_activations(model, Settings())
    assert {layer.recompute for layer in model.layers} == {None}
    assert {layer.hidden_dropout for layer in model.layers} == {0.0}


def test_z_loss_is_of_training_alone():
    config = tiny("llama")
    model, plain = from_config(config, seed=1), from_config(config, seed=1)
    set_activations(model, Settings(z_loss=1e-2))
    batch = {name: paddle.to_tensor([[9, 8, 7, 6]]) for name in ("input_ids", "labels")}
    for each in (model, plain):
        each.train()
    # Logits near zero: the log-sum-exp is about the logarithm of the vocabulary.
    expected = 1e-2 * math.log(config.vocab_size) ** 2
    difference = (model.loss(**batch) - plain.loss(**batch)).item()
    assert difference == pytest.approx(expected, rel=0.05)
    for each in (model, plain):
        each.eval()
    assert model.loss(**batch).item() == plain.loss(**batch).item()


def test_no_dropout_is_said_where_paddlenlp_has_it():
    gpt, llama = tiny("gpt3"), tiny("llama")
    said = dropout_notice(Settings(), gpt)
    assert said is not None and "no dropout: hidden_dropout_prob is 0" in said
    assert "with 0.1 where hidden_dropout_prob and attention_probs_dropout_prob are left" in said
    assert dropout_notice(Settings(), tiny("opt")) is not None
    assert dropout_notice(Settings(hidden_dropout_prob=0.1), gpt) is None
    assert dropout_notice(Settings(), llama) is None
