"""Every configuration that ships resolves, parses, and asks for what its name says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pypkg.config import check_supported, load_settings
from pypkg.models.architecture.registry import (
    config_from_huggingface,
    config_to_huggingface,
    known_models,
    load_config,
)
from pypkg.parallel.mesh import Degrees
from pypkg.training.start.layout import degrees, layout_notices, layout_problems

REPO = Path(__file__).resolve().parents[2]
PRETRAIN = sorted((REPO / "configs/pretrain").rglob("*.json"))
ONE_PROCESS = [
    *(file for file in PRETRAIN if file.stem.endswith("-one_process")),
    REPO / "configs/quickstart.json",
]
SPLIT = [file for file in PRETRAIN if file not in ONE_PROCESS]
FAMILIES = {
    "baichuan", "baichuan2", "bloom", "chatglm", "chatglm2", "glm130b", "glm4", "gpt3", "llama",
    "mistral", "opt", "qwen", "qwen2", "qwen3", "stablelm",
}  # fmt: skip
# The files of PaddleNLP's performance table; all of its numbers are for sequences of 4096 tokens.
MEASURED = [
    "llama/pretrain-flagalpha_llama2_13b-tp2sd4_stage2",
    "llama/pretrain-flagalpha_llama2_7b-tp2sd4_stage2",
    "baichuan2/pretrain-baichuan2_13b-sd8_stage2",
    "baichuan2/pretrain-baichuan2_7b-tp2sd4_stage2",
    "llama/pretrain-llama_13b-tp2sd4_stage2",
    "llama/pretrain-llama_7b-tp2sd4_stage2",
    "llama/pretrain-ziya_llama_13b-tp2sd4_stage2",
    "llama/pretrain-linly_llama2_7b-tp2sd4_stage2",
    "llama/pretrain-llama2_13b-tp2sd4_stage2",
    "llama/pretrain-llama2_7b-tp2sd4_stage2",
    "qwen/pretrain-qwen_7b-tp2sd4_stage2",
]
# The layout in a file's name, on the number of processes that the file is written for.
LAYOUTS = {
    "tp2sd4_stage2": (Degrees(tensor=2, sharding=4), 2),
    "sd8_stage2": (Degrees(sharding=8), 2),
    "tp4pp8": (Degrees(tensor=4, pipeline=8), 0),
    # On eight processes nothing is left to shard over, as in the run that it is made after.
    "tp4pp2_stage1": (Degrees(tensor=4, pipeline=2), 1),
    "tp4cp2_stage1": (Degrees(tensor=4, context=2, ring=True, sequence_parallel=True), 1),
}


def name(file: Path) -> str:
    return file.stem.removeprefix("pretrain-")


def test_every_family_has_a_file_for_one_process_and_one_for_more():
    assert {file.parent.name for file in PRETRAIN} == FAMILIES
    for files in (ONE_PROCESS[:-1], SPLIT):
        assert {file.parent.name for file in files} == FAMILIES


@pytest.mark.parametrize("file", ONE_PROCESS, ids=name)
def test_a_file_for_one_process_can_start(file):
    paths = ["--input_dir", "data", "--output_dir", "out", "--tokenizer_name_or_path", "tokenizer"]
    settings = load_settings([str(file), *paths])
    check_supported(settings)
    config = load_config(settings.model_name_or_path).replace(**settings.model_overrides)
    assert layout_problems(settings, config, 1) == []
    # With weights, gradients and two moments in float32 it fits a GPU with 80 GB.
    assert config.num_parameters() * 16 < 80e9


@pytest.mark.parametrize("file", SPLIT, ids=name)
def test_a_file_for_several_processes_has_the_layout_that_its_name_says(file):
    layout, stage = LAYOUTS[file.stem.rpartition("-")[2]]
    settings = load_settings([str(file)])
    check_supported(settings)
    config = load_config(settings.model_name_or_path)
    assert config.num_parameters() > 2e9
    for processes in (layout.world_size, 2 * layout.world_size):
        assert layout_problems(settings, config, processes) == []
    assert degrees(settings, layout.world_size) == layout
    assert settings.sharding_stage == stage


def test_the_hybrid_run_asks_for_what_paddlenlps_script_does():
    file = REPO / "configs/pretrain/llama/pretrain-llama_7b-tp4pp2_stage1.json"
    settings = load_settings([str(file)])
    assert settings.fp16 and settings.scale_loss == 512 and not settings.amp_master_grad
    assert (settings.max_seq_length, settings.gradient_accumulation_steps) == (2048, 4)
    assert degrees(settings, 16) == Degrees(tensor=4, pipeline=2, sharding=2)
    assert "sharding (stage1) has no effect" in layout_notices(settings, 8)[0]
    assert layout_notices(settings, 16) == []


@pytest.mark.parametrize("path", MEASURED)
def test_measured_files_ask_for_the_same_as_paddlenlps(path):
    ours = load_settings([str(REPO / "configs/pretrain" / f"{path}.json")])
    stem = path.rpartition("/")[2]
    theirs = load_settings([str(REPO / "tests/golden/paddlenlp_configs" / f"{stem}.json")])
    assert ours == dataclasses.replace(theirs, max_seq_length=4096)


@pytest.mark.parametrize("file", PRETRAIN, ids=name)
def test_the_model_of_a_pretrain_file_belongs_to_the_folder_of_its_family(file):
    in_folder = {
        "gpt3": "gpt2", "baichuan2": "baichuan", "chatglm2": "chatglm", "glm130b": "glm-130b",
    }  # fmt: skip
    model = load_settings([str(file)]).model_name_or_path
    keys = json.loads(shipped_file(model).read_text())
    assert keys["model_type"] == in_folder.get(file.parent.name, file.parent.name)


@pytest.mark.parametrize("model", known_models())
def test_a_known_model_reads_the_same_after_it_was_written(model):
    config = load_config(model)
    assert config_from_huggingface(config_to_huggingface(config)) == config


def test_aliases_name_shipped_files():
    aliases = json.loads((REPO / "configs/models/aliases.json").read_text())
    for alias, model in aliases.items():
        assert shipped_file(model).is_file()
        assert not (REPO / "configs/models" / f"{alias.replace('/', '--')}.json").exists()
        assert load_config(alias) == load_config(model)


def test_names_do_not_differ_by_case_alone():
    assert len({model.lower() for model in known_models()}) == len(known_models())


def shipped_file(model: str) -> Path:
    aliases = json.loads((REPO / "configs/models/aliases.json").read_text())
    return REPO / "configs/models" / f"{aliases.get(model, model).replace('/', '--')}.json"
