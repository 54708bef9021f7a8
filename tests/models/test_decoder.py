"""The decoder: its loss path, what it is equal to, and its random initialisation."""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from pypkg import ops
from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config


def _ids(config: ModelConfig, seed: int, shape: tuple[int, int] = (3, 17)) -> paddle.Tensor:
    rng = np.random.default_rng(seed)
    return paddle.to_tensor(rng.integers(0, config.vocab_size, shape))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_cross_entropy_of_the_logits(
    backend: str, tiny_config: ModelConfig, tied: bool, reduction: str
) -> None:
    config = tiny_config.replace(tie_word_embeddings=tied, initializer_range=0.3)
    model = from_config(config, seed=1)
    input_ids, labels = _ids(config, 0), _ids(config, 1)
    labels[1, 4:9] = -100
    loss = model.loss(input_ids, labels, reduction=reduction)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    model.clear_gradients()
    # Paddle's own "mean" divides by the ignored tokens too.
    expected = F.cross_entropy(model(input_ids), labels, ignore_index=-100, reduction="sum")
    if reduction == "mean":
        expected = expected / (labels != -100).sum()
    expected.backward()
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-5)
    for name, parameter in model.named_parameters():
        wanted = parameter.grad.numpy()
        scale = np.abs(wanted).max()
        # Same float32 sums in another order; a lost term would be of the order of the scale.
        np.testing.assert_allclose(gradients[name], wanted, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_loss_never_holds_full_logits(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_config(tiny_config, seed=1)
    monkeypatch.setattr(model, "logits", None)  # the loss goes past it
    calls = []
    original = ops.linear_cross_entropy

    def spy(hidden: paddle.Tensor, weight: paddle.Tensor, *args: object, **kwargs: object):
        calls.append((hidden.shape, weight.shape))
        return original(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(ops, "linear_cross_entropy", spy)
    model.loss(_ids(tiny_config, 0), _ids(tiny_config, 1))
    assert calls == [([3, 17, 48], [61, 48])]


def test_all_labels_ignored_is_zero(backend: str, tiny_config: ModelConfig) -> None:
    model = from_config(tiny_config, seed=1)
    input_ids = _ids(tiny_config, 0)
    loss = model.loss(input_ids, paddle.full_like(input_ids, -100))
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        assert not parameter.grad.numpy().any(), name


def test_grouped_query_attention_is_multi_head_with_repeated_heads(
    backend: str, tiny_config: ModelConfig
) -> None:
    grouped = from_config(tiny_config.replace(initializer_range=0.3), seed=2)
    expanded = from_config(grouped.config.replace(num_key_value_heads=6), seed=2)
    state = grouped.state_dict()
    group, head_dim = 3, 8
    for name, value in state.items():
        if name.endswith("qkv_proj.weight"):
            query, key, value = np.split(value.numpy(), [48, 64], axis=1)
            repeated = [
                part.reshape(48, 2, head_dim).repeat(group, axis=1).reshape(48, 48)
                for part in (key, value)
            ]
            state[name] = paddle.to_tensor(np.concatenate([query, *repeated], axis=1))
    expanded.set_state_dict(state)
    input_ids = _ids(tiny_config, 3)
    np.testing.assert_allclose(
        grouped(input_ids).numpy(), expanded(input_ids).numpy(), rtol=0, atol=1e-4
    )


def test_tokens_do_not_see_what_comes_after_them(backend: str, tiny_config: ModelConfig) -> None:
    model = from_config(tiny_config.replace(initializer_range=0.3), seed=2)
    input_ids = _ids(tiny_config, 4)
    changed = input_ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % tiny_config.vocab_size
    difference = np.abs(model(input_ids).numpy() - model(changed).numpy()).max(axis=(0, 2))
    assert difference[:10].max() < 1e-5  # a batched product may round differently
    assert difference[10:].min() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "qkv_bias": True, "mlp_bias": True},
        {"head_dim": 16, "attention_output_bias": True, "num_key_value_heads": 1},
    ],
)
def test_parameter_count_is_that_of_the_configuration(
    tiny_config: ModelConfig, changes: dict
) -> None:
    config = tiny_config.replace(**changes)
    model = from_config(config, seed=0)
    assert sum(p.size for p in model.parameters()) == config.num_parameters()


def test_initialisation() -> None:
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        qkv_bias=True,
        initializer_range=0.05,
    )
    for name, parameter in from_config(config, seed=5).named_parameters():
        values = parameter.numpy()
        if name.endswith("norm.weight"):
            assert (values == 1).all(), name
        elif name.endswith("bias"):
            assert (values == 0).all(), name
        else:
            # 2^16 values or more: the standard error of both is below 0.4 % of the deviation.
            assert abs(values.mean()) < 0.02 * 0.05, name
            assert abs(values.std() / 0.05 - 1) < 0.02, name


def test_initialisation_depends_on_the_seed_alone(tiny_config: ModelConfig) -> None:
    def state(seed: int | None) -> dict[str, np.ndarray]:
        model = from_config(tiny_config, seed=seed)
        return {name: p.numpy() for name, p in model.named_parameters()}

    paddle.seed(1)
    np.random.seed(1)
    first = state(3)
    after = paddle.rand([4]).numpy()
    paddle.seed(1)
    np.testing.assert_array_equal(after, paddle.rand([4]).numpy())  # no global state was used
    paddle.seed(2)
    np.random.seed(2)
    again, other = state(3), state(4)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name], err_msg=name)
        if values.ndim == 2:
            assert not np.array_equal(values, other[name]), name
    one, two = (first[f"layers.{i}.mlp.down_proj.weight"] for i in (0, 1))
    assert not np.array_equal(one, two)
    assert not np.array_equal(state(None)["lm_head.weight"], state(None)["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(tiny_config: ModelConfig, dtype: str) -> None:
    model = from_config(tiny_config, dtype=dtype, seed=3)
    wide = dict(from_config(tiny_config, seed=3).named_parameters())
    assert paddle.get_default_dtype() == "float32"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == getattr(paddle, dtype), name
        expected = wide[name].astype(dtype).astype("float32").numpy()
        np.testing.assert_array_equal(parameter.astype("float32").numpy(), expected, err_msg=name)


def test_unknown_dtype(tiny_config: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"dtype must be one of float32.*'int8'"):
        from_config(tiny_config, dtype="int8")


def test_attention_that_stores_its_weights_gives_the_same_loss(
    backend: str, tiny_config: ModelConfig
) -> None:
    model = from_config(tiny_config.replace(initializer_range=0.3), seed=1)
    input_ids, labels = _ids(tiny_config, 0), _ids(tiny_config, 1)
    flash = model.loss(input_ids, labels)
    model.use_attention("reference")
    stored = model.loss(input_ids, labels)
    np.testing.assert_allclose(stored.item(), flash.item(), rtol=1e-6)


def test_sequence_longer_than_the_learned_positions(tiny_config: ModelConfig) -> None:
    model = from_config(tiny_config.replace(position_embedding="learned"), seed=1)
    with pytest.raises(UserError, match=r"33 tokens.*max_position_embeddings \(32\)"):
        model(_ids(tiny_config, 0, (1, 33)))


def test_explicit_learned_positions(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(
        position_embedding="learned", position_offset=2, initializer_range=0.3
    )
    model = from_config(config, seed=1)
    input_ids = _ids(config, 0)
    positions = paddle.arange(17).expand([3, 17])
    np.testing.assert_array_equal(model(input_ids).numpy(), model(input_ids, positions).numpy())
    shifted = model(input_ids, positions + 3).numpy()
    assert np.abs(shifted - model(input_ids).numpy()).max() > 1e-2


@pytest.mark.parametrize("position_embedding", ["alibi", "none"])
def test_positions_without_effect_are_refused(
    tiny_config: ModelConfig, position_embedding: str
) -> None:
    model = from_config(tiny_config.replace(position_embedding=position_embedding), seed=1)
    with pytest.raises(UserError, match=f"position_embedding is {position_embedding}"):
        model(_ids(tiny_config, 0), paddle.arange(17).expand([3, 17]))


def test_embedding_gradient_scale(backend: str, tiny_config: ModelConfig) -> None:
    """The forward pass is the same; what reaches the table shrinks, and nothing else does."""
    input_ids, labels = _ids(tiny_config, 0), _ids(tiny_config, 1)
    gradients, losses = {}, {}
    for scale in (1.0, 0.1):
        model = from_config(tiny_config.replace(embedding_gradient_scale=scale), seed=1)
        loss = model.loss(input_ids, labels)
        loss.backward()
        gradients[scale] = {name: p.grad.numpy() for name, p in model.named_parameters()}
        losses[scale] = loss.item()
    assert losses[0.1] == pytest.approx(losses[1.0], rel=1e-6)
    # Logits deviate by about 0.14 and there are 51 labels: the standard error is 0.02.
    assert losses[1.0] == pytest.approx(math.log(tiny_config.vocab_size), abs=0.1)
    for name, gradient in gradients[0.1].items():
        expected = gradients[1.0][name] * (0.1 if name == "embed_tokens.weight" else 1.0)
        np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


def test_norm_head_ignores_the_length_of_its_rows(tiny_config: ModelConfig) -> None:
    model = from_config(tiny_config.replace(norm_head=True, initializer_range=0.3), seed=1)
    input_ids = _ids(tiny_config, 0)
    before = model(input_ids).numpy()
    model.lm_head.weight.set_value(model.lm_head.weight * 3.0)
    np.testing.assert_allclose(model(input_ids).numpy(), before, rtol=0, atol=1e-5)
