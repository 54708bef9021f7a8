"""No key of a config.json is passed over that could change the model."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from model_testing import GOLDEN
from safetensors.numpy import load_file, save_file
from tiny_configs import KEYS

from pypkg import convert
from pypkg.config import Settings
from pypkg.errors import UserError
from pypkg.models import from_pretrained
from pypkg.models.architecture import family as family_module
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.config_keys import DROPOUTS, NEUTRAL, UNUSED
from pypkg.models.architecture.registry import (
    config_from_huggingface,
    config_to_huggingface,
    families,
    load_config,
)
from pypkg.training.start.sources import load_model, model_config

# A family of each file format, with its tiny config.json.
TINY = {config_from_huggingface(keys).model_type: keys for keys in KEYS.values()}
FAMILIES = {family.name: (family, TINY[family.name]) for family in families()}
ANY_KEY = sorted(
    {key for each in families() for key in (*each.known_keys(), *each.fixed, *each.neutral)}
    | {key for each in families() for key in (*each.unused, *each.dropouts)}
)


def _read(fixture: str, **changes: Any) -> ModelConfig:
    keys = json.loads((GOLDEN / fixture / "config.json").read_text())
    return config_from_huggingface({**keys, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_any_family_is_read_or_harmless_or_refused(name: str) -> None:
    family, keys = FAMILIES[name]
    plain = config_from_huggingface(keys)
    for key in (*ANY_KEY, *NEUTRAL, "num_experts", "quantization_config"):
        value = _other_than(keys.get(key))
        if key in {"architectures", "model_type", *(each.distinctive_key for each in families())}:
            continue  # they say which family it is
        if key in UNUSED or key in family.unused or key in DROPOUTS or key in family.dropouts:
            assert config_from_huggingface({**keys, key: value}) == plain, key
        elif key in family.known_keys():
            counts_with = _COUNTS_WITH.get(key, {})
            others = {**keys, **{k: v for k, v in counts_with.items() if k in family.known_keys()}}
            assert any(_follows(others, key, value) for value in _VALUES), key
        else:
            with pytest.raises(UserError, match=rf"\b{key}\b"):
                config_from_huggingface({**keys, key: value})


# A key that counts only beside certain values of others.
_COUNTS_WITH = {
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 8},
    "model_max_length": {"max_position_embeddings": None},
    "sliding_window": {"use_sliding_window": True},
    "use_sliding_window": {"sliding_window": 8},
    "_remove_final_layer_norm": {"do_layer_norm_before": True},
    "pretraining_tp": {"slow_but_exact": True},
    "slow_but_exact": {"pretraining_tp": 2},
    "rope_scaling_factor": {"rope_scaling_type": "linear"},
}
_VALUES = (7, True, False, "relu", 0.25, [1, 2], {"rope_type": "linear", "factor": 2.0})
_STRANGE = (
    *("text", -1, 0, 1.5, float("inf"), float("nan"), [], [[1]], {}, {"rope_type": [1]}, None),
    *(1e308, 1e-308, 10**400),
)


def _other_than(value: Any) -> Any:
    return {"a": 1} if value != {"a": 1} else 3


def _follows(keys: dict, key: str, value: Any) -> bool:
    """Whether a value makes another configuration than without the key, or is refused."""
    without = {name: each for name, each in keys.items() if name != key}
    try:
        plain = config_from_huggingface(without)
        return config_from_huggingface({**without, key: value}) != plain
    except UserError:
        return True


@pytest.mark.parametrize("name", FAMILIES)
def test_a_strange_value_of_any_key_is_read_or_refused(name: str) -> None:
    family, keys = FAMILIES[name]
    for key in (*family.known_keys(), *family.fixed, *family.neutral, "architectures"):
        for value in _STRANGE:
            with suppress(UserError):
                config_from_huggingface({**keys, key: value}).num_parameters()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"head_dim": 2},
        {"rope_scaling_factor": 1e308},
        {"rope_scaling_factor": -2.0},
    ],
    ids=str,
)
def test_sizes_that_paddlenlps_ntk_cannot_be_computed_from(changes: dict) -> None:
    ntk = {"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0}
    with pytest.raises(UserError):
        config_from_huggingface({**KEYS["llama"], **ntk, **changes})


def test_all_unknown_keys_are_named_at_once_with_a_way_out(tmp_path: Path) -> None:
    keys = {**KEYS["llama"], "num_experts": 8, "router": "top2", "hidden_act": "gelu"}
    with pytest.raises(UserError) as caught:
        config_from_huggingface(keys)
    message = str(caught.value)
    assert "hidden_act is 'gelu'; a llama model needs 'silu'" in message
    assert "does not know num_experts, router" in message
    assert "--allow_unknown_config num_experts router of pypkg pretrain and" in message
    keys["hidden_act"] = "silu"
    (tmp_path / "config.json").write_text(json.dumps(keys))
    allowed = ("num_experts", "router")
    assert load_config(tmp_path, allowed) == config_from_huggingface(KEYS["llama"])
    with pytest.raises(UserError, match="does not know router,"):
        load_config(tmp_path, ["num_experts"])
    # It lets unknown keys pass, not a value that is known to make another model.
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        config_from_huggingface({**keys, "hidden_act": "gelu"}, (*allowed, "hidden_act"))


@pytest.mark.parametrize(
    ("fixture", "changes", "message"),
    [
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("llama", {"num_experts": 8}, "does not know num_experts"),
        ("llama", {"rope_scaling_type": "ntk_by_parts"}, "rope_scaling_type 'ntk_by_parts'"),
        (
            "llama",
            {"rope_scaling_type": "linear", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling_type is 'linear' beside rope_scaling",
        ),
        ("qwen2", {"rope_scaling_type": "linear"}, "rope_scaling_type is 'linear'.*needs null"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types has sliding_attention, but sliding_window is None",
        ),
        ("chatglm", {"pre_seq_len": 128}, "pre_seq_len is 128; a chatglm model needs null"),
        ("chatglm", {"quantization_bit": 4}, "quantization_bit is 4; a chatglm model needs 0"),
        ("chatglm2", {"quantization_bit": 8}, "quantization_bit is 8"),
        ("baichuan_7b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "know rope_scaling"),
        ("glm130b", {"tie_word_embeddings": False}, "tie_word_embeddings is False.*needs True"),
        ("glm130b", {"use_bias": False}, "use_bias is False; a glm-130b model needs True"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact is true with"),
        ("bloom", {"n_embed": 128}, "hidden_size 64 and n_embed 128 are two values of the same"),
        ("gpt3", {"scale_attn_weights": None}, "scale_attn_weights is None.*needs True"),
    ],
)
def test_a_value_that_makes_another_model_is_refused(
    fixture: str, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _read(fixture, **changes)


@pytest.mark.parametrize(
    ("fixture", "changes", "fields"),
    [
        ("llama", {"alibi": True}, {"position_embedding": "alibi"}),
        (
            "llama",
            {"sliding_window": 8},
            {"sliding_window": 8, "layer_types": ("sliding_attention",) * 2},
        ),
        (
            "llama",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            {"layer_types": ("full_attention", "sliding_attention")},
        ),
        ("llama", {"attn_logit_softcapping": 30.0}, {"attn_logit_softcapping": 30.0}),
        ("mistral", {"attention_bias": True}, {"qkv_bias": True, "attention_output_bias": True}),
        ("qwen3", {"mlp_bias": True}, {"mlp_bias": True}),
        ("baichuan_7b", {"num_key_value_heads": 2}, {"num_key_value_heads": 2}),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 1}, {}),
        ("bloom", {"slow_but_exact": False, "pretraining_tp": 4}, {}),
    ],
)
def test_what_the_decoder_can_do_is_followed_and_written(
    fixture: str, changes: dict, fields: dict
) -> None:
    config = _read(fixture, **changes)
    assert {name: getattr(config, name) for name in fields} == fields
    written = json.loads(json.dumps(config_to_huggingface(config)))
    assert config_from_huggingface(written) == config
    assert not fields or config != _read(fixture)


@pytest.mark.parametrize(
    ("fixture", "keys"),
    [
        ("llama", {"unsloth_fixed": True, "rope_interleaved": False, "is_llama_config": True}),
        ("llama", {"pad_token_id": None, "max_sequence_length": 2048, "pretraining_tp": 2}),
        ("llama", {"transformers.js_config": {"dtype": "q4"}, "_attn_implementation": "sdpa"}),
        ("gpt3", {"output_past": True, "n_special": 0, "predict_special_tokens": True}),
        ("qwen2", {"use_mrope": False, "max_window_layers": 21}),
        ("bloom", {"n_inner": None, "offset_alibi": 100, "skip_bias_add": True}),
        ("chatglm2", {"vocab_size": 320, "quantization_bit": 0, "classifier_dropout": None}),
        ("chatglm", {"pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0}),
        ("qwen", {"use_flash_attn": "auto", "use_cache_quantization": False}),
    ],
)
def test_harmless_keys_of_released_models_are_known(fixture: str, keys: dict) -> None:
    assert _read(fixture, **keys) == _read(fixture)


def test_extensions_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    family_module._log_extension.cache_clear()
    for _ in range(2):
        _read("llama", sliding_window=8)
    assert caplog.text.count("llama model has sliding_window, which the original") == 1
    assert set(config_to_huggingface(_read("llama"))).isdisjoint({"sliding_window", "layer_types"})


def test_rope_scaling_wins_over_rope_parameters() -> None:
    """As in transformers 5, which takes nothing from rope_parameters then."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    both = _read("llama", rope_scaling=scaling, rope_parameters={"rope_theta": 5e5})
    assert both == _read("llama", rope_scaling=scaling)


# Rows 0, 63 and 95 of the logits; the last lies beyond max_position_embeddings.
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("alibi", {"alibi": True}),
        ("linear", {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0}),
        ("ntk", {"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0}),
        ("dynamic_ntk", {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2.0}),
    ],
)
def test_paddlenlp_positions_give_its_logits(case: str, changes: dict, tmp_path: Path) -> None:
    keys = json.loads((GOLDEN / "llama/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, **changes}))
    save_file(load_file(GOLDEN / "llama/model.safetensors"), tmp_path / "model.safetensors")
    expected = np.load(GOLDEN / "llama_variants/paddlenlp.npz")
    logits = from_pretrained(tmp_path)(paddle.to_tensor(expected["input_ids"]))
    np.testing.assert_allclose(logits.numpy()[:, [0, 63, 95]], expected[case], rtol=0, atol=1e-4)


@pytest.mark.parametrize("continue_training", [False, True])
def test_pretrain_and_convert_let_named_keys_pass(continue_training: bool, tmp_path: Path) -> None:
    keys = json.loads((GOLDEN / "llama/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "router": "top2"}))
    save_file(load_file(GOLDEN / "llama/model.safetensors"), tmp_path / "model.safetensors")
    settings = Settings(
        model_name_or_path=str(tmp_path), continue_training=continue_training, max_seq_length=32
    )
    with pytest.raises(UserError, match="does not know router"):
        model_config(settings, None)
    allowed = dataclasses.replace(settings, allow_unknown_config=("router",))
    config = model_config(allowed, None)
    assert config == load_config(GOLDEN / "llama")
    model, _ = load_model(allowed, "float32", None, config, filled=True)
    assert model.config == config
    command = ["export", str(tmp_path), str(tmp_path / "out")]
    assert convert.main(command) == 2
    assert convert.main([*command, "--allow_unknown_config", "router"]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["router"] == "top2"
