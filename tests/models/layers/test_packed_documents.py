"""Rows that hold several documents, against the documents alone."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from tiny_configs import KEYS, tiny

from pypkg.data.loading.objectives import causal
from pypkg.data.loading.packing import Packing
from pypkg.errors import UserError
from pypkg.models import from_config

LENGTHS = ((1, 30, 17, 1, 1, 15), (23, 42))  # documents of each row: 65 tokens
PREFIX_FAMILIES = ("chatglm", "glm130b")
CAUSAL_FAMILIES = [family for family in KEYS if family not in PREFIX_FAMILIES]
ALL_APART = Packing(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)


def make_documents() -> list[list[np.ndarray]]:
    rng = np.random.default_rng(3)
    return [[rng.integers(8, 4000, length) for length in row] for row in LENGTHS]


def packed_batch(documents: list[list[np.ndarray]], packing: Packing) -> dict[str, paddle.Tensor]:
    text = np.stack([np.concatenate(row) for row in documents])
    starts = np.stack(
        [
            np.repeat(np.cumsum([0, *map(len, row[:-1])]), list(map(len, row))).astype(np.int32)
            for row in documents
        ]
    )
    batch = packing(causal(np.arange(len(text)), text), starts)
    return {name: paddle.to_tensor(array) for name, array in batch.items()}


def without_positions(packing: Packing) -> Packing:
    """For a model that has none: distances within a document are its own anyway."""
    return Packing(packing.reset_attention_mask, False, packing.eod_mask_loss)


def packing_for(config) -> Packing:
    has_positions = config.position_embedding in ("rope", "learned")
    return ALL_APART if has_positions else without_positions(ALL_APART)


def gradients(model) -> dict[str, np.ndarray]:
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_loss_and_gradients_are_those_of_the_documents_alone(family: str, dtype: str):
    config = tiny(family)
    model = from_config(config, seed=4).to(dtype=dtype)
    model.train()
    documents = make_documents()
    packed = model.loss(**packed_batch(documents, packing_for(config)))
    packed.backward()
    of_packed = gradients(model)

    predicted = sum(length - 1 for row in LENGTHS for length in row)
    alone = 0.0
    for document in (document for row in documents for document in row if len(document) > 1):
        text = paddle.to_tensor(document).unsqueeze(0)
        loss = model.loss(text[:, :-1], text[:, 1:], reduction="sum") / predicted
        loss.backward()
        alone += loss.item()
    of_alone = gradients(model)

    tolerance = {"float32": 2e-6, "float64": 1e-12}[dtype]
    assert packed.item() == pytest.approx(alone, rel=tolerance)
    assert of_packed.keys() == of_alone.keys()
    floor = 1e-3 * max(np.linalg.norm(gradient) for gradient in of_alone.values())
    for name, gradient in of_alone.items():
        error = np.linalg.norm(of_packed[name] - gradient)
        assert error <= 20 * tolerance * max(np.linalg.norm(gradient), floor), name


@pytest.mark.parametrize("family", ["llama", "opt", "baichuan_13b"])
@pytest.mark.parametrize("flash", [True, False])
def test_each_setting_changes_what_it_says(family: str, flash: bool):
    """A later document does not depend on an earlier one exactly if attention is reset."""
    config = tiny(family)
    model = from_config(config, seed=4)
    model.use_attention("pypkg" if flash else "reference")
    model.eval()
    documents = make_documents()
    other = [[(document + 1) % 4000 for document in row[:-1]] + row[-1:] for row in documents]
    last = [sum(lengths[:-1]) for lengths in LENGTHS]
    for attention in (False, True):
        packing = Packing(attention, config.position_embedding != "alibi", True)
        first, second = (packed_batch(each, packing) for each in (documents, other))
        difference = [
            float((a[row, begin:] - b[row, begin:]).abs().max())
            for a, b in [
                [
                    model(**{k: v for k, v in batch.items() if k != "labels"})
                    for batch in (first, second)
                ]
            ]
            for row, begin in enumerate(last)
        ]
        assert (max(difference) < 1e-6) == attention, difference
        assert (min(difference) > 1e-4) != attention, difference


@pytest.mark.parametrize("family", PREFIX_FAMILIES)
def test_a_model_that_sees_a_prefix_refuses(family: str):
    model = from_config(tiny(family), seed=4)
    with pytest.raises(UserError, match="prefix language model"):
        model.loss(**packed_batch(make_documents(), Packing(reset_attention_mask=True)))
