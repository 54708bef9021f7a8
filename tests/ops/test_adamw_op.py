"""adamw_ against its formula, in float64 and bit for bit in float32, and Paddle's optimizer."""

from __future__ import annotations

import weakref

import numpy as np
import paddle
import pytest

from pypkg import _native, ops

BACKENDS = ("compiled", "reference")
SHAPES = [(1,), (760,), (3, 1128), (17, 31, 19), (8192,), (8193,), (2, 0)]
BETA1, BETA2, EPSILON, RATE = 0.9, 0.95, 1e-8, 1e-2
DECAYS = [0.1 * (i % 2) for i in range(len(SHAPES))]


class Tensors:
    """Parameters with their state, and the same in float64 by the formula."""

    def __init__(self, dtype: str, has_masters: bool, shapes=SHAPES) -> None:
        rng = np.random.default_rng(0)
        values = [rng.standard_normal(shape) for shape in shapes]
        self.params = [paddle.to_tensor(each, "float32").astype(dtype) for each in values]
        for each in self.params:
            each.stop_gradient = False
        state = "float64" if dtype == "float64" else "float32"
        self.masters = [p.detach().astype(state) for p in self.params] if has_masters else None
        self.moments1, self.moments2 = (
            [paddle.zeros(shape, state) for shape in shapes] for _ in range(2)
        )
        self.powers1 = [paddle.to_tensor([BETA1], state) for _ in shapes]
        self.powers2 = [paddle.to_tensor([BETA2], state) for _ in shapes]
        self.exact = [p.detach().astype("float64").numpy() for p in self.params]
        self.exact_moments = [(0.0, 0.0)] * len(shapes)
        self.steps = 0

    def step(self, grads: list[paddle.Tensor], scale: float | None = None, **options) -> None:
        ops.adamw_(
            *(self.params, grads, self.moments1, self.moments2, self.powers1, self.powers2),
            self.masters,
            learning_rate=RATE,
            weight_decays=DECAYS[: len(self.params)],
            **{"beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON, **options},
            grad_scale=None if scale is None else paddle.to_tensor(scale, "float32"),
        )
        self.steps += 1
        t = self.steps
        for i, grad in enumerate(grads):
            g = grad.astype("float64").numpy() * (1.0 if scale is None else np.float32(scale))
            m = BETA1 * self.exact_moments[i][0] + (1 - BETA1) * g
            v = BETA2 * self.exact_moments[i][1] + (1 - BETA2) * g**2
            self.exact_moments[i] = m, v
            denominator = np.sqrt(v / (1 - BETA2**t)) + EPSILON
            self.exact[i] = self.exact[i] * (1 - RATE * DECAYS[i])
            self.exact[i] = self.exact[i] - RATE * (m / (1 - BETA1**t)) / denominator

    def weights(self) -> list[np.ndarray]:
        return [p.astype("float64").numpy() for p in self.masters or self.params]


def gradients(step: int, dtype: str = "float32", shapes=SHAPES) -> list[paddle.Tensor]:
    rng = np.random.default_rng(100 + step)
    return [paddle.to_tensor(rng.standard_normal(s), "float32").astype(dtype) for s in shapes]


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [("float64", "float64"), ("float32", "float32"), ("bfloat16", "bfloat16"),
     ("bfloat16", "float32")],
)  # fmt: skip
def test_steps_against_float64(each_backend, dtype, grad_dtype, scale):
    """With master weights for bfloat16, whose parameters are the masters rounded."""
    tensors = Tensors(dtype, has_masters=dtype == "bfloat16")
    for step in range(5):
        tensors.step(gradients(step, grad_dtype), scale)
    # A step is about RATE, and its float32 terms lose a few roundings of it and of the weight.
    # Paddle's operator keeps the weight decay in float32 even for float64.
    tolerance = 1e-10 if dtype == "float64" else 3e-7
    for got, exact in zip(tensors.weights(), tensors.exact, strict=True):
        np.testing.assert_allclose(got, exact, rtol=tolerance, atol=tolerance)
    for moment, (expected, _) in zip(tensors.moments1, tensors.exact_moments, strict=True):
        np.testing.assert_allclose(moment.numpy(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(tensors.powers1[0].item(), BETA1**6, rtol=1e-6)
    if tensors.masters:
        for param, master in zip(tensors.params, tensors.masters, strict=True):
            rounded = master.astype(dtype)
            assert (param.detach() == rounded).all()


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once to float32: the product of two float32 is exact in float64."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def test_the_bits_are_those_of_the_formula(compiled):
    """Each rounding of csrc/kernels/adamw/adamw_update.h, whatever processor runs it."""
    tensors = Tensors("float32", False)
    beta1, beta2, one = np.float32(BETA1), np.float32(BETA2), np.float32(1)
    power1, power2 = beta1, beta2
    weights = [each.astype(np.float32) for each in tensors.weights()]
    moments1, moments2 = ([np.zeros_like(each) for each in weights] for _ in range(2))
    for step in range(4):
        tensors.step(gradients(step))
        correction = np.sqrt(one - power2)
        rate = np.float32(RATE) * (correction / (one - power1))
        epsilon = np.float32(EPSILON) * correction
        for i, grad in enumerate(gradients(step)):
            g = grad.numpy()
            moments1[i] = fma(beta1, moments1[i], (one - beta1) * g)
            moments2[i] = fma(beta2, moments2[i], (one - beta2) * (g * g))
            decayed = fma(-np.float32(RATE) * np.float32(DECAYS[i]), weights[i], weights[i])
            direction = moments1[i] / (np.sqrt(moments2[i]) + epsilon)
            weights[i] = fma(-rate, direction, decayed)
            np.testing.assert_array_equal(tensors.params[i].numpy(), weights[i])
        power1, power2 = power1 * beta1, power2 * beta2


def test_as_paddles_optimizer(compiled):
    """Up to roundings: which of its products Paddle rounds depends on the processor."""
    ours, theirs = Tensors("float32", False), Tensors("float32", False)
    decayed = {p.name for p, decay in zip(theirs.params, DECAYS, strict=True) if decay}
    optimizer = paddle.optimizer.AdamW(
        *(RATE, BETA1, BETA2, EPSILON),
        parameters=theirs.params,
        weight_decay=0.1,
        apply_decay_param_fun=decayed.__contains__,
    )
    unit = 2.0**-24
    for step in range(4):
        grads = gradients(step)
        ours.step(grads)
        for param, grad in zip(theirs.params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        # A step rounds the weight and terms of RATE, each a few times.
        for got, expected in zip(ours.weights(), theirs.weights(), strict=True):
            np.testing.assert_allclose(got, expected, rtol=8 * unit, atol=16 * unit * RATE)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("has_masters", [False, True])
def test_a_scale_that_is_not_finite_changes_nothing(each_backend, has_masters, scale):
    """Bit for bit, whatever the gradients are; the powers alone count the step."""
    tensors = Tensors("bfloat16" if has_masters else "float32", has_masters)
    tensors.step(gradients(0), 0.37)
    lists = (tensors.params, tensors.moments1, tensors.moments2, tensors.masters or [])
    before = [each.astype("float32").numpy() for held in lists for each in held]
    grads = [each * np.nan for each in gradients(1)]
    tensors.step(grads, scale)
    after = [each.astype("float32").numpy() for held in lists for each in held]
    for got, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(tensors.powers1[0].item(), BETA1**3, rtol=1e-6)


def test_threads_do_not_matter(compiled):
    results = []
    for count in (1, 2, 3, 2):
        _native.set_num_threads(count)
        tensors = Tensors("bfloat16", False)
        for step in range(2):
            tensors.step(gradients(step, "bfloat16"), 0.5)
        results.append(tensors.weights())
    _native.set_num_threads(0)
    for other in results[1:]:
        for first, each in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, each)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": gradients(0)[:2]}, ValueError, r"as long as params, 7; lengths are \[2, 7"),
        ({"params": [paddle.ones([2], "int32")] * 7}, TypeError, "params must be float32"),
        ({"moments1": [paddle.ones([3, 2]).T] * 7}, ValueError, "must be contiguous"),
    ],
)
def test_wrong_arguments(each_backend, change, error, message):
    t = Tensors("float32", False)
    lists = {
        "params": t.params,
        "grads": gradients(0),
        "moments1": t.moments1,
        "moments2": t.moments2,
        "beta1_powers": t.powers1,
        "beta2_powers": t.powers2,
    }
    with pytest.raises(error, match=message):
        ops.adamw_(**lists | change, learning_rate=RATE, weight_decays=DECAYS)


@pytest.mark.parametrize(
    ("has_masters", "grad_dtype", "message"),
    [
        (False, "bfloat16", "gradients must be float32 or float32 like"),
        (True, "float32", "master weights are for 16-bit"),
    ],
)
def test_what_does_not_go_together(compiled, has_masters, grad_dtype, message):
    with pytest.raises(ValueError, match=message):
        Tensors("float32", has_masters).step(gradients(0, grad_dtype))


def test_the_glue_checks_what_the_kernel_relies_on(compiled):
    t = Tensors("float32", False)
    with pytest.raises(ValueError, match=r"gradient must have shape \[760\], got \[1\]"):
        t.step([gradients(0)[0]] * 7)
    t.moments2[2] = t.moments2[2].astype("bfloat16")
    with pytest.raises(ValueError, match="moment2 must be float32, got bfloat16"):
        t.step(gradients(0))


def test_a_tensor_that_takes_the_place_of_a_checked_one_is_checked(compiled):
    """The lists of a run are checked in its first step alone, as long as they hold its tensors."""
    t = Tensors("float32", False)
    t.step(gradients(0))
    t.step(gradients(1))
    t.moments1[3] = paddle.zeros([17, 31, 18])
    with pytest.raises(ValueError, match=r"moment1 must have shape \[17, 31, 19\]"):
        t.step(gradients(2))


def test_the_checks_keep_no_tensor_alive(compiled):
    t = Tensors("float32", False)
    t.step(gradients(0))
    moment = weakref.ref(t.moments1[0])
    del t
    assert moment() is None
