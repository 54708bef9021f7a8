"""Every family learns: 50 steps of pre-training from random weights, on text like the quickstart's.

And the family with the most to resume, ChatGLM-6B with its blanks, does so exactly.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest
from tiny_configs import KEYS, tiny
from training_testing import SavesAtOnce, Workplace, healer, write_corpus

from pypkg.config import load_settings
from pypkg.data import (
    Batch,
    BatchLoader,
    BlankInfilling,
    Dataset,
    Objective,
    build_train_valid_test_datasets,
    causal,
)
from pypkg.data.preprocess.options import PreparationOptions
from pypkg.data.preprocess.prepare import prepare
from pypkg.errors import UserError
from pypkg.generation.text import encode_prompt
from pypkg.models import from_config
from pypkg.models.layers.masks import derived_positions, derived_prefix_lengths
from pypkg.parallel import mesh
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.training.feed.samples import objective_of
from pypkg.training.reporting.metrics import Throughput
from pypkg.training.reporting.summary import write_sample
from pypkg.training.state import TrainerState
from pypkg.training.step.engine import Engine
from pypkg.training.trainer import Trainer

STEPS, BATCH, SEQ_LENGTH = 50, 4, 64
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "max_seq_length": SEQ_LENGTH,
    "learning_rate": 0.01,
    "min_learning_rate": 0.001,
    "warmup_steps": 5,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
    "do_train": True,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Part of the Python standard library, made as the quickstart makes it."""
    folder = tmp_path_factory.mktemp("quickstart")
    prepare(
        PreparationOptions(
            input_path=Path(sysconfig.get_path("stdlib")) / "email",
            output_prefix=str(folder / "corpus"),
            tokenizer_name_or_path=folder / "tokenizer",
            file_suffix=(".py",),
            append_eos=True,
            shuffle_seed=1,
            train_tokenizer=1024,
            tokenizer_train_bytes=10**6,
        )
    )
    prefix = [str(folder / "corpus")]
    return build_train_valid_test_datasets(prefix, "1", SEQ_LENGTH, (STEPS * BATCH, 0, 0), 42)[0]


class Batches:
    """Training batches of a dataset, and nothing to evaluate."""

    def __init__(self, dataset: Dataset, objective: Objective) -> None:
        self.sources = {"train": ["corpus"]}
        self._dataset, self._objective = dataset, objective

    def train_batches(self, start: int) -> Iterator[Batch]:
        return iter(BatchLoader(self._dataset, BATCH, start, objective=self._objective))


class NoCheckpoints(SavesAtOnce):
    def save(self, state: TrainerState) -> None:
        raise AssertionError("save_strategy is no")


class Losses:
    """A reporter that keeps what a log line would say."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def report(self, step: int, metrics: dict[str, float]) -> None:
        assert np.isfinite(metrics["grad_norm"])
        self.by_step[step] = metrics["loss"]

    def close(self) -> None:
        pass


def by_tier(family: str):
    """Each objective, kind of position and residual stream is quick."""
    is_quick = family in ("llama", "gpt3", "bloom", "chatglm", "glm130b")
    return pytest.param(family, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("family", map(by_tier, KEYS))
def test_loss_falls(family: str, dataset: Dataset, tmp_path: Path):
    given = {"model_name_or_path": family, "input_dir": "unused", "output_dir": tmp_path}
    words = [w for k, v in (given | SETTINGS).items() for w in (f"--{k}", str(v))]
    settings = load_settings(words)
    config = tiny(family)
    model = from_config(config, seed=1)
    objective = objective_of(config, SEQ_LENGTH, settings.seed)
    losses = Losses()
    options = UpdateOptions(beta1=0.9, beta2=0.95, weight_decay=0.1, max_grad_norm=1.0)
    state = TrainerState()
    trainer = Trainer(
        settings,
        Engine(*distribute(model, options, mesh.current())),
        state,
        data=Batches(dataset, objective),
        checkpointer=NoCheckpoints(),
        healer=healer(settings, state),
        reporters=[losses],
        throughput=Throughput(config.flops_per_token(SEQ_LENGTH), None),
    )
    trainer.train()
    values = [losses.by_step[step] for step in range(1, STEPS + 1)]
    # Uniform guesses among the vocabulary at the start; falls by 2.1 to 3.1.
    assert values[0] == pytest.approx(np.log(config.vocab_size), abs=0.7)
    assert np.mean(values[-10:]) < values[0] - 1.8


@pytest.mark.parametrize("family", KEYS)
def test_objective_follows_from_the_configuration(family: str):
    objective = objective_of(tiny(family), SEQ_LENGTH, 5)
    if family not in ("chatglm", "glm130b"):
        assert objective is causal
        return
    assert objective == BlankInfilling(
        seq_length=SEQ_LENGTH,
        mask_id=4096,
        gmask_id=4097,
        sop_id=4100,
        eop_id=4101,
        two_dimensional=family == "chatglm",
        seed=5,
    )


@pytest.mark.parametrize("family", ["chatglm", "glm130b"])
def test_positions_are_those_that_the_model_derives(family: str, dataset: Dataset):
    """As far as it can: from the special tokens of a row it tells the context and one blank."""
    config = tiny(family)
    samples = np.arange(40)
    batch = objective_of(config, SEQ_LENGTH, 5)(samples, dataset.read(samples))
    input_ids = paddle.to_tensor(batch["input_ids"])
    assert (derived_prefix_lengths(config, input_ids).numpy() == batch["prefix_lengths"]).all()
    one_blank = (batch["input_ids"] == config.gmask_token_id).any(axis=1)
    assert 15 < one_blank.sum() < 40
    derived = derived_positions(config, input_ids).numpy()
    assert (derived[one_blank] == batch["position_ids"][one_blank]).all()


def test_end_of_a_blank_is_needed():
    config = tiny("glm130b")
    assert objective_of(config.replace(eos_token_id=[7, 8]), SEQ_LENGTH, 0).eop_id == 7
    with pytest.raises(UserError, match=r"config.json of the model folder/glm lacks eos_token_id"):
        objective_of(config.replace(eos_token_id=None), SEQ_LENGTH, 0, "folder/glm")


class Bytes:
    """A tokenizer whose ids are bytes."""

    bos_id, eos_id = 1, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("family", "prompt", "begin"),
    [("chatglm", "ab", "97 98 4097 4100"), ("glm130b", "", "4097 4100"), ("llama", "", "1")],
)
def test_sample_is_asked_for_as_in_training(family: str, prompt: str, begin: str):
    model = from_config(tiny(family), seed=1)
    assert Bytes().decode(encode_prompt(Bytes(), model.config, prompt)) == begin
    written = write_sample(model, Bytes(), prompt, tokens=3, seed=0)
    assert written.startswith(prompt + " ")
    assert len(written.removeprefix(prompt).split()) == 3


def test_blank_infilling_resumes_to_the_same_floats(tmp_path: Path):
    """From a checkpoint of an uninterrupted run; a sample's blanks depend on its number alone."""
    whole, resumed = Workplace(tmp_path / "whole"), Workplace(tmp_path / "resumed")
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 4000, 40) for _ in range(60)]
    for workplace in (whole, resumed):
        (workplace.folder / "model").mkdir(parents=True)
        (workplace.folder / "model" / "config.json").write_text(json.dumps(KEYS["chatglm"]))
        write_corpus(workplace.folder / "data" / "corpus", documents)
    done = whole.run(dataloader_num_workers=1)
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole.output_dir / "checkpoint-4", resumed.output_dir / "checkpoint-4")
    done = resumed.run(dataloader_num_workers=1)
    assert done.returncode == 0, done.stderr
    assert "at step 4" in done.stderr
    assert resumed.losses() == {s: loss for s, loss in whole.losses().items() if s > 4}
    assert resumed.losses("eval_loss")[12] == whole.losses("eval_loss")[12]
