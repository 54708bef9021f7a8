"""Settings of processes, sharding, precision and recompute: forms, contradictions, notices."""

from __future__ import annotations

import pytest
from config_testing import check_one_problem, load, problems

from pypkg.config import check_supported, load_settings, notices, notices_of_float32
from pypkg.config.options.suboptions import (
    FUSED_GRAD_ADD,
    OF_SEQUENCE_PARALLEL,
    STAGE_OF_WORD,
    SUB_OPTIONS,
)
from pypkg.errors import UserError


def test_defaults_are_paddlenlps_and_ask_for_nothing(tmp_path):
    settings = load(tmp_path, {"do_train": True})
    assert settings.tensor_parallel_degree == settings.pipeline_parallel_degree == -1
    assert settings.sharding_parallel_degree == settings.data_parallel_degree == -1
    assert (settings.virtual_pp_degree, settings.pp_recompute_interval) == (1, 1)
    assert settings.sharding == settings.no_recompute_layers == ()
    assert (settings.sharding_stage, settings.sharding_offload) == (0, False)
    assert settings.scale_loss == 32768.0
    assert not (settings.recompute or settings.sequence_parallel or settings.amp_master_grad)
    assert settings.recompute_granularity == "full"
    assert settings.hidden_dropout_prob == 0.0
    check_supported(settings)
    assert notices(settings) == []


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("", ()),
        ([], ()),
        ("stage1", ("stage1",)),
        ("stage2 offload", ("stage2", "offload")),
        ("stage2, offload", ("stage2", "offload")),
        (["stage3", "offload"], ("stage3", "offload")),
    ],
)
def test_sharding_in_its_many_forms(tmp_path, written, parts):
    settings = load(tmp_path, {"sharding": written})
    assert settings.sharding == parts
    assert settings.sharding_stage == (int(parts[0][-1]) if parts else 0)
    assert settings.sharding_offload == ("offload" in parts)


def test_lists_on_the_command_line_and_read_back(tmp_path):
    settings = load(
        tmp_path, None, "--sharding", "stage2", "offload", "--no_recompute_layers", "0", "3",
        "--pipeline_parallel_config", "enable_timer disable_partial_send_recv",
    )  # fmt: skip
    assert settings.sharding == ("stage2", "offload")
    assert settings.no_recompute_layers == (0, 3)
    assert settings.pipeline_parallel_config == ("enable_timer", "disable_partial_send_recv")
    file = tmp_path / "again.json"
    file.write_text(settings.to_json(), encoding="utf-8")
    assert load_settings([str(file)]) == settings


def test_where_the_optimizer_state_stays(tmp_path):
    assert not load(tmp_path, {"sharding": "stage2"}).offloads_optimizer
    assert load(tmp_path, {"sharding": "stage1 offload"}).offloads_optimizer
    assert load(tmp_path, {"offload_optim": True}).offloads_optimizer


def test_the_old_name_of_the_sharding_degree(tmp_path):
    assert load(tmp_path).wanted_sharding_degree == -1
    assert load(tmp_path, {"sharding": "stage1", "sharding_degree": 4}).wanted_sharding_degree == 4
    both = {"sharding": "stage1", "sharding_degree": 4, "sharding_parallel_degree": 4}
    assert load(tmp_path, both).wanted_sharding_degree == 4


def test_a_sharding_degree_of_one_is_no_sharding(tmp_path):
    """As in PaddleNLP, with every stage and beside a pipeline, which refuses stages 2 and 3."""
    for name in ("sharding_parallel_degree", "sharding_degree"):
        extra = {"sharding": "stage2 offload", name: 1, "pipeline_parallel_degree": 2}
        settings = load(tmp_path, extra)
        assert (settings.sharding_stage, settings.offloads_optimizer) == (0, False)
        assert notices(settings) == [
            "sharding has no effect: sharding_parallel_degree is 1, so nothing is divided"
        ]
    assert notices(load(tmp_path, {"sharding_parallel_degree": 1})) == []


def test_options_of_benchmark_files_are_accepted(tmp_path):
    """They fuse an addition, or choose a backend for products that are not used."""
    extra = {
        "enable_linear_fused_grad_add": True, "amp_master_grad": True, "use_fused_linear": True,
        "fused_linear_param_grad_add": True, "use_fp8": False,
        "transformer_engine_backend": "paddle", "pipeline_schedule_mode": "VPP",
        "sharding_parallel_config": "enable_overlap enable_tensor_fusion", "sharding": "stage1",
        "pipeline_parallel_config": "enable_send_recv_overlap enable_split_backward",
        "pipeline_parallel_degree": 2, "do_train": True,
    }  # fmt: skip
    settings = load(tmp_path, extra)
    check_supported(settings)
    assert [line.split(" has no effect")[0] for line in notices(settings)] == [
        "use_fused_linear", "fused_linear_param_grad_add", "transformer_engine_backend",
        "pipeline_parallel_config enable_send_recv_overlap",
        "pipeline_parallel_config enable_split_backward",
        "sharding_parallel_config enable_tensor_fusion",
        "sharding_parallel_config enable_overlap",
    ]  # fmt: skip


_VPP = {"pipeline_parallel_degree": 4, "virtual_pp_degree": 2}
_SP = {"sequence_parallel": True, "tensor_parallel_degree": 4}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tensor_parallel_degree": 0}, ["tensor_parallel_degree is 0; expected at least 1, or"]),
        ({"pipeline_parallel_degree": -2}, ["is -2; expected at least -1"]),
        ({"virtual_pp_degree": 0}, ["virtual_pp_degree is 0; expected at least 1"]),
        ({"data_parallel_degree": 0}, ["data_parallel_degree is 0; expected at least 1"]),
        ({"sharding": "stage4"}, ["sharding is 'stage4'; expected one of stage1, stage2, stage3"]),
        ({"sharding": "stage1 stage2"}, ["'stage1 stage2'", "expected one of stage1"]),
        ({"sharding": "offload"}, ["'offload' without a stage", "set offload_optim instead"]),
        ({"sharding": "stage1", "sharding_degree": 2, "sharding_parallel_degree": 4},
         ["sharding_degree (2)", "sharding_parallel_degree (4)", "keep only the second"]),
        ({"sharding_parallel_degree": 4}, ["sharding_parallel_degree is 4", "names no stage"]),
        ({"sharding_degree": 4}, ["sharding_parallel_degree is 4", "names no stage"]),
        ({"sharding": "stage2", "pipeline_parallel_degree": 2},
         ["stage2 and pipeline_parallel_degree 2", "use stage1, or"]),
        ({"sharding": "stage3", "pipeline_parallel_degree": 4}, ["stage3", "degree 4"]),
        ({"virtual_pp_degree": 2}, ["virtual_pp_degree is 2", "3 or more, found 1"]),
        ({"virtual_pp_degree": 2, "pipeline_parallel_degree": 2}, ["3 or more, found 2"]),
        ({**_VPP, "do_train": 1, "gradient_accumulation_steps": 7},
         ["gradient_accumulation_steps (7)", "pipeline_parallel_degree 4", "virtual_pp_degree 2",
          "make it 4, or at least 8, or set virtual_pp_degree to 1"]),
        ({**_VPP, "do_train": 1}, ["gradient_accumulation_steps (1)"]),
        ({"sequence_parallel": True}, ["sequence_parallel is true", "degree is -1; raise"]),
        ({**_SP, "do_train": 1, "per_device_train_batch_size": 3, "max_seq_length": 6},
         ["per_device_train_batch_size (3) x max_seq_length (6)", "tensor_parallel_degree (4)"]),
        ({**_SP, "do_eval": 1, "per_device_eval_batch_size": 1, "max_seq_length": 6},
         ["per_device_eval_batch_size (1) x max_seq_length (6)"]),
        ({**_SP, "sample_tokens": 8}, ["sample_tokens is 8", "sequence_parallel is true"]),
        ({"sep_parallel_degree": 0}, ["sep_parallel_degree is 0; expected at least 1"]),
        ({"sep_parallel_degree": 2, "context_parallel_degree": 4},
         ["sep_parallel_degree is 2 and context_parallel_degree 4", "set one of them to 1"]),
        ({"sep_parallel_degree": 3, "max_seq_length": 8},
         ["max_seq_length (8) cannot be cut into 3 equal parts", "a multiple of 3"]),
        ({"context_parallel_degree": 2, "max_seq_length": 6},
         ["max_seq_length (6) cannot be cut into 4 blocks", "context_parallel_degree (2) needs"]),
        ({"context_parallel_degree": 2, "use_flash_attention": False},
         ["use_flash_attention is false", "use sep_parallel_degree instead"]),
        ({"context_parallel_degree": 2, "attention_backend": "paddle"}, ["is 'paddle', but ring"]),
        ({"context_parallel_degree": 2, "sample_tokens": 8}, ["sample_tokens is 8 and context_"]),
        ({**_SP, "sep_parallel_degree": 2, "do_train": 1, "max_seq_length": 12,
          "per_device_train_batch_size": 1},
         ["x max_seq_length (12) / 2 (context ranks) tokens are not divisible"]),
        ({"fp16": True, "bf16": True}, ["fp16 and bf16 are both true"]),
        ({"scale_loss": 0}, ["scale_loss is 0.0; expected more than 0"]),
        ({"recompute_granularity": "half"}, ["'half'; expected one of full, full_attn, core_attn"]),
        ({"no_recompute_layers": [1, -1]}, ["no_recompute_layers is -1; expected at least 0"]),
        ({"pp_recompute_interval": -1}, ["pp_recompute_interval is -1; expected at least 0"]),
        ({"hybrid_parallel_topo_order": "dp_first"}, ["expected one of pp_first, sharding_first"]),
        ({"hidden_dropout_prob": 1}, ["hidden_dropout_prob is 1.0; expected less than 1"]),
        ({"tensor_parallel_config": "enable_mp_async_allreduce enable_x"},
         ["tensor_parallel_config is 'enable_x'; expected one of enable_mp_async_allreduce"]),
    ],
)  # fmt: skip
def test_contradictions_are_named(tmp_path, extra, words):
    check_one_problem(tmp_path, extra, words)


def test_what_is_possible(tmp_path):
    for steps in (4, 8, 9):
        load(tmp_path, {**_VPP, "do_train": 1, "gradient_accumulation_steps": steps})
    load(tmp_path, {**_VPP, "do_eval": 1, "sharding": "stage1"})
    load(tmp_path, {**_SP, "do_train": 1, "per_device_train_batch_size": 2, "max_seq_length": 6})
    load(tmp_path, {**_SP, "per_device_train_batch_size": 3, "max_seq_length": 6})  # unused
    load(tmp_path, {"sharding_parallel_degree": 1})


def test_no_follow_up_of_a_wrong_type(tmp_path):
    text = problems(tmp_path, {"tensor_parallel_degree": "two", "sequence_parallel": True})
    assert text.startswith("tensor_parallel_degree is")
    assert "\n" not in text


@pytest.mark.parametrize(
    "option", SUB_OPTIONS, ids=lambda option: f"{option.setting}-{option.name}"
)
def test_no_sub_option_is_silently_ignored(tmp_path, option):
    """All but what happens anyway is refused, or said to change nothing, with the reason."""
    layout = {"tensor_parallel_degree": 2, "amp_master_grad": True, "do_train": True}
    layout["sequence_parallel"] = OF_SEQUENCE_PARALLEL.get(option.name, True)
    if option.name in STAGE_OF_WORD:
        layout |= {"sharding": f"stage{STAGE_OF_WORD[option.name]}"}
    else:
        layout |= {"pipeline_parallel_degree": 2, "sharding": "stage1"}
    settings = load(tmp_path, {**layout, option.setting: option.name})
    if option.refused:
        with pytest.raises(UserError, match=f"{option.setting} holds {option.name}, but "):
            check_supported(settings)
        return
    check_supported(settings)
    said = [f"{option.setting} {option.name} has no effect: {option.why}"] if option.why else []
    assert notices(settings) == said


@pytest.mark.parametrize(
    ("extra", "adds", "idle"),
    [
        ({"enable_linear_fused_grad_add": True}, False, "enable_linear_fused_grad_add"),
        ({"enable_linear_fused_grad_add": True, "amp_master_grad": True}, True, ""),
        ({"tensor_parallel_degree": 2}, False, f"tensor_parallel_config {FUSED_GRAD_ADD}"),
        ({"tensor_parallel_degree": 2, "amp_master_grad": True}, True, ""),
    ],
)
def test_products_add_weight_gradients_only_to_main_gradients(tmp_path, extra, adds, idle):
    if "tensor_parallel_degree" in extra:
        extra = {**extra, "tensor_parallel_config": FUSED_GRAD_ADD}
    settings = load(tmp_path, extra)
    assert settings.adds_weight_gradients == adds
    said = [f"{idle} has no effect: it matters only with amp_master_grad"] if idle else []
    assert notices(settings) == said


def test_what_matters_only_in_16_bits(tmp_path):
    assert notices_of_float32(load(tmp_path, {"enable_linear_fused_grad_add": True})) == []
    undivided = {"amp_master_grad": True, "tensor_parallel_config": FUSED_GRAD_ADD}
    assert len(notices_of_float32(load(tmp_path, undivided))) == 1  # ``notices`` names the word
    extra = {"amp_master_grad": True, "enable_linear_fused_grad_add": True,
             "tensor_parallel_degree": 2, "tensor_parallel_config": FUSED_GRAD_ADD}  # fmt: skip
    assert notices_of_float32(load(tmp_path, extra)) == [
        "amp_master_grad has no effect: gradients are float32 without it",
        *(
            f"{name} has no effect: it matters only with bf16 or fp16"
            for name in (
                "enable_linear_fused_grad_add",
                f"tensor_parallel_config {FUSED_GRAD_ADD}",
            )
        ),
    ]


@pytest.mark.parametrize("of_sequence", [False, True])
@pytest.mark.parametrize("word", OF_SEQUENCE_PARALLEL)
def test_words_of_the_other_tensor_layout_are_pointed_out(tmp_path, word, of_sequence):
    extra = {"tensor_parallel_degree": 2, "sequence_parallel": of_sequence}
    settings = load(tmp_path, {**extra, "tensor_parallel_config": word})
    belongs = OF_SEQUENCE_PARALLEL[word] == of_sequence
    assert settings.overlaps_input_gradients == (belongs and "async" in word)
    needed = "with" if OF_SEQUENCE_PARALLEL[word] else "without"
    line = (
        f"tensor_parallel_config {word} has no effect: it matters only {needed} sequence_parallel"
    )
    assert notices(settings) == ([] if belongs else [line])


@pytest.mark.parametrize(
    ("word", "sharding", "reduces_once"),
    [
        ("enable_stage1_tensor_fusion", "stage1", True),
        ("enable_stage1_overlap", "stage1", True),
        ("enable_stage1_overlap", "stage2", False),
        ("reduce_once_per_step", "stage2", True),
        ("reduce_once_per_step", "stage1", False),
        ("enable_stage2_overlap", "stage2", False),
        ("split_param", "stage1", False),
    ],
)
def test_when_gradients_are_reduced_once_in_a_step(tmp_path, word, sharding, reduces_once):
    extra = {"sharding": sharding, "sharding_parallel_config": word}
    settings = load(tmp_path, extra)
    assert settings.reduces_once == reduces_once
    if word != "split_param" and not sharding.endswith(str(STAGE_OF_WORD[word])):
        assert notices(settings) == [
            f"sharding_parallel_config {word} has no effect: "
            f"it matters only with sharding stage{STAGE_OF_WORD[word]}"
        ]
    staged = load(tmp_path, {**extra, "sharding": "stage1", "pipeline_parallel_degree": 2})
    assert not staged.reduces_once
    assert len(notices(staged)) == 1


@pytest.mark.parametrize(
    ("word", "sharding", "overlaps"),
    [
        ("enable_stage1_broadcast_overlap", "stage1", True),
        ("enable_stage1_broadcast_overlap", "stage2", False),
        ("enable_stage2_overlap", "stage2", True),
        ("enable_stage2_overlap", "stage1", False),
        ("enable_stage1_overlap", "stage1", False),
    ],
)
def test_when_weights_come_beside_the_forward_pass(tmp_path, word, sharding, overlaps):
    settings = load(tmp_path, {"sharding": sharding, "sharding_parallel_config": word})
    assert settings.overlaps_weights == overlaps


def test_weights_come_beside_the_forward_pass_of_a_pipeline_too(tmp_path):
    words = {"sharding_parallel_config": "enable_stage1_broadcast_overlap"}
    settings = load(tmp_path, {**words, "sharding": "stage1", "pipeline_parallel_degree": 2})
    assert settings.overlaps_weights
    assert notices(settings) == []


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"recompute_granularity": "core_attn"}, "recompute_granularity has no effect: it matters"),
        ({"recompute_use_reentrant": 1}, "recompute_use_reentrant has no effect"),
        ({"no_recompute_layers": [1]}, "no_recompute_layers has no effect"),
        ({"recompute": 1, "pp_recompute_interval": 2},
         "pp_recompute_interval has no effect: it matters only with recompute and pipeline_par"),
        ({"scale_loss": 512}, "scale_loss has no effect: it matters only with fp16"),
        ({"tensor_parallel_config": "sync_param"}, "tensor_parallel_config has no effect"),
        ({"sequence_parallel_config": "enable_allreduce_avg_in_gradinent_scale"},
         "sequence_parallel_config has no effect"),
        ({"pipeline_parallel_config": "disable_partial_send_recv"},
         "pipeline_parallel_config has no effect"),
        ({"sharding_parallel_config": "split_param"}, "sharding_parallel_config has no effect"),
    ],
)  # fmt: skip
def test_what_refines_something_that_is_off_is_pointed_out(tmp_path, extra, line):
    lines = notices(load(tmp_path, extra))
    assert len(lines) == 1
    assert lines[0].startswith(line)
