"""One rank of test_half.py: updates in 16 bits on a CPU under a layout.

Argument: JSON of a list of cases (see test_half.py). Reports of each case the
losses, those of one process in float32, the dtypes that meet in an update, the loss scale, the
number of products that added a weight gradient, and whether a run that begins with the state after
two steps goes on bit for bit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import updaters_worker
from distributed_testing import report
from updaters_worker import STEPS, Trained, new_run, start, train, whole
from whole_values import SlicesOf

from pypkg.ops.dispatch import half_on_cpu
from pypkg.parallel import linear_gradients, mesh

HALFWAY = 2
added_products: list[tuple[int, ...]] = []  # their shapes


def note_added_products() -> None:
    """Fills ``added_products``."""
    add = linear_gradients.add_product

    def noting(*given: Any) -> Any:
        total = add(*given)
        added_products.append(tuple(total.shape))
        return total

    linear_gradients.add_product = noting


def watch_dtypes(run: Trained) -> set[str]:
    """The dtypes of parameter, gradient and state in each update, as they are met."""
    seen: set[str] = set()
    optimizer = run.updater.optimizer
    apply = optimizer._apply_optimize

    def watched(*, params_grads: list, **others: object) -> None:
        apply(params_grads=params_grads, **others)
        for parameter, gradient in params_grads:
            if gradient is not None and not run.updater.optimizer._clip.skipped:
                state = {value.dtype for value in optimizer.state_of(parameter).values()}
                seen.add(" ".join(map(_name, (parameter.dtype, gradient.dtype, *state))))

    optimizer._apply_optimize = watched
    return seen


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("paddle.")


def same(values: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return values.keys() == expected.keys() and all(
        np.array_equal(value, expected[name]) for name, value in values.items()
    )


def run_case(case: dict) -> dict[str, Any]:
    start(case)
    added_products.clear()
    run = new_run(case)
    dtypes = watch_dtypes(run)
    losses, norms, _ = train(run, range(HALFWAY), case)
    parameters, state = whole(run)
    scaler = None if run.updater.scaler is None else run.updater.scaler.state()
    more, more_norms, _ = train(run, range(HALFWAY, STEPS), case)
    resumed = new_run(case, parameters)
    resumed.updater.load_state(SlicesOf(state))
    if scaler is not None:
        resumed.updater.scaler.load_state(scaler)
    again, again_norms, _ = train(resumed, range(HALFWAY, STEPS), case)
    expected, found = whole(run), whole(resumed)
    return {
        "losses": losses + more,
        "norms": [norm for norm in norms + more_norms if np.isfinite(norm)],
        "dtypes": sorted(dtypes),
        "added_products": len(added_products),
        "scaler": None if scaler is None else run.updater.scaler.state(),
        "is_resumed": again == more
        and np.array_equal(again_norms, more_norms, equal_nan=True)
        and all(map(same, found, expected)),
    }


def main(cases: list[dict]) -> None:
    expected = {}
    if mesh.launched_rank() == 0:
        for case in cases:
            key = updaters_worker.reference(case)
            if key not in expected:
                with updaters_worker.paddle.utils.unique_name.guard():
                    expected[key] = updaters_worker.one_process(*key)
    half_on_cpu.install()
    note_added_products()
    results = [run_case(case) for case in cases]
    for case, result in zip(cases, results, strict=True):
        if expected:
            plain = expected[updaters_worker.reference(case)]
            finite = [norm for norm in plain["norms"] if np.isfinite(norm)]
            result["expected"] = {"losses": plain["losses"], "norms": finite}
    report(results)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
