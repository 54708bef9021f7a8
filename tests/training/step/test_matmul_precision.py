"""A run whose matrix products are rounded to bfloat16 learns what a float32 run learns."""

from __future__ import annotations

import pytest
from training_testing import Workplace, counting_documents, write_corpus, write_model

from pypkg import _native

needs_instructions = pytest.mark.skipif(
    not _native.matmul_bfloat16_supported(), reason="this processor has no AVX512_BF16"
)


@needs_instructions
def test_both_precisions_reach_the_same_loss(tmp_path):
    write_corpus(tmp_path / "data" / "corpus", counting_documents())
    write_model(tmp_path / "model")
    found = {}
    for precision in ("float32", "bfloat16"):
        workplace = Workplace(tmp_path, output=precision)
        done = workplace.run(
            matmul_precision=precision, max_steps=120, save_steps=120, eval_steps=120, eval_iters=8
        )
        assert done.returncode == 0, done.stderr
        found[precision] = (workplace.losses(), workplace.losses("eval_loss")[120])
    (losses, evaluation), (rounded, rounded_evaluation) = found.values()
    assert rounded[1] == pytest.approx(losses[1], rel=1e-3)
    assert rounded[120] != losses[120]  # the setting has done something
    assert evaluation < 0.3 * losses[1]  # and something has been learnt
    assert rounded_evaluation == pytest.approx(evaluation, rel=0.03)
