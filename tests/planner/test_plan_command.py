"""``pypkg plan``: what it prints, its errors, the search and the picture."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from pypkg.config import Settings
from pypkg.config.options.suboptions import FUSED_GRAD_ADD
from pypkg.models.architecture.registry import known_models, load_config
from pypkg.parallel.mesh import Degrees
from pypkg.plan import main
from pypkg.planner.memory import plan_memory
from pypkg.planner.search.best import search
from pypkg.planner.search.plan import OUTSIDE, make_plan, what_would_do
from pypkg.planner.time.gpus import GPUS
from pypkg.planner.time.step_time import Cluster
from pypkg.training.start.layout import degrees

REPO = Path(__file__).resolve().parents[2]
CONFIG = str(REPO / "configs/pretrain/llama/pretrain-llama2_13b-tp2sd4_stage2.json")
LLAMA = load_config("meta-llama/Llama-2-13b")
GPU = GPUS["a100-80g"]
NODE = Cluster(GPU, 8, GPU.link)
BASE = Settings(
    bf16=True, max_seq_length=4096, gradient_accumulation_steps=16, sharding=("stage2",),
    per_device_train_batch_size=1, save_strategy="no", evaluation_strategy="no",
)  # fmt: skip
ONE_OF_EACH_FAMILY = {load_config(name).model_type: name for name in known_models()}


def test_a_layout_that_fits(capsys):
    assert main([CONFIG, "--gpus", "8", "--tokens", "1T", "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "layout  tensor 2, sharding 4 (stage2)" in out
    assert "262,144 tokens a step" in out and "give or take 10 %" in out
    assert "fits: " in out and "at 2 a GPU hour" in out


def test_json_adds_up(capsys):
    assert main([CONFIG, "--gpus", "8", "--tokens", "1T", "--price", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (rank,) = found["ranks"]
    assert sum(rank["terms"].values()) == rank["peak_bytes"] <= found["capacity_bytes"]
    assert sum(found["step_terms"].values()) == pytest.approx(found["step_seconds"])
    assert found["price"] == pytest.approx(found["days"] * 24 * 8 * 2)
    speed = found["tokens_per_step"] / found["step_seconds"] / 8
    assert found["tokens_per_second_per_gpu"] == pytest.approx(speed)


def test_a_layout_that_does_not_fit_says_what_would_do(capsys):
    arguments = [CONFIG, "--gpus", "8", "--per_device_train_batch_size", "4"]
    assert main([*arguments, "--gpu", "a100-40g"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: " in out and "GiB short: " in out
    assert "would do: " in out or "no single change makes it fit" in out


def test_zero_over_the_data_parallel_ranks_is_a_change(capsys):
    model = ["--model_name_or_path", "facebook/llama-7b", "--bf16", "--max_seq_length", "2048"]
    assert main([*model, "--gpus", "8"]) == 1
    out = capsys.readouterr().out
    assert "layout  data 8" in out and "sharding stage3 would do: " in out


def test_a_model_name_alone_is_planned(capsys):
    """A plan needs neither data nor output_dir nor max_steps."""
    given = ["--model_name_or_path", "facebook/llama-7b", "--per_device_train_batch_size=1"]
    assert main([*given, "--gpus", "8", "--search", "--tensor_parallel_degree", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "run_pretrain.py --model_name_or_path facebook/llama-7b --" in line
    assert (
        line.count("--tensor_parallel_degree") == line.count("--per_device_train_batch_size") == 1
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"like": "a100-80g", "flops": 1}', "it has no field 'flops'"),
        ('{"like": "b300"}', "\"like\" is 'b300'"),
        ('{"memory_mib": 1000}', "it lacks 'matmul_flops'"),
        ("[1]", "must hold a JSON object"),
    ],
)
def test_a_file_that_describes_no_gpu(tmp_path, capsys, content, message):
    file = tmp_path / "gpu.json"
    file.write_text(content)
    assert main([CONFIG, "--gpus", "8", "--gpu", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_number_of_tokens_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main([CONFIG, "--tokens", "1X"])
    assert "which may end in K, M, B or T, found '1X'" in capsys.readouterr().err


def test_what_would_do_is_the_fastest_change():
    settings = Settings(**{**vars(BASE), "per_device_train_batch_size": 4})
    plan = make_plan(settings, LLAMA, Degrees(tensor=2, sharding=4), NODE)
    assert not plan.fits and plan.short == plan.largest.peak - (GPU.memory - OUTSIDE)
    label, way = what_would_do(plan)
    assert label == "a micro batch of 2" and way.fits
    assert way.time.tokens == plan.time.tokens


def test_layouts_that_need_recompute_say_how_much():
    node = Cluster(GPUS["a100-40g"], 8, GPU.link)
    base = Settings(**{**vars(BASE), "max_seq_length": 8192})
    found = search(base, load_config("meta-llama/Llama-2-7b"), 4, 8, node, 2)
    assert found.faster
    for miss in found.faster:
        name, plan = miss.way
        assert not miss.plan.fits and plan.fits and name.startswith("recompute ")
        assert miss.plan.time.seconds < found.fitting[0].time.seconds
        assert miss.reason == (
            f"{miss.plan.short / 2**30:.1f} GiB short: activations; {name} would do, at "
            f"{plan.time.tokens_per_second:,.0f} tokens/s"
        )


def test_interleaved_stages(capsys):
    """The largest stage is the first; a search plans the first and the last of them."""
    given = ["--pipeline_parallel_degree", "4", "--virtual_pp_degree", "5", "--sharding", ""]
    assert main([CONFIG, "--gpus", "8", *given, "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    sizes = [rank["peak_bytes"] for rank in found["ranks"]]
    assert len(sizes) == 4 and max(sizes) in (sizes[0], sizes[-1])
    cluster = Cluster(GPUS["h100-80g"], 8, 100e9)
    best = search(BASE, LLAMA, 32, 32, cluster).fitting
    interleaved = [plan for plan in best if plan.degrees.virtual_stages > 1]
    assert interleaved
    for plan in interleaved[:3]:
        whole = make_plan(plan.settings, LLAMA, plan.degrees, cluster)
        assert whole.largest.peak == plan.largest.peak
        assert plan.settings.virtual_pp_degree == plan.degrees.virtual_stages


def test_a_search():
    found = search(BASE, LLAMA, 8, 64, NODE)
    assert len(found.fitting) == 10
    speeds = [plan.time.tokens_per_second for plan in found.fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert all(plan.fits and plan.time.tokens == 64 * 4096 for plan in found.fitting)
    assert found.too_large and not any(miss.plan.fits for miss in found.too_large)
    assert found.too_large_by_state > 0  # no sharding at all
    best = found.fitting[0]
    planned = make_plan(best.settings, LLAMA, best.degrees, NODE)
    assert planned.largest.peak == best.largest.peak


@pytest.mark.parametrize(
    "options",
    [
        {"enable_linear_fused_grad_add": True, "amp_master_grad": True},
        {"tensor_parallel_config": (FUSED_GRAD_ADD,), "amp_master_grad": True},
        {"tensor_parallel_config": ("enable_sp_async_reduce_scatter",)},
    ],
)
def test_a_layout_of_a_search_is_planned_as_it_would_be_alone(options):
    """With the options that change how linear layers compute, and so what they keep."""
    plain = search(BASE, LLAMA, 8, 64, NODE).fitting
    fitting = search(replace(BASE, **options), LLAMA, 8, 64, NODE).fitting
    for each in fitting:
        alone = make_plan(each.settings, LLAMA, degrees(each.settings, 8), NODE)
        assert alone.degrees == each.degrees
        assert alone.largest.peak == each.largest.peak
    peaks = [[each.largest.peak for each in found] for found in (plain, fitting)]
    assert peaks[0] != peaks[1]


def test_every_layout_trains_the_whole_batch():
    """12 sequences are no multiple of 2 on each of 4 ranks; such a layout would drop some."""
    fitting = search(BASE, LLAMA, 4, 12, NODE, 3).fitting
    assert fitting and all(plan.time.tokens == 12 * 4096 for plan in fitting)


def test_layouts_that_are_too_large_come_nearest_first():
    short = [miss.plan.short for miss in search(BASE, LLAMA, 4, 32, NODE).too_large]
    assert len(short) == 5 and short == sorted(short) and short[0] < short[-1]


@pytest.mark.slow
def test_no_layout_is_missed():
    """The search ends early; another that looks at all layouts finds nothing faster."""
    few, all_of_them = (search(BASE, LLAMA, 4, 16, NODE, count) for count in (3, 1000))
    assert [plan.degrees for plan in few.fitting] == [p.degrees for p in all_of_them.fitting[:3]]


def test_the_launch_line_of_a_search(capsys):
    arguments = [CONFIG, "--max_seq_length", "2048", "--recompute", "true"]
    arguments += ["--gpus", "16", "--network", "100", "--search"]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    changes = json.loads(out[-2].removeprefix("the first one changes "))
    assert out[-1].startswith("python -m paddle.distributed.launch --nnodes 2 --rank N --master")
    for name, value in changes.items():
        assert f"--{name} {json.dumps(value)}" in out[-1]
    assert f"{CONFIG} --max_seq_length 2048 --" in out[-1] and out[-1].count("--recompute ") == 1
    # Those keys give the layout of the first line.
    words = out[-1].split(f"{CONFIG} ")[1].replace('"', "").split()
    assert main([CONFIG, *words, *arguments[-5:-1]]) == 0
    speed = out[1].split()[1]
    assert f"{speed} tokens/s per GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [
        ["--data_parallel_degree", "8"],
        ["--sharding", "stage1", "--sharding_degree", "4"],
        ["--rampup_batch_size", "8", "8", "64", "--per_device_train_batch_size", "1"],
    ],
)
def test_the_launch_line_of_a_search_is_one_that_pretrain_takes(capsys, given):
    """The settings that were given and are not searched do not contradict what was found."""
    arguments = ["--model_name_or_path", "facebook/llama-7b", "--max_seq_length", "512", *given]
    assert main([*arguments, "--gpus", "8", "--gpu", "h200", "--search"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.split("run_pretrain.py ")[1])
    assert main([*words, "--gpus", "8", "--gpu", "h200"]) == 0


def test_gpus_that_no_layout_fits(tmp_path, capsys):
    file = tmp_path / "none.svg"
    assert main([CONFIG, "--gpus", "2", "--gpu", "a100-40g", "--search", "--picture", str(file),
                 "--sharding_parallel_degree", "1"]) == 1  # fmt: skip
    told = capsys.readouterr()
    assert "no layout fits these GPUs" in told.out and "none.svg was not drawn" in told.err
    assert not file.exists()


def test_columns_do_not_touch(tmp_path, capsys):
    """Speeds from a million on, and the phases of several stages."""
    keys = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(keys))
    small = ["--model_name_or_path", str(tmp_path), "--max_seq_length", "512"]
    assert main([*small, "--gpus", "8", "--gpu", "h200", "--search"]) == 0
    number, speed = capsys.readouterr().out.splitlines()[1].split()[:2]
    assert number == "1" and int(speed.replace(",", "")) > 1_000_000
    assert main([*small, "--gpus", "4", "--pipeline_parallel_degree", "2"]) == 0
    (phases,) = (line for line in capsys.readouterr().out.splitlines() if "in the" in line)
    assert set(phases.removeprefix("in the").split()) <= {"forward", "backward", "update"}
    assert len(phases.split()) == 2 + 2


def test_an_absurd_micro_batch_is_planned_at_once(capsys):
    """The chunks of the loss are not counted one by one."""
    huge = ["--per_device_train_batch_size", str(10**12), "--gradient_accumulation_steps", "1"]
    assert main([CONFIG, "--gpus", "8", *huge]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*ONE_OF_EACH_FAMILY.values(), "meta-llama/Llama-3.1-8B"])
def test_models_of_every_family_are_planned(name):
    config = load_config(name)
    memory = plan_memory(BASE, config, Degrees(sharding=8)).largest
    assert memory.peak > 2 * config.num_parameters()  # the weights


def test_a_picture(tmp_path):
    file = tmp_path / "plan.svg"
    arguments = ["--pipeline_parallel_degree", "2", "--sharding", "stage1", "--picture", str(file)]
    assert main([CONFIG, "--gpus", "8", *arguments]) == 0
    root = ElementTree.parse(file).getroot()
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"stage 0", "stage 1", "80 GPU", "77 tensors", "activations"} <= set(texts)


def test_a_picture_needs_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([CONFIG, "--gpus", "8", "--picture", str(tmp_path / "plan.svg")]) == 2
    assert "pip install 'pypkg[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "6", "--sharding_parallel_degree", "4"], "sharding_parallel_degree (4)"),
        (["--gpus", "7"], "tensor_parallel_degree"),
        (["--gpu", "b100"], "one of a100-40g"),
        (["--gpus", "16"], "need --network"),
        (["--gpus", "16", "--nodes", "3"], "multiple of --nodes"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--price", "-1", "--gpus", "8"], "--price is -1"),
        (["--price", "2"], "add --tokens"),
        (["--tokens", "1T", "--price", "nan"], "--price is nan"),
        (["--tokens", "inf"], "--tokens is inf"),
        (["--gpus", "16", "--network", "nan"], "--network is nan"),
        (["--gpus", "16", "--network", "400e9"], "at most 100,000 GB/s"),
        (["--gpus", "12"], "does not fill machines of 8"),
        (["--gpus", "1000001"], "at most 1,000,000 GPUs"),
        (["--picture", "plan.png"], "ends in .svg"),
        (["--picture", ""], "ends in .svg"),
        (["--recompute_granularity", "most"], "recompute_granularity"),
        (["--no_such_key", "1"], "no_such_key"),
        (["--device", "cpu"], "plans are for GPUs"),
        (["--virtual_pp_degree", "2", "--pipeline_parallel_degree", "4", "--sharding", "stage1",
          "--gradient_accumulation_steps", "7"], "virtual_pp_degree"),
    ],
)  # fmt: skip
def test_errors(capsys, arguments, words):
    given = arguments if "--gpus" in arguments else ["--gpus", "8", *arguments]
    assert main([CONFIG, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
    assert "bf16" not in error  # the machine of the plan is not that of the run


def test_it_runs_without_paddle():
    code = (
        "import sys; sys.modules['paddle'] = None; from pypkg.plan import main; "
        f"assert main([{CONFIG!r}, '--gpus', '7']) == 2; "
        f"sys.exit(main([{CONFIG!r}, '--gpus', '8']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_a_search_knows_the_state_of_other_optimizers():
    """Lion has one moment: layouts fit that AdamW's two rule out by their state alone."""
    excluded = {}
    for optim in ("adamw", "lion", "adamw_8bit"):
        base = Settings(**{**vars(BASE), "optim": optim})
        excluded[optim] = search(base, LLAMA, 4, 4, NODE, 1).too_large_by_state
    assert excluded["adamw"] > excluded["lion"] >= excluded["adamw_8bit"]
