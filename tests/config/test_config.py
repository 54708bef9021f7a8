"""Reading settings: the file, the command line, and every way to get them wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
from config_testing import MINIMAL, check_one_problem, load, problems
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st

from pypkg.config import check_supported, load_settings, notices
from pypkg.config.docs_page import configuration_page
from pypkg.config.known_keys import NO_EFFECT, REFUSED
from pypkg.config.settings import setting_fields
from pypkg.errors import UserError

REPO = Path(__file__).resolve().parents[2]
NO_PATH = "null bytes and lone surrogates, which no path can have"


def test_defaults_and_values_derived_from_others(tmp_path):
    settings = load(tmp_path, {"logging_steps": 7, "do_eval": True})
    assert settings.learning_rate == 5e-5
    assert settings.tokenizer_name_or_path == "llama-58m"
    assert settings.decay_steps == 100.0
    assert settings.eval_steps == 7
    assert settings.eval_iters == 10
    assert settings.evaluates
    assert settings.saves
    assert settings.report_to == ()
    assert settings.bf16 is None
    assert settings.use_flash_attention is None
    assert load(tmp_path, {"max_evaluate_steps": 3}).eval_iters == 3
    assert not load(tmp_path).evaluates
    assert load(tmp_path, {"evaluation_strategy": "steps"}).evaluates
    assert not load(tmp_path, {"save_strategy": "no"}).saves


def test_command_line_wins_over_the_file(tmp_path):
    extra = {"learning_rate": 1e-3, "report_to": ["visualdl"], "do_train": True}
    settings = load(
        tmp_path, extra, "--learning_rate", "2e-3", "--report_to", "visualdl", "tensorboard",
        "--no_do_train", "--do_eval", "--seed=7", "--max_steps", "9",
    )  # fmt: skip
    assert settings.learning_rate == 2e-3
    assert settings.report_to == ("visualdl", "tensorboard")
    assert not settings.do_train
    assert settings.do_eval
    assert settings.seed == 7
    assert settings.max_steps == 9


def test_command_line_without_a_file():
    arguments = [part for key, value in MINIMAL.items() for part in (f"--{key}", str(value))]
    assert load_settings(arguments).max_steps == 100


def test_a_null_or_None_stands_for_the_default(tmp_path):
    settings = load(tmp_path, {"seed": None, "save_total_limit": None, "warmup_steps": 5},
                    "--warmup_steps", "None")  # fmt: skip
    assert (settings.seed, settings.save_total_limit, settings.warmup_steps) == (42, None, 0)


@pytest.mark.parametrize("text", [True, 1, "true", "True", "t", "yes", "Y", "1"])
def test_true_in_its_many_forms(tmp_path, text):
    assert load(tmp_path, {"do_train": text}).do_train is True


@pytest.mark.parametrize("text", [False, 0, "false", "F", "no", "n", "0"])
def test_false_in_its_many_forms(tmp_path, text):
    assert load(tmp_path, {"bf16": text}).bf16 is False


def test_numbers_as_text_and_whole_floats(tmp_path):
    settings = load(
        tmp_path, {"learning_rate": "3e-05", "max_steps": 1e4, "weight_decay": 0, "seed": "7"}
    )
    assert settings.learning_rate == 3e-5
    assert settings.max_steps == 10000
    assert isinstance(settings.max_steps, int)
    assert isinstance(settings.weight_decay, float)
    assert settings.seed == 7


def test_a_number_for_a_text(tmp_path):
    """As on the command line, where PaddleNLP puts all values of a file."""
    assert load(tmp_path, {"split": 100}).split == "100"
    assert load(tmp_path, {"output_dir": 3}).output_dir == "3"


def test_keys_may_be_cut_short_on_the_command_line_only(tmp_path):
    assert load(tmp_path, None, "--learning", "1e-3").learning_rate == 1e-3
    assert "unknown setting 'learning' in" in problems(tmp_path, {"learning": 1e-3})
    ambiguous = problems(tmp_path, None, "--warmup", "3")
    assert "unknown setting 'warmup' on the command line" in ambiguous
    assert "warmup_steps" in ambiguous


def test_unknown_keys_name_their_neighbours(tmp_path):
    text = problems(tmp_path, {"learning_rat": 1.0}, "--max-steps", "3", "--zzz", "1")
    assert text.startswith("3 problems in the settings:\n  - ")
    assert "unknown setting 'learning_rat' in " in text
    assert "did you mean learning_rate" in text
    assert "unknown setting 'max-steps' on the command line; did you mean max_steps" in text
    assert "unknown setting 'zzz' on the command line; 'pypkg pretrain --help'" in text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_steps", "many", 'max_steps is "many" in {file}; expected a whole number'),
        ("max_steps", 1.5, "max_steps is 1.5 in {file}; expected a whole number"),
        ("seed", 2**63, f"seed is {2**63} in {{file}}; expected a whole number of at most 64 bits"),
        ("max_steps", True, "max_steps is true in {file}; expected a whole number"),
        ("learning_rate", [1], "learning_rate is [1] in {file}; expected a number"),
        ("learning_rate", "nan", 'learning_rate is "nan" in {file}; expected a number'),
        ("do_train", 2, "do_train is 2 in {file}; expected true or false"),
        ("do_train", 1.0, "do_train is 1.0 in {file}; expected true or false"),
        ("output_dir", [3], "output_dir is [3] in {file}; expected text"),
        ("output_dir", "\0", 'output_dir is "\\u0000" in {file}; expected text without ' + NO_PATH),
        ("run_name", "\ud800", 'run_name is "\\ud800" in {file}; expected text without ' + NO_PATH),
        ("input_dir", {"a": 1}, 'input_dir is {{"a": 1}} in {file}; expected text'),
        ("report_to", [[1]], "report_to is [[1]] in {file}; expected a list, each item text"),
        ("no_recompute_layers", ["a"],
         'no_recompute_layers is ["a"] in {file}; expected a list, each item a whole number'),
        ("tensor_parallel_degree", "two",
         'tensor_parallel_degree is "two" in {file}; expected a whole number'),
    ],
)  # fmt: skip
def test_wrong_types(tmp_path, key, value, expected):
    assert problems(tmp_path, {key: value}) == expected.format(file=tmp_path / "run.json")


def test_wrong_type_on_the_command_line(tmp_path):
    text = problems(tmp_path, None, "--max_steps", "x", "--input_dir", "1.0", "a", "--seed")
    assert 'max_steps is "x" on the command line; expected a whole number' in text
    assert 'input_dir is ["1.0", "a"] on the command line; expected text' in text
    assert "--seed has no value" in text
    assert "'stray' on the command line belongs to no --key" in problems(tmp_path, None, "stray")


def test_an_unknown_flag_at_the_end_is_unknown(tmp_path):
    assert problems(tmp_path, None, "--dry_run").startswith("unknown setting 'dry_run' on the comm")
    assert problems(tmp_path, None, "--dry_run", "--do_train").startswith("unknown setting")


def _error(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(arguments)
    return str(caught.value)


def test_missing_settings_are_all_named():
    text = _error([])
    for name in ("model_name_or_path", "input_dir", "output_dir", "max_steps"):
        assert f"{name} is " in text


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"min_learning_rate": 1e-2, "learning_rate": 1e-3},
         ["min_learning_rate (0.01)", "learning_rate (0.001)"]),
        ({"warmup_steps": 101}, ["warmup_steps (101)", "max_steps (100)"]),
        ({"warmup_ratio": 0.5, "decay_steps": 20}, ["warm-up of 50", "decay_steps (20)"]),
        ({"warmup_steps": 30, "decay_steps": 20}, ["warm-up of 30", "decay_steps (20)"]),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, ["'constant'", "3 steps"]),
        ({"do_eval": True, "evaluation_strategy": "no"}, ["do_eval", "evaluation_strategy"]),
        ({"eval_on_start": True}, ["eval_on_start", "evaluation_strategy is 'no'", "do_eval"]),
        ({"eval_iters": 9, "max_evaluate_steps": 4}, ["eval_iters (9)", "steps (4)"]),
        ({"eval_iters": -1, "max_evaluate_steps": 4}, ["eval_iters (-1)", "steps (4)"]),
        ({"eval_iters": 0}, ["eval_iters is 0; expected at least 1, or -1 for the whole split"]),
        ({"eval_iters": -2}, ["eval_iters is -2; expected at least -1"]),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "c"}, ["overwrite", "'c'"]),
        ({"load_best_model_at_end": True}, ["load_best_model_at_end is true", "nothing to choose"]),
        ({"load_best_model_at_end": True, "do_eval": True, "eval_steps": 4, "save_steps": 6},
         ["not every checkpoint has an evaluation", "6 and 4 steps apart"]),
        ({"skip_data_intervals": [[3, 2]]}, ["skip_data_intervals holds [3, 2]", "ascending"]),
        ({"skip_data_intervals": [[0, 2]]}, ["skip_data_intervals holds [0, 2]"]),
        ({"skip_data_intervals": [[1, 2], [5]]}, ["skip_data_intervals holds [5]"]),
        ({"skip_data_intervals": [[9, 100]]}, ["max_steps (100)", "max_steps to 8"]),
        ({"max_steps": 0}, ["max_steps is 0; expected at least 1"]),
        ({"max_steps": -1}, ["max_steps is -1; expected at least 1"]),
        ({"per_device_train_batch_size": 0}, ["is 0; expected at least 1"]),
        ({"gradient_accumulation_steps": -2}, ["is -2; expected at least 1"]),
        ({"save_steps": 0}, ["save_steps is 0; expected at least 1"]),
        ({"seed": 2**32}, ["seed is 4294967296; expected at most 4294967295"]),
        ({"eval_steps": 0}, ["eval_steps is 0; expected at least 1"]),
        ({"logging_steps": 0}, ["logging_steps is 0; expected at least 1"]),
        ({"save_total_limit": 0}, ["save_total_limit is 0; expected at least 1"]),
        ({"learning_rate": 0}, ["learning_rate is 0.0; expected more than 0"]),
        ({"adam_beta2": 1}, ["adam_beta2 is 1.0; expected less than 1"]),
        ({"warmup_ratio": 1.5}, ["warmup_ratio is 1.5; expected at most 1"]),
        ({"weight_decay": -0.1}, ["weight_decay is -0.1; expected at least 0"]),
        ({"max_seq_length": 0}, ["max_seq_length is 0"]),
        ({"split": "949,50,1,0"}, ["split is '949,50,1,0'", "up to three shares"]),
        ({"split": ""}, ["split is ''"]),
        ({"split": "a,b,c"}, ["split is 'a,b,c'"]),
        ({"split": "1,-1,0"}, ["split is '1,-1,0'"]),
        ({"split": "0/0/0"}, ["split is '0/0/0'"]),
        ({"split": "nan,1,1"}, ["split is 'nan,1,1'"]),
        ({"lr_scheduler_type": "greedy"}, ["'greedy'", "linear, cosine"]),
        ({"lr_scheduler_type": "polynomial", "lr_end": 1e-3, "learning_rate": 1e-3},
         ["lr_end (0.001)", "learning_rate (0.001)"]),
        ({"lr_scheduler_type": "polynomial", "power": 0}, ["power is 0.0; expected more than 0"]),
        ({"lr_scheduler_type": "polynomial", "warmup_steps": 30, "decay_steps": 20},
         ["warm-up of 30", "decay_steps (20)"]),
        ({"lr_scheduler_type": "cosine_with_restarts"}, ["num_cycles is 0.5", "whole cycles"]),
        ({"lr_scheduler_type": "inverse_sqrt", "min_learning_rate": 1e-2, "learning_rate": 1e-3},
         ["min_learning_rate (0.01)", "learning_rate (0.001)"]),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ["lr_wsd_decay_steps is not set"]),
        ({"lr_scheduler_type": "warmup_stable_decay", "lr_wsd_decay_steps": 60, "warmup_steps": 50},
         ["warm-up of 50 steps", "lr_wsd_decay_steps (60)", "decay_steps (100)"]),
        ({"rampup_batch_size": [8, 8]}, ["rampup_batch_size is [8, 8]", "three numbers"]),
        ({"rampup_batch_size": [8, 0, 9]}, ["rampup_batch_size is 0; expected at least 1"]),
        ({"rampup_batch_size": [8, 8, 64], "pipeline_parallel_degree": 4, "virtual_pp_degree": 2,
          "do_train": True},
         ["rampup_batch_size is [8, 8, 64]", "virtual_pp_degree 2"]),
        ({"mup_base_width": 64, "optim": "muon"}, ["mup_base_width is 64", "optim is 'muon'"]),
        ({"optim": "adamw_mini"}, ["optim is 'adamw_mini'; expected one of adamw, "]),
        ({"stochastic_rounding": True, "fp16": True}, ["stochastic_rounding", "fp16 is true"]),
        ({"stochastic_rounding": True, "bf16": False}, ["stochastic_rounding", "bf16 is false"]),
        ({"report_to": ["mlflow"]}, ["report_to is 'mlflow'", "none, visualdl, tensorboard"]),
        ({"device": "tpu"}, ["device is 'tpu'; expected one of cpu, gpu"]),
    ],
)  # fmt: skip
def test_impossible_values_are_named(tmp_path, extra, words):
    check_one_problem(tmp_path, extra, words)


@pytest.mark.parametrize("extra", [{}, {"decay_steps": 100}, {"lr_scheduler_type": "cosine"}])
def test_a_warm_up_of_all_steps_is_allowed(tmp_path, extra):
    assert load(tmp_path, {"max_steps": 100, "warmup_steps": 100, **extra}).warmup == 100


def test_evaluations_between_checkpoints_are_allowed(tmp_path):
    extra = {"load_best_model_at_end": True, "do_eval": True, "eval_steps": 3, "save_steps": 6}
    assert load(tmp_path, extra).save_interval == 6


@pytest.mark.parametrize("split", ["949,50,1", "8/1/1", "0.9,0.1,0", "1,0,0", "100", "949,50"])
def test_possible_splits(tmp_path, split):
    assert load(tmp_path, {"split": split}).split == split


def test_a_floor_above_the_peak_does_not_matter_to_a_constant_schedule(tmp_path):
    load(tmp_path, {"lr_scheduler_type": "constant", "learning_rate": 1e-6})


def test_all_problems_come_at_once_and_none_because_of_another(tmp_path):
    text = problems(
        tmp_path,
        {"max_steps": "x", "warmup_steps": 30, "learning_rate": -1, "split": "0", "sed": 1},
    )
    assert text.startswith("4 problems in the settings:")
    assert "warmup_steps (30)" not in text
    assert "min_learning_rate" not in text


def test_json_reads_back_to_equal_settings(tmp_path):
    settings = load(
        tmp_path,
        {"report_to": ["tensorboard"], "warmup_ratio": 0.1, "do_eval": 1, "unified_checkpoint": 1},
    )
    file = tmp_path / "settings.json"
    file.write_text(settings.to_json(), encoding="utf-8")
    again = load_settings([str(file)])
    assert dataclasses.replace(again, other_keys=settings.other_keys) == settings
    assert again.digest() == settings.digest()
    assert load(tmp_path, {"seed": 1}).digest() != load(tmp_path).digest()


def test_secrets_stay_out_of_json_and_log(tmp_path):
    settings = load(tmp_path, {"wandb_api_key": "s3cret"})
    assert "s3cret" not in settings.to_json() + repr(settings) + "".join(notices(settings))


def test_model_overrides(tmp_path):
    assert load(tmp_path).model_overrides == {}
    settings = load(tmp_path, {"num_hidden_layers": 2, "initializer_range": 0.01})
    assert settings.model_overrides == {"num_hidden_layers": 2, "initializer_range": 0.01}


def test_what_is_not_implemented_is_refused_all_at_once(tmp_path):
    settings = load(
        tmp_path,
        {
            "split_inputs_sequence_dim": False, "attention_probs_dropout_prob": 0.1,
            "pipeline_parallel_config": "use_dualpipev", "do_train": True, "do_eval": True,
            "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
            "greater_is_better": True,
        },
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        check_supported(settings)
    text = str(caught.value)
    assert text.startswith("5 settings are not possible in this version:")
    assert "split_inputs_sequence_dim is false, but each rank takes its part of the tokens" in text
    assert "attention_probs_dropout_prob is 0.1, but flash attention has no dropout" in text
    assert "pipeline_parallel_config holds use_dualpipev, but the schedules here are" in text
    assert 'metric_for_best_model is "accuracy", but an evaluation computes only' in text
    assert "greater_is_better is true" in text


def test_neutral_values_are_supported(tmp_path):
    neutral = {row.name: row.neutral[0] for row in (*NO_EFFECT, *REFUSED)}
    settings = load(tmp_path, {**neutral, "do_train": True})
    check_supported(settings)
    assert notices(settings) == []


_ANOTHER = {bool: (True, False), int: (3,), float: (0.25,), str: ("other",)}


@pytest.mark.parametrize("row", [*NO_EFFECT, *REFUSED], ids=lambda row: row.name)
def test_no_known_key_is_silently_ignored(tmp_path, row):
    values = [v for v in _ANOTHER.get(row.type, ([1],)) if v not in row.neutral]
    if row.type not in _ANOTHER:
        values = [[["1"]] if "tuple[tuple" in str(row.type) else ["1"]]
    assert values
    settings = load(tmp_path, {row.name: values[0], "do_train": True})
    if row in NO_EFFECT:
        check_supported(settings)
        assert [line.split()[0] for line in notices(settings)] == [row.name]
    else:
        with pytest.raises(UserError) as caught:
            check_supported(settings)
        assert str(caught.value).startswith(f"{row.name} is ")
        assert (
            row.way_out or "set it to" in str(caught.value) or "leave it out" in str(caught.value)
        )


def test_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to do"):
        check_supported(load(tmp_path))
    check_supported(load(tmp_path, {"do_eval": True}))


_KEYS = [spec.name for spec in setting_fields()] + [row.name for row in (*NO_EFFECT, *REFUSED)]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@run_with(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(_KEYS) | st.text(), _JSON, max_size=6),
    st.lists(st.sampled_from([f"--{key}" for key in _KEYS]) | st.text(max_size=8), max_size=6),
)
def test_whatever_comes_in_the_answer_is_settings_or_a_user_error(content, arguments):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps({**MINIMAL, **content}), encoding="utf-8")
        with contextlib.suppress(UserError):
            parsed = load_settings([str(file), *arguments])
            notices(parsed)
            assert json.loads(parsed.to_json())["output_dir"] == parsed.output_dir
            check_supported(parsed)


def test_the_documentation_is_up_to_date():
    page = (REPO / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run `make docs`"


def test_temperature_without_its_blend(tmp_path):
    found = problems(tmp_path, {"blend_temperature": 2.0, "blend_by": "size"})
    assert "blend_temperature is 2, but blend_by is 'size'" in found
    assert load(tmp_path, {"blend_temperature": 2, "blend_by": "temperature"}).blend_by
    assert "expected at least 1" in problems(
        tmp_path, {"blend_temperature": 0.5, "blend_by": "temperature"}
    )
