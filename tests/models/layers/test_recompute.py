"""Recompute: bit for bit the same training, with less memory."""

from __future__ import annotations

import gc

import numpy as np
import paddle
import pytest
from tiny_configs import KEYS, tiny

from pypkg.models import from_config
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.layers.recompute import ATTENTION, ATTENTION_BLOCK, FULL, Recompute, use_recompute
from pypkg.parallel.optimizer.distribute import WrappedModel

GRANULARITIES = (FULL, ATTENTION_BLOCK, ATTENTION)
BATCH, SEQUENCE = 2, 24
WIDE_SEQUENCE = 128
WIDE = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=8,
)


def make(family: str):
    model = from_config(tiny(family), seed=3)
    model.train()
    return model


def train_twice(model) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and gradients of two micro batches, whose gradients add up."""
    config = model.config
    generator = np.random.default_rng(1)
    losses = []
    for _ in range(2):
        ids = generator.integers(8, min(config.vocab_size, 4096), [BATCH, SEQUENCE])
        if config.prefix_lm:
            ids[:, 9], ids[:, 10] = config.gmask_token_id, config.sop_token_id
        loss = model.loss(paddle.to_tensor(ids), paddle.to_tensor(np.roll(ids, -1, 1)))
        loss.backward()
        losses.append(loss.item())
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    model.clear_gradients()
    return losses, gradients


def assert_same(found, expected) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_array_equal(found[1][name], value, err_msg=name)


@pytest.mark.parametrize("family", KEYS)
def test_losses_and_gradients_are_the_same_bit_for_bit(family):
    model = make(family)
    expected = train_twice(model)
    for granularity in GRANULARITIES:
        for use_reentrant in (False, True):
            model.use_recompute(Recompute(granularity, use_reentrant=use_reentrant))
            assert_same(train_twice(model), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_with_an_attention_that_stores_its_weights(granularity):
    model = make("llama")
    model.use_attention("reference")
    expected = train_twice(model)
    model.use_recompute(Recompute(granularity))
    assert_same(train_twice(model), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dropout_draws_the_same_in_both_passes(granularity, use_reentrant):
    from pypkg.parallel.comm.random_states import seed_step

    model = make("gpt3")
    without = train_twice(model)
    model.use_dropout(0.3)
    seed_step(1, 1)
    expected = train_twice(model)
    assert expected[0] != without[0]
    model.use_recompute(Recompute(granularity, use_reentrant=use_reentrant))
    seed_step(1, 1)
    assert_same(train_twice(model), expected)


class Calls:
    """Counts how often each layer, or its attention block, runs in a forward and backward pass."""

    def __init__(self, model) -> None:
        self.model = model
        self.layers = [0] * len(model.layers)
        for number, layer in enumerate(model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: self._count(number))

    def _count(self, number: int) -> None:
        self.layers[number] += 1

    def of_a_step(self) -> list[int]:
        self.layers[:] = [0] * len(self.layers)
        ids = paddle.to_tensor(np.arange(8, 16).reshape([1, 8]))
        self.model.loss(ids, ids).backward()
        self.model.clear_gradients()
        return list(self.layers)


@pytest.fixture
def five_layers():
    model = from_config(tiny("llama").replace(num_hidden_layers=5), seed=3)
    model.train()
    return model


@pytest.mark.parametrize(
    ("choice", "runs"),
    [
        (None, [1, 1, 1, 1, 1]),
        (Recompute(), [2, 2, 2, 2, 2]),
        (Recompute(skipped_layers=frozenset({0, 3})), [1, 2, 2, 1, 2]),
        (Recompute(interval=2), [2, 1, 2, 1, 2]),
        (Recompute(interval=0), [1, 1, 1, 1, 1]),
        (Recompute(interval=3, skipped_layers=frozenset({0})), [1, 1, 1, 2, 1]),
        (Recompute(ATTENTION_BLOCK), [1, 1, 1, 1, 1]),  # the feed-forward block runs once
    ],
)
def test_which_layers_run_twice(five_layers, choice, runs):
    five_layers.use_recompute(Recompute())
    five_layers.use_recompute(choice)
    assert Calls(five_layers).of_a_step() == runs


def test_the_interval_counts_from_the_first_layer_of_a_stage(five_layers):
    stage = [(number, five_layers.layers[number]) for number in (1, 2, 3, 4)]
    use_recompute(stage, Recompute(interval=2, skipped_layers=frozenset({3})))
    assert Calls(five_layers).of_a_step() == [1, 2, 1, 1, 1]


def test_evaluation_runs_each_layer_once(five_layers):
    five_layers.use_recompute(Recompute())
    calls = Calls(five_layers)
    five_layers.eval()
    assert calls.of_a_step() == [1, 1, 1, 1, 1]
    five_layers.train()
    with paddle.no_grad():
        ids = paddle.to_tensor(np.arange(8, 16).reshape([1, 8]))
        calls.layers[:] = [0] * 5
        five_layers.loss(ids, ids)
    assert calls.layers == [1, 1, 1, 1, 1]


def allocated() -> int:
    """Bytes that Paddle's tensors hold in host memory."""
    gc.collect()
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


def trained_model(layers: int, choice: Recompute | None):
    """A model whose attention stores its weights, of which there is more to save; and its ids."""
    model = from_config(WIDE.replace(num_hidden_layers=layers), seed=1)
    model.use_attention("reference")
    model.use_recompute(choice)
    model.train()
    ids = paddle.to_tensor(np.full([BATCH, WIDE_SEQUENCE], 7))
    model.loss(ids, ids).backward()  # gradients, and what is made once, are there from now on
    return model, ids


def held_between_passes(layers: int, choice: Recompute | None) -> int:
    """Bytes that a step holds between its forward and its backward pass."""
    model, ids = trained_model(layers, choice)
    before = allocated()
    loss = model.loss(ids, ids)
    held = allocated() - before
    loss.backward()
    return held


def held_per_layer(choice: Recompute | None) -> int:
    """The difference of two depths leaves out what does not belong to the layers."""
    return (held_between_passes(4, choice) - held_between_passes(1, choice)) // 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_memory_that_is_saved(use_reentrant):
    held = {choice: held_per_layer(Recompute(choice, use_reentrant=use_reentrant))
            for choice in GRANULARITIES}  # fmt: skip
    tokens, float32 = BATCH * WIDE_SEQUENCE, 4
    # The input of a layer, which is x and the stream beside it, and nothing else.
    assert held[FULL] == 2 * tokens * WIDE.hidden_size * float32
    # Of attention that runs again, query, key and value; of a whole block not even those, but
    # both keep the rest of the layer.
    weights = BATCH * WIDE.num_attention_heads * WIDE_SEQUENCE**2 * float32
    everything = held_per_layer(None)
    assert everything - held[ATTENTION] > 3 * weights
    qkv = 3 * tokens * WIDE.hidden_size * float32
    assert held[ATTENTION] - held[ATTENTION_BLOCK] >= qkv
    assert held[ATTENTION_BLOCK] > 3 * held[FULL]


def test_a_step_with_recompute_peaks_lower():
    """The memory that is saved between the passes is not needed elsewhere in the step."""
    peaks = {}
    for choice in (None, Recompute()):
        model, ids = trained_model(12, choice)
        before = allocated()
        paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
        model.loss(ids, ids).backward()
        peaks[choice] = paddle.base.core.host_memory_stat_peak_value("Allocated", 0) - before
    assert peaks[Recompute()] < 0.3 * peaks[None]


def test_the_graph_of_a_micro_batch_is_gone_before_the_next():
    """With it go the inputs of all layers, of which recompute would otherwise hold two sets."""
    model, ids = trained_model(24, Recompute())
    model.use_attention("pypkg")
    batch = {"input_ids": ids, "labels": ids}
    wrapped = WrappedModel(model, model.loss, lambda passes: None)
    memory, peaks = paddle.base.core, []
    for micro_batches in (1, 3):
        before = allocated()
        memory.host_memory_stat_reset_peak_value("Allocated", 0)
        wrapped.forward_backward([batch] * micro_batches, lambda loss: loss)
        peaks.append(memory.host_memory_stat_peak_value("Allocated", 0) - before)
    assert peaks[1] < 1.05 * peaks[0]
