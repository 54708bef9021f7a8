"""ModelConfig: reading both forms of config.json, writing it back, and refusing nonsense."""

from __future__ import annotations

import json
import re
from pathlib import Path

import paddle
import pytest
from model_testing import GOLDEN

from pypkg.errors import UserError
from pypkg.models import from_config
from pypkg.models.architecture import checks, registry
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.family import _log_dropout

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _keys(**changes: object) -> dict:
    return {**json.loads((GOLDEN / "llama" / "config.json").read_text()), **changes}


def test_both_forms_read_the_same() -> None:
    new = json.loads((GOLDEN / "llama" / "config_v5.json").read_text())
    assert "rope_theta" not in new
    config = registry.config_from_huggingface(_keys())
    assert registry.config_from_huggingface(new) == config
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (64, 16, 320)
    assert config.norm_eps == 1e-6 and config.eos_token_id == 2


def test_both_forms_of_a_scaling_read_the_same() -> None:
    old = _keys(rope_theta=5e5, rope_scaling=YARN)
    new = _keys(rope_parameters={**YARN, "rope_theta": 5e5}, rope_theta=None, rope_scaling=None)
    oldest = _keys(rope_theta=5e5, rope_scaling={**YARN, "type": "yarn"})
    del oldest["rope_scaling"]["rope_type"]
    config = registry.config_from_huggingface(old)
    assert config.rope_theta == 5e5 and config.rope_scaling == YARN
    assert registry.config_from_huggingface(new) == config
    assert registry.config_from_huggingface(oldest) == config


def test_absent_keys_take_the_formats_defaults() -> None:
    keys = _keys()
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "attention_bias"):
        del keys[key]
    config = registry.config_from_huggingface(keys)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert not config.qkv_bias


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 2, "head_dim": 24, "rope_scaling": YARN, "eos_token_id": [2, 3]},
    ],
)
def test_written_keys_read_back_equal(changes: dict) -> None:
    config = registry.config_from_huggingface(_keys(**changes))
    keys = registry.config_to_huggingface(config, "bfloat16")
    assert keys["architectures"] == ["LlamaForCausalLM"] and keys["torch_dtype"] == "bfloat16"
    assert registry.config_from_huggingface(json.loads(json.dumps(keys))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 66, "head_dim": None}, r"hidden_size \(66\).*num_attention_heads \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\).*num_key_value_heads \(3\)"),
        ({"head_dim": 15}, r"head_dim \(15\) is odd"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, found 0"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, found '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
        ({"rms_norm_eps": -1e-6}, "norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "norm_eps must be a positive number"),
        ({"rms_norm_eps": float("inf")}, "norm_eps must be a positive number, found inf"),
        ({"hidden_size": float("inf")}, "hidden_size must be a positive integer, found inf"),
        ({"bos_token_id": "1"}, "bos_token_id must be an integer from 0 on, found '1'"),
        ({"bos_token_id": -1}, "bos_token_id must be an integer from 0 on, found -1"),
        ({"pad_token_id": -1}, "pad_token_id must .* found -1; leave it out or set it to null"),
        ({"eos_token_id": -1}, "eos_token_id must .* found -1; leave it out or set it to null"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id must .* list of them, found \[2, -1\]"),
        ({"eos_token_id": [1, 2.0]}, "eos_token_id must be an integer from 0 on or a list of them"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10,000, found 1,000,0"),
        ({"vocab_size": 10**12}, "vocab_size must be at most 2,147,483,647"),
        (
            {"intermediate_size": 2**31 - 1, "hidden_size": 2**20, "num_hidden_layers": 9},
            r"e\+16 parameters; at most 1e\+14",
        ),
        ({"mlp_bias": "no"}, "mlp_bias must be true or false, found 'no'"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu'"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "'longrope'.*default, linear, dynamic, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, "linear lacks factor"),
        ({"rope_scaling": {"factor": 2.0}}, "of type default does not know factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "faktor": 1}}, "not know faktor"),
        ({"rope_scaling": 2.0}, "rope_scaling must be an object or null, found 2.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 64,
                }
            },
            r"high_freq_factor \(1.0\) must be above low_freq_factor \(4.0\)",
        ),
    ],
)
def test_impossible_values_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.config_from_huggingface(_keys(**changes))


def test_layers_are_counted_before_their_types_are_made() -> None:
    """``max_window_layers`` makes a list with an entry for each."""
    keys = json.loads((GOLDEN / "family_variants/qwen2_tied_window/config.json").read_text())
    del keys["layer_types"]
    assert registry.config_from_huggingface(keys).num_hidden_layers == 2
    with pytest.raises(UserError, match="num_hidden_layers must be at most 10,000"):
        registry.config_from_huggingface({**keys, "num_hidden_layers": 10**9})


def test_unknown_architecture_lists_the_supported() -> None:
    with pytest.raises(UserError, match=r"MambaForCausalLM.*'mamba'.*LlamaForCausalLM"):
        registry.config_from_huggingface(
            _keys(architectures=["MambaForCausalLM"], model_type="mamba")
        )


def test_replace_follows_derived_sizes() -> None:
    config = registry.config_from_huggingface(_keys())
    wider = config.replace(hidden_size=128, num_attention_heads=2)
    assert (wider.head_dim, wider.num_key_value_heads) == (64, 2)
    own = config.replace(head_dim=32)
    assert own.replace(hidden_size=96).head_dim == 32


def test_replace_refuses_unknown_fields() -> None:
    config = registry.config_from_huggingface(_keys())
    with pytest.raises(UserError, match=r"'hiden_size' is not a field.*hidden_size"):
        config.replace(hiden_size=3)


def test_configuration_that_its_file_format_cannot_hold() -> None:
    config = registry.config_from_huggingface(_keys()).replace(qkv_bias=True)
    with pytest.raises(UserError, match="cannot hold attention_output_bias=False beside"):
        registry.config_to_huggingface(config)


def test_dropout_is_not_applied_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _log_dropout.cache_clear()
    for _ in range(2):
        config = registry.config_from_huggingface(_keys(attention_dropout=0.1))
    assert caplog.text.count("asks for dropout (attention_dropout)") == 1
    assert registry.config_to_huggingface(config)["attention_dropout"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": 64,\n "x" 3}', "is not JSON: .* at line 2, column 6"),
        ("[1]", "must hold a JSON object, found a list"),
        ("[" * 100_000, "is not usable JSON: .*recursion"),
        ('{"hidden_size": ' + "[" * 900 + "]" * 900 + "}", "it has more than 100 levels"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "is not usable JSON: .*digits"),
        ('{"vocab_size": 64, "vocab_size": 65}', "'vocab_size' occurs more than once"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "config.json does not exist, so .* is not a model"),
    ],
)
def test_unreadable_file(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        registry.load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_file_that_begins_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_keys()), encoding="utf-8-sig")
    assert registry.load_config(tmp_path) == registry.config_from_huggingface(_keys())


def test_a_name_that_is_too_long_for_a_path() -> None:
    with pytest.raises(UserError, match="neither a folder nor a known model"):
        registry.load_config("x" * 5000)


def test_wrong_value_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_keys(vocab_size=-1)))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "config.json"))):
        registry.load_config(tmp_path)


def test_flops_per_token() -> None:
    config = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=4,
    )
    # Per layer 4 matrices of 4 x 8, 3 of 4 x 6, 2 norms; embedding, head, final norm.
    num_parameters = 3 * (4 * 32 + 3 * 24 + 8) + 2 * 40 + 4
    assert config.num_parameters() == num_parameters
    assert config.flops_per_token(7) == 6 * num_parameters + 12 * 3 * 8 * 7


@pytest.mark.parametrize("name", checks._CHOICES)
def test_a_choice_that_no_layer_implements_is_an_error(
    name: str, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checks._CHOICES, name, (*checks._CHOICES[name], "unknown"))
    config = tiny_config.replace(**{name: "unknown"})
    with pytest.raises(UserError, match=f"{name}.* must be one of .*, found 'unknown'"):
        from_config(config, seed=1)


def test_a_norm_without_a_size_is_an_error(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checks._CHOICES, "norm", ("unknown",))
    with pytest.raises(UserError, match="norm must be one of rms_norm, layer_norm, found"):
        tiny_config.replace(norm="unknown").num_parameters()


def test_a_layer_type_that_no_mask_implements_is_an_error(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_LAYER_TYPES", (*checks._LAYER_TYPES, "unknown"))
    config = tiny_config.replace(layer_types=["full_attention", "unknown"])
    with pytest.raises(UserError, match=r"layer_types must be one of full_attention, .*'unknown'"):
        from_config(config, seed=1)(paddle.ones([1, 3], dtype="int64"))


def test_a_scaling_that_no_formula_implements_is_an_error(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checks._ROPE_SCALING_KEYS, "unknown", (frozenset(), frozenset()))
    config = tiny_config.replace(rope_scaling={"rope_type": "unknown"})
    with pytest.raises(UserError, match=r"rope_scaling.rope_type must be one of linear, .*unknown"):
        from_config(config, seed=1)(paddle.ones([1, 3], dtype="int64"))
