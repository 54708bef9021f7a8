"""Whole parameters and optimizer state, as tests hand them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import paddle

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.building import parameter_shapes
from pypkg.models.pretrained import whole_parameter
from pypkg.parallel import mesh
from pypkg.parallel.comm import gather
from pypkg.parallel.comm.collective import from_all_ranks
from pypkg.parallel.optimizer.updater import Updater


class SlicesOf:
    """What ``Updater.load_state`` reads from, of whole arrays by key; it counts elements."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self._values = values
        self.elements = 0

    def __call__(self, key: str, cut: Sequence[slice] = ()) -> np.ndarray:
        found = self._values[key][tuple(cut)]
        self.elements += found.size
        return found


def slices_of(value: np.ndarray) -> Callable[[Sequence[slice]], np.ndarray]:
    """What ``TpSharding.read`` reads from, of a whole array."""
    return lambda cut: value[tuple(cut)]


def whole_parameters(
    config: ModelConfig, tensors: Mapping[str, paddle.Tensor], of_first_samples: bool = False
) -> dict[str, np.ndarray]:
    """Whole parameters, or their gradients, in the order of the model, on every rank.

    Args:
        tensors: those of this rank, by the name of the parameter.
        of_first_samples: takes those of sample shard 0, where others have gradients of their own.
    """
    places = gather.places(parameter_shapes(config), dict.fromkeys(tensors))

    def read(name: str, writer: int) -> np.ndarray | None:
        if not gather.takes_part(writer):
            return None
        return whole_parameter(config, name, tensors[name], writer)

    return _from_writers(places, read, of_first_samples)


def whole_state(updater: Updater) -> dict[str, np.ndarray]:
    """Whole optimizer state by key, on every rank."""
    return _from_writers(updater.state_places(), updater.read_state)


def _from_writers(
    places: Mapping[str, Sequence[gather.Place]],
    read: Callable[[str, int], np.ndarray | None],
    of_first_samples: bool = False,
) -> dict[str, np.ndarray]:
    """Each array by way of one of the ranks that may write it, all of them in turn.

    Copies of an array, which a checkpoint may hold instead, have to be equal bit for bit.
    """
    own = {}
    for index, (name, copies) in enumerate(places.items()):
        for number, place in enumerate(copies):
            writers = gather.possible_writers(place)
            if of_first_samples:
                at = {rank: mesh.current().coordinates(rank) for rank in writers}
                writers = [r for r in writers if (at[r].data, at[r].sharding) == (0, 0)]
            writer = writers[index % len(writers)]
            value = read(name, writer)
            assert (value is not None) == (writer == mesh.current().rank), name
            if value is not None:
                own[name, number] = value.copy()
    found = {key: value for each in from_all_ranks(lambda: own) for key, value in each.items()}
    for (name, _), copy in found.items():
        assert np.array_equal(copy, found[name, 0]), name
    return {name: found[name, 0] for name in places}
