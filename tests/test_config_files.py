"""The configurations of PaddleNLP that users bring along."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_testing import refused_names

REPO = Path(__file__).resolve().parent.parent
PADDLENLP = sorted((REPO / "tests/golden/paddlenlp_configs").glob("*.json"))

# What each of PaddleNLP's files asks for that this version refuses.
_TP = {"tensor_parallel_degree"}
_SHARDING = {"sharding"}
REFUSED = {
    "pretrain-baichuan2_13b-sd8_stage2": _SHARDING | {"recompute"},
    "pretrain-baichuan2_7b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-flagalpha_llama2_13b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-flagalpha_llama2_7b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-gpt_medium_en-stage2": _SHARDING | {"fp16"},
    "pretrain-linly_llama2_7b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-llama2_13b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-llama2_7b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-llama_13b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-llama_7b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-qwen_7b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain-ziya_llama_13b-tp2sd4_stage2": _TP | _SHARDING,
    "pretrain_argument.baichuan": _TP | _SHARDING | {"sharding_parallel_degree"},
    "pretrain_argument.chatglm2": _TP
    | _SHARDING
    | {"recompute", "fp16", "load_best_model_at_end", "evaluation_strategy", "save_strategy"},
    "pretrain_argument.gpt-3": _SHARDING | {"fp16"},
    "pretrain_argument.llama": _TP | _SHARDING,
    "pretrain_argument.qwen": _SHARDING | {"recompute"},
}


def test_the_table_here_covers_every_file():
    assert {file.stem for file in PADDLENLP} == set(REFUSED)


@pytest.mark.parametrize("file", PADDLENLP, ids=lambda file: file.stem)
def test_paddlenlp_configs_parse_and_exactly_the_unsupported_is_refused(file):
    assert refused_names(file) == REFUSED[file.stem]
