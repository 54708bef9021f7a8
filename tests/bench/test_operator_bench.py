"""Every operator of the benchmark at a tiny size, and that a wrong result ends the run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pypkg.bench.ops.bench import Limits, OperatorCase, bench_case
from pypkg.bench.ops.case import (
    OURS,
    Baseline,
    BenchmarkError,
    Workload,
    with_sum,
)
from pypkg.bench.ops.cases import adamw, operator_cases
from pypkg.bench.ops.fill_run import NormalFill
from pypkg.bench.ops.frameworks import available_frameworks
from pypkg.bench.ops.limits import ThreadedCopy, best_matmul_rate
from pypkg.bench.ops.suite import default_workloads
from pypkg.bench.ops.work import adamw as adamw_work
from pypkg.models.architecture.config import ModelConfig

_CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
)
_CASES = operator_cases([Workload("tiny", _CONFIG, batch=2, sequence=9)])
_NAMES = list(dict.fromkeys(each.op for each in _CASES))


@pytest.fixture(scope="module")
def frameworks():
    return available_frameworks(threads=2)[0]


@pytest.fixture(scope="module")
def limits(frameworks) -> Limits:
    return Limits(ThreadedCopy(2), frameworks["paddle"])


def _case(op: str, dtype: str = "float32", **changes) -> OperatorCase:
    first = next(each for each in _CASES if each.op == op)
    return dataclasses.replace(first, dtype=dtype, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _NAMES)
def test_every_baseline_is_validated_and_timed(name, dtype, frameworks, limits) -> None:
    case = _case(name, dtype)
    rows = bench_case(case, frameworks, limits, seconds=0.0)
    able = [
        each for each in case.baselines if dtype in each.dtypes and each.framework in frameworks
    ]
    if dtype not in case.baselines[0].dtypes:
        assert rows == []
        return
    assert able[0].name == OURS
    assert [(row["baseline"], row["pass"]) for row in rows] == [
        (each.name, part) for each in able for part in case.passes or with_sum(case.work)
    ]
    for row in rows:
        assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
        assert row["median"] > 0 and row["limit"] > 0 and 0 < row["error"] <= 1
        assert (row["bytes"] > 0) == (case.bound != "compute")
        assert (row["flops"] > 0) == (case.bound == "compute")


def _wrong_in_forward(gate):
    from pypkg import ops

    return ops.swiglu(gate) * 1.001


def _wrong_in_backward(gate):
    import paddle

    from pypkg import ops

    # The value of swiglu, and twice its gradient.
    y = ops.swiglu(gate)
    return 2 * y - y.detach() if paddle.is_grad_enabled() else y


def _not_a_number(gate):
    from pypkg import ops

    return ops.swiglu(gate) * float("nan")


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (_wrong_in_forward, "output 0"),
        (_wrong_in_backward, "gradient of gate"),
        (_not_a_number, "output 0"),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_a_wrong_baseline_ends_the_run(function, where, position, frameworks, limits) -> None:
    wrong = Baseline(OURS if position == 0 else "baseline", "paddle", function)
    baselines = list(_case("swiglu").baselines[:2])
    baselines[position] = wrong
    case = _case("swiglu", baselines=tuple(baselines))
    with pytest.raises(BenchmarkError, match=f"{wrong.name} is wrong in its {where}"):
        bench_case(case, frameworks, limits, 0.0)


def _step_in_bfloat16() -> OperatorCase:
    """With the baselines that support bfloat16 on a CPU; the benchmark runs it on GPUs only."""
    baselines = [
        dataclasses.replace(each, dtypes=("float32", "bfloat16"))
        for each in _case("adamw").baselines
        if not each.name.startswith("Paddle")
    ]
    return _case("adamw", "bfloat16", baselines=tuple(baselines))


def test_a_step_of_bfloat16_parameters_goes_through_master_weights(frameworks, limits) -> None:
    case = _step_in_bfloat16()
    rows = bench_case(case, frameworks, limits, 0.0)
    here = [each.name for each in case.baselines if each.framework in frameworks]
    assert [row["baseline"] for row in rows] == here
    assert {row["pass"] for row in rows} == {"step"}
    assert all(0 < row["error"] <= 1 for row in rows)


def _no_step(tensors):
    return lambda: None


def _without_decay(tensors):
    vectors = {kind: [each.flatten() for each in of_kind] for kind, of_kind in tensors.items()}
    return adamw._ours(vectors)


def _wrong_state(kind: str):
    def make(tensors):
        step = adamw._ours(tensors)

        def run() -> None:
            step()
            tensors[kind][-1][0] *= 1.001

        return run

    return make


@pytest.mark.parametrize(
    ("function", "dtype", "where"),
    [
        (_no_step, "float32", "param 0"),
        (_without_decay, "float32", "param 0"),
        (_wrong_state("moment1"), "float32", "moment1"),
        (_wrong_state("moment2"), "float32", "moment2"),
        (_wrong_state("master"), "bfloat16", "master"),
    ],
)
def test_a_wrong_step_ends_the_run(function, dtype, where, frameworks, limits) -> None:
    case = _case("adamw", dtype, baselines=(Baseline(OURS, "paddle", function),))
    with pytest.raises(BenchmarkError, match=rf"{OURS} is wrong in its {where}"):
        bench_case(case, frameworks, limits, 0.0)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda out: out.normal_(0.001, 0.02), "mean"),
        (lambda out: out.normal_(0.0, 0.0206), "mean magnitude"),
        (lambda out: out.uniform_(-0.02 * 3**0.5, 0.02 * 3**0.5), "mean magnitude"),
        (lambda out: out, "mean"),  # leaves NaN
    ],
)
def test_wrong_random_numbers_end_the_run(wrong, where, frameworks, limits) -> None:
    case = _case("random_normal", method=NormalFill((200, 250), 0.02))
    assert bench_case(case, frameworks, limits, 0.0)
    case = dataclasses.replace(case, baselines=(Baseline(OURS, "paddle", wrong),))
    with pytest.raises(BenchmarkError, match=f"{where}: the error"):
        bench_case(case, frameworks, limits, 0.0)


def test_every_slice_of_a_large_parameter_is_compared(monkeypatch, frameworks, limits) -> None:
    """The last element of a matrix is wrong, in its third slice."""
    from pypkg.bench.ops import update_run

    monkeypatch.setattr(update_run, "_SLICE", 16)

    def make(tensors):
        step = adamw._ours(tensors)

        def run() -> None:
            step()
            tensors["moment1"][0][-1, -1] *= 1.001

        return run

    case = _case(
        "adamw",
        baselines=(Baseline(OURS, "paddle", make),),
        work=adamw_work(5 * 7),
        method=dataclasses.replace(_case("adamw").method, parameters=((5, 7),)),
    )
    with pytest.raises(BenchmarkError, match="moment1 0"):
        bench_case(case, frameworks, limits, 0.0)


def test_gradient_of_a_small_probability_is_not_lost_beside_that_of_the_label(
    frameworks, limits
) -> None:
    """A cross entropy that forgets softmax in its gradient is caught in bfloat16 too."""
    import paddle

    def no_softmax(logits, labels):
        loss = _case("cross_entropy").method.reference(logits, labels)
        wide = logits.astype("float32")
        target = paddle.take_along_axis(wide, labels.unsqueeze(-1), axis=-1).squeeze(-1)
        return loss.detach() - target + target.detach()

    ours = Baseline(OURS, "paddle", no_softmax)
    case = _case("cross_entropy", "bfloat16", baselines=(ours,))
    with pytest.raises(BenchmarkError, match="gradient of logits"):
        bench_case(case, frameworks, limits, 0.0)


def test_counted_work() -> None:
    """rms_norm of [18, 48] in bfloat16: 2 and 3 passes over x, and the weights."""
    forward, backward = _case("rms_norm").work.values()
    assert forward.bytes(2) == (2 * 18 * 48 + 48) * 2
    assert (forward + backward).bytes(2) == (5 * 18 * 48 + 3 * 48) * 2
    attention = _case("flash_attention")
    pairs = 9 * 10 // 2  # of the causal mask
    assert attention.work["forward"].flops == 2 * 2 * 2 * 6 * pairs * 8
    step = _case("adamw")
    weights = 2 * 96 * 48 + 48 * (48 + 2 * 16) + 48 * 48 + 3 * 48 * 40 + 3 * 48
    assert step.work["step"].bytes(4) == step.work["step"].bytes(2) == 28 * weights


def test_products_in_bfloat16_are_left_out_with_a_note_where_there_are_none(
    monkeypatch, frameworks, limits
) -> None:
    from pypkg.bench.ops.cases import matmul

    monkeypatch.setattr(matmul._native, "matmul_bfloat16_supported", lambda: False)
    case, *_ = matmul.cases([Workload("tiny", _CONFIG, batch=2, sequence=9)])
    assert "AVX512_BF16" in case.notes[0]
    assert bench_case(case, frameworks, limits, 0.0) == []


def test_products_in_float32_pass_no_float32_baseline_that_rounds(frameworks, limits) -> None:
    """A baseline that says it computes in float32 is held to that."""
    if "torch" not in frameworks:
        pytest.skip("torch is not installed, and is the baseline that rounds")
    names = [each.name for each in _case("matmul").baselines]
    rounds = _case("matmul").baselines[names.index("torch, bfloat16 autocast")]
    claimed = dataclasses.replace(rounds, name=OURS, precision=None)
    with pytest.raises(BenchmarkError, match="output 0"):
        bench_case(_case("matmul", baselines=(claimed,)), frameworks, limits, 0.0)


def test_default_shapes_are_those_of_the_models() -> None:
    labels = [each.shape for each in operator_cases(default_workloads())]
    assert "llama-58m, gate_up_proj: [2048, 512] x [512, 2752]" in labels
    assert "llama-2-7b, o_proj: [256, 4096] x [4096, 4096]" in labels
    assert "llama-58m: [2048, 512]" in labels
    assert "llama-2-7b: [1024, 2 x 11008]" in labels
    assert "llama-58m: 51 tensors, 58.1 M" in labels
    assert "llama-2-7b, one layer: 6 tensors, 202.4 M" in labels


def test_limits_are_positive_and_of_a_plausible_size(frameworks) -> None:
    copy = ThreadedCopy(2)
    rate = 2**24 / copy.seconds(2**24)
    assert 1e8 < rate < 1e13
    flops, source = best_matmul_rate(frameworks)
    assert 1e8 < flops < 1e14 and source in frameworks


def test_copy_copies_every_byte() -> None:
    copy = ThreadedCopy(3)
    copy.seconds(2 * 1001)
    assert copy._target.size == 1001 and np.all(copy._target == 1)


def test_a_pass_in_place_inverts_every_byte() -> None:
    copy = ThreadedCopy(3)
    copy._BYTES_PER_CALL = 1  # once
    copy.seconds(2 * 1001, in_place=True)
    assert copy._source.size == 1001 and np.all(copy._source == 254)
    assert not copy._target.any()


def test_what_is_larger_than_the_largest_copy_takes_its_time_in_proportion() -> None:
    copy = ThreadedCopy(2)
    copy._LARGEST = 2**20
    whole, tenfold = (min(copy.seconds(n * 2**20) for _ in range(5)) for n in (1, 10))
    assert copy._source.size == 2**19
    assert 2 < tenfold / whole < 50
