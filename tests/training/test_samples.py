"""The samples of a run: blends, losses and counts, resuming with changes, packed documents."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import paddle
import pytest
from tiny_configs import KEYS, tiny
from training_testing import Workplace, counting_documents, write_corpus, write_model

from pypkg.config import load_settings
from pypkg.data import IndexCache, Packing
from pypkg.data.tokenizers.train_bpe import train_tokenizer
from pypkg.errors import UserError
from pypkg.training.feed import samples
from pypkg.training.feed.samples import packing_of, short_names
from pypkg.training.reporting.source_losses import SourceLosses
from pypkg.training.state import TrainerState

BLEND = {"logging_steps": 3, "save_steps": 4, "eval_steps": 6, "max_steps": 12}


@pytest.fixture
def make_blend(tmp_path):
    """Workplaces with two corpora, one that counts upwards and one that cannot be learnt."""

    def make(name: str) -> tuple[Workplace, dict]:
        folder = tmp_path / name
        rng = np.random.default_rng(1)
        write_corpus(folder / "data" / "even", counting_documents())
        write_corpus(folder / "data" / "noise", [rng.integers(0, 64, 50) for _ in range(40)])
        write_model(folder / "model")
        return Workplace(folder), BLEND | {
            "input_dir": f"3 {folder}/data/even 1 {folder}/data/noise"
        }

    return make


def rows(workplace: Workplace) -> list[dict]:
    return list(map(json.loads, (workplace.output_dir / "metrics.jsonl").read_text().splitlines()))


def read_json(workplace: Workplace, name: str) -> dict:
    return json.loads((workplace.output_dir / name).read_text())


def test_a_blend_reports_each_corpus_and_resumes_to_the_same_floats(make_blend):
    (whole, settings), (resumed, _) = make_blend("whole"), make_blend("resumed")
    done = whole.run(**settings)
    assert done.returncode == 0, done.stderr
    training = [row for row in rows(whole) if "loss" in row]
    assert [row["global_step"] for row in training] == [3, 6, 9, 12]
    for row in training:
        # 12 samples of 16 labels: 9 of one corpus and 3 of the other, or one more or less.
        counts = np.array([[9, 3], [8, 4], [10, 2]])
        means = counts @ [row["loss/even"], row["loss/noise"]] / 12
        assert np.abs(means - row["loss"]).min() < 1e-5
        assert 0 <= row["data_wait_seconds_per_step"] < 1
    evaluations = [row for row in rows(whole) if "eval_loss" in row]
    assert {"eval_loss/even", "eval_loss/noise"} <= set(evaluations[-1])
    # Of 48 samples, 36 and 12: exactly what the weights say.
    data = read_json(whole, "summary.json")["data"]
    assert [(row["corpus"], row["samples"], row["tokens"]) for row in data] == [
        ("even", 36, 36 * 16), ("noise", 12, 12 * 16),
    ]  # fmt: skip
    # Training has 32 of its 40 documents of 50 tokens.
    assert data[1]["epochs"] == pytest.approx(12 * 16 / (32 * 50))
    state = read_json(whole, "checkpoint-12/trainer_state.json")
    assert [corpus["position"] for corpus in state["data_order"]["corpora"]] == [36, 12]

    # checkpoint-4 lies between two log lines.
    shutil.copytree(whole.output_dir / "checkpoint-4", resumed.output_dir / "checkpoint-4")
    done = resumed.run(**settings)
    assert done.returncode == 0, done.stderr
    assert "another one since" not in done.stderr and "in another order" not in done.stderr
    for name in ("loss", "loss/even", "loss/noise"):
        assert resumed.losses(name) == {s: v for s, v in whole.losses(name).items() if s > 4}, name


def test_longer_with_larger_batches(make_blend):
    workplace, settings = make_blend("run")
    assert workplace.run(**settings).returncode == 0
    done = workplace.run(
        **settings | {"max_steps": 30, "per_device_train_batch_size": 3, "save_steps": 30}
    )
    assert done.returncode == 0, done.stderr
    state = read_json(workplace, "checkpoint-30/trainer_state.json")
    assert state["consumed_samples"] == 12 * 4 + 18 * 6
    assert state["data_order"]["start"] == 0
    positions = [corpus["position"] for corpus in state["data_order"]["corpora"]]
    assert positions == [117, 39]  # three to one, of 156
    data = read_json(workplace, "summary.json")["data"]
    assert [row["samples"] for row in data] == positions


def test_packed_documents_from_the_command_line(workplace):
    done = workplace.run(
        reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True, max_steps=30
    )
    assert done.returncode == 0, done.stderr
    packed = workplace.losses()
    assert packed[30] < packed[1]
    shutil.rmtree(workplace.output_dir)
    assert workplace.run(max_steps=30).returncode == 0
    assert abs(workplace.losses()[1] - packed[1]) > 1e-4


def settings_with(**changes: object):
    given = {"model_name_or_path": "llama-58m", "input_dir": "d", "output_dir": "o"}
    given |= {"max_steps": 1, "max_seq_length": 64} | changes
    return load_settings([w for k, v in given.items() for w in (f"--{k}", str(v))])


def test_the_index_cache_knows_the_rank(tmp_path, monkeypatch):
    """The index cache lets rank 0 build, so it needs the ranks that the launcher gave."""
    given = {}

    def index_cache(data_cache, share_folder, **ranks):
        given.update(ranks)
        return IndexCache(data_cache, share_folder, **ranks)

    monkeypatch.setattr(samples, "IndexCache", index_cache)
    monkeypatch.setenv("PADDLE_TRAINER_ID", "5")
    monkeypatch.setenv("PADDLE_RANK_IN_NODE", "1")
    write_corpus(tmp_path / "corpus", counting_documents())
    settings = settings_with(input_dir=tmp_path, split="1,0,0", max_seq_length=8, do_train=True)
    samples.Samples(settings, tiny("llama"), TrainerState())
    assert given == {"rank": 5, "local_rank": 1}


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (2, "an evaluation takes 6 samples of the validation split, which has 12\n"),
        (4, "an evaluation takes 12 samples of the validation split, which has 12\n"),
        (5, "takes 15 samples of the validation split, which has 12: some of them count more"),
        (-1, "an evaluation takes 12 samples of the validation split, which has 12\n"),
    ],
)
def test_how_much_an_evaluation_covers(tmp_path, caplog, batches, said):
    caplog.set_level(logging.INFO, "pypkg")
    write_corpus(tmp_path / "corpus", [np.arange(25)] * 8)  # 100 of 200 tokens for validation
    settings = settings_with(
        input_dir=tmp_path, split="1,1,0", max_seq_length=8, do_eval=True, eval_iters=batches,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    samples.Samples(settings, tiny("llama"), TrainerState())
    assert said in caplog.text


def test_repeated_evaluations_take_the_same_first_samples(tmp_path):
    """PaddleNLP's second evaluation goes on where its first one ended."""
    write_corpus(tmp_path / "corpus", counting_documents())

    def evaluated(batches: int, times: int) -> list[np.ndarray]:
        settings = settings_with(
            input_dir=tmp_path, split="1,1,0", max_seq_length=8, do_eval=True, eval_iters=batches,
            per_device_eval_batch_size=3,
        )  # fmt: skip
        data = samples.Samples(settings, tiny("llama"), TrainerState())
        return [
            np.concatenate([batch["input_ids"] for batch in data.eval_batches()])
            for _ in range(times)
        ]

    first, second, third = evaluated(2, times=3)
    assert first.shape == (6, 8)
    assert np.array_equal(first, second) and np.array_equal(first, third)
    (whole,) = evaluated(4, times=1)
    assert np.array_equal(whole[:6], first) and not np.array_equal(whole[6:], first)


def test_packing_of_every_family():
    apart = settings_with(reset_attention_mask=True, reset_position_ids=True)
    positions_alone = settings_with(reset_position_ids=True)
    for family in KEYS:
        config = tiny(family)
        assert packing_of(settings_with(), config) is None
        if config.prefix_lm:
            with pytest.raises(UserError, match=r"reset_attention_mask.* sees in both directions"):
                packing_of(apart, config)
        elif config.position_embedding == "alibi":
            assert packing_of(apart, config) == Packing(reset_attention_mask=True)
            with pytest.raises(UserError, match="position_embedding is alibi"):
                packing_of(positions_alone, config)
        else:
            expected = Packing(reset_attention_mask=True, reset_position_ids=True)
            assert packing_of(apart, config) == expected
    qwen = tiny("qwen").replace(logn_attention_length=32)
    with pytest.raises(UserError, match="beyond 32 tokens"):
        packing_of(apart, qwen)
    as_long = qwen.replace(logn_attention_length=apart.max_seq_length)
    assert packing_of(apart, as_long) == expected
    assert packing_of(settings_with(eod_mask_loss=True), qwen) == Packing(eod_mask_loss=True)


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["data/a", "data/b"], ["a", "b"]),
        (["x/corpus", "y/corpus", "y/other"], ["x/corpus", "y/corpus", "y/other"]),
        (["x/a", "x/a"], ["a#1", "a#2"]),
        (["a"], ["a"]),
    ],
)
def test_short_names(prefixes, names):
    assert short_names(prefixes) == names


def test_source_losses_count_labels():
    losses = SourceLosses(["a", "b", "never"])
    labels = np.array([[1, 2, -100], [3, -100, -100], [1, 1, 1]])
    batch = losses.watch({"input_ids": labels, "labels": labels, "sources": np.array([0, 1, 0])})
    assert set(batch) == {"input_ids", "labels", "token_losses"}
    token_losses = np.array([[1.0, 2.0, 0.0], [5.0, 0.0, 0.0], [3.0, 4.0, 10.0]], np.float32)
    batch["token_losses"].append(paddle.to_tensor(token_losses))
    losses.collect()
    losses.collect()  # counts nothing twice
    kept = SourceLosses(["a", "b", "never"], losses.sums())
    for each in (losses, kept):
        assert each.take() == {"a": 4.0, "b": 5.0}
        assert each.take() == {}
    alone = SourceLosses(["only"])
    assert alone.watch({"labels": labels, "sources": np.zeros(3)}) == {"labels": labels}
    assert alone.take() == {}


def test_documents_of_samples_by_corpus(tmp_path):
    """Each document is a sample and one token more."""
    for name in ("a", "b"):
        write_corpus(tmp_path / name, [np.arange(9)] * 8)
    given = f"0.5 {tmp_path / 'a'} 0.5 {tmp_path / 'b'}"
    settings = settings_with(input_dir=given, split="1,0,0", max_seq_length=8, do_train=True)
    found = samples.Samples(settings, tiny("llama"), TrainerState()).documents(0, 4)
    assert found.keys() == {"a", "b"}
    for documents in found.values():
        assert documents == sorted(set(documents))
        assert 2 <= len(documents) <= 4 and documents[0] >= 0 and documents[-1] < 8


def test_data_of_another_tokenizer_are_told(workplace):
    """By the summary that preprocessing has left beside them."""
    tokenizer = workplace.folder / "tokenizer"
    train_tokenizer(iter(["abcabc"]), 280, tokenizer, "x")
    summary = workplace.folder / "data" / "corpus.meta.json"
    summary.write_text('{"tokenizer": "other", "vocab_size": 64}')
    done = workplace.run(tokenizer_name_or_path=tokenizer, max_steps=4)
    assert done.returncode == 0, done.stderr
    assert "corpus was made with the tokenizer other of 64 entries, but that of the run, " in (
        done.stderr
    )
