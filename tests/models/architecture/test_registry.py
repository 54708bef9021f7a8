"""Names: they resolve to configurations with the published numbers of parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_configs import KEYS, tiny

from pypkg.errors import UserError
from pypkg.files.paths import configs_dir
from pypkg.models.__main__ import main
from pypkg.models.architecture import registry
from pypkg.models.docs_page import models_page

# Exact numbers; aliases share that of the model whose file they name. Where they were published:
# - LLaMA, Mistral, Qwen, GPT-2, GLM-4, OPT-125m and -350m: the number of elements in the released
#   checkpoint, as its Hugging Face page shows it (a tied table that is stored twice counts once);
# - Baichuan 1: the table in the README of Baichuan-13B; BLOOM and StableLM: the model cards;
# - ChatGLM-6B and ChatGLM2-6B: "all params" in logs of fine-tuning with peft, 6173286400 (the head
#   is the embedding) and 6243584000;
# - the others: rounded only, see ROUNDED.
EXACT = {
    "llama-58m": 58_073_600,  # ours, counted by hand
    "quickstart-llama": 2_557_632,  # ours, counted by hand
    "facebook/llama-7b": 6_738_415_616,
    "facebook/llama-13b": 13_015_864_320,
    "facebook/llama-30b": 32_528_943_616,
    "facebook/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-7b": 6_738_415_616,
    "meta-llama/Llama-2-13b": 13_015_864_320,
    "meta-llama/Llama-2-70b": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "idea-ccnl/ziya-llama-13b-v1": 13_091_886_080,
    "linly-ai/chinese-llama-2-7b": 6_804_574_208,
    "linly-ai/chinese-llama-2-13b": 13_098_562_560,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "baichuan-inc/Baichuan-7B": 7_000_559_616,
    "baichuan-inc/Baichuan-13B-Base": 13_264_901_120,
    "baichuan-inc/Baichuan2-7B-Base": 7_505_973_248,
    "baichuan-inc/Baichuan2-13B-Base": 13_896_668_160,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt2-medium-en": 354_871_296,
    "gpt3-1.3B-en": 1_313_722_368,
    "gpt3-6.7B-en": 6_654_402_560,
    "gpt3-13B-en": 12_848_384_000,
    "gpt3-89B-en": 87_622_508_544,
    "gpt3-175B-en": 174_603_264_000,
    "qwen/qwen-1.8b": 1_836_828_672,
    "qwen/qwen-7b": 7_721_324_544,
    "qwen/qwen-14b": 14_167_290_880,
    "qwen/qwen-72b": 72_287_920_128,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2-72B": 72_706_203_648,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "facebook/opt-30b": 29_974_540_288,
    "facebook/opt-66b": 65_719_701_504,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-1b1": 1_065_314_304,
    "bigscience/bloom-1b7": 1_722_408_960,
    "bigscience/bloom-3b": 3_002_557_440,
    "bigscience/bloom-7b1": 7_069_016_064,
    "bigscience/bloom": 176_247_271_424,
    "THUDM/chatglm-6b-v1.1": 6_173_286_400,
    "THUDM/chatglm2-6b": 6_243_584_000,
    "THUDM/glm-130b": 128_697_794_560,
    "THUDM/glm-4-9b-hf": 9_399_951_360,
    "THUDM/glm-4-9b-chat-hf": 9_399_951_360,
    "THUDM/GLM-4-9B-0414": 9_400_279_040,
    "stabilityai/stablelm-3b-4e1t": 2_795_443_200,
}
# Published in this form only, so the exact number has to round to it.
ROUNDED = {
    "idea-ccnl/ziya-llama-13b-v1": "13e9",
    "linly-ai/chinese-llama-2-7b": "7e9",
    "linly-ai/chinese-llama-2-13b": "13e9",
    "baichuan-inc/Baichuan2-7B-Base": "7.5e9",
    "baichuan-inc/Baichuan2-13B-Base": "13.9e9",
    "gpt2-medium-en": "0.35e9",
    "gpt3-1.3B-en": "1.3e9",
    "gpt3-6.7B-en": "6.7e9",
    "gpt3-13B-en": "13e9",
    "gpt3-175B-en": "175e9",
    "facebook/opt-1.3b": "1.3e9",
    "facebook/opt-2.7b": "2.7e9",
    "facebook/opt-6.7b": "6.7e9",
    "facebook/opt-13b": "13e9",
    "facebook/opt-30b": "30e9",
    "facebook/opt-66b": "66e9",
    "THUDM/glm-130b": "1.3e11",
}
ALIASES = json.loads((configs_dir() / "models/aliases.json").read_text())


def test_every_name_is_in_the_table_of_published_sizes() -> None:
    assert set(registry.known_models()) == set(EXACT) | set(ALIASES)


@pytest.mark.parametrize("name", EXACT)
def test_number_of_parameters(name: str) -> None:
    assert registry.num_parameters(name) == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_exact_numbers_round_to_the_published_ones(name: str) -> None:
    mantissa, _, exponent = ROUNDED[name].partition("e")
    digits = len(mantissa.partition(".")[2])
    assert round(EXACT[name] / 10 ** int(exponent), digits) == float(mantissa)


@pytest.mark.parametrize(
    "name",
    [name for name in EXACT if "gpt" in name or ("opt" in name and name != "facebook/opt-350m")],
)
def test_gpt_like_sizes_follow_the_published_formula(name: str) -> None:
    """Narayanan et al., 2021, equation 2, which leaves out the final norm."""
    c = registry.load_config(name)
    layers, h = c.num_hidden_layers, c.hidden_size
    rows = c.vocab_size + c.max_position_embeddings + c.position_offset
    formula = 12 * layers * h**2 * (1 + 13 / (12 * h) + rows / (12 * layers * h))
    assert round(formula) + 2 * h == EXACT[name]


def test_details_of_named_models() -> None:
    load = registry.load_config
    assert load("facebook/llama-65b").norm_eps == 1e-5
    assert load("meta-llama/Llama-2-70b").num_key_value_heads == 8
    assert load("meta-llama/Meta-Llama-3-8B").rope_theta == 5e5
    assert load("mistralai/Mistral-7B-v0.1").sliding_window == 4096
    assert load("baichuan-inc/Baichuan-7B").position_embedding == "rope"
    assert load("baichuan-inc/Baichuan-13B-Chat").position_embedding == "alibi"
    assert not load("baichuan-inc/Baichuan-13B-Chat").norm_head
    assert load("baichuan-inc/Baichuan2-7B-Chat").norm_head
    assert load("bigscience/bloom").num_attention_heads == 112
    assert load("facebook/opt-350m").residual == "post"
    assert load("qwen/qwen-7b-chat").intermediate_size == 11008
    assert load("THUDM/chatglm2-6b").num_key_value_heads == 2
    assert load("THUDM/glm-130b").gmask_token_id == 150001


def test_case_of_names_does_not_matter() -> None:
    for name in ("facebook/llama-7b", "FlagAlpha/Llama2-Chinese-7b-Chat", "Qwen/Qwen3-8B"):
        assert registry.load_config(name.upper()) == registry.load_config(name.lower())


def test_unknown_name_gets_the_nearest_and_a_way_out() -> None:
    with pytest.raises(UserError, match=r"facebook/lama-7b.*facebook/llama-7b.*path of a folder"):
        registry.load_config("facebook/lama-7b")
    with pytest.raises(UserError, match=r"known model\. .*folder.*`pypkg models`"):
        registry.load_config("zzzzqqqq")


@pytest.mark.parametrize(
    ("name", "suggested", "not_suggested"),
    [
        ("meta-llama/Llama-2-8b", "meta-llama/Llama-2-7b", "70b"),
        ("Qwen/Qwen3-0.5B", "Qwen/Qwen3-0.6B", "32B"),
        ("THUDM/chatglm-6b", "THUDM/chatglm-6b-v1.1", "130b"),
        ("gpt2-xxl", "gpt2-xl", "gpt3-175B"),
        ("bigscience/bloom-7b", "bigscience/bloom-7b1", "1b7"),
    ],
)
def test_suggested_models_are_of_a_similar_size(
    name: str, suggested: str, not_suggested: str
) -> None:
    with pytest.raises(UserError, match=f"did you mean .*{suggested}") as error:
        registry.load_config(name)
    assert not_suggested not in str(error.value)


def test_no_model_of_that_size_is_no_suggestion() -> None:
    with pytest.raises(UserError, match=r"known model\. Give the path"):
        registry.load_config("Qwen/Qwen3-235B")


def test_a_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text(json.dumps(KEYS["llama"]))
    monkeypatch.chdir(tmp_path)
    assert registry.load_config("gpt2") == tiny("llama")


@pytest.mark.parametrize("family", KEYS)
def test_tiny_configurations_are_tiny(family: str) -> None:
    config = tiny(family)
    assert config.hidden_size == 64
    assert config.num_hidden_layers == 2
    assert 1e5 < config.num_parameters() < 1e6


def test_every_family_has_models_and_a_tiny_configuration() -> None:
    families = {family.name for family in registry.families()}
    assert {registry.load_config(name).model_type for name in EXACT} == families
    assert {tiny(name).model_type for name in KEYS} == families


def test_the_page_of_models_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[3] / "docs/models.md"
    assert page.read_text(encoding="utf-8") == models_page(), "run make docs"


def test_the_command_prints_the_page_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Not what reading GPT-2 and OPT logs of their dropout."""
    assert main([]) == 0
    assert capsys.readouterr() == (models_page(), "")


def test_the_command_counts_a_folder_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**KEYS["llama"], "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert main([str(tmp_path), "gpt2-medium"]) == 0
    *_, ours, gpt2 = capsys.readouterr().out.splitlines()
    assert f"{tiny('llama', 3).num_parameters():,}" in ours and "llama" in ours
    assert "354,823,168" in gpt2
    assert main([str(tmp_path / "missing")]) == 2
    assert "neither a folder nor a known model" in capsys.readouterr().err


def test_the_command_prints_a_config_to_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with it is the known model."""
    assert main(["--config", "qwen/qwen3-0.6b"]) == 0
    (tmp_path / "config.json").write_text(capsys.readouterr().out)
    assert registry.load_config(tmp_path) == registry.load_config("Qwen/Qwen3-0.6B")
    assert main(["--config", "Qwen/Qwen3-0.5B"]) == 2
    assert "is no known model; did you mean Qwen/Qwen3-0.6B" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--config", "gpt2", "gpt2"])
    assert "leave out MODEL" in capsys.readouterr().err


def test_the_configuration_side_needs_no_paddle() -> None:
    code = (
        "import sys; sys.modules['paddle'] = None\n"
        "import pypkg.models.weights.formats.tensor_files\n"
        "from pypkg.models.architecture import config, registry, weight_map\n"
        "print(registry.num_parameters('facebook/llama-7b'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "6738415616", result.stderr


def test_a_misspelt_folder(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(UserError, match=r"known model; did you mean '.*/my-model'\? Give the path"):
        registry.load_config(tmp_path / "my-modell")
