"""Orthogonal matrices, one for each of those that a parameter holds."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from pypkg.parallel.mesh import Degrees, Mesh
from pypkg.parallel.optimizer.pieces import MatrixLayout, Piece, divided, joined
from pypkg.parallel.optimizer.protocol import ParameterUpdate
from pypkg.parallel.optimizer.rules.muon import Muon, orthogonalized
from pypkg.parallel.optimizer.rules.weights import Weights
from pypkg.parallel.update_rules import updated_by_muon


class Member:
    """A rank of a group, as a mesh asks it."""

    def __init__(self, rank: int, nranks: int) -> None:
        self.rank, self.nranks = rank, nranks


def updated(weight: np.ndarray, gradient: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    muon = Muon(
        momentum=0.95, weight_decay=0.0, decayed=(), takes=updated_by_muon, weights=Weights()
    )
    parameter = paddle.to_tensor(weight)
    state = muon.make_state(parameter, layout.shape)
    update = ParameterUpdate(
        "w", parameter, paddle.to_tensor(gradient), state, Piece(layout, Mesh())
    )
    muon.update([update], 0.1, paddle.ones([]))
    return parameter.numpy()


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32), (1, 8)])
def test_singular_values_come_near_to_one(shape):
    """0.7 to 1.2 (Jordan et al., 2024), for any scale of the matrix."""
    generator = np.random.default_rng(shape[0])
    left, _ = np.linalg.qr(generator.normal(size=(shape[0], min(shape))))
    right, _ = np.linalg.qr(generator.normal(size=(shape[1], min(shape))))
    values = np.linspace(0.2, 1.0, min(shape))
    for scale in (1e-6, 1.0, 1e4):
        matrix = (left * values) @ right.T * scale
        found = orthogonalized(paddle.to_tensor(matrix, dtype="float32")).astype("float32").numpy()
        rotated = left.T @ found @ right
        assert np.linalg.svd(found)[1].min() > 0.65 and np.linalg.svd(found)[1].max() < 1.25
        assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 0.05


def test_zero_stays_zero():
    assert not orthogonalized(paddle.zeros([4, 8])).astype("float32").numpy().any()


@pytest.mark.parametrize("axis", [0, 1])
def test_matrices_in_one_parameter_are_updated_each_by_itself(axis):
    """Query, key and value of different widths: the update of each as if it were alone."""
    generator = np.random.default_rng(axis)
    widths = (32, 8, 8)
    shape = (24, 48) if axis else (48, 24)
    weight, gradient = (generator.normal(size=shape).astype(np.float32) for _ in range(2))
    packed = updated(weight, gradient, MatrixLayout(shape, axis, widths))
    cuts = np.cumsum(widths)[:-1]
    parts = [np.split(each, cuts, axis) for each in (weight, gradient)]
    alone = [updated(w, g, MatrixLayout(w.shape)) for w, g in zip(*parts, strict=True)]
    # Products of other strides sum in another order, and bfloat16 may then round otherwise.
    assert np.abs(packed - np.concatenate(alone, axis)).max() < 0.002
    as_one = updated(weight, gradient, MatrixLayout(shape))
    assert np.abs(as_one - packed).max() > 0.02


def test_updates_are_as_large_as_those_of_adamw():
    for shape in ((64, 64), (32, 128), (128, 32)):
        gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        change = updated(np.zeros(shape, np.float32), gradient, MatrixLayout(shape)) / 0.1
        assert 0.16 < np.sqrt((change**2).mean()) < 0.24


def test_embeddings_heads_and_vectors_are_not_taken():
    muon = Muon(
        momentum=0.95, weight_decay=0.0, decayed=(), takes=updated_by_muon, weights=Weights()
    )
    assert muon.takes("layers.0.mlp.down_proj.weight", (8, 4))
    assert not muon.takes("layers.0.input_layernorm.weight", (8,))
    for name in ("embed_tokens.weight", "embed_positions.weight", "lm_head.weight"):
        assert not muon.takes(name, (8, 4))


LAYOUTS = {
    "whole": MatrixLayout((6, 5)),
    "columns": MatrixLayout((6, 8), 1, (4, 2, 2), (((0, 2), (4, 5), (6, 7)),
                            ((2, 4), (5, 6), (7, 8))), 4),
    "copies": MatrixLayout((3, 8), 1, (4, 2, 2), (((0, 2), (4, 6), (6, 8)),
                           ((2, 4), (4, 6), (6, 8))), 6),
    "padded rows": MatrixLayout((5, 4), 0, (5,), (((0, 3),), ((3, 5),)), 3),
}  # fmt: skip


def pieces(layout: MatrixLayout, slices: int) -> list[Piece]:
    """Of all ranks, by tensor and sharding rank; slices reach beyond the end of the shard."""
    tensor = max(1, len(layout.shards))
    length = -(-(int(np.prod(layout.shard_shape)) + 3) // slices)
    return [
        Piece(
            layout,
            Mesh(
                Degrees(sharding=slices, tensor=tensor),
                tensor=Member(t, tensor) if tensor > 1 else None,
                sharding=Member(s, slices) if slices > 1 else None,
            ),
            (s * length, (s + 1) * length) if slices > 1 else None,
        )
        for t in range(tensor)
        for s in range(slices)
    ]


@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_make_the_whole(name, slices):
    layout = LAYOUTS[name]
    whole = paddle.arange(1, 1 + int(np.prod(layout.shape)), dtype="float32").reshape(layout.shape)
    of_ranks = pieces(layout, slices)
    parts = divided(of_ranks[0], whole, len(of_ranks))
    assert len(parts) == len(of_ranks)
    np.testing.assert_array_equal(joined(of_ranks[0], parts).numpy(), whole.numpy())
    seen = np.zeros(layout.shape)
    for piece, part in zip(of_ranks, parts, strict=True):
        np.testing.assert_array_equal(piece.from_block(piece.to_block(part)).numpy(), part.numpy())
        # The elements that each rank counts cover the whole once; the values say where they lie.
        ids = piece.along_axis(piece.places.astype(np.float64))
        held = part.numpy()
        axis_index = np.broadcast_to(ids.numpy(), held.shape)
        owned = np.broadcast_to(piece.along_axis(piece.owned).numpy(), held.shape) > 0
        index = np.unravel_index(np.maximum(held.astype(int) - 1, 0), layout.shape)
        inside = held > 0
        assert (index[layout.axis][inside] == axis_index[inside]).all()
        counted = inside & owned & piece.counts(slices > 1)
        np.add.at(seen, tuple(each[counted] for each in index), 1)
    assert (seen == 1).all()
