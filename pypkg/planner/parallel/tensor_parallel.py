"""What tensor and sequence parallelism allocate: the counterpart of parallel/tp_layers.py.

Fleet's layers (paddle/distributed/fleet/layers/mpu, utils/sequence_parallel_utils.py) copy the
input of a column-parallel layer and the gradient of a row-parallel layer's output; sums over the
group are in place. On a CPU the adapter in parallel/gloo adds copies, which have the term
"communication".
"""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.weights.tp_shards import key_value_range
from pypkg.parallel.mesh import Degrees
from pypkg.planner.operators import ACTIVATIONS, COMMUNICATION, GRADIENTS, Operators
from pypkg.planner.tape import Gradients, Parameter, Tensor


@dataclass(frozen=True)
class Shard:
    """The widths of the TP shard that one rank holds.

    Attributes:
        config: configuration of the whole model.
        degree, rank: of the tensor group.
    """

    config: ModelConfig
    degree: int = 1
    rank: int = 0

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.config.num_attention_heads // self.degree

    @property
    def key_value_heads(self) -> int:
        start, stop = key_value_range(self.config, self.degree, self.rank)
        return stop - start

    @property
    def query_size(self) -> int:
        return self.heads * self.config.head_dim

    @property
    def key_value_size(self) -> int:
        return self.key_value_heads * self.config.head_dim

    @property
    def intermediate_size(self) -> int:
        return self.config.intermediate_size // self.degree

    @property
    def padded_rows(self) -> int:
        """Rows of the tables of the vocabulary, padding included."""
        return -(-self.config.vocab_size // self.degree)

    @property
    def rows(self) -> int:
        """Rows that stand for entries of the vocabulary."""
        return min(self.padded_rows, self.config.vocab_size - self.rank * self.padded_rows)


class TensorParallel:
    """Inputs and outputs of the layers that tensor parallelism divides.

    Args:
        degrees: degrees of the layout.
    """

    def __init__(self, ops: Operators, degrees: Degrees) -> None:
        self._ops, self._degrees = ops, degrees
        self.degree = degrees.tensor
        self.splits_tokens = degrees.sequence_parallel and degrees.tensor > 1

    def tokens(self, tokens: int) -> int:
        """Tokens of ``tokens`` that this rank has between the layers."""
        return tokens // self.degree if self.splits_tokens else tokens

    def column_linear(
        self, x: Tensor, weight: Parameter, bias: Parameter | None, outputs: int
    ) -> Tensor:
        """A column-parallel layer with ``outputs`` output elements on this rank."""
        if self.degree > 1 and self._degrees.overlap_input_gradients:
            return self._overlapped(x, weight, bias, outputs)
        return self._ops.linear(self.enter(x), weight, bias, outputs)

    def enter(self, x: Tensor) -> Tensor:
        """The operand of a column-parallel layer's product, from the layer's input."""
        if self.splits_tokens:
            return self.gather(x, sums=True)
        if self.degree == 1 or self._degrees.skip_identity:
            return x
        return self._identity(x)

    def leave(self, product: Tensor) -> Tensor:
        """The output of a row-parallel layer without a bias, from its product."""
        if self.degree == 1:
            return product
        return self._reduce_scatter(product) if self.splits_tokens else self._all_reduce(product)

    def row_linear(
        self, x: Tensor, weight: Parameter, bias: Parameter | None, outputs: int
    ) -> Tensor:
        """A row-parallel layer; ``outputs`` elements before the tokens are split."""
        if self.degree == 1:
            return self._ops.linear(x, weight, bias, outputs)
        out = self.leave(self._ops.linear(x, weight, None, outputs))
        return out if bias is None else self._ops.add_bias(out, bias)

    def embedding(self, table: Parameter, tokens: int, width: int) -> Tensor:
        """Rows of a table that is divided by rows."""
        ops = self._ops
        if self.degree == 1:
            return ops.embedding(table, tokens * width)
        if ops.is_gpu:  # c_embedding, which keeps the ids alone
            return self._all_reduce(ops.embedding(table, tokens * width))
        rows = ops.embedding(table, tokens * width)
        out, mask, places = (
            ops.like(rows, ACTIVATIONS),
            ops.new(tokens),
            ops.tape.empty(8 * tokens, ACTIVATIONS),
        )
        kept = rows.detach()

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert mask and places
            return [ops.like(kept)]

        ops.tape.record([rows], [out], backward)
        del rows
        return self._all_reduce(out)

    def split(self, x: Tensor) -> Tensor:
        """The tokens of this rank, a view; its gradient is gathered."""
        if not self.splits_tokens:
            return x
        out = Tensor(x.num_bytes // self.degree, x.memory)

        def backward(incoming: list[Tensor | None], size: int = x.num_bytes) -> Gradients:
            return [self._ops.tape.empty(size, GRADIENTS)]

        self._ops.tape.record([x], [out], backward)
        return out

    def gather(self, x: Tensor, sums: bool = False) -> Tensor:
        """All tokens; the gradient is this rank's part, a view, or summed and scattered."""
        if not self.splits_tokens:
            return x
        ops, part = self._ops, x.num_bytes
        out = ops.tape.empty(part * self.degree, ACTIVATIONS)

        def backward(incoming: list[Tensor | None]) -> Gradients:
            whole = incoming[0]
            assert whole is not None
            return [self._scattered(whole) if sums else Tensor(part, whole.memory)]

        ops.tape.record([x], [out], backward)
        return out

    def gather_gradient(self, incoming: list[Tensor | None]) -> None:
        """The backward pass of a row-parallel layer's sum, which needs no saved tensors.

        It runs before the layer is recomputed; the recomputed layer reuses its result.
        """
        if self.splits_tokens and incoming[0] is not None:
            size = incoming[0].num_bytes * self.degree
            incoming[0] = self._ops.tape.empty(size, GRADIENTS)

    def sum_over_group(self, gradient: Tensor) -> Tensor:
        """The gradient hook of a parameter that is replicated while its uses are divided."""
        return self._ops.like(gradient, GRADIENTS)

    def sum_replicas(self, shard: Shard, gradient: Tensor) -> Tensor:
        """The hook of columns that several ranks replicate (``sum_replica_gradients``)."""
        part = 2 * shard.key_value_size * gradient.num_bytes
        part //= shard.query_size + 2 * shard.key_value_size
        rooms = self._ops.tape.empty(shard.config.num_key_value_heads * part, COMMUNICATION)
        summed = self._ops.like(gradient, GRADIENTS)
        del rooms
        return summed

    def _identity(self, x: Tensor) -> Tensor:
        """c_identity: a copy; its gradient is summed in place."""
        out = self._ops.like(x, ACTIVATIONS)
        self._ops.tape.record([x], [out], lambda incoming: incoming)
        return out

    def _all_reduce(self, x: Tensor) -> Tensor:
        """mp_allreduce: in place; the gradient is copied."""
        ops, out = self._ops, x.detach()
        copies = not self._degrees.skip_identity

        def backward(incoming: list[Tensor | None]) -> Gradients:
            gradient = incoming[0]
            assert gradient is not None
            return [ops.like(gradient) if copies else gradient]

        ops.tape.record([x], [out], backward)
        return out

    def _scattered(self, whole: Tensor) -> Tensor:
        """The part of this rank of the sum over the group."""
        out = self._ops.tape.empty(whole.num_bytes // self.degree, GRADIENTS)
        self._sum_a_copy(whole.num_bytes)
        return out

    def _sum_a_copy(self, size: int) -> None:
        """reduce_scatter_tensor of parallel/gloo/collectives.py: a copy is summed."""
        if not self._ops.is_gpu:
            self._ops.tape.empty(size, COMMUNICATION)

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        ops, size = self._ops, x.num_bytes
        out = ops.tape.empty(size // self.degree, ACTIVATIONS)
        self._sum_a_copy(size)

        def backward(incoming: list[Tensor | None]) -> Gradients:
            gradient = incoming[0]
            is_whole = gradient is not None and gradient.num_bytes == size
            return [gradient if is_whole else ops.tape.empty(size, GRADIENTS)]

        ops.tape.record([x], [out], backward)
        return out

    def _overlapped(
        self, x: Tensor, weight: Parameter, bias: Parameter | None, outputs: int
    ) -> Tensor:
        """``OverlappedColumnLinear``, which keeps the whole input and copies nothing."""
        ops = self._ops
        if self.splits_tokens:
            kept = ops.tape.empty(x.num_bytes * self.degree, ACTIVATIONS)
        else:
            kept = x.detach()
        out = ops.new(outputs)
        inputs: list[Tensor] = [x, weight]
        if bias is not None:
            out = ops.like(out, ACTIVATIONS)
            inputs.append(bias)

        def backward(incoming: list[Tensor | None]) -> Gradients:
            of_x = ops.like(kept)
            if self.splits_tokens:
                whole, of_x = of_x, self._scattered(of_x)
                assert whole
            gradients = [of_x, ops.like(weight)]
            if bias is not None:
                gradients.append(ops.like(bias))
            return gradients

        ops.tape.record(inputs, [out], backward)
        return out
