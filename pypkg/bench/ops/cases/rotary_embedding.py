"""rotary_embedding of queries and keys, half-split pairing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pypkg import ops
from pypkg.bench.ops import work
from pypkg.bench.ops.case import (
    COMPOSITION,
    OURS,
    TORCH,
    Baseline,
    BenchmarkCase,
    Inputs,
    Workload,
    normal,
)
from pypkg.bench.ops.run import Differentiated

if TYPE_CHECKING:
    import torch


def _torch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    # As in transformers, the tables have the dtype of q, so that nothing is promoted to float32.
    cos, sin = (table.to(q.dtype)[None, :, None, :] for table in (cos, sin))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return rotate(q), rotate(k)


def _case(workload: Workload) -> BenchmarkCase[Differentiated]:
    config = workload.config
    batch, sequence, dim = workload.batch, workload.sequence, config.head_dim
    heads = (config.num_attention_heads, config.num_key_value_heads)

    def inputs(rng: np.random.Generator) -> Inputs:
        rates = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
        angles = np.outer(np.arange(sequence), rates)
        return {
            "q": normal(rng, batch, sequence, heads[0], dim),
            "k": normal(rng, batch, sequence, heads[1], dim),
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
        }

    return BenchmarkCase(
        "rotary_embedding",
        f"{workload.name}: [{batch}, {sequence}, {heads[0]}+{heads[1]}, {dim}]",
        work.rotary_embedding(batch, sequence, sum(heads), dim),
        (
            Baseline(OURS, "paddle", ops.rotary_embedding),
            Baseline(COMPOSITION, "paddle", ops.rotary_embedding_reference),
            Baseline(TORCH, "torch", _torch),
        ),
        Differentiated(inputs, ("q", "k"), ops.rotary_embedding_reference),
    )


def cases(workloads: Sequence[Workload]) -> list[BenchmarkCase[Differentiated]]:
    return [_case(workload) for workload in workloads]
