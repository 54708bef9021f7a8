"""Windows from layer to layer, scale and soft cap of the scores, against a float64 reference."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from dense_decoder import dense_loss

from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config
from pypkg.models.architecture.layer_split import cut
from pypkg.models.architecture.registry import config_to_huggingface
from pypkg.models.decoder import Decoder, DecoderChunk
from pypkg.models.generate import generate
from pypkg.models.layers.recompute import ATTENTION, ATTENTION_BLOCK, FULL, Recompute
from pypkg.models.sampling import Sampling

WINDOW = 4
TYPES = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.replace(
        num_hidden_layers=4, sliding_window=WINDOW, layer_types=TYPES, initializer_range=0.2
    )


def _batch(config: ModelConfig) -> list[paddle.Tensor]:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, [2, 18])
    return [paddle.to_tensor(ids[:, :-1]), paddle.to_tensor(ids[:, 1:])]


def assert_equals_dense(model: Decoder) -> None:
    """Logits, loss and every gradient of ``model``."""
    ids, labels = _batch(model.config)
    loss = model.loss(ids, labels)
    loss.backward()
    weights = {name: value.astype("float64").detach() for name, value in model.named_parameters()}
    for value in weights.values():
        value.stop_gradient = False
    logits, wanted = dense_loss(model.config, weights, ids, labels)
    wanted.backward()
    np.testing.assert_allclose(model(ids).numpy(), logits.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss.item(), wanted.item(), rtol=1e-5)
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad.numpy()
        # float32 sums against float64 ones; a wrong mask changes gradients by their own size.
        tolerance = 1e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(
            parameter.grad.numpy(), gradient, rtol=0, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("granularity", [None, FULL, ATTENTION_BLOCK, ATTENTION])
def test_equals_dense_masks(backend: str, config: ModelConfig, granularity: str | None) -> None:
    model = from_config(config, seed=1)
    model.use_recompute(None if granularity is None else Recompute(granularity))
    assert_equals_dense(model)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"query_pre_attn_scalar": 3.5},
        {"attn_logit_softcapping": 0.7},
        {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5},
    ],
)
def test_scale_and_soft_cap(
    backend: str, config: ModelConfig, fields: dict[str, float], flash: bool
) -> None:
    model = from_config(config.replace(**fields), seed=1)
    model.use_attention("pypkg" if flash else "reference")
    assert_equals_dense(model)
    ids, _ = _batch(config)
    plain = from_config(config, seed=1)(ids).numpy()
    assert np.abs(model(ids).numpy() - plain).max() > 1e-2


def test_scale_and_soft_cap_are_positive(config: ModelConfig) -> None:
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping"):
        for value in (0, -1.0, "1"):
            with pytest.raises(UserError, match=f"{name} must be a positive number, found"):
                config.replace(**{name: value})
    written = config.replace(model_type="qwen3", qk_norm=True, query_pre_attn_scalar=2.0)
    with pytest.raises(UserError, match=r"cannot hold query_pre_attn_scalar=2\.0"):
        config_to_huggingface(written)


def test_each_layer_has_its_own_type(config: ModelConfig) -> None:
    ids, _ = _batch(config)
    logits = from_config(config, seed=1)(ids).numpy()
    for types in (TYPES[::-1], TYPES[:1] * 4, TYPES[1:2] * 4):
        other = from_config(config.replace(layer_types=types), seed=1)(ids).numpy()
        assert np.abs(logits[:, :WINDOW] - other[:, :WINDOW]).max() < 1e-5
        assert np.abs(logits[:, WINDOW:] - other[:, WINDOW:]).max() > 1e-2


def test_model_chunks_count_layers_of_the_whole_model(config: ModelConfig) -> None:
    whole, x = from_config(config, seed=1), None
    ids, _ = _batch(config)
    for chunk in cut(4, 4):
        decoder = DecoderChunk(config, chunk)
        decoder.set_state_dict({name: whole.state_dict()[name] for name in decoder.state_dict()})
        x = decoder.run(x, ids)
    np.testing.assert_allclose(x.numpy(), whole.hidden_states(ids).numpy(), rtol=0, atol=1e-5)


def test_generation(config: ModelConfig) -> None:
    model = from_config(config, seed=1)
    ids, _ = _batch(config)
    prompts = ids[:, :3].tolist()
    made = generate(model, prompts, 8, Sampling(temperature=0.0))
    tokens = paddle.to_tensor(np.concatenate([prompts, made], axis=1))
    weights = {name: value.astype("float64") for name, value in model.named_parameters()}
    logits, _ = dense_loss(config, weights, tokens, tokens)
    np.testing.assert_array_equal(tokens[:, 3:].numpy(), logits[:, 2:-1].numpy().argmax(-1))


def test_types_follow_the_depth(config: ModelConfig) -> None:
    assert config.replace(num_hidden_layers=3).layer_types == TYPES[:3]
    with pytest.raises(UserError, match="layer_types names 4 layers, but num_hidden_layers is 5"):
        config.replace(num_hidden_layers=5)
    alike = config.replace(layer_types=None)
    assert alike.replace(num_hidden_layers=6).layer_types == ("sliding_attention",) * 6
    assert alike.replace(sliding_window=None).layer_types == ("full_attention",) * 4
    with pytest.raises(UserError, match="layer_types has sliding_attention, but sliding_window"):
        config.replace(sliding_window=None)
