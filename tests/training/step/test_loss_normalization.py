"""The gradient of a step is that of the mean over all labels of its global batch."""

from __future__ import annotations

import math
import shutil

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from dense_decoder import dense_loss
from tiny_configs import tiny
from training_testing import counting_documents

from pypkg.data import Batch
from pypkg.models import from_config
from pypkg.models.decoder import Decoder
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.training.feed.samples import objective_of
from pypkg.training.step.engine import Engine

ROWS, SEQUENCE = 4, 24


def new_engine(
    family: str, normalization: str = "global", loss_scale: float | None = None
) -> tuple[Decoder, Engine]:
    model = from_config(tiny(family), seed=3)
    model.train()
    scaling = None if loss_scale is None else LossScale(initial=loss_scale)
    options = UpdateOptions(weight_decay=0.5, loss_scale=scaling)
    wrapped, updater = distribute(model, options, mesh.current())
    return model, Engine(wrapped, updater, normalization=normalization)


def rows_of(family: str, masked: bool) -> list[Batch]:
    """One global batch as rows; with ``masked``, labels are few, more and none."""
    text = np.random.default_rng(1).integers(8, 4000, [ROWS, SEQUENCE + 1])
    objective = objective_of(tiny(family), SEQUENCE, 5)
    rows = [objective(np.array([i]), text[i : i + 1]) for i in range(ROWS)]
    if masked:
        for row, kept in zip(rows, (2, 20, 0, 7), strict=True):
            row["labels"] = np.where(np.arange(SEQUENCE) < kept, row["labels"], -100)
    return rows


def joined(rows: list[Batch], size: int) -> list[Batch]:
    """Micro batches of ``size`` rows."""
    return [
        {name: np.concatenate([row[name] for row in rows[i : i + size]]) for name in rows[0]}
        for i in range(0, len(rows), size)
    ]


def gradients(model: Decoder) -> list[np.ndarray]:
    found = [parameter.grad.numpy().copy() for parameter in model.parameters()]
    model.clear_gradients()
    return found


@pytest.mark.parametrize(("family", "masked"), [("llama", True), ("chatglm", False)])
def test_gradients_do_not_depend_on_the_size_of_micro_batches(family: str, masked: bool):
    """Against the sum of the losses of all labels over their number, computed here."""
    rows = rows_of(family, masked)
    (whole,) = joined(rows, ROWS)
    count = (whole["labels"] != -100).sum()
    assert len({(row["labels"] != -100).sum() for row in rows}) > 1
    model, engine = new_engine(family)
    tensors = {name: paddle.to_tensor(value) for name, value in whole.items()}
    expected = model.loss(**tensors, reduction="sum") / float(count)
    expected.backward()
    wanted = gradients(model)
    for size in (1, 2, 4):
        loss = engine.forward_backward(joined(rows, size))
        assert loss is not None
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for value, right in zip(gradients(model), wanted, strict=True):
            assert np.linalg.norm(value - right) <= 1e-5 * max(np.linalg.norm(right), 1e-3)
        assert engine.evaluate(joined(rows, size)) == pytest.approx(expected.item(), rel=1e-6)
    _, micro = new_engine(family, "micro_batch")
    other = micro.forward_backward(joined(rows, 1))
    assert other is not None
    assert abs(other.item() / expected.item() - 1) > 1e-3


@pytest.mark.parametrize("scale", [None, 4096.0])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_of_unequal_counts_against_float64(size: int, scale: float | None):
    """The mean over all labels of the batch, by a decoder that shares no code with the model.

    With a loss scale, gradients are that many times as large until the update.
    """
    rows = rows_of("llama", masked=True)
    (whole,) = joined(rows, ROWS)
    model, engine = new_engine("llama", loss_scale=scale)
    exact = {
        name: paddle.to_tensor(value.numpy().astype(np.float64), stop_gradient=False)
        for name, value in model.named_parameters()
    }
    ids, labels = (paddle.to_tensor(whole[name]) for name in ("input_ids", "labels"))
    logits, _ = dense_loss(model.config, exact, ids, labels)
    counted = labels.flatten() != -100
    likelihoods = F.log_softmax(logits.flatten(0, 1)[counted], axis=-1)
    expected = -likelihoods.take_along_axis(labels.flatten()[counted].unsqueeze(1), 1).mean()
    expected.backward()
    loss = engine.forward_backward(joined(rows, size))
    assert loss is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        right = exact[name].grad.numpy()
        found = parameter.grad.numpy().astype(np.float64) / (scale or 1.0)
        assert np.linalg.norm(found - right) <= 2e-6 * np.linalg.norm(right), name


def test_equal_counts_have_the_same_bits_as_means():
    batches = joined(rows_of("llama", masked=False), 2)
    for batch in batches:
        batch["labels"] = np.where(np.arange(SEQUENCE) % 5 > 0, batch["labels"], -100)
    found = []
    for normalization in ("global", "micro_batch"):
        model, engine = new_engine("llama", normalization)
        loss = engine.forward_backward(batches)
        assert loss is not None
        found.append((loss.item(), gradients(model), engine.evaluate(batches)))
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    assert all(map(np.array_equal, found[0][1], found[1][1]))


def test_no_label_is_no_loss():
    _, engine = new_engine("llama")
    batches = joined(rows_of("llama", masked=True), 1)[2:3]
    assert engine.forward_backward(batches) is None
    assert math.isnan(engine.evaluate(batches))


def test_a_run_with_masks(workplace):
    """4 x 1 is 1 x 4; a step without labels has no loss and no gradient, and is told of once."""
    tokens = sum(map(len, counting_documents()))
    mask = np.zeros(tokens, np.uint8)
    mask[: tokens // 2] = np.arange(tokens // 2) % 48 < 16
    (workplace.folder / "data" / "corpus.lsm").write_bytes(mask.tobytes())
    curves = []
    for size, steps in ((1, 4), (4, 1)):
        shutil.rmtree(workplace.output_dir, ignore_errors=True)
        done = workplace.run(
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            weight_decay=0.1, max_steps=6,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("has no label that counts for the loss") == 1
        assert 6 not in workplace.losses()
        curves.append((workplace.losses(), workplace.losses("grad_norm")))
    for losses, norms in curves[1:]:
        assert losses == pytest.approx(curves[0][0], rel=1e-4)
        assert norms == pytest.approx(curves[0][1], rel=1e-3, abs=1e-6)
