"""Medians, quartiles and taking turns."""

from __future__ import annotations

import pytest

from pypkg.bench.timing import Summary, interleave, rounds_within, summarize


def test_summary_is_median_and_quartiles() -> None:
    assert summarize([5.0, 1.0, 3.0, 2.0, 4.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert summarize([1.0, 2.0]) == Summary(1.5, 1.25, 1.75, 2)
    assert summarize([7.0]) == Summary(7.0, 7.0, 7.0, 1)


def test_one_slow_run_does_not_move_the_median() -> None:
    assert summarize([1.0, 1.0, 1.0, 1.0, 100.0]).median == 1.0


def test_nothing_to_summarize() -> None:
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_baselines_take_turns_and_the_first_moves_on() -> None:
    order: list[str] = []

    def run(name: str):
        def call() -> int:
            order.append(name)
            return len(order)

        return call

    samples = interleave({name: run(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_garbage_collection_is_back_after_an_error() -> None:
    import gc

    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        interleave({"a": fail}, rounds=1)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("seconds", "per_round", "expected"), [(2.0, 0.1, 20), (2.0, 1.9, 5), (2.0, 1e-6, 60)]
)
def test_rounds_within_a_budget(seconds: float, per_round: float, expected: int) -> None:
    assert rounds_within(seconds, per_round, at_least=5, at_most=60) == expected
