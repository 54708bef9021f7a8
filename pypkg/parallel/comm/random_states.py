"""Random numbers of a training step: a function of the seed, the step and the rank's coordinates.

Dropout in a tensor-parallel group needs two streams besides Paddle's own. ``WHOLE`` gives all ranks
of the group the same numbers, for activations that every rank holds whole. ``SPLIT`` gives each
rank its own numbers, for activations that are split over the group. Ranks with different samples or
tokens, and different pipeline stages, draw different numbers from both streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import paddle
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

from pypkg.parallel import mesh

WHOLE, SPLIT = "pypkg_whole", "pypkg_split"


def seed_step(seed: int, step: int) -> None:
    """Seeds all streams for a step. Every rank calls this before the step's first forward pass.

    A resumed run therefore draws the same numbers as an uninterrupted one, without saved generator
    states.
    """
    here = mesh.current()
    shared = (seed, step, here.token_shard, here.pipeline_rank)
    for number, (name, place) in enumerate(((WHOLE, shared), (SPLIT, (*shared, here.tensor_rank)))):
        _register(name)
        with get_rng_state_tracker().rng_state(name):
            paddle.seed(_mixed((number, *place)))
    paddle.seed(seed + step)  # last, because on a GPU the lines above also seed the CPU's generator


@contextlib.contextmanager
def stream(name: str) -> Iterator[None]:
    """Draws from ``WHOLE`` or ``SPLIT`` within the context."""
    if name not in get_rng_state_tracker().states_:
        seed_step(0, 0)
    with get_rng_state_tracker().rng_state(name):
        yield


def _register(name: str) -> None:
    """Adds the state ``name`` to fleet's tracker, whose states recompute saves and restores."""
    tracker = get_rng_state_tracker()
    if name not in tracker.states_:  # the tracker rejects a seed that it has seen
        tracker.add(name, _mixed((len(tracker.seeds_), *name.encode())))


def _mixed(numbers: tuple[int, ...]) -> int:
    """A seed for a generator: 63 bits that depend on all ``numbers`` and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
