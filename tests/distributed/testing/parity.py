"""Models of every family with the values of a run in one process, and how far others are off."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
from distributed_testing import REPO

sys.path.insert(0, str(REPO / "tests" / "models"))
from tiny_configs import KEYS, OVERRIDES, tiny

from pypkg.models import from_pretrained
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.formats.tensor_files import TensorFiles

SEED, BATCH, SEQUENCE = 11, 2, 48
# Beside every family: what only shows with other sizes. Family and changes of its configuration.
_VARIANTS = {
    "multi_query": ("chatglm2", {"num_key_value_heads": 1}),
    "multi_query_norm": ("qwen3", {"num_key_value_heads": 1}),
    "odd_vocabulary": ("llama", {"vocab_size": 1021}),
    "odd_vocabulary_tied": ("opt", {"vocab_size": 1021}),
    "odd_vocabulary_norm_head": ("baichuan2_7b", {"vocab_size": 1021}),
}
FAMILIES = tuple(KEYS)
CASES = (*FAMILIES, *_VARIANTS)


def case_config(case: str, num_layers: int = 2) -> ModelConfig:
    family, changes = _VARIANTS.get(case, (case, {}))
    return tiny(family, num_layers).replace(**changes)


def load(case: str, folder: Path):
    """The model of ``case`` that was saved to ``folder``."""
    return from_pretrained(folder, **OVERRIDES.get(_VARIANTS.get(case, (case,))[0], {}))


def batch_of(
    config: ModelConfig, seed: int = 5, sequence: int = SEQUENCE
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Input ids and labels, of which some do not count; with the tokens that mark a prefix."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(8, min(config.vocab_size, 4096), [BATCH, sequence])
    labels = generator.integers(8, config.vocab_size, [BATCH, sequence])
    labels[:, ::seed] = -100
    labels[0, 1] = config.vocab_size - 1
    if config.prefix_lm:
        for row, start in enumerate((9, 20)):
            ids[row, start], ids[row, start + 1] = config.gmask_token_id, config.sop_token_id
    return paddle.to_tensor(ids), paddle.to_tensor(labels)


def randomise_vectors(model) -> None:
    """Norm weights and biases away from 1 and 0, so that losing one shows."""
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            noise = np.random.default_rng(index).normal(0, 0.1, parameter.shape)
            parameter.set_value(parameter + paddle.to_tensor(noise, dtype=parameter.dtype))


def largest_difference(values: dict, expected: dict) -> tuple[float, str]:
    """Relative to each one's norm; where that is nothing but rounding, to a floor."""
    assert list(values) == list(expected)
    floor = 1e-4 * max(np.linalg.norm(value) for value in expected.values())
    errors = {}
    for name, value in expected.items():
        assert values[name].shape == value.shape, name
        error = np.linalg.norm(values[name] - value) / max(np.linalg.norm(value), floor)
        errors[name] = float(error) if np.isfinite(error) else 1e30
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def same_model(first: Path, second: Path) -> bool:
    """The same configuration and bit for bit the same tensors, however files divide them."""
    if (first / "config.json").read_bytes() != (second / "config.json").read_bytes():
        return False
    found, wanted = TensorFiles(first), TensorFiles(second)
    return found.specs() == wanted.specs() and all(
        found.read(name, dtype).tobytes() == wanted.read(name, dtype).tobytes()
        for name, (dtype, _) in wanted.specs().items()
    )


def drawn_alike(model, again) -> bool:
    """Whether the matrices of ``model``, before any training, are those of ``again``."""
    drawn = dict(again.named_parameters())
    return all(
        np.array_equal(parameter.numpy(), drawn[name].numpy())
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    )
