"""What each process adds to the global norm, and what the clip makes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import paddle
import pytest

from pypkg import ops
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.clipping import GlobalNormClip, NormContribution, norm_contribution


def random(*shape: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(0).normal(size=shape), dtype="float32")


def squares(contribution: NormContribution, gradient: paddle.Tensor) -> float:
    return ops.squared_l2_norm([contribution.counted(gradient)]).item()


def squared(array: np.ndarray) -> float:
    return float((array.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("shape", [(6, 10), (10,)])
def test_only_some_columns_count(shape):
    gradient = random(*shape)
    found = squares(NormContribution(True, columns=7, width=10), gradient)
    assert found == pytest.approx(squared(gradient.numpy()[..., :7]), rel=1e-6)


@pytest.mark.parametrize("columns", [None, 7])
@pytest.mark.parametrize("length", [8, 13, 60])
def test_flat_slices_add_up_to_the_whole(length, columns):
    gradient = random(6, 10)
    contribution = NormContribution(True, columns, 10)
    flat = paddle.concat([gradient.flatten(), paddle.zeros([length])])
    parts = [
        squares(replace(contribution, start=start), flat[start : start + length])
        for start in range(0, 60, length)
    ]
    assert sum(parts) == pytest.approx(squared(gradient.numpy()[:, :columns]), rel=1e-6)


def test_half_precision_gradients_do_not_overflow():
    gradient = paddle.full([1000], 30000.0).astype("float16")
    assert squares(NormContribution(True), gradient) == pytest.approx(1000 * 30000.0**2, rel=1e-3)


class Rank:
    """A process's place in a mesh, without the groups."""

    def __init__(self, tensor: int, replica: int = 0) -> None:
        self.tensor_rank, self.replica_rank = tensor, replica


def parameter(is_distributed: bool, **marks: object) -> paddle.Tensor:
    made = paddle.create_parameter([4, 10], "float32")
    made.is_distributed = is_distributed
    for name, value in marks.items():
        setattr(made, name, value)
    return made


def test_whole_parameters_count_on_the_first_process_of_a_tensor_group():
    assert [norm_contribution(parameter(False), Rank(t)).counts for t in range(2)] == [True, False]
    assert [norm_contribution(parameter(True), Rank(t)).counts for t in range(2)] == [True, True]


def test_copies_count_once():
    assert not norm_contribution(parameter(True), Rank(0, replica=1)).counts
    assert not norm_contribution(parameter(True, counted_elsewhere=True), Rank(0)).counts


def test_replicated_columns_count_on_the_first_of_the_processes_that_have_them():
    shared = parameter(True, replicated_columns=(6, 2))
    assert [norm_contribution(shared, Rank(t)).columns for t in range(4)] == [None, 6, None, 6]


def clipped(max_norm: float, gradient: paddle.Tensor, **options: object) -> GlobalNormClip:
    held = paddle.create_parameter(gradient.shape, "float32")
    clip = GlobalNormClip(max_norm, {held.name: NormContribution(True)}, is_alone=True, **options)
    assert len(clip([(held, gradient)])) == (0 if clip.skipped else 1)
    return clip


def test_the_factor_scales_gradients_to_the_norm():
    gradient = random(6, 10)
    before = gradient.numpy()
    clip = clipped(0.5, gradient)
    assert clip.norm.item() == pytest.approx(math.sqrt(squared(before)), rel=1e-6)
    assert clip.factor.item() == pytest.approx(0.5 / clip.norm.item(), rel=1e-5)
    np.testing.assert_array_equal(gradient.numpy(), before)  # the update multiplies


@pytest.mark.parametrize("max_norm", [0.0, 100.0])
def test_small_gradients_stay_bit_for_bit(max_norm):
    clip = clipped(max_norm, random(6, 10))
    assert clip.norm.item() > 1
    assert clip.factor.item() == 1.0


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 1.0), (0.5, 0.5)])
def test_the_loss_scale_is_taken_out(max_norm, expected):
    """Of the norm and of the gradients."""
    gradient = paddle.full([4], 512 * 0.5)  # norm 1 without the scale
    clip = clipped(max_norm, gradient, unscale=lambda: 512.0)
    assert clip.norm.item() == pytest.approx(1.0)
    assert clip.factor.item() * 512 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_gradients_that_are_not_finite(bad, max_norm):
    """With a loss scale the host skips them, without one the factor tells the device to."""
    assert clipped(max_norm, paddle.to_tensor([1.0, bad]), unscale=lambda: 512.0).skipped
    clip = clipped(max_norm, paddle.to_tensor([1.0, bad]))
    assert not clip.skipped
    assert math.isnan(clip.factor.item())


def test_one_process_is_its_own_mesh():
    assert norm_contribution(parameter(False), mesh.Mesh()) == NormContribution(True, None, 10)
