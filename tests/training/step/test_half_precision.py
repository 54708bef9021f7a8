"""Runs in 16 bits on a CPU learn what a float32 run learns, and resume bit for bit."""

from __future__ import annotations

import shutil

import pytest

STEPS, WEIGHTS_FILE = 80, "model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_both_precisions_learn_and_resume(make_workplace, name):
    settings = {"max_steps": STEPS, "save_steps": STEPS // 2, "eval_steps": STEPS, "device": "cpu"}
    settings |= {"amp_master_grad": True, "decay_steps": STEPS}
    plain, half = make_workplace("plain"), make_workplace("half")
    for workplace, precision in ((plain, {}), (half, {name: True})):
        done = workplace.run(**settings, **precision)
        assert done.returncode == 0, done.stderr
        idle = "amp_master_grad has no effect: gradients are float32 without it"
        assert (idle in done.stderr) == (not precision)
    assert "operators compute in float32" in done.stderr
    expected, found = plain.losses("eval_loss")[STEPS], half.losses("eval_loss")[STEPS]
    assert expected < 0.4 * plain.losses()[1]  # something has been learnt
    assert found == pytest.approx(expected, rel=0.02)
    losses, last = half.losses(), half.output_dir / f"checkpoint-{STEPS}"
    weights = (last / WEIGHTS_FILE).read_bytes()
    shutil.rmtree(last)
    done = half.run(**settings, **{name: True})
    assert done.returncode == 0, done.stderr
    assert f"resuming from {half.output_dir}/checkpoint-{STEPS // 2}" in done.stderr
    assert half.losses() == losses
    assert (last / WEIGHTS_FILE).read_bytes() == weights
