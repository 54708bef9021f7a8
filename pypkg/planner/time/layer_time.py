"""Seconds of a decoder layer, and of the head with the loss, for one micro batch on one rank."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pypkg.models.architecture.config import ModelConfig
from pypkg.planner.micro_batch import Batch
from pypkg.planner.time.context_time import ContextTime
from pypkg.planner.time.gpus import Gpu

_LOSS_CHUNK_BYTES = 256 * 2**20  # ops/loss/linear_cross_entropy.py
_SCORE_PASSES = 7  # over stored scores, each way: written, mask added, softmax, read
_FLOAT32_ROPE_PASSES = 16  # float32 elements of query or key that operators read and write


@dataclass(frozen=True)
class Seconds:
    """Seconds by term; ``tensor`` and ``context`` are communication of these groups."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(*(getattr(self, f.name) * factor for f in fields(self)))

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Implementation:
    """How a layer is implemented: memory traffic and messages besides its matrix products.

    Attributes:
        stream_passes: over [tokens, hidden_size], forward and backward: norms and residuals.
        gate_passes: over [tokens, intermediate_size], forward and backward.
        logit_passes: over the logits, both ways, beside the products that make them.
        projections: linear layers that make query, key and value.
        up_projections: linear layers that make gate and up. Under tensor parallelism each of both
            kinds copies its input and sums the gradient of it over the group.
        rope_in_float32: query and key are rotated by plain operators on float32 tensors.
        stored_scores: attention stores the scores and takes no part of the mask out.
        gradients_overlap: gradients are reduced beside the backward pass.
    """

    # Norm with residual: docs/kernel_notes.md. Blocks write the outputs of norms and activations
    # again in the backward pass (ops/blocks.py). In a tensor group norms are no part of a block, so
    # two of the ten passes are too many there.
    stream_passes: tuple[float, float] = (8, 10)
    gate_passes: tuple[float, float] = (3, 6)
    # Written, read twice and replaced by their gradient, which two products read.
    logit_passes: float = 6
    projections: int = 1
    up_projections: int = 1
    rope_in_float32: bool = False
    stored_scores: bool = False
    gradients_overlap: bool = True


OURS = Implementation()


class LayerTime:
    """Times of one rank.

    Args:
        tensor: degree of tensor parallelism, within a machine if ``tensor_rate`` is its link's.
        tensor_rate: bytes per second that a rank exchanges with the tensor group.
        sequence_parallel: norms and residuals take the rank's share of the tokens.
        ring: whether keys and values go round the ranks that divide the tokens.
        context_rate: bytes per second that a rank exchanges with these.
        element_bytes: bytes of an activation or weight.
    """

    def __init__(
        self,
        config: ModelConfig,
        gpu: Gpu,
        batch: Batch,
        *,
        tensor: int = 1,
        tensor_rate: float = 0.0,
        sequence_parallel: bool = False,
        ring: bool = False,
        context_rate: float = 0.0,
        element_bytes: int = 2,
        implementation: Implementation = OURS,
    ) -> None:
        self._config, self._gpu, self._batch = config, gpu, batch
        self._t, self._rate, self._bytes = tensor, tensor_rate, element_bytes
        self._share = tensor if sequence_parallel else 1
        self._made = implementation
        self._context = self._context_time(ring, context_rate) if batch.context > 1 else None

    def _context_time(self, ring: bool, rate: float) -> ContextTime:
        config, c, tokens = self._config, self._batch.context, self._batch.tokens
        heads = max(config.num_key_value_heads // self._t, 1)
        keys = (heads if ring else max(heads, c)) * config.head_dim
        return ContextTime(
            *(c, ring, rate, tokens * config.query_size / self._t, 2 * tokens * keys), self._bytes
        )

    def core_forward(self) -> Seconds:
        """What is recomputed of attention without projections: not the exchange of heads."""
        core = self._core(backward=False)
        if self._context is None or not self._context.is_ring:
            return core
        return core + self._divided(core, backward=False)

    def attention_forward(self) -> Seconds:
        """The attention block with its projections."""
        core = self._core(backward=False)
        return (
            self._linear(*self._attention_matrices())
            + core
            + self._divided(core, backward=False)
            + self._exchange(1)
        )

    def forward(self) -> Seconds:
        """A layer."""
        matrices, core = self._matrices(), self._core(backward=False)
        return (
            self._linear(*matrices)
            + core
            + self._divided(core, backward=False)
            + self._moved(self._made.stream_passes[0], self._made.gate_passes[0], backward=False)
            + self._exchange(2)
        )

    def backward(self) -> Seconds:
        """The backward pass of a layer, without what it recomputes."""
        matrices, core = self._matrices(), self._core(backward=True)
        return (
            self._linear(*matrices) * 2
            + core
            + self._divided(core, backward=True)
            + self._moved(self._made.stream_passes[1], self._made.gate_passes[1], backward=True)
            + self._exchange(self._made.projections + self._made.up_projections)
        )

    def head(self) -> Seconds:
        """Head and loss, forward and backward: the products of both are in one pass."""
        config, tokens, t = self._config, self._batch.tokens, self._t
        vocabulary = -(-config.vocab_size // t)
        logits = tokens * vocabulary
        chunks = -(-logits * self._bytes // _LOSS_CHUNK_BYTES)
        weight = vocabulary * config.embedding_size
        moved = self._made.logit_passes * self._bytes * logits
        moved += chunks * 2 * 4 * weight  # each chunk adds to a float32 gradient of the weight
        if config.norm_head:
            moved += 6 * self._bytes * weight
        return (
            self._linear((config.embedding_size, vocabulary)) * 3
            + Seconds(memory=moved / self._gpu.memory_rate)
            + self._exchange(2)
        )

    def _divided(self, core: Seconds, backward: bool) -> Seconds:
        """What the attention ``core`` takes beside itself where ranks divide the tokens."""
        if self._context is None:
            return Seconds()
        return Seconds(
            memory=self._context.moved(backward) / self._gpu.memory_rate,
            context=self._context.sent(backward, core.total),
        )

    def _matrices(self) -> list[tuple[int, int]]:
        return [*self._attention_matrices(), *self._mlp_matrices()]

    def _attention_matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the matrices on this rank."""
        config, t = self._config, self._t
        query, key = config.query_size // t, max(config.key_value_size // t, config.head_dim)
        return [(config.hidden_size, query + 2 * key), (query, config.hidden_size)]

    def _mlp_matrices(self) -> list[tuple[int, int]]:
        config = self._config
        inner = config.intermediate_size // self._t
        up = 2 * inner if config.gated_mlp else inner
        return [(config.hidden_size, up), (inner, config.hidden_size)]

    def _linear(self, *matrices: tuple[int, int]) -> Seconds:
        """One product of the tokens with each matrix, bound by arithmetic or by memory."""
        tokens, seconds = self._batch.tokens, 0.0
        for inputs, outputs in matrices:
            flops = 2 * tokens * inputs * outputs
            moved = self._bytes * (tokens * (inputs + outputs) + inputs * outputs)
            seconds += max(
                flops / self._gpu.product_rate(self._bytes, (tokens, inputs, outputs)),
                moved / self._gpu.memory_rate,
            )
        return Seconds(products=seconds)

    def _core(self, backward: bool) -> Seconds:
        """Scores and their products with values: two products forward and five backward.

        Where scores are stored, the backward pass has four and no mask saves any.
        """
        config, batch, gpu = self._config, self._batch, self._gpu
        scores = batch.tokens * config.num_attention_heads / self._t * batch.sequence
        if self._made.stored_scores:
            flops = (8 if backward else 4) * scores * config.head_dim
            moved = _SCORE_PASSES * self._bytes * scores
            return Seconds(
                attention=flops / gpu.product_rate(self._bytes), memory=moved / gpu.memory_rate
            )
        flops = (10 if backward else 4) * scores * config.head_dim * self._visible()
        return Seconds(attention=flops / gpu.attention_rate(self._bytes))

    def _visible(self) -> float:
        """Part of the scores that the mask leaves, of the mean layer."""
        config, s = self._config, self._batch.sequence
        if config.prefix_lm:
            return 1.0  # at most
        window = min(config.sliding_window or s, s)
        windowed = sum(kind == "sliding_attention" for kind in config.layer_types)
        part = windowed / len(config.layer_types)
        return part * (window / s) * (1 - window / (2 * s)) + (1 - part) / 2

    def _moved(self, stream_passes: float, gate_passes: float, backward: bool) -> Seconds:
        """Seconds of the operators that are bound by memory."""
        config, tokens, t, made = self._config, self._batch.tokens, self._t, self._made
        inputs = made.projections + made.up_projections
        copies = 0 if t == 1 else 2 * inputs  # c_identity reads and writes each input
        if backward:
            copies = 3 * (inputs - 2)  # gradients of one input are added up
        elements = stream_passes * tokens * config.hidden_size / self._share
        elements += copies * tokens * config.hidden_size
        elements += gate_passes * tokens * config.intermediate_size / t
        moved = self._bytes * elements
        if config.position_embedding == "rope":
            rotated = tokens * (config.query_size + config.key_value_size) / t
            plain = 4 * _FLOAT32_ROPE_PASSES if made.rope_in_float32 else 2 * self._bytes
            moved += plain * rotated
        return Seconds(memory=moved / self._gpu.memory_rate)

    def _exchange(self, count: int) -> Seconds:
        """All-reduces of [tokens, hidden_size], or what sequence parallelism sends for them."""
        if self._t == 1:
            return Seconds()
        size = self._bytes * self._batch.tokens * self._config.hidden_size
        return Seconds(tensor=count * 2 * (self._t - 1) / self._t * size / self._rate)
