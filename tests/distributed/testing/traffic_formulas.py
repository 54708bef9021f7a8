"""What a training step sends, as docs/parallelism.md says, for a tiny LLaMA under some layouts.

Names as there: b s tokens of a micro batch, h the hidden size, L layers, m micro batches, n
parameters of a rank before ZeRO; degrees t, p, d, z, c. docs/scale.md shows the same of large
models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk, cut
from pypkg.models.architecture.parameter_shapes import ParameterShape, whole_parameters
from pypkg.models.architecture.registry import config_from_huggingface
from pypkg.parallel.mesh import Degrees
from pypkg.planner.parallel.parameters import parameters

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
_FLOAT, _INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Layout:
    """What is trained: by default by a launch of test_traffic.py.

    Attributes:
        batch, sequence: of a micro batch.
        width: bytes of an activation, a weight or a gradient.
    """

    degrees: Degrees
    sharding_stage: int = 0
    reduces_once: bool = False
    recomputes: bool = False
    config: ModelConfig = CONFIG
    batch: int = BATCH
    sequence: int = SEQUENCE
    width: int = _FLOAT

    @property
    def tokens(self) -> int:
        """Of a micro batch, on a rank."""
        return self.batch * self.sequence // self.degrees.context

    @property
    def activations(self) -> int:
        """Elements of a micro batch between the layers."""
        return self.tokens * self.config.hidden_size

    def chunk(self, stage: int) -> ModelChunk:
        """The layers of a pipeline stage."""
        return cut(self.config.num_hidden_layers, self.degrees.pipeline)[stage]

    def parameters(self, stage: int) -> list[ParameterShape]:
        """Of the first tensor-parallel rank of a pipeline stage, before ZeRO."""
        return parameters(self.config, self.chunk(stage), self.degrees.tensor)


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
    "heads": Layout(Degrees(context=2)),
    "heads, tensor, recompute": Layout(Degrees(context=2, tensor=2), recomputes=True),
    "ring": Layout(Degrees(context=2, ring=True)),
    "ring, recompute": Layout(Degrees(context=4, ring=True), recomputes=True),
    "ring, data": Layout(Degrees(context=2, data=2, ring=True)),
    "ring, stage 1": Layout(Degrees(context=2, sharding=2, ring=True), 1),
    "ring, pipeline": Layout(Degrees(context=2, pipeline=2, ring=True)),
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
    if degrees.data * degrees.context > 1:
        elements = _reduced_over_replicas(layout, pipeline_rank, sharding_rank, owned)
        group = "context" if degrees.data == 1 else "data" if degrees.context == 1 else "other"
        _add(sent, f"{group} all_reduce", 1, elements, layout.width)
    if degrees.context > 1:
        _add_context(sent, layout, pipeline_rank, m)
    if degrees.tensor > 1:
        _add_tensor(sent, layout, pipeline_rank, m)
    if degrees.pipeline > 1:
        _add_pipeline(sent, layout, pipeline_rank, m)
    if layout.sharding_stage > 0:
        _SHARDING[layout.sharding_stage](sent, layout, pipeline_rank, m, owned)
    return sent


def _reduced_over_replicas(
    layout: Layout, stage: int, sharding_rank: int, owned: Sequence[Sequence[int]]
) -> int:
    if layout.sharding_stage == 0:
        return sum(each.size for each in layout.parameters(stage))
    if layout.sharding_stage == 1:
        return sum(owned[sharding_rank])
    return sum(_padded(size, layout.width) for size in owned[sharding_rank])


def _add_context(sent: Sent, layout: Layout, pipeline_rank: int, m: int) -> None:
    """Heads for tokens and back around attention; or keys and values, and their gradients."""
    degrees, config, width = layout.degrees, layout.config, layout.width
    c, layers = degrees.context, len(layout.chunk(pipeline_rank).layers)
    forward = m * layers * (2 if layout.recomputes else 1)
    of_head = layout.tokens * config.head_dim
    queries = of_head * config.num_attention_heads // degrees.tensor
    key_heads = config.num_key_value_heads // degrees.tensor
    if not degrees.ring:
        packed = queries + 2 * of_head * max(key_heads, c)
        for elements in (packed, queries):
            _add(sent, "context all_to_all", forward + m * layers, elements, width)
        return
    pair, backward = 2 * of_head * key_heads, m * layers
    _add(sent, "context send", (c - 1) * (forward + backward), pair, width)
    _add(sent, "context send", c * backward, pair)  # float32
    _add(sent, "context recv", (c - 1) * (forward + backward) + c * backward, 0)


def _add_tensor(sent: Sent, layout: Layout, pipeline_rank: int, m: int) -> None:
    """Attention and MLP of each layer, the embedding, and the head's input gradient."""
    degrees, passes = layout.degrees, 3 if layout.recomputes else 2
    part = layout.chunk(pipeline_rank)
    branches, t, width = 2 * len(part.layers), degrees.tensor, layout.width
    if part.is_last:
        _add(sent, "tensor all_reduce", m, layout.tokens)  # the loss: maxima,
        _add(sent, "tensor all_reduce", m, 2 * layout.tokens)  # sums and the labels' logits
    ends = part.is_first + part.is_last
    _add(sent, "tensor all_reduce", m * ends, layout.activations, width)
    if degrees.sequence_parallel:
        gathers = m * (passes * branches + ends)
        _add(sent, "tensor all_gather", gathers, layout.activations // t, width)
        _add(sent, "tensor reduce_scatter", m * passes * branches, layout.activations, width)
        whole = {each.name: each.shape for each in whole_parameters(layout.config, part)}
        for each in layout.parameters(pipeline_rank):
            if len(each.shape) == 1 and each.shape == whole[each.name]:  # norms
                _add(sent, "tensor all_reduce", m, each.size, width)
    else:
        _add(sent, "tensor all_reduce", m * passes * branches, layout.activations, width)


def _add_pipeline(sent: Sent, layout: Layout, pipeline_rank: int, m: int) -> None:
    """Activations to the next stage, with the token ids, and their gradients to the one before."""
    degrees, part = layout.degrees, layout.chunk(pipeline_rank)
    stream = layout.activations // (degrees.tensor if degrees.sequence_parallel else 1)
    if not part.is_last:
        _add(sent, "pipeline send", m, layout.tokens, _INT64)
        _add(sent, "pipeline recv", m, 0)
        _add(sent, "pipeline send", m, stream, layout.width)
    if not part.is_first:
        _add(sent, "pipeline recv", 2 * m, 0)
        _add(sent, "pipeline send", m, stream, layout.width)
    _add(sent, "pipeline broadcast", 1, 1)  # the loss,
    _add(sent, "pipeline broadcast", 1, 1, _INT64)  # after its dtype


def _add_stage_1(
    sent: Sent, layout: Layout, stage: int, m: int, owned: Sequence[Sequence[int]]
) -> None:
    """An operation for each parameter, whichever rank owns it."""
    for each in layout.parameters(stage):
        for operation in ("reduce", "broadcast"):
            _add(sent, f"sharding {operation}", 1, each.size, layout.width)


def _add_stage_2(
    sent: Sent, layout: Layout, stage: int, m: int, owned: Sequence[Sequence[int]]
) -> None:
    """A bucket and a buffer of parameters for each owner; in both, each parameter is padded.

    Large models have more buckets, of as many elements altogether.
    """
    width = layout.width
    for length in (sum(_padded(size, width) for size in sizes) for sizes in owned):
        _add(sent, "sharding reduce", 1 if layout.reduces_once else m, length, width)
        _add(sent, "sharding broadcast", 1, length, width)


def _add_stage_3(
    sent: Sent, layout: Layout, stage: int, m: int, owned: Sequence[Sequence[int]]
) -> None:
    """Matrices in slices, gathered in the forward and in the backward pass; vectors whole.

    A recomputed layer gathers its matrices once more, but still has the last in its backward pass.
    """
    z, width, held = layout.degrees.sharding, layout.width, layout.parameters(stage)
    matrices = [each for each in held if len(each.shape) > 1]
    gathered = matrices * 2
    if layout.recomputes:
        last = {each.layer: each for each in matrices}
        gathered += [
            each for each in matrices if each.layer is not None and each != last[each.layer]
        ]
    for each in gathered:
        _add(sent, "sharding all_gather", m, each.size // z, width)
    for each in matrices:
        _add(sent, "sharding reduce_scatter", m, each.size, width)
    vectors = sum(_padded(each.size, width) for each in held if len(each.shape) == 1)
    _add(sent, "sharding all_reduce", 1, vectors, width)


def _padded(size: int, width: int) -> int:
    """Fleet's alignment of parameters in a buffer, 256 bytes."""
    unit = 256 // width
    return -(-size // unit) * unit


_SHARDING = {1: _add_stage_1, 2: _add_stage_2, 3: _add_stage_3}
