"""Hugging Face folders in and out."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from disk_log import DiskLog
from model_testing import GOLDEN
from safetensors.numpy import load_file, save_file

from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config, from_pretrained, pretrained, save_pretrained
from pypkg.models.architecture import registry
from pypkg.models.weights import tensor_writer
from pypkg.models.weights.tensor_writer import FileToWrite

FIXTURES = ["llama", "llama_variants/biased"]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _editable(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A copy of the golden llama folder, and its tensors."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", SINGLE):
        shutil.copy(GOLDEN / "llama" / name, folder)
    return folder, load_file(folder / SINGLE)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_export_holds_the_tensors_that_were_imported(fixture: str, tmp_path: Path) -> None:
    save_pretrained(from_pretrained(GOLDEN / fixture), tmp_path)
    assert sorted(_files(tmp_path)) == ["config.json", SINGLE]
    original, exported = load_file(GOLDEN / fixture / SINGLE), load_file(tmp_path / SINGLE)
    assert exported.keys() == original.keys()
    for name, value in original.items():
        assert exported[name].tobytes() == value.tobytes(), name
    assert registry.load_config(tmp_path) == registry.load_config(GOLDEN / fixture)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_import_of_an_export_is_byte_identical(
    tiny_config: ModelConfig, tmp_path: Path, dtype: str, max_shard_size: str
) -> None:
    config = tiny_config.replace(qkv_bias=True, attention_output_bias=True, mlp_bias=True)
    model = from_config(config, dtype=dtype, seed=1)
    save_pretrained(model, tmp_path / "one", max_shard_size)
    loaded = from_pretrained(tmp_path / "one", dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.numpy().tobytes() == loaded.state_dict()[name].numpy().tobytes(), name
    save_pretrained(loaded, tmp_path / "two", max_shard_size)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_shards(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = from_config(tiny_config, seed=1)
    save_pretrained(model, tmp_path, max_shard_size=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    count = len(shards)
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert sorted(_files(tmp_path)) == sorted([*shards, INDEX, "config.json"])
    held = {}
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        held.update(dict.fromkeys(tensors, shard))
        # One parameter that is larger than a shard has one to itself.
        assert sum(value.nbytes for value in tensors.values()) <= 20_000 or len(tensors) <= 3
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * tiny_config.num_parameters()
    (tmp_path / shards[2]).unlink()
    with pytest.raises(UserError, match=shards[2]):
        from_pretrained(tmp_path)


def test_a_smaller_export_leaves_nothing_of_a_larger_one(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    save_pretrained(from_config(tiny_config, seed=1), tmp_path, max_shard_size="20KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    second = from_config(tiny_config, seed=2)
    save_pretrained(second, tmp_path)
    assert sorted(_files(tmp_path)) == ["config.json", SINGLE, "tokenizer.json"]
    loaded = from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.head_weight.numpy(), second.head_weight.numpy())


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_stored_dtype_is_converted(
    tiny_config: ModelConfig, tmp_path: Path, stored: str, asked: str
) -> None:
    model = from_config(tiny_config, dtype=stored, seed=1)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == stored
    loaded = dict(from_pretrained(tmp_path, dtype=asked).named_parameters())
    for name, parameter in model.named_parameters():
        wanted = parameter.astype("float32").astype(asked)
        assert loaded[name].dtype == wanted.dtype
        assert loaded[name].numpy().tobytes() == wanted.numpy().tobytes(), name


def test_overrides(tmp_path: Path) -> None:
    model = from_pretrained(GOLDEN / "llama", rope_theta=5e5, max_position_embeddings=128)
    assert (model.config.rope_theta, model.config.max_position_embeddings) == (5e5, 128)
    with pytest.raises(UserError, match=r"'rope_tetha' is not a field.*rope_theta"):
        from_pretrained(GOLDEN / "llama", rope_tetha=1.0)


def test_rotary_frequencies_and_second_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    folder, tensors = _editable(tmp_path)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / SINGLE)
    from_pretrained(folder)
    tied = from_pretrained(folder, tie_word_embeddings=True)
    assert tied.lm_head is None
    np.testing.assert_array_equal(tied.head_weight.numpy(), tensors["model.embed_tokens.weight"])


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    folder, tensors = _editable(tmp_path)
    del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((136, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(UserError) as error:
        from_pretrained(folder)
    message = str(error.value)
    for line in (
        str(folder),
        "missing: model.layers.0.self_attn.k_proj.weight [64, 64]",
        "missing: lm_head.weight [320, 64]",
        "wrong shape: model.layers.1.mlp.up_proj.weight: expected [136, 64], found [136, 32]",
        "not part of the model: model.layers.0.self_attn.q_proj.bias [64]",
    ):
        assert line in message
    assert message.count("\n  ") == 4


def test_override_of_a_size_that_the_weights_have_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"embed_tokens.weight: expected \[384, 64\], found"):
        from_pretrained(GOLDEN / "llama", vocab_size=384)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    folder, _ = _editable(tmp_path)
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated") as error:
        from_pretrained(folder)
    assert str(path) in str(error.value)


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json; .*convert import"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("size", ["5 parsecs", "GB", "-1", 0, "0.2", ""])
def test_bad_shard_size(tiny_config: ModelConfig, tmp_path: Path, size: str | int) -> None:
    with pytest.raises(UserError, match="max_shard_size must be a positive number"):
        save_pretrained(from_config(tiny_config, seed=0), tmp_path, size)


def test_failed_save_leaves_the_earlier_one(
    tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(from_config(tiny_config, seed=1), tmp_path, max_shard_size="20KB")
    before = _files(tmp_path)
    calls = []

    class FullDisk(tensor_writer._File):
        def __init__(self, what: FileToWrite) -> None:
            calls.append(what.path)
            super().__init__(what)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_writer, "_File", FullDisk)
    with pytest.raises(UserError, match=r"cannot save the model in .*No space left on device"):
        save_pretrained(from_config(tiny_config, seed=2), tmp_path, max_shard_size="20KB")
    assert len(calls) == 3
    assert _files(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_not_saved(
    tiny_config: ModelConfig, tmp_path: Path, dtype: str, value: float
) -> None:
    model = from_config(tiny_config, dtype, seed=1)
    save_pretrained(model, tmp_path)
    before = _files(tmp_path)
    parameter = model.layers[1].mlp.down_proj.weight
    parameter.set_value(paddle.full_like(parameter, value))
    message = r"layers\.1\.mlp\.down_proj\.weight holds values that are NaN or"
    with pytest.raises(UserError, match=message):
        save_pretrained(model, tmp_path)
    assert _files(tmp_path) == before


def test_files_are_on_the_disk_before_they_have_their_names(
    tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskLog(monkeypatch)
    save_pretrained(from_config(tiny_config, seed=1), tmp_path, max_shard_size="20KB")
    disk.check()
    renamed = [event.split()[2] for event in disk.changes()]
    assert renamed[-2:] == ["model.safetensors.index.json", "config.json"]
    assert sorted(renamed) == sorted(_files(tmp_path))


def test_folder_that_cannot_be_made(tiny_config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot save the model in .*file"):
        save_pretrained(from_config(tiny_config, seed=0), tmp_path / "file" / "model")


def test_loading_holds_one_tensor_beside_the_model(
    tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is read once, and assigned before the next parameter is read."""
    save_pretrained(from_config(tiny_config, seed=1), tmp_path)
    events: list[str] = []
    read = pretrained.TensorFiles.read
    assign = paddle.Tensor.set_value

    def spy_read(self: object, name: str, dtype: str) -> np.ndarray:
        events.append(name)
        return read(self, name, dtype)

    def spy_assign(self: paddle.Tensor, value: object) -> None:
        events.append("assign")
        assign(self, value)

    monkeypatch.setattr(pretrained.TensorFiles, "read", spy_read)
    monkeypatch.setattr(paddle.Tensor, "set_value", spy_assign)
    from_pretrained(tmp_path)
    reads = [event for event in events if event != "assign"]
    assert sorted(reads) == sorted(load_file(tmp_path / SINGLE))
    assert max(len(run.split()) for run in " ".join(events).split("assign")) == 3  # q, k, v
