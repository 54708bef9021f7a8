"""How each family's config.json reads and is written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from model_testing import FORMS, GOLDEN, overrides

from pypkg.errors import UserError
from pypkg.models.architecture.registry import config_from_huggingface, config_to_huggingface


def _keys(fixture: str, form: str = "config.json", **changes: Any) -> dict[str, Any]:
    return {**json.loads((GOLDEN / fixture / form).read_text()), **changes}


@pytest.mark.parametrize(("fixture", "form"), FORMS)
def test_written_keys_read_back_equal(fixture: str, form: str) -> None:
    config = config_from_huggingface(_keys(fixture, form)).replace(**overrides(fixture))
    written = json.loads(json.dumps(config_to_huggingface(config, "bfloat16")))
    assert config_from_huggingface(written) == config
    assert written["torch_dtype"] == "bfloat16"
    original = _keys(fixture)
    assert written["model_type"] == original["model_type"]
    assert written.get("architectures") == original.get("architectures")
    # What the original's file says and ours says too, ours says alike; dropout is written as 0.
    skipped = {"torch_dtype", "max_window_layers"}
    if not original.get("use_sliding_window", True):
        skipped.add("sliding_window")  # a length that is not used
    for key in original.keys() & written.keys() - skipped:
        if "drop" not in key and original[key] is not None:
            assert written[key] == original[key], key


@pytest.mark.parametrize("fixture", sorted({fixture for fixture, form in FORMS if "v5" in form}))
def test_both_forms_read_the_same(fixture: str) -> None:
    v5 = config_from_huggingface(_keys(fixture, "config_v5.json"))
    assert config_from_huggingface(_keys(fixture)) == v5


def test_the_two_families_called_chatglm() -> None:
    assert config_from_huggingface(_keys("chatglm")).model_type == "chatglm"
    assert config_from_huggingface(_keys("chatglm2")).model_type == "chatglm2"
    neither = {"model_type": "chatglm", "architectures": ["ChatGLMModel"]}
    with pytest.raises(UserError, match=r"ChatGLMModel.*is not supported"):
        config_from_huggingface(neither)


@pytest.mark.parametrize(
    ("changes", "position_embedding", "norm_head"),
    [
        ({"vocab_size": 64000, "max_position_embeddings": 4096}, "rope", False),
        ({"vocab_size": 125696, "max_position_embeddings": 4096}, "rope", True),
        ({"vocab_size": 64000, "hidden_size": 5120}, "alibi", False),
        (
            {"vocab_size": 125696, "hidden_size": 5120, "max_position_embeddings": 4096},
            "alibi",
            True,
        ),
        ({"vocab_size": 320}, "alibi", False),  # a 13B's file has model_max_length alone
        ({"vocab_size": 320, "position_embedding": "rope", "norm_head": True}, "rope", True),
    ],
)
def test_baichuan_by_its_sizes(changes: dict, position_embedding: str, norm_head: bool) -> None:
    config = config_from_huggingface(_keys("baichuan_13b", **changes))
    assert (config.position_embedding, config.norm_head) == (position_embedding, norm_head)


def test_qwen() -> None:
    config = config_from_huggingface(_keys("qwen"))
    assert (config.intermediate_size, config.qkv_bias, config.mlp_bias) == (96, True, False)
    assert (config.dynamic_ntk_length, config.logn_attention_length) == (64, 64)
    off = config_from_huggingface(_keys("qwen", use_dynamic_ntk=False, use_logn_attn=False))
    assert (off.dynamic_ntk_length, off.logn_attention_length) == (None, None)
    with pytest.raises(UserError, match="must be even, found 97"):
        config_from_huggingface(_keys("qwen", intermediate_size=97))


def test_windows() -> None:
    mistral = _keys("mistral")
    assert config_from_huggingface(mistral).sliding_window is None
    del mistral["sliding_window"]
    assert config_from_huggingface(mistral).sliding_window == 4096
    assert config_from_huggingface(_keys("qwen2")).sliding_window is None
    used = _keys("qwen2", use_sliding_window=True, max_window_layers=1)
    config = config_from_huggingface(used)
    full, sliding = "full_attention", "sliding_attention"
    assert (config.sliding_window, config.layer_types) == (4096, (full, sliding))
    for first, types in {0: (sliding, sliding), 28: (full, full)}.items():
        config = config_from_huggingface({**used, "max_window_layers": first})
        assert config.layer_types == types
    deep = _keys("qwen2", use_sliding_window=True, num_hidden_layers=30)
    deep.pop("max_window_layers", None)
    assert config_from_huggingface(deep).layer_types == (full,) * 28 + (sliding,) * 2
    for types in ([full, full], [sliding, full]):  # wins over max_window_layers
        config = config_from_huggingface({**used, "layer_types": types})
        assert config.layer_types == tuple(types)
        assert config_from_huggingface(config_to_huggingface(config)) == config
    with pytest.raises(UserError, match="layer_types must be a list of full_attention and"):
        config_from_huggingface({**used, "layer_types": [full, "chunked_attention"]})
    with pytest.raises(UserError, match="layer_types names 1 layers, but num_hidden_layers is 2"):
        config_from_huggingface({**used, "layer_types": [full]})


def test_opt_of_350m() -> None:
    keys = _keys("opt", do_layer_norm_before=False, word_embed_proj_dim=16)
    config = config_from_huggingface(keys)
    assert (config.residual, config.final_norm, config.embedding_size) == ("post", False, 16)
    removed = config_from_huggingface(_keys("opt", _remove_final_layer_norm=True))
    assert (removed.residual, removed.final_norm) == ("pre", False)


def test_older_names_of_keys() -> None:
    bloom = _keys("bloom")
    for old, new in (("n_embed", "hidden_size"), ("num_attention_heads", "n_head")):
        bloom[old] = bloom.pop(new)
    assert config_from_huggingface(bloom) == config_from_huggingface(_keys("bloom"))


@pytest.mark.parametrize(
    ("fixture", "changes", "message"),
    [
        ("gpt3", {"activation_function": "selu"}, "activation_function is 'selu'; supported are"),
        ("gpt3", {"n_embd": None}, "lacks n_embd"),
        ("gpt3", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("baichuan2_7b", {"z_loss_weight": 1e-4}, "z_loss_weight is 0.0001"),
        ("chatglm", {"gmask_token_id": None}, "prefix_lm needs sop_token_id, gmask_token_id"),
        ("chatglm2", {"original_rope": False}, "original_rope is False"),
        ("glm130b", {"layernorm_order": "pre"}, "layernorm_order is 'pre'"),
        ("qwen", {"no_bias": False}, "no_bias is False"),
        ("opt", {"activation_function": "swish"}, "activation must be one of silu, gelu"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("qwen", {"seq_length": "2048"}, "a qwen config.json holds a value of the wrong type"),
        ("glm4_glm", {"partial_rotary_factor": 1.5}, r"partial_rotary_factor \(1.5\)"),
    ],
)
def test_what_is_not_supported_is_refused(fixture: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_huggingface(_keys(fixture, **changes))


@pytest.mark.parametrize(
    ("fixture", "changes", "field"),
    [
        ("chatglm", {"branch_norm": True}, "branch_norm=True"),
        ("bloom", {"intermediate_size": 100}, "intermediate_size=100"),
        ("mistral", {"norm_head": True}, "norm_head=True"),
        ("gpt3", {"activation": "silu"}, "activation"),
        ("qwen2", {"qk_norm": True}, "qk_norm=True"),
    ],
)
def test_what_a_format_cannot_say_is_refused(fixture: str, changes: dict, field: str) -> None:
    config = config_from_huggingface(_keys(fixture)).replace(**changes)
    with pytest.raises(UserError, match=field):
        config_to_huggingface(config)
