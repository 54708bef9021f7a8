"""AdamW against its formula, clipping, and state by structured names."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from pypkg.training.optimizer import (
    build_adamw,
    clip_by_global_norm,
    decays,
    load_optimizer_state,
    optimizer_state,
)

RATE, BETA1, BETA2, EPSILON, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1


class Model(paddle.nn.Layer):
    def __init__(self, seed: int) -> None:
        super().__init__()
        paddle.seed(seed)
        self.first = paddle.nn.Linear(5, 7)
        self.norm = paddle.nn.LayerNorm(7)
        self.second = paddle.nn.Linear(7, 3, bias_attr=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.second(self.norm(self.first(x)))


def adamw(model: paddle.nn.Layer) -> paddle.optimizer.AdamW:
    optimizer = build_adamw(model, beta1=BETA1, beta2=BETA2, epsilon=EPSILON, weight_decay=DECAY)
    optimizer.set_lr(RATE)
    return optimizer


def step(model: paddle.nn.Layer, optimizer: paddle.optimizer.AdamW, seed: int) -> None:
    x = paddle.to_tensor(np.random.default_rng(seed).standard_normal((4, 5)), dtype="float32")
    (model(x) ** 2).mean().backward()
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)


def test_decay_skips_norms_and_biases():
    model = Model(0)
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    assert decayed == {"first.weight", "second.weight"}


def test_update_is_decoupled_weight_decay():
    """Three steps against Loshchilov and Hutter's formula in float64."""
    model = Model(0)
    optimizer = adamw(model)
    expected = {n: p.numpy().astype(np.float64) for n, p in model.named_parameters()}
    m = {n: np.zeros_like(v) for n, v in expected.items()}
    v = {n: np.zeros_like(x) for n, x in expected.items()}
    rng = np.random.default_rng(1)
    for t in (1, 2, 3):
        for name, parameter in model.named_parameters():
            gradient = rng.standard_normal(parameter.shape).astype(np.float32)
            parameter.grad = paddle.to_tensor(gradient)
            m[name] = BETA1 * m[name] + (1 - BETA1) * gradient
            v[name] = BETA2 * v[name] + (1 - BETA2) * gradient.astype(np.float64) ** 2
            if decays(name, parameter):
                expected[name] *= 1 - RATE * DECAY
            corrected = np.sqrt(v[name] / (1 - BETA2**t)) + EPSILON
            expected[name] -= RATE * (m[name] / (1 - BETA1**t)) / corrected
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clip_by_global_norm(max_norm):
    parameters = [
        paddle.create_parameter([3, 4], "float32"),
        paddle.create_parameter([5], "float32"),
    ]
    rng = np.random.default_rng(0)
    gradients = [rng.standard_normal(p.shape).astype(np.float32) for p in parameters]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = paddle.to_tensor(gradient)
    norm = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients)))
    assert clip_by_global_norm(parameters, max_norm).item() == pytest.approx(norm, rel=1e-6)
    scale = max_norm / norm if 0 < max_norm < norm else 1.0
    for parameter, gradient in zip(parameters, gradients):
        np.testing.assert_allclose(parameter.grad.numpy(), gradient * scale, rtol=1e-5)


def test_state_moves_to_a_model_with_other_internal_names():
    """A resumed process makes its parameters anew, so Paddle's own names may differ."""
    first = Model(0)
    optimizer = adamw(first)
    for seed in range(3):
        step(first, optimizer, seed)
    state = {name: tensor.clone() for name, tensor in optimizer_state(optimizer, first).items()}

    second = Model(1)
    second.set_state_dict({name: p.clone() for name, p in first.state_dict().items()})
    assert {p.name for p in second.parameters()}.isdisjoint(p.name for p in first.parameters())
    resumed = adamw(second)
    load_optimizer_state(resumed, second, state)
    for seed in range(3, 6):
        step(first, optimizer, seed)
        step(second, resumed, seed)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters()):
        assert np.array_equal(a.numpy(), b.numpy()), name


def test_state_of_another_model_names_what_is_missing():
    model = Model(0)
    optimizer = adamw(model)
    with pytest.raises(KeyError, match=r"first\.weight\.moment1"):
        load_optimizer_state(optimizer, model, {})


def test_master_weights_of_16_bit_parameters_move_too():
    """CPU Paddle has no bfloat16 update, so the accumulators are made without a step."""

    def make() -> tuple[paddle.nn.Layer, paddle.optimizer.AdamW]:
        model = paddle.nn.Linear(4, 3)
        model.to(dtype="bfloat16")
        optimizer = adamw(model)
        block = paddle.static.default_main_program().global_block()
        optimizer._create_accumulators(block, list(model.parameters()))
        return model, optimizer

    first, optimizer = make()
    state = optimizer_state(optimizer, first)
    assert len(state) == 2 * 5
    assert state["weight.master_weight"].dtype == paddle.float32
    changed = {name: tensor + 1.5 for name, tensor in state.items()}

    second, resumed = make()
    load_optimizer_state(resumed, second, changed)
    restored = optimizer_state(resumed, second)
    assert set(restored) == set(changed)
    for name, tensor in changed.items():
        assert np.array_equal(restored[name].numpy(), tensor.numpy()), name
