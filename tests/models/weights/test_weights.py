"""The weight map: one description read in both directions."""

from __future__ import annotations

import numpy as np
import pytest

from pypkg.errors import UserError
from pypkg.models.architecture.weight_map import Weight, WeightMap, linear

MAP = WeightMap(
    [
        Weight("table", ("embed",)),
        Weight("layers.{}.in.weight", ("h.{}.a", "h.{}.b"), sizes=(3, 2), transpose=True),
        Weight("layers.{}.in.bias", ("h.{}.a_bias", "h.{}.b_bias"), sizes=(3, 2)),
    ],
    ignored=[r"h\.\d+\.cache"],
)
PARAMETERS = {"table": [7, 4], "layers.11.in.weight": [4, 5], "layers.11.in.bias": [5]}
FOUND = {
    "embed": (7, 4),
    "h.11.a": (3, 4),
    "h.11.b": (2, 4),
    "h.11.a_bias": (3,),
    "h.11.b_bias": (2,),
}


def test_source_shapes() -> None:
    shapes = {}
    for name, shape in PARAMETERS.items():
        shapes.update(MAP.source_shapes(name, shape))
    assert shapes == FOUND


def test_import_joins_and_transposes() -> None:
    a, b = np.arange(12).reshape(3, 4), 100 + np.arange(8).reshape(2, 4)
    weight = MAP.to_model("layers.11.in.weight", [a, b])
    assert weight.shape == (4, 5) and weight.flags.c_contiguous
    x = np.array([1, 2, 3, 4])
    np.testing.assert_array_equal(x @ weight, np.concatenate([a @ x, b @ x]))
    bias = MAP.to_model("layers.11.in.bias", [np.array([1, 2, 3]), np.array([4, 5])])
    np.testing.assert_array_equal(bias, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_two_directions_are_inverse(name: str) -> None:
    value = np.random.default_rng(0).random(PARAMETERS[name])
    tensors = MAP.to_checkpoint(name, value)
    assert {key: part.shape for key, part in tensors.items()} == MAP.source_shapes(
        name, value.shape
    )
    np.testing.assert_array_equal(MAP.to_model(name, list(tensors.values())), value)


def test_names_with_several_indices() -> None:
    """A made-up family with experts: one tensor for each, or a gate and an up matrix for each."""
    experts = "model.layers.{}.mlp.experts.{}."
    names = WeightMap(
        [
            Weight("layers.{}.router.weight", ("model.layers.{}.gate.weight",), transpose=True),
            *linear("layers.{}.experts.{}.down_proj", f"{experts}down_proj"),
            *linear(
                "layers.{}.experts.{}.gate_up_proj",
                (f"{experts}gate_proj", f"{experts}up_proj"),
                sizes=(3, 3),
            ),
            Weight("layers.{}.experts.{}.scale", ("by_expert.{1}.layer.{0}.scale",)),
        ]
    )
    shapes = {
        "layers.2.router.weight": (4, 16),
        "layers.2.experts.10.down_proj.weight": (3, 4),
        "layers.2.experts.10.gate_up_proj.weight": (4, 6),
        "layers.2.experts.10.scale": (1,),
    }
    stored = {
        "model.layers.2.gate.weight": (16, 4),
        "model.layers.2.mlp.experts.10.down_proj.weight": (4, 3),
        "model.layers.2.mlp.experts.10.gate_proj.weight": (3, 4),
        "model.layers.2.mlp.experts.10.up_proj.weight": (3, 4),
        "by_expert.10.layer.2.scale": (1,),
    }
    names.check(shapes, stored, "x")
    with pytest.raises(UserError, match=r"missing: by_expert\.10\.layer\.2\.scale"):
        names.check(
            shapes, {name: shape for name, shape in stored.items() if "scale" not in name}, "x"
        )
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = rng.random(shape)
        tensors = names.to_checkpoint(name, value)
        assert {key: part.shape for key, part in tensors.items()}.items() <= stored.items()
        np.testing.assert_array_equal(names.to_model(name, list(tensors.values())), value)


def test_check_accepts_what_fits_and_ignores_what_is_known() -> None:
    MAP.check(PARAMETERS, {**FOUND, "h.3.cache": (1,)}, "x")


def test_check_lists_every_problem_at_once() -> None:
    found = {**FOUND, "h.11.b": (2, 5), "extra": (1, 2), "h.3.cached": (1,)}
    del found["embed"], found["h.11.a_bias"]
    with pytest.raises(UserError) as error:
        MAP.check(PARAMETERS, found, "/some/folder")
    message = str(error.value)
    for line in (
        "/some/folder",
        "missing: embed [7, 4]",
        "missing: h.11.a_bias [3]",
        "wrong shape: h.11.b: expected [2, 4], found [2, 5]",
        "not part of the model: extra [1, 2]",
        "not part of the model: h.3.cached [1]",
    ):
        assert line in message


def test_a_long_list_is_cut_and_counted() -> None:
    with pytest.raises(UserError, match=r"\.\.\. and 15 more"):
        MAP.check(PARAMETERS, {**FOUND, **{f"x{i}": (1,) for i in range(35)}}, "x")
