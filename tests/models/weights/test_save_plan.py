"""Which rank writes which tensors: one writer for each, evenly by bytes, under every layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from pypkg.models.weights.assembly import Assembly, Division
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.save_plan import SavePlan, TensorSet, Unit, as_it_is


def tensor_set(
    stem: str, sizes: dict[str, int], ranks: dict[str, tuple[int, ...]], limit: int | None = None
) -> TensorSet:
    """Units of one tensor each of so many float32."""
    units = [
        Unit(n, (size,), {n: TensorSpec("float32", (size,))}, ranks[n]) for n, size in sizes.items()
    ]
    return TensorSet(
        stem,
        units,
        lambda name, writer: np.zeros(sizes[name], np.float32),
        lambda n, v: {n: v},
        limit,
    )


def sizes_of(layers: int) -> dict[str, int]:
    """Of a model whose table is a fifth of it."""
    names = {f"layers.{i}.{kind}": size for i in range(layers)
             for kind, size in (("norm", 64), ("qkv", 3 * 64**2), ("up", 4 * 64**2))}  # fmt: skip
    return {"table": layers * 7 * 64**2 // 4, **names}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_bytes_are_spread_evenly(world_size):
    sizes, everyone = sizes_of(24), tuple(range(world_size))
    sets = [
        tensor_set(stem, sizes, dict.fromkeys(sizes, everyone)) for stem in ("model", "optimizer")
    ]
    plan = SavePlan(sets)
    loads = Counter()
    for file in plan.files:
        loads[file.rank] += sum(spec.num_bytes for spec in file.specs.values())
    total = sum(each.total_size() for each in sets)
    assert sum(loads.values()) == total
    assert max(loads.values()) <= 1.05 * total / world_size
    for stem in ("model", "optimizer"):
        names = [name for file in plan.files if file.stem == stem for name in file.specs]
        assert sorted(names) == sorted(sizes)


def test_a_tensor_is_written_where_it_lies():
    """State of the owners 0 and 1; weights, which both have, make up for what owners write."""
    state = {"a": 900, "b": 100}
    weights = {"c": 400, "d": 400}
    plan = SavePlan(
        [
            tensor_set("model", weights, dict.fromkeys(weights, (0, 1))),
            tensor_set("optimizer", state, {"a": (0,), "b": (1,)}),
        ]
    )
    assert {name: file.rank for file in plan.files for name in file.specs} == {
        "a": 0, "b": 1, "c": 1, "d": 1,
    }  # fmt: skip


def test_what_one_rank_alone_may_write_is_assigned_first():
    """A larger tensor that both have goes to the rank with nothing of its own."""
    plan = SavePlan(
        [
            tensor_set("model", {"large": 1000}, {"large": (0, 1)}),
            tensor_set("optimizer", {"own": 900}, {"own": (0,)}),
        ]
    )
    assert {name: file.rank for file in plan.files for name in file.specs} == {
        "large": 1, "own": 0,
    }  # fmt: skip


def opt_125m_sizes() -> dict[str, int]:
    """Elements of the parameters; those of a layer are by their kinds."""
    hidden = 768
    layer = {"qkv": 3 * hidden * (hidden + 1), "out": hidden * (hidden + 1), "norms": 4 * hidden,
             "up": 4 * hidden * (hidden + 1), "down": hidden * (4 * hidden + 1)}  # fmt: skip
    layers = {f"layers.{i}.{kind}": size for i in range(12) for kind, size in layer.items()}
    return {"table": 50272 * hidden, "positions": 2050 * hidden, **layers, "norm": 2 * hidden}


def two_stages_of_opt_125m(
    of_stage: int, dtype: str, neighbours: Sequence[Sequence[int]] = ()
) -> SavePlan:
    """Weights in ``dtype`` and AdamW's state under pp2; each stage has ``of_stage`` ranks."""
    first, last = tuple(range(of_stage)), tuple(range(of_stage, 2 * of_stage))
    sizes = opt_125m_sizes()
    second_half = {f"layers.{i}" for i in range(6, 12)} | {"norm"}

    def unit(name: str, key: str, dtype: str) -> Unit:
        spec = {key: TensorSpec(dtype, (sizes[name],))}
        if name == "table":
            return Unit(key, (sizes[name],), spec, first, copies=[last])
        is_last = name.rpartition(".")[0] in second_half or name in second_half
        return Unit(key, (sizes[name],), spec, last if is_last else first)

    kinds = ["moment1", "moment2"] + (["master_weight"] if dtype == "bfloat16" else [])
    units = {
        "model": [unit(name, name, dtype) for name in sizes],
        "optimizer": [unit(name, f"{name}.{kind}", "float32") for name in sizes for kind in kinds],
    }
    sets = [
        TensorSet(s, u, lambda name, rank: np.full(1, rank), as_it_is) for s, u in units.items()
    ]
    return SavePlan(sets, neighbours)


@pytest.mark.parametrize("of_stage", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        ("bfloat16", 1.05),
        # One stage writes two of three equal tables, each a tenth of all bytes.
        ("float32", 1.10),
    ],
)
def test_either_stage_that_holds_a_tied_table_may_write_it(of_stage, dtype, largest):
    """With the first stage alone it would be 1.32."""
    assert sum(opt_125m_sizes().values()) == 125_239_296  # as published
    plan = two_stages_of_opt_125m(of_stage, dtype)
    written = [plan.num_bytes_of(rank) for rank in range(2 * of_stage)]
    assert max(written) <= largest * sum(written) / len(written)
    names = [name for file in plan.files for name in file.specs]
    assert len(names) == len(set(names)) == len(opt_125m_sizes()) * (4 if largest < 1.06 else 3)


@pytest.mark.parametrize("of_stage", [1, 2, 4])
def test_neighbours_take_what_makes_a_stage_write_more(of_stage):
    """Whole units, no more than needed; their holder passes them on."""
    everyone = range(2 * of_stage)
    plan = two_stages_of_opt_125m(of_stage, "float32", [everyone])
    written = [plan.num_bytes_of(rank) for rank in everyone]
    mean = sum(written) / len(written)
    assert max(written) <= 1.02 * mean
    handed = [unit for unit in plan.units() if unit.sources != (unit.writer,)]
    before = two_stages_of_opt_125m(of_stage, "float32")
    held = {unit.name: unit.sources for unit in before.units()}
    assert all(unit.sources == held[unit.name] for unit in plan.units())
    sizes = {key: spec.num_bytes for file in plan.files for key, spec in file.specs.items()}
    excess = sum(max(0.0, before.num_bytes_of(rank) - mean) for rank in everyone)
    assert 0 < sum(sizes[unit.name] for unit in handed) <= excess
    for rank in everyone:
        for unit, value in plan.parts_of(rank, plan.units()):
            assert unit.sources == (rank,) and value[0] == rank
    assert {u.name for u in plan.without_neighbours().units() if u.sources != (u.writer,)} == set()


def test_only_neighbours_take_units():
    """Each stage is on a machine of its own, and its ranks are even already."""
    assert [file.specs.keys() for file in two_stages_of_opt_125m(2, "float32").files] == [
        file.specs.keys() for file in two_stages_of_opt_125m(2, "float32", [(0, 1), (2, 3)]).files
    ]


def test_beside_divided_units_none_is_handed_on():
    """A neighbour would not know how to join the parts of one."""
    sets = [tensor_set("optimizer", {"a": 900, "b": 500, "c": 400}, dict.fromkeys("abc", (0,)))]
    assert SavePlan(sets, [(0, 1)]).num_bytes_of(1) == 4 * 900
    units = sets[0].units
    divided = replace(units[1], division=Division(lambda writer: (0, 2), 4, Assembly((500,))))
    plan = SavePlan([replace(sets[0], units=[units[0], divided, units[2]])], [(0, 1)])
    assert plan.num_bytes_of(1) == 0


def test_each_unit_goes_to_the_least_loaded_rank():
    """Of those that may write it, found by looking at all of them, whatever others may write."""
    random = np.random.default_rng(0)
    choices = [(0, 1, 2, 3), (2, 3), (1,), (3, 0), (0, 1, 2, 3)]
    ranks = {str(i): choices[random.integers(len(choices))] for i in range(300)}
    sizes = {name: int(random.integers(1, 50)) for name in ranks}
    plan = SavePlan([tensor_set("model", sizes, ranks)])
    loads = dict.fromkeys(range(4), 0)
    expected = {}
    for name in sorted(sizes, key=lambda name: (len(ranks[name]), -sizes[name])):
        expected[name] = min(ranks[name], key=lambda rank: (loads[rank], rank))
        loads[expected[name]] += sizes[name]
    assert {name: file.rank for file in plan.files for name in file.specs} == expected


class Ranks(Sequence[int]):
    """0 to ``count`` - 1, which counts how often somebody asks for one."""

    def __init__(self, count: int) -> None:
        self._count, self.asked = count, 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        self.asked += 1
        return range(self._count)[index]

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(self._count))


def test_ranks_are_looked_through_once_for_all_tensors():
    """Else a plan for 1,024 ranks takes seconds, in each of which training may stand still."""
    everyone, names = Ranks(1024), [str(i) for i in range(2000)]
    plan = SavePlan(
        [tensor_set("model", dict.fromkeys(names, 8), dict.fromkeys(names, everyone), 64)]
    )
    assert everyone.asked <= 2 * 1024
    writers = Counter(file.rank for file in plan.files for _ in file.specs)
    assert set(writers) == set(range(1024)) and set(writers.values()) == {1, 2}


def test_files_and_indices():
    sizes = {"a": 10, "b": 10, "c": 10, "d": 50}
    ranks = {"a": (0,), "b": (1,), "c": (0,), "d": (1,)}
    plan = SavePlan([tensor_set("model", sizes, ranks, 80), tensor_set("optimizer", {}, {})])
    assert [(file.name, file.rank, list(file.specs)) for file in plan.files] == [
        ("model-00001-of-00003.safetensors", 0, ["a", "c"]),
        ("model-00002-of-00003.safetensors", 1, ["b"]),
        ("model-00003-of-00003.safetensors", 1, ["d"]),
        ("optimizer.safetensors", 0, []),
    ]
    assert plan.indices() == {
        "model.safetensors.index.json": {
            "metadata": {"total_size": 320},
            "weight_map": {
                "a": "model-00001-of-00003.safetensors",
                "c": "model-00001-of-00003.safetensors",
                "b": "model-00002-of-00003.safetensors",
                "d": "model-00003-of-00003.safetensors",
            },
        }
    }


def test_a_rank_gets_its_tensors_in_the_order_of_its_files():
    sizes = sizes_of(5)
    plan = SavePlan([tensor_set("model", sizes, dict.fromkeys(sizes, (0, 1, 2)), 4 * 64**3)])
    for rank in range(3):
        files = plan.files_of(rank)
        assert [name for file in files for name in file.specs] == [
            unit.name for unit, _ in plan.parts_of(rank, plan.units())
        ]
