"""An updater's AdamW against its formula."""

from __future__ import annotations

import numpy as np
import paddle

from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions, decays

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


def test_decay_skips_norms_and_biases():
    model = Model(0)
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    assert decayed == {"first.weight", "second.weight"}


def test_update_is_decoupled_weight_decay():
    """Three steps against Loshchilov and Hutter's formula in float64."""
    model = Model(0)
    options = UpdateOptions(BETA1, BETA2, EPSILON, DECAY)
    _, updater = distribute(model, options, mesh.current())
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
        updater.step(RATE)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=2e-5, atol=1e-6)
