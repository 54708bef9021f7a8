"""Runs that PaddleNLP 3.0.0b4 began go on here (golden/paddlenlp/ORIGIN.md)."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from distributed_testing import run_ranks
from safetensors.numpy import load_file, save_file
from test_pretrain import assert_user_error
from training_testing import ROOT, Workplace

from pypkg.errors import UserError
from pypkg.models.architecture.registry import load_config
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.training.checkpoint import paddlenlp
from pypkg.training.checkpoint.reading import load_trainer_state

RUNS = ROOT / "tests/golden/paddlenlp/run"
PRETRAIN_WORKER = ROOT / "tests/distributed/runs/pretrain_worker.py"
FORMS = (
    "plain",
    pytest.param("unified", marks=pytest.mark.slow),
    pytest.param("sharded_plain", marks=pytest.mark.slow),
    "sharded_unified",
    pytest.param("sharded_split", marks=pytest.mark.slow),
    "sharded_split_tp",
)


@pytest.fixture
def paddlenlp_run(tmp_path: Path) -> Workplace:
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(RUNS / name, tmp_path / "data")
    shutil.copytree(RUNS / "start", tmp_path / "model")
    return Workplace(tmp_path)


def _settings(form: str, ranks: int = 1) -> dict[str, object]:
    """Those of PaddleNLP's run; a sharded one had two ranks with two samples each."""
    samples = 4 if form.startswith("sharded") else 2
    return {
        "resume_from_checkpoint": RUNS / form / "checkpoint-5",
        "max_seq_length": 32,
        "per_device_train_batch_size": samples // ranks,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "seed": 7,
        "split": "949,50,1",
        "max_steps": 10,
        "do_eval": False,
        "save_steps": 10,
    }


def _assert_goes_on(run: Workplace, form: str) -> None:
    trace = json.loads((RUNS / f"{form}.trace.json").read_text())
    expected = {row["step"]: row["loss"] for row in trace["trace"] if row["step"] > 5}
    assert list(run.losses()) == [6, 7, 8, 9, 10]
    assert run.losses() == pytest.approx(expected, abs=1e-5)
    # PaddleNLP logs the rate of the next step.
    rates = {row["step"] + 1: row["lr"] for row in trace["trace"] if 5 <= row["step"] < 10}
    assert run.losses("learning_rate") == pytest.approx(rates, rel=1e-3)
    if not form.startswith("sharded"):  # those norms are of one rank
        norms = dict(enumerate(trace["norms"], start=1))
        assert run.losses("grad_norm") == pytest.approx(
            {step: norms[step] for step in range(6, 11)}, rel=1e-4
        )


@pytest.mark.parametrize("form", FORMS)
def test_goes_on_with_the_losses_of_the_uninterrupted_run(
    paddlenlp_run: Workplace, form: str
) -> None:
    done = paddlenlp_run.run(**_settings(form))
    assert done.returncode == 0, done.stderr
    assert "checkpoint-5 at step 5" in done.stderr
    _assert_goes_on(paddlenlp_run, form)
    state = load_trainer_state(paddlenlp_run.output_dir / "checkpoint-10")
    assert state.consumed_tokens == state.consumed_samples * 32


def test_begins_with_the_weights_of_paddlenlp(paddlenlp_run: Workplace) -> None:
    """The whole run, with continue_training."""
    settings = _settings("plain") | {"continue_training": True}
    del settings["resume_from_checkpoint"]
    done = paddlenlp_run.run(**settings)
    assert done.returncode == 0, done.stderr
    trace = json.loads((RUNS / "plain.trace.json").read_text())
    expected = {row["step"]: row["loss"] for row in trace["trace"]}
    assert paddlenlp_run.losses() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("form", "layout", "sample_ranks"),
    [
        ("plain", {"tensor_parallel_degree": 2}, 1),
        pytest.param("unified", {"pipeline_parallel_degree": 2}, 1, marks=pytest.mark.slow),
        pytest.param(
            "sharded_plain",
            {"sharding": "stage1", "sharding_parallel_degree": 2},
            2,
            marks=pytest.mark.slow,
        ),
        ("sharded_unified", {"sharding": "stage3", "sharding_parallel_degree": 2}, 2),
    ],
)
def test_goes_on_under_another_layout(
    paddlenlp_run: Workplace, form: str, layout: dict[str, object], sample_ranks: int
) -> None:
    arguments = paddlenlp_run.command(**_settings(form, sample_ranks) | layout)[3:]
    assert run_ranks(PRETRAIN_WORKER, 2, arguments) == [0, 0]
    _assert_goes_on(paddlenlp_run, form)


def test_goes_on_in_the_output_dir_of_paddlenlp(paddlenlp_run: Workplace) -> None:
    shutil.copytree(RUNS / "unified/checkpoint-5", paddlenlp_run.output_dir / "checkpoint-5")
    settings = _settings("unified")
    del settings["resume_from_checkpoint"]
    done = paddlenlp_run.run(**settings)
    assert done.returncode == 0, done.stderr
    _assert_goes_on(paddlenlp_run, "unified")


def test_without_optimizer_files_only_weights_are_taken(paddlenlp_run: Workplace) -> None:
    folder = paddlenlp_run.folder / "checkpoint-5"
    shutil.copytree(RUNS / "plain/checkpoint-5", folder)
    (folder / "optimizer.pdopt").unlink()
    settings = _settings("plain") | {"resume_from_checkpoint": folder}
    assert_user_error(
        paddlenlp_run.run(**settings), "PaddleNLP's optimizer state", "ignore_load_lr_and_optim"
    )
    done = paddlenlp_run.run(**settings, ignore_load_lr_and_optim=True)
    assert done.returncode == 0, done.stderr
    assert list(paddlenlp_run.losses()) == list(range(1, 11))


def _moment(folder: Path, key: str) -> np.ndarray:
    return paddlenlp.OptimizerState(folder, load_config(folder)).read(key)


KEYS = ("embed_tokens.weight", "layers.1.self_attn.qkv_proj.weight", "lm_head.weight")


def test_all_forms_hold_the_same_state() -> None:
    for one, other in (("plain", "unified"), ("sharded_plain", "sharded_unified")):
        for name in KEYS:
            for state in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"):
                key = f"{name}.{state}"
                first, second = (_moment(RUNS / run / "checkpoint-5", key) for run in (one, other))
                assert np.array_equal(first, second), key
    assert _moment(RUNS / "plain/checkpoint-5", f"{KEYS[0]}.beta1_pow_acc") == pytest.approx(0.9**6)


@pytest.mark.parametrize("form", ["sharded_split", "sharded_split_tp"])
def test_slices_hold_the_state_of_whole_parameters(form: str) -> None:
    """Up to rounding: the norm of the gradient is summed in another order."""
    one, other = (RUNS / run / "checkpoint-5" for run in ("sharded_plain", form))
    config = load_config(one)
    states = [paddlenlp.OptimizerState(folder, config) for folder in (one, other)]
    for name in parameter_shapes(config):
        for state in ("moment1", "moment2"):
            first, second = (each.read(f"{name}.{state}") for each in states)
            np.testing.assert_allclose(second, first, rtol=1e-3, atol=1e-5 * abs(first).max())


def _dump(path: Path, content: dict) -> None:
    path.write_bytes(pickle.dumps(content, protocol=4))


def test_parts_of_tensor_parallel_ranks_and_stages(tmp_path: Path) -> None:
    """Each stage counts its parameters anew, so the same name of Paddle is another parameter."""
    source = RUNS / "plain/checkpoint-5"
    weights = pickle.loads((source / "model_state.pdparams").read_bytes())
    optimizer = pickle.loads((source / "optimizer.pdopt").read_bytes())
    paddle_names = weights.pop("StructuredToParameterName@@")
    for tp in range(2):
        for pp in range(2):
            names = [n for n in weights if ("layers.1" in n or "lm_head" in n) == bool(pp)]
            own = {name: f"linear_{number}.w_0" for number, name in enumerate(names)}
            part = {name: _shard(name, weights[name], tp) for name in names}
            suffix = f"tp{tp:02d}_pp{pp:02d}"
            _dump(
                tmp_path / f"model_state.{suffix}.pdparams",
                part | {"StructuredToParameterName@@": own},
            )
            for shard in range(2):
                state = {}
                for name in names[shard::2]:
                    for moment in ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0"):
                        value = optimizer[f"{paddle_names[name]}_{moment}"]
                        state[f"{own[name]}_{moment}"] = _shard(name, value, tp)
                _dump(tmp_path / f"optimizer.{suffix}_shard{shard:02d}.pdopt", state)
    shutil.copy(source / "config.json", tmp_path)
    for name in KEYS:
        for state in ("moment1", "moment2", "beta1_pow_acc"):
            key = f"{name}.{state}"
            assert np.array_equal(_moment(tmp_path, key), _moment(source, key)), key


def _shard(name: str, value: np.ndarray, rank: int) -> np.ndarray:
    if value.ndim < 2:
        return value
    is_row = any(word in name for word in ("embed", "o_proj", "down_proj"))
    return np.split(value, 2, 0 if is_row else 1)[rank]


def test_slices_that_end_within_a_row(tmp_path: Path) -> None:
    """Of three sharding ranks, whose numbers are not in the order of their names."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / "plain/checkpoint-5", folder)
    content = pickle.loads((folder / "optimizer.pdopt").read_bytes())
    (folder / "optimizer.pdopt").unlink()
    name = "embedding_0.w_0_moment1_0"
    padded = np.append(content[name].reshape(-1), np.zeros(40, np.float32))
    files = [folder / f"optimizer.shard{rank}.pdopt" for rank in ("09", "99", "100")]
    for file, piece in zip(files, np.split(padded, [45, 5100]), strict=True):
        _dump(file, {name: piece})
    key = f"{KEYS[0]}.moment1"
    assert np.array_equal(_moment(folder, key), content[name])
    _dump(files[-1], {name: piece + 1})
    with pytest.raises(UserError, match=r"beyond 5120 are not zero; the file is of another model"):
        _moment(folder, key)
    files[-1].unlink()
    with pytest.raises(UserError, match=r"\[5100\], expected \[160, 32\].* rank is missing"):
        _moment(folder, key)


@pytest.mark.parametrize("form", ["plain", "unified"])
def test_master_weights(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """A float32 run has none: its weights take their place."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / form / "checkpoint-5", folder)
    key = f"{KEYS[1]}.master_weight"
    weights = TensorFiles(folder)
    names = [f"llama.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    values = {name: weights.read(name, "float32") for name in names}
    assert np.array_equal(_moment(folder, key), np.concatenate(list(values.values()), axis=1))
    masters = {name: value + 1 for name, value in values.items()}
    if form == "plain":
        content = pickle.loads((folder / "optimizer.pdopt").read_bytes())
        told = pickle.loads((folder / "model_state.pdparams").read_bytes())
        told = told["StructuredToParameterName@@"]
        # A tensor below the first level is a tuple of its name and its array.
        content["master_weights"] = {
            told[name]: (f"{told[name]}_fp32_master_0", value) for name, value in masters.items()
        }
        for name in names:  # state of a parameter with a master weight has its name
            for moment in ("moment1_0", "moment2_0"):
                value = content.pop(f"{told[name]}_{moment}")
                content[f"{told[name]}_fp32_master_0_{moment}"] = value
        _dump(folder / "optimizer.pdopt", content)
    else:
        file = "master_weights-00001-of-00001.safetensors"
        save_file(masters, folder / file, {"format": "np"})
        index = {"weight_map": dict.fromkeys(masters, file)}
        (folder / "master_weights.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(_moment(folder, key), np.concatenate(list(masters.values()), axis=1))
    moment = f"{KEYS[1]}.moment1"
    state = paddlenlp.OptimizerState(folder, load_config(folder))
    expected = _moment(RUNS / form / "checkpoint-5", moment)
    assert np.array_equal(state.read(moment), expected)
    state.log_unread()
    assert "this run is in float32" in caplog.text
    caplog.clear()
    state.read(key)
    state.log_unread()
    assert not caplog.text


def test_state_of_a_tied_embedding_has_the_name_of_the_head(tmp_path: Path) -> None:
    """The last of the two names of a parameter is what unified_checkpoint writes."""
    folder = RUNS.parent / "models/qwen2_tied_safetensors"
    shutil.copytree(folder, tmp_path / "checkpoint")
    moment = np.arange(160 * 32, dtype=np.float32).reshape(160, 32)
    name = "optimizer-00001-of-00001.safetensors"
    save_file({"lm_head.weight/moment1_0": moment}, tmp_path / "checkpoint" / name)
    index = {"weight_map": {"lm_head.weight/moment1_0": name}}
    (tmp_path / "checkpoint/optimizer.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(_moment(tmp_path / "checkpoint", "embed_tokens.weight.moment1"), moment)
    with pytest.raises(UserError, match=r"no moment1 of qwen2\.norm\.weight"):
        _moment(tmp_path / "checkpoint", "norm.weight.moment1")


def test_incomplete_state_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / "sharded_plain/checkpoint-5", folder)
    (folder / "optimizer.shard01.pdopt").unlink()
    with pytest.raises(UserError, match=r"holds no moment1 of llama\..*ignore_load_lr_and_optim"):
        _moment(folder, f"{KEYS[1]}.moment1")
    content = pickle.loads((folder / "optimizer.shard00.pdopt").read_bytes())
    content["embedding_0.w_0_moment1_0"] = content["embedding_0.w_0_moment1_0"].reshape(-1)[:100]
    _dump(folder / "optimizer.shard00.pdopt", content)
    with pytest.raises(UserError, match=r"shape \[100\], expected \[160, 32\].*split_param"):
        _moment(folder, f"{KEYS[0]}.moment1")
    content = pickle.loads((folder / "model_state.pdparams").read_bytes())
    del content["StructuredToParameterName@@"]
    _dump(folder / "model_state.pdparams", content)
    with pytest.raises(UserError, match="does not map them to names in the model"):
        _moment(folder, f"{KEYS[0]}.moment1")


def test_a_file_that_is_left_from_another_save(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / "sharded_plain/checkpoint-5", folder)
    expected = _moment(folder, f"{KEYS[0]}.moment1")
    shutil.copy(folder / "optimizer.shard00.pdopt", folder / "optimizer.shard02.pdopt")
    assert np.array_equal(_moment(folder, f"{KEYS[0]}.moment1"), expected)
    shutil.copy(RUNS / "plain/checkpoint-5/optimizer.pdopt", folder / "optimizer.shard02.pdopt")
    with pytest.raises(UserError, match=r"shard00.pdopt and .*shard02.pdopt hold different moment"):
        _moment(folder, f"{KEYS[0]}.moment1")


def test_master_weights_without_their_index(tmp_path: Path) -> None:
    """The 16-bit weights would take their place."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / "unified/checkpoint-5", folder)
    (folder / "master_weights-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"but master_weights.safetensors.index.json, .* missing"):
        _moment(folder, f"{KEYS[0]}.moment1")


def test_powers_that_are_no_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / "unified/checkpoint-5", folder)
    file = folder / "optimizer-00001-of-00001.safetensors"
    tensors = load_file(file)
    powers = {name: np.ones(3, np.float32) for name in tensors if "pow_acc" in name}
    save_file(tensors | powers, file)
    with pytest.raises(UserError, match=r"beta1_pow_acc of .* has shape \[3\], expected \[1\]"):
        _moment(folder, f"{KEYS[0]}.beta1_pow_acc")


@pytest.mark.parametrize("state", ["moment1", "moment2", "beta1_pow_acc"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_state_that_is_not_finite(tmp_path: Path, state: str, value: float) -> None:
    """One value of it makes weights NaN in the first step."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / "unified/checkpoint-5", folder)
    file = folder / "optimizer-00001-of-00001.safetensors"
    tensors = load_file(file)
    (name,) = (each for each in tensors if each.endswith(f"embed_tokens.weight/{state}_0"))
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(UserError, match=rf"{KEYS[0]}\.{state} holds values that are NaN or inf"):
        _moment(folder, f"{KEYS[0]}.{state}")


@pytest.mark.parametrize("number", [10**30, True, -1])
def test_counts_that_no_run_has(tmp_path: Path, number: int) -> None:
    content = json.loads((RUNS / "plain/checkpoint-5/trainer_state.json").read_text())
    (tmp_path / "trainer_state.json").write_text(json.dumps({**content, "global_step": number}))
    with pytest.raises(UserError, match="global_step must be a number"):
        load_trainer_state(tmp_path)


def test_a_trainer_state_without_samples_is_told(tmp_path: Path) -> None:
    content = json.loads((RUNS / "plain/checkpoint-5/trainer_state.json").read_text())
    del content["consumed_samples"]
    (tmp_path / "trainer_state.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="consumed_samples must be a number"):
        load_trainer_state(tmp_path)


def test_state_of_a_tied_head_under_its_second_name(tmp_path: Path) -> None:
    """Paddle keeps one state for a matrix that the model holds under two names."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(RUNS / "unified/checkpoint-5", folder)
    config = load_config(folder).replace(tie_word_embeddings=True)
    key = "embed_tokens.weight.moment1"
    expected = paddlenlp.OptimizerState(folder, config).read(key)
    assert expected.any()
    file = folder / "optimizer-00001-of-00001.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith("lm_head.weight/")]:
        del tensors[name]
    for name in [name for name in tensors if "embed_tokens.weight/" in name]:
        tensors[f"lm_head.weight/{name.partition('/')[2]}"] = tensors.pop(name)
    save_file(tensors, file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (folder / "optimizer.safetensors.index.json").write_text(json.dumps(index))
    found = paddlenlp.OptimizerState(folder, config).read(key)
    np.testing.assert_array_equal(found, expected)
