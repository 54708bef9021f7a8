"""What a training step sends, as docs/parallelism.md says, for a tiny LLaMA under some layouts.

Names as there: b s tokens of a micro batch, h the hidden size, L layers, m micro batches, N
parameters, of which V = (2 L + 1) h are vectors; degrees t, p, d, z.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pypkg.models.architecture.layer_split import cut
from pypkg.models.architecture.registry import config_from_huggingface
from pypkg.parallel.mesh import Degrees

BATCH, SEQUENCE = 2, 8
CONFIG = config_from_huggingface(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
    }
)
_TOKENS = BATCH * SEQUENCE
_ACTIVATIONS = _TOKENS * CONFIG.hidden_size
_LAYERS = CONFIG.num_hidden_layers
_PARAMETERS = CONFIG.num_parameters()
_VECTORS = (2 * _LAYERS + 1) * CONFIG.hidden_size
_NUM_MATRICES = 4 * _LAYERS + 2  # query-key-value, output, gate-up, down; embedding and head
_NUM_PARAMETERS = _NUM_MATRICES + 2 * _LAYERS + 1
_FLOAT, _INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Layout:
    """What a launch of test_traffic.py trains."""

    degrees: Degrees
    sharding_stage: int = 0
    reduces_once: bool = False
    recomputes: bool = False


LAYOUTS = {
    "data": Layout(Degrees(data=2)),
    "tensor": Layout(Degrees(tensor=2)),
    "tensor, recompute": Layout(Degrees(tensor=2), recomputes=True),
    "sequence": Layout(Degrees(tensor=2, sequence_parallel=True)),
    "pipeline": Layout(Degrees(pipeline=2)),
    "stage 1, data": Layout(Degrees(sharding=2, data=2), 1),
    "stage 2, data": Layout(Degrees(sharding=2, data=2), 2),
    "stage 2, once": Layout(Degrees(sharding=2), 2, reduces_once=True),
    "stage 3, recompute": Layout(Degrees(sharding=2), 3, recomputes=True),
    "tensor, sequence, pipeline": Layout(Degrees(tensor=2, pipeline=2, sequence_parallel=True)),
}

# By "group operation": operations, elements, bytes.
Sent = defaultdict[str, list[int]]


def _add(sent: Sent, what: str, times: int, elements: int, bytes_of_one: int = _FLOAT) -> None:
    """``times`` operations of ``elements`` each."""
    for place, number in enumerate((times, times * elements, times * elements * bytes_of_one)):
        sent[what][place] += number


def expected(
    layout: Layout, pipeline_rank: int, sharding_rank: int, m: int, owned: Sequence[Sequence[int]]
) -> Sent:
    """Of a rank in a step of ``m`` micro batches.

    Args:
        owned: sizes of the parameters that each rank of the sharding group owns, in stages 1 and 2.
    """
    sent: Sent = defaultdict(lambda: [0, 0, 0])
    _add(sent, "world all_reduce", 1, 1)  # squares of the gradient norm
    degrees = layout.degrees
    if degrees.data > 1:
        _add(sent, "data all_reduce", 1, _reduced_over_data(layout, sharding_rank, owned))
    if degrees.tensor > 1:
        _add_tensor(sent, layout, pipeline_rank, m)
    if degrees.pipeline > 1:
        _add_pipeline(sent, degrees, pipeline_rank, m)
    if layout.sharding_stage > 0:
        _SHARDING[layout.sharding_stage](sent, layout, m, owned)
    return sent


def _reduced_over_data(layout: Layout, sharding_rank: int, owned: Sequence[Sequence[int]]) -> int:
    if layout.sharding_stage == 0:
        return _PARAMETERS
    if layout.sharding_stage == 1:
        return sum(owned[sharding_rank])
    return sum(map(_padded, owned[sharding_rank]))


def _add_tensor(sent: Sent, layout: Layout, pipeline_rank: int, m: int) -> None:
    """Attention and MLP of each layer, the embedding, and the head's input gradient."""
    degrees, passes = layout.degrees, 3 if layout.recomputes else 2
    part = cut(_LAYERS, degrees.pipeline)[pipeline_rank]
    branches, t = 2 * len(part.layers), degrees.tensor
    if part.is_last:
        _add(sent, "tensor all_reduce", m, _TOKENS)  # the loss: maxima,
        _add(sent, "tensor all_reduce", m, 2 * _TOKENS)  # sums and the labels' logits
    ends = part.is_first + part.is_last
    _add(sent, "tensor all_reduce", m * ends, _ACTIVATIONS)
    if degrees.sequence_parallel:
        _add(sent, "tensor all_gather", m * (passes * branches + ends), _ACTIVATIONS // t)
        _add(sent, "tensor reduce_scatter", m * passes * branches, _ACTIVATIONS)
        _add(sent, "tensor all_reduce", m * (branches + part.is_last), CONFIG.hidden_size)
    else:
        _add(sent, "tensor all_reduce", m * passes * branches, _ACTIVATIONS)


def _add_pipeline(sent: Sent, degrees: Degrees, pipeline_rank: int, m: int) -> None:
    """Of two stages."""
    stream = _ACTIVATIONS // (degrees.tensor if degrees.sequence_parallel else 1)
    if pipeline_rank == 0:
        _add(sent, "pipeline send", m, _TOKENS, _INT64)
        _add(sent, "pipeline recv", m, 0)
    else:
        _add(sent, "pipeline recv", 2 * m, 0)
    _add(sent, "pipeline send", m, stream)
    _add(sent, "pipeline broadcast", 1, 1)  # the loss,
    _add(sent, "pipeline broadcast", 1, 1, _INT64)  # after its dtype


def _add_stage_1(sent: Sent, layout: Layout, m: int, owned: Sequence[Sequence[int]]) -> None:
    """An operation for each parameter, whichever rank owns it."""
    for operation in ("reduce", "broadcast"):
        sent[f"sharding {operation}"] = [_NUM_PARAMETERS, _PARAMETERS, _PARAMETERS * _FLOAT]


def _add_stage_2(sent: Sent, layout: Layout, m: int, owned: Sequence[Sequence[int]]) -> None:
    """A bucket and a buffer of parameters for each owner; in both, each parameter is padded."""
    for length in (sum(map(_padded, sizes)) for sizes in owned):
        _add(sent, "sharding reduce", 1 if layout.reduces_once else m, length)
        _add(sent, "sharding broadcast", 1, length)


def _add_stage_3(sent: Sent, layout: Layout, m: int, owned: Sequence[Sequence[int]]) -> None:
    """Matrices in slices, gathered in the forward and in the backward pass; vectors whole.

    A recomputed layer gathers its matrices once more, but still has the last in its backward pass.
    """
    z = layout.degrees.sharding
    matrices = _PARAMETERS - _VECTORS
    gathers, elements = 2 * _NUM_MATRICES, 2 * matrices
    if layout.recomputes:
        down = CONFIG.intermediate_size * CONFIG.hidden_size
        ends = 2 * CONFIG.vocab_size * CONFIG.hidden_size
        gathers += 3 * _LAYERS
        elements += matrices - ends - _LAYERS * down
    elements //= z
    sent["sharding all_gather"] = [m * gathers, m * elements, m * elements * _FLOAT]
    vectors = (2 * _LAYERS + 1) * _padded(CONFIG.hidden_size)
    sent["sharding reduce_scatter"] = [m * _NUM_MATRICES, m * matrices, m * matrices * _FLOAT]
    _add(sent, "sharding all_reduce", 1, vectors)


def _padded(size: int) -> int:
    """Fleet's alignment of parameters in a buffer, 256 bytes."""
    unit = 256 // _FLOAT
    return -(-size // unit) * unit


_SHARDING = {1: _add_stage_1, 2: _add_stage_2, 3: _add_stage_3}
