"""The benchmark of the optimizer's step on the CPU: what is wrong is not timed."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares with torch")

from pypkg import _native  # noqa: E402
from pypkg.bench.ops.gpu import adamw  # noqa: E402
from pypkg.bench.ops.gpu.case import Maker, filling, validate  # noqa: E402


def case(form: str):
    return adamw.adamw(Maker(_native, None, "cpu", False), "x", (37, 4097), form)


def expected(of):
    _, baseline = of.baselines
    return baseline.function()


@pytest.mark.parametrize("form", adamw.FORMS)
def test_a_step_is_that_of_torch_and_validated_from_where_it_began(form):
    step = case(form)
    results = expected(step)
    for _ in range(2):
        # Parameters are rounded to bfloat16.
        assert validate(step, results) < (1e-6 if form == "float32" else 2.0**-8)


@pytest.mark.parametrize("form", adamw.FORMS)
@pytest.mark.parametrize("setting", ["RATE", "DECAY"])
def test_a_wrong_step_is_refused(form, setting, monkeypatch):
    results = expected(case(form))
    monkeypatch.setattr(adamw, setting, 2 * getattr(adamw, setting))
    with pytest.raises(AssertionError, match=f"adamw step x, {form}, CUDA: off by"):
        validate(case(form), results)


def test_a_step_that_writes_nothing_is_refused():
    step = case("bfloat16, masters")
    results = next(iter(step.method.versions.values()))()
    idle = dataclasses.replace(step.method, versions=filling(results, {"idle": lambda: None}))
    step = dataclasses.replace(step, method=idle)
    with pytest.raises(AssertionError, match="idle: off by"):
        validate(step, expected(step))


def test_the_small_model_is_the_one_of_the_other_benchmarks():
    from pypkg.models.architecture.registry import load_config
    from pypkg.models.building import parameter_shapes

    shapes = parameter_shapes(load_config("llama-58m")).values()
    assert sorted(torch.Size(shape).numel() for shape in shapes) == sorted(
        adamw._models("cuda")["58M"]
    )
