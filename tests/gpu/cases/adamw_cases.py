"""Cases of the kernel that updates many tensors at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import references as ref
from checks import FLOAT32_ERROR, Backend, Case, Comparison, tolerance


def adamw_case(
    dtype: str,
    sizes: tuple[int, ...],
    grad_dtype: str = "float32",
    masters: bool = False,
    misaligned: bool = False,
) -> Case:
    """Two steps over tensors of these sizes, with gradients scaled, and one with NaN as scale."""
    betas, epsilon, rate, scale = (0.9, 0.95), 1e-8, 1e-2, 0.37

    def run(be: Backend, rng: np.random.Generator) -> Iterator[Comparison]:
        def arrays(kind: str, values: list[np.ndarray]) -> list[Any]:
            return [be.array(each, kind, misaligned) for each in values]

        weights = [rng.standard_normal(size) for size in sizes]
        decays = [0.1 * (i % 2) for i in range(len(sizes))]
        params = arrays(dtype, weights)
        held = arrays("float32", weights) if masters else [None] * len(sizes)
        moments = [arrays("float32", [np.zeros(size) for size in sizes]) for _ in betas]
        exact = [be.numpy(each) for each in (held if masters else params)]
        states = [(np.zeros(size), np.zeros(size)) for size in sizes]
        for t in (1, 2, 3):
            grads = arrays(grad_dtype, [rng.standard_normal(size) for size in sizes])
            powers = [[beta**t] * len(sizes) for beta in betas]
            tensors = list(zip(params, grads, *moments, held, decays, *powers))
            be.kernels.adamw(
                *(tensors, be.array(np.array([scale if t < 3 else np.nan]), "float32")),
                **{"learning_rate": rate, "beta1": betas[0], "beta2": betas[1]},
                epsilon=epsilon,
                stream=be.stream,
            )
            for i, grad in enumerate(grads if t < 3 else ()):
                exact[i], states[i] = ref.adamw(
                    *(exact[i], states[i], scale * be.numpy(grad)),
                    *(t, rate, betas, epsilon, decays[i]),
                )
        # Terms are about 1 (moments: 0.1) and may cancel. Weights without masters are rounded in
        # both steps.
        for i in range(len(sizes)):
            if masters:
                yield Comparison(f"master {i}", be.numpy(held[i]), exact[i], FLOAT32_ERROR, 1, 1)
            allowed = tolerance(dtype, 1 if masters else 2)
            yield Comparison(f"param {i}", be.numpy(params[i]), exact[i], allowed, 1, 1)
            for kind in range(2):
                what = f"moment{kind + 1} of {i}"
                value = be.numpy(moments[kind][i])
                yield Comparison(what, value, states[i][kind], FLOAT32_ERROR, 1, 0.1)

    suffix = f"{'-masters' if masters else ''}{'-misaligned' if misaligned else ''}"
    label = f"{len(sizes)}of{max(sizes)}-grad_{grad_dtype}{suffix}"
    return Case("adamw", dtype, label, run)
