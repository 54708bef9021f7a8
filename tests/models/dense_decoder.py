"""A LLaMA decoder in float64 with dense masks: what each field about attention means."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from pypkg.models.architecture.config import ModelConfig


def dense_loss(
    config: ModelConfig,
    weights: dict[str, paddle.Tensor],
    ids: paddle.Tensor,
    labels: paddle.Tensor,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Logits [batch, sequence, vocab] and their mean cross entropy, differentiable.

    Args:
        weights: float64, by the names of the model's parameters; RMS norms, rotary positions, a
            gated SiLU and a head of its own.
    """
    x = weights["embed_tokens.weight"][ids]
    for number in range(config.num_hidden_layers):
        layer = {name.removeprefix(f"layers.{number}."): value for name, value in weights.items()}
        x = x + _attention(config, layer, _norm(config, x, layer["input_layernorm.weight"]), number)
        hidden = _norm(config, x, layer["post_attention_layernorm.weight"])
        gate, up = (hidden @ layer["mlp.gate_up_proj.weight"]).chunk(2, axis=-1)
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"]
    logits = _norm(config, x, weights["norm.weight"]) @ weights["lm_head.weight"].T
    return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _norm(config: ModelConfig, x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight


def _attention(
    config: ModelConfig, layer: dict[str, paddle.Tensor], x: paddle.Tensor, number: int
) -> paddle.Tensor:
    sequence = x.shape[1]
    sizes = [config.query_size, config.key_value_size, config.key_value_size]
    q, k, v = (
        part.reshape([x.shape[0], sequence, -1, config.head_dim]).transpose([0, 2, 1, 3])
        for part in (x @ layer["self_attn.qkv_proj.weight"]).split(sizes, axis=-1)
    )
    groups = config.num_attention_heads // config.num_key_value_heads
    k, v = (each.repeat_interleave(groups, axis=1) for each in (k, v))
    scores = _rotated(config, q) @ _rotated(config, k).transpose([0, 1, 3, 2])
    scores = scores / (config.query_pre_attn_scalar or config.head_dim) ** 0.5
    if config.attn_logit_softcapping is not None:
        scores = config.attn_logit_softcapping * (scores / config.attn_logit_softcapping).tanh()
    distance = paddle.arange(sequence).unsqueeze(1) - paddle.arange(sequence)
    visible = distance >= 0
    if config.layer_types[number] == "sliding_attention":
        visible &= distance < config.sliding_window
    scores = paddle.where(visible, scores, paddle.full_like(scores, float("-inf")))
    out = (F.softmax(scores, axis=-1) @ v).transpose([0, 2, 1, 3]).flatten(2)
    return out @ layer["self_attn.o_proj.weight"]


def _rotated(config: ModelConfig, x: paddle.Tensor) -> paddle.Tensor:
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-paddle.arange(half, dtype="float64") / half)
    angles = paddle.outer(paddle.arange(x.shape[2], dtype="float64"), frequencies)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)
