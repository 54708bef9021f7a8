"""Models that PaddleNLP 3.0.0b4 saved, against its own logits (golden/paddlenlp/ORIGIN.md)."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import pytest
from model_testing import GOLDEN

from pypkg.conversion.converter import convert_model
from pypkg.errors import UserError
from pypkg.models import from_config, from_pretrained
from pypkg.models.architecture.registry import (
    config_from_huggingface,
    config_to_paddlenlp,
    load_config,
    stored_weight_map,
)
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.tp_shards import tp_shard

PADDLENLP = GOLDEN / "paddlenlp"
MODELS = PADDLENLP / "models"
FOLDERS = sorted(folder.name for folder in MODELS.iterdir() if folder.is_dir())
# Logits are up to 2; the largest difference is 1.1e-6.
TOLERANCE = 1e-5


def _assert_logits(folder: Path, name: str) -> None:
    logits = from_pretrained(folder)(paddle.to_tensor(np.load(MODELS / "ids.npy")))
    np.testing.assert_allclose(logits.numpy(), np.load(MODELS / f"{name}.npy"), atol=TOLERANCE)


def _keys(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def _copied(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    (target / "config.json").write_text(json.dumps(_keys(folder) | changes))
    return target


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """As paddle.save does."""
    path.write_bytes(pickle.dumps(tensors, protocol=4))


def test_ten_models_in_two_forms() -> None:
    assert len(FOLDERS) == 20


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits(folder: str) -> None:
    _assert_logits(MODELS / folder, folder.rpartition("_")[0])


def _assert_chatglm_logits(folder: Path, expected: Path) -> None:
    """Its input has a prefix of eleven tokens, which see each other."""
    logits = from_pretrained(folder)(paddle.to_tensor(np.load(PADDLENLP / "chatglm/ids.npy")))
    np.testing.assert_allclose(logits.numpy(), np.load(expected), atol=TOLERANCE)


def test_chatglm() -> None:
    _assert_chatglm_logits(PADDLENLP / "chatglm/model", PADDLENLP / "chatglm/logits.npy")


def test_chatglm_of_another_depth(tmp_path: Path) -> None:
    """PaddleNLP weighs its residual stream by its depth; a Hugging Face folder of it says so."""
    folder = PADDLENLP / "chatglm_3_layers"
    _assert_chatglm_logits(folder, folder / "logits.npy")
    convert_model(folder, tmp_path / "imported")
    assert _keys(tmp_path / "imported")["residual_alpha"] == 6**0.5
    _assert_chatglm_logits(tmp_path / "imported", folder / "logits.npy")
    convert_model(tmp_path / "imported", tmp_path / "exported", layout="paddlenlp")
    assert "residual_alpha" not in _keys(tmp_path / "exported")
    _assert_chatglm_logits(tmp_path / "exported", folder / "logits.npy")
    config = load_config(tmp_path / "imported").replace(residual_alpha=56**0.5)
    with pytest.raises(UserError, match=r"PaddleNLP's chatglm model does not support residual_"):
        config_to_paddlenlp(config)


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_fused_matrices(name: str) -> None:
    """The model has two key-value heads of four, so groups of query, key and value differ."""
    names = TensorFiles(PADDLENLP / "fused" / name).shapes()
    assert any("qkv_proj" in each for each in names)
    _assert_logits(PADDLENLP / "fused" / name, name)


@pytest.mark.parametrize("name", ["gpt", "chatglm_v2"])
def test_models_without_the_prefix(name: str) -> None:
    """Saved from ``GPTModel`` and ``ChatGLMv2Model``: the one is tied, the other holds its head."""
    _assert_logits(PADDLENLP / "base" / name, name)


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name.endswith("_pdparams")])
def test_names_of_every_family_without_the_prefix(folder: str) -> None:
    stored = TensorFiles(MODELS / folder).shapes()
    shapes = {n if n.startswith("lm_head") else n.partition(".")[2]: stored[n] for n in stored}
    config = load_config(MODELS / folder)
    stored_weight_map(config, shapes).check(parameter_shapes(config), shapes, folder)


def test_names_without_the_prefix_that_are_those_of_hugging_face_as_well() -> None:
    """``ChatGLMModel``; its matrices lie the other way round."""
    expected = PADDLENLP / "chatglm_3_layers/logits.npy"
    _assert_chatglm_logits(PADDLENLP / "base/chatglm", expected)


def test_a_model_without_its_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A ``LlamaModel``: its last hidden states are PaddleNLP's, and a seed makes the head."""
    folder = PADDLENLP / "base/llama"
    model = from_pretrained(folder, seed=3)
    assert "a model without its head, which starts with random values" in caplog.text
    hidden = model.hidden_states(paddle.to_tensor(np.load(MODELS / "ids.npy"))).numpy()
    np.testing.assert_allclose(hidden, np.load(PADDLENLP / "base/llama.npy"), atol=TOLERANCE)
    drawn = from_config(model.config, seed=3).lm_head.weight.numpy()
    assert np.array_equal(model.lm_head.weight.numpy(), drawn)
    with pytest.raises(UserError, match=r"a model without its head.*continue_training"):
        convert_model(folder, tmp_path / "out")
    whole = _copied(folder, tmp_path / "llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        from_pretrained(whole)


@pytest.mark.parametrize("name", ["llama_tp4", "qwen_tp2", "chatglm_v2_tp2"])
def test_parts_of_tensor_parallel_ranks(name: str) -> None:
    _assert_logits(PADDLENLP / "parts" / name, name.rpartition("_")[0])


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("fused/llama", "llama"),
        ("models/qwen2_tied_pdparams", "qwen2_tied"),
        ("models/gpt_pdparams", "gpt"),
    ],
)
def test_parts_of_stages(tmp_path: Path, folder: str, name: str) -> None:
    """Both degrees in the names of the files; the fused gate and up have a block of each half."""
    stored = TensorFiles(PADDLENLP / folder)
    for tp in range(2):
        for pp in range(2):
            part = {
                each: _shard(each, stored.read(each, "float32"), tp, name != "llama")
                for each in stored.shapes()
                if ("layers.1" in each or "lm_head" in each) == bool(pp)
            }
            _write(tmp_path / f"model_state.tp{tp:02d}_pp{pp:02d}.pdparams", part)
    shutil.copy(MODELS / f"{name}_pdparams/config.json", tmp_path)
    _assert_logits(tmp_path, name)
    (tmp_path / "model_state.tp01_pp00.pdparams").unlink()
    with pytest.raises(UserError, match="tensor-parallel rank 1 and pipeline stage 0"):
        TensorFiles(tmp_path)


def _shard(name: str, value: np.ndarray, rank: int, is_tied: bool) -> np.ndarray:
    is_row = any(word in name for word in ("o_proj", "out_proj", "down_proj", "linear2"))
    if "norm" in name or "position" in name or (is_row and value.ndim == 1):
        return value  # whole on every rank
    if "gate_up_fused" in name:
        return np.concatenate([np.split(half, 2, 1)[rank] for half in np.split(value, 2, 1)], 1)
    is_row |= "embed" in name or ("lm_head" in name and is_tied)
    axis = 0 if is_row else value.ndim - 1
    return np.split(value, 2, axis)[rank]


def test_file_shards_with_an_index(tmp_path: Path) -> None:
    stored = TensorFiles(MODELS / "llama_pdparams")
    index = {}
    for name in stored.shapes():
        file = f"model_state-0000{1 + ('layers.1' in name)}-of-00002.pdparams"
        index[name] = file
    for file in set(index.values()):
        held = [name for name in index if index[name] == file]
        _write(tmp_path / file, {name: stored.read(name, "float32") for name in held})
    (tmp_path / "model_state.pdparams.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(MODELS / "llama_pdparams/config.json", tmp_path)
    _assert_logits(tmp_path, "llama")


@pytest.mark.parametrize("form", ["safetensors", "pdparams"])
def test_bfloat16(tmp_path: Path, form: str) -> None:
    """NumPy has no bfloat16: PaddleNLP writes its bits as uint16, in safetensors as well."""
    folder = PADDLENLP / "bfloat16/llama"
    stored = TensorFiles(folder)
    if form == "pdparams":
        bits = {name: stored.read(name, "bfloat16") for name in stored.shapes()}
        assert all(value.dtype == np.uint16 for value in bits.values())
        _write(tmp_path / "model_state.pdparams", bits)
        shutil.copy(folder / "config.json", tmp_path)
        folder = tmp_path
    assert {spec.dtype for spec in TensorFiles(folder).specs().values()} == {"bfloat16"}
    exact = TensorFiles(MODELS / "llama_safetensors")
    for name in exact.shapes():
        rounded = exact.read(name, "bfloat16")
        assert np.array_equal(TensorFiles(folder).read(name, "bfloat16"), rounded), name
    logits = from_pretrained(folder)(paddle.to_tensor(np.load(MODELS / "ids.npy"))).numpy()
    np.testing.assert_allclose(logits, np.load(MODELS / "llama.npy"), atol=0.05)


@pytest.mark.parametrize(
    "folder", ["models/gpt_safetensors", "models/qwen_safetensors", "fused/llama", "fused/gpt"]
)
def test_a_tensor_parallel_rank_reads_its_part(folder: str) -> None:
    """The same as a part of the whole, from other bytes of the file alone."""
    config = load_config(PADDLENLP / folder)
    files = TensorFiles(PADDLENLP / folder)
    names = stored_weight_map(config, files.shapes())

    def read(source: str, cut: Sequence[slice] = ()) -> np.ndarray:
        return files.read(source, "float32", cut)

    divided = 0
    for name, shape in parameter_shapes(config).items():
        whole = names.to_model(name, [read(each) for each in names.source_shapes(name, shape)])
        for rank in range(2):
            if shard := tp_shard(config, name, 2, rank):
                divided += 1
                part = shard.read(partial(names.read_slices, name, shape, read=read))
                assert np.array_equal(part, shard.take(whole)), name
    assert divided > 10


def test_opt(tmp_path: Path) -> None:
    """Its head is a matrix of its own, also where it equals the embedding."""

    def assert_logits(folder: Path) -> None:
        logits = from_pretrained(folder)(paddle.to_tensor(np.load(MODELS / "ids.npy")))
        expected = np.load(PADDLENLP / "opt/logits.npy")
        np.testing.assert_allclose(logits.numpy(), expected, atol=TOLERANCE)

    assert_logits(PADDLENLP / "opt")
    convert_model(PADDLENLP / "opt", tmp_path / "imported")
    assert _keys(tmp_path / "imported")["tie_word_embeddings"] is False
    assert_logits(tmp_path / "imported")
    convert_model(tmp_path / "imported", tmp_path / "exported", layout="paddlenlp")
    assert_logits(tmp_path / "exported")
    one, other = (TensorFiles(folder) for folder in (PADDLENLP / "opt", tmp_path / "exported"))
    assert one.shapes() == other.shapes()


def test_a_tied_opt_is_written_with_its_head(tmp_path: Path) -> None:
    """PaddleNLP would begin with a random one."""
    convert_model(GOLDEN / "opt", tmp_path, layout="paddlenlp")
    stored = TensorFiles(tmp_path)
    names = ("lm_head.decoder_weight", "opt.embeddings.word_embeddings.weight")
    head, table = (stored.read(name, "float32") for name in names)
    assert np.array_equal(head, table)
    assert load_config(GOLDEN / "opt") == from_pretrained(tmp_path).config


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("llama", {"rope_scaling_type": "yarn"}, "rope_scaling_type 'yarn' is not supported"),
        ("qwen2", {"rope_scaling_type": "ntk"}, "rope_scaling_type is 'ntk'"),
        ("gpt", {"normalize_before": False}, "normalize_before is False"),
        ("gpt", {"scale_qk_coeff": 2.0}, r"scale_qk_coeff is 2\.0"),
        ("gpt", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("qwen", {"use_long_sequence_strategies": True}, "use_long_sequence_strategies is True"),
        ("llama", {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "Gemma"),
    ],
)
def test_what_changes_the_computation_is_refused(
    tmp_path: Path, model: str, changes: dict, message: str
) -> None:
    folder = _copied(MODELS / f"{model}_safetensors", tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message) as error:
        load_config(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0},
        {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2.0},
        {"alibi": True},
    ],
)
def test_positions_of_llama_and_back(tmp_path: Path, changes: dict) -> None:
    folder = _copied(MODELS / "llama_safetensors", tmp_path / "model", **changes)
    config = load_config(folder)
    assert changes.items() <= config_to_paddlenlp(config).items()
    assert config_from_huggingface(config_to_paddlenlp(config)) == config


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name.endswith("_pdparams")])
def test_written_keys_say_what_the_original_ones_say(folder: str) -> None:
    original = _keys(MODELS / folder)
    written = config_to_paddlenlp(load_config(MODELS / folder))
    common = written.keys() & original.keys()
    assert {"architectures", "model_type", "vocab_size", "hidden_size"} <= common
    assert {key: written[key] for key in common} == {key: original[key] for key in common}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_dim": 16}, "head_dim=16"),
        ({"qkv_bias": True, "attention_output_bias": True}, "qkv_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling="),
    ],
)
def test_a_model_that_paddlenlp_cannot_be_told_of(overrides: dict, message: str) -> None:
    config = load_config(MODELS / "llama_pdparams").replace(**overrides)
    with pytest.raises(UserError, match=f"PaddleNLP's llama model does not support .*{message}"):
        config_to_paddlenlp(config)
