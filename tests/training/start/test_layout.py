"""The degrees that follow from settings and processes, and every layout that is impossible."""

from __future__ import annotations

import pytest

from pypkg.config import Settings
from pypkg.models.architecture.registry import load_config
from pypkg.parallel.mesh import Degrees
from pypkg.training.start.layout import degrees, layout_notices, layout_problems

LLAMA = load_config("facebook/llama-7b")  # 32 layers, 32 heads


@pytest.mark.parametrize(
    ("asked", "processes", "expected"),
    [
        ({}, 1, Degrees()),
        ({}, 4, Degrees(data=4)),
        ({"tensor_parallel_degree": 1, "pipeline_parallel_degree": 1}, 1, Degrees()),
        ({"tensor_parallel_degree": 2}, 8, Degrees(data=4, tensor=2)),
        ({"tensor_parallel_degree": 2, "tensor_parallel_config": ("enable_mp_skip_c_identity",)}, 2,
         Degrees(tensor=2, skip_identity=True)),
        ({"tensor_parallel_degree": 2, "tensor_parallel_config": ("enable_mp_async_allreduce",)}, 2,
         Degrees(tensor=2, overlap_input_gradients=True)),
        ({"tensor_parallel_degree": 2, "amp_master_grad": True,
          "tensor_parallel_config": ("enable_mp_fused_linear_param_grad_add",)}, 2,
         Degrees(tensor=2, adds_weight_gradients=True)),
        ({"amp_master_grad": True, "enable_linear_fused_grad_add": True}, 2,
         Degrees(data=2, adds_weight_gradients=True)),
        ({"tensor_parallel_degree": 2, "sequence_parallel": True,
          "tensor_parallel_config": ("enable_sp_async_reduce_scatter",)}, 2,
         Degrees(tensor=2, sequence_parallel=True, overlap_input_gradients=True)),
        ({"tensor_parallel_degree": 2, "sharding": ("stage2",)}, 8, Degrees(sharding=4, tensor=2)),
        ({"sharding": ("stage1",), "sharding_parallel_degree": 2}, 8, Degrees(data=4, sharding=2)),
        ({"sharding": ("stage1",), "sharding_degree": 2}, 8, Degrees(data=4, sharding=2)),
        ({"sharding": ("stage1",), "data_parallel_degree": 2}, 8, Degrees(data=2, sharding=4)),
        ({"sharding": ("stage1",), "sharding_parallel_degree": 1}, 1, Degrees()),
        ({"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "sharding": ("stage1",)}, 8,
         Degrees(pipeline=2, sharding=2, tensor=2)),
        ({"tensor_parallel_degree": 2, "sequence_parallel": True,
          "hybrid_parallel_topo_order": "sharding_first"}, 2,
         Degrees(tensor=2, sequence_parallel=True, topology_order="sharding_first")),
        ({"data_parallel_degree": 4}, 4, Degrees(data=4)),
        ({"sep_parallel_degree": 2}, 4, Degrees(data=2, context=2)),
        ({"context_parallel_degree": 2, "tensor_parallel_degree": 2, "sharding": ("stage1",)}, 8,
         Degrees(context=2, ring=True, sharding=2, tensor=2)),
    ],
)  # fmt: skip
def test_degrees(asked, processes, expected):
    settings = Settings(**asked)
    assert layout_problems(settings, LLAMA, processes) == []
    assert degrees(settings, processes) == expected
    assert degrees(settings, processes).world_size == processes


_VPP = {"pipeline_parallel_degree": 4, "virtual_pp_degree": 9}


@pytest.mark.parametrize(
    ("asked", "processes", "words"),
    [
        ({"tensor_parallel_degree": 2}, 1,
         ["tensor_parallel_degree (2) needs 2", "1 was launched", "--nproc 2"]),
        ({"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}, 6,
         ["tensor_parallel_degree (2) x pipeline_parallel_degree (2) needs 4", "6 were launched",
          "launch 4 "]),
        ({"sharding": ("stage1",), "sharding_parallel_degree": 4}, 6,
         ["sharding_parallel_degree (4) needs 4", "6 were", "launch 4 "]),
        ({"sharding": ("stage1",), "sharding_parallel_degree": 4, "tensor_parallel_degree": 2}, 1,
         ["tensor_parallel_degree (2) x sharding_parallel_degree (4) needs 8", "--nproc 8"]),
        ({"sharding": ("stage2", "offload")}, 1,
         ["sharding is 'stage2 offload', but there is one process", "or leave sharding out"]),
        ({"data_parallel_degree": 4}, 1, ["data_parallel_degree is 4", "of 1 processes",
                                          "leave 1 for it; leave it out, or launch 4"]),
        ({"data_parallel_degree": 2, "tensor_parallel_degree": 2}, 8,
         ["data_parallel_degree is 2", "8 processes tensor_parallel_degree (2) leave 4",
          "launch 4 "]),
        ({"tensor_parallel_degree": 3}, 3, None),
        ({"pipeline_parallel_degree": 33}, 33,
         ["num_hidden_layers (32)", "pipeline_parallel_degree (33)", "of at most 32"]),
        (_VPP, 4, ["num_hidden_layers (32)", "pipeline_parallel_degree (4) x virtual_pp_degree (9)",
                   "use a virtual_pp_degree of at most 8"]),
        ({"recompute": True, "no_recompute_layers": (1, 32, 40)}, 1,
         ["no_recompute_layers holds 32, 40", "num_hidden_layers is 32", "last layer is 31"]),
        ({"sharding": ("stage2",), "pipeline_parallel_degree": 2}, 4, ["use stage1, or"]),
        ({"context_parallel_degree": 2}, 3, ["context_parallel_degree (2) needs 2", "3 were"]),
        ({"sep_parallel_degree": 64}, 64,
         ["num_attention_heads (32) is not divisible by sep_parallel_degree (64)",
          "or context_parallel_degree instead"]),
        ({"sep_parallel_degree": 16, "tensor_parallel_degree": 4}, 64,
         ["num_attention_heads (32) / tensor_parallel_degree (4) is not divisible"]),
    ],
)  # fmt: skip
def test_problems(asked, processes, words):
    found = layout_problems(Settings(**asked), LLAMA, processes)
    if words is None:  # the sizes of the model do not allow it
        assert [line.split(" ")[0] for line in found] == [
            "num_attention_heads", "intermediate_size", "num_key_value_heads",
        ]  # fmt: skip
        return
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]


def test_uneven_stages_are_possible():
    assert layout_problems(Settings(pipeline_parallel_degree=3), LLAMA, 3) == []
    settings = Settings(pipeline_parallel_degree=3, virtual_pp_degree=2)
    assert layout_problems(settings, LLAMA, 3) == []
    assert degrees(settings, 6) == Degrees(data=2, pipeline=3, virtual_stages=2)


def test_all_problems_come_at_once():
    settings = Settings(
        tensor_parallel_degree=3,
        pipeline_parallel_degree=40,
        sharding=("stage3",),
        recompute=True,
        no_recompute_layers=(99,),
    )
    text = "\n".join(layout_problems(settings, LLAMA, 8))
    for word in ("stage3", "needs 120", "num_attention_heads (32)", "at most 32", "holds 99"):
        assert word in text


def test_sharding_that_has_nothing_to_divide_over_is_pointed_out():
    settings = Settings(tensor_parallel_degree=4, sharding=("stage1",))
    assert layout_problems(settings, LLAMA, 4) == []
    [line] = layout_notices(settings, 4)
    assert line.startswith("sharding (stage1) has no effect: of 4 processes")
    assert layout_notices(settings, 8) == []
