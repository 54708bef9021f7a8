"""Every configuration that ships, and those of PaddleNLP that users bring along."""

from __future__ import annotations

from pathlib import Path

import pytest

from pypkg.config import check_supported, load_settings
from pypkg.errors import UserError
from pypkg.models.registry import known_models, load_config

REPO = Path(__file__).resolve().parent.parent
PADDLENLP = sorted((REPO / "tests/golden/paddlenlp_configs").glob("*.json"))
PRETRAIN = sorted((REPO / "configs/pretrain").rglob("*.json"))
MODELS = sorted((REPO / "configs/models").glob("*.json"))
SPLIT_OVER_GPUS = [file for file in PRETRAIN if "one_process" not in file.name]
ONE_PROCESS = [
    *(file for file in PRETRAIN if "one_process" in file.name),
    REPO / "configs/quickstart.json",
]

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


def refused_names(file: Path) -> set[str]:
    with pytest.raises(UserError) as caught:
        check_supported(load_settings([str(file)]))
    return {
        line.removeprefix("  - ").split(" is ")[0]
        for line in str(caught.value).splitlines()
        if " is " in line
    }


def test_the_tables_here_cover_every_file():
    assert {file.stem for file in PADDLENLP} == set(REFUSED)
    assert len(MODELS) >= 9
    assert SPLIT_OVER_GPUS
    assert len(ONE_PROCESS) >= 2


@pytest.mark.parametrize("file", PADDLENLP, ids=lambda file: file.stem)
def test_paddlenlp_configs_parse_and_exactly_the_unsupported_is_refused(file):
    assert refused_names(file) == REFUSED[file.stem]


@pytest.mark.parametrize("file", SPLIT_OVER_GPUS, ids=lambda file: file.stem)
def test_shipped_configs_for_several_gpus_parse_and_are_refused_for_now(file):
    assert refused_names(file) == _TP | _SHARDING
    assert load_config(load_settings([str(file)]).model_name_or_path).hidden_size >= 4096


@pytest.mark.parametrize("file", ONE_PROCESS, ids=lambda file: file.stem)
def test_shipped_configs_for_one_process_can_start(file):
    paths = ["--input_dir", "data", "--output_dir", "out", "--tokenizer_name_or_path", "tokenizer"]
    settings = load_settings([str(file), *paths])
    check_supported(settings)
    load_config(settings.model_name_or_path)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_known_models_load(file):
    name = file.stem.replace("--", "/")
    assert name in known_models()
    config = load_config(name)
    assert config.num_parameters() > 1e6
