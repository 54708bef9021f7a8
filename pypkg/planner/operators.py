"""The memory of each operator: what it allocates, saves for its backward pass, and returns.

The counterpart of pypkg/ops and of the Paddle operators that the layers call. Sizes are in
elements; a tensor of the model has ``dtype_bytes`` for each, statistics have four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pypkg.planner.tape import Gradients, Parameter, Tape, Tensor

ACTIVATIONS, GRADIENTS, WORKSPACE, LOGITS = "activations", "gradients", "workspace", "logits"
COMMUNICATION, INPUTS = "communication", "inputs"

_FLOAT = 4
# Of the logits that are in memory at a time (ops/loss/linear_cross_entropy.py).
_GPU_CHUNK_BYTES, _CPU_CHUNK_BYTES = 256 * 2**20, 128 * 2**20
# rms_norm.cu divides rows over at most 132 multiprocessors (H100); an A100 has 108.
_MULTIPROCESSORS = 132


class Operators:
    """Operators on ``tape``.

    Args:
        dtype_bytes: bytes of an element of the model.
        is_gpu: whether GPU kernels run; their workspaces differ from those of CPU kernels.
    """

    def __init__(self, tape: Tape, dtype_bytes: int, is_gpu: bool = False) -> None:
        self.tape, self.dtype_bytes, self.is_gpu = tape, dtype_bytes, is_gpu

    def new(self, elements: int, term: str = ACTIVATIONS) -> Tensor:
        """A tensor of the model's dtype."""
        return self.tape.empty(elements * self.dtype_bytes, term)

    def floats(self, elements: int, term: str = ACTIVATIONS) -> Tensor:
        """A float32 tensor."""
        return self.tape.empty(elements * _FLOAT, term)

    def like(self, tensor: Tensor, term: str = GRADIENTS) -> Tensor:
        """A new tensor of the same size."""
        return self.tape.empty(tensor.num_bytes, term)

    def _elements(self, tensor: Tensor) -> int:
        return tensor.num_bytes // self.dtype_bytes

    def scratch(self, floats: int) -> None:
        """Memory that a kernel uses only while it runs."""
        self.floats(floats, WORKSPACE)

    def _row_partials(self, rows: int, columns: int) -> int:
        """Floats for partial sums of a norm's weight gradient (csrc/kernels/rms_norm)."""
        if self.is_gpu:
            vectors = -(-columns // 8)
            per_thread = 1 if vectors <= 256 else 2 if vectors <= 512 else 4
            each = max(512 // (-(-vectors // per_thread // 32) * 32), 1)
            return min(rows, each * _MULTIPROCESSORS) * columns
        return min(max(rows // 16, 1), 64) * columns

    def view(self, x: Tensor) -> Tensor:
        """A reshape of contiguous memory: no copy in either direction."""
        out = x.detach()
        self.tape.record([x], [out], lambda incoming: incoming)
        return out

    def linear(self, x: Tensor, weight: Parameter, bias: Parameter | None, outputs: int) -> Tensor:
        """x @ weight + bias, with ``outputs`` elements."""
        out, kept = self.new(outputs), x.detach()

        def backward(incoming: list[Tensor | None]) -> Gradients:
            return [self.like(kept), self.like(weight)]

        self.tape.record([x, weight], [out], backward)
        return out if bias is None else self.add_bias(out, bias)

    def add_bias(self, x: Tensor, bias: Parameter) -> Tensor:
        """x + bias; nothing is kept."""
        out, size = self.like(x, ACTIVATIONS), x.num_bytes

        def backward(incoming: list[Tensor | None]) -> Gradients:
            gradient = incoming[0]
            # Sequence parallelism may have gathered it before (TensorParallel.gather_gradient).
            is_copied = gradient is None or gradient.num_bytes == size
            return [self._passed_on(gradient) if is_copied else gradient, self.like(bias)]

        self.tape.record([x, bias], [out], backward)
        return out

    def _passed_on(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient of an addend; Paddle's add_grad copies it."""
        return None if gradient is None else self.like(gradient)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        out = self.like(x, ACTIVATIONS)

        def backward(incoming: list[Tensor | None]) -> Gradients:
            return [self._passed_on(incoming[0]), self._passed_on(incoming[0])]

        self.tape.record([x, y], [out], backward)
        return out

    def rms_norm(self, x: Tensor, weight: Parameter, rows: int) -> Tensor:
        """The norm of each of ``rows`` rows."""
        out, rstd, kept = self.like(x, ACTIVATIONS), self.floats(rows), x.detach()

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert rstd
            gradients = [self.like(kept), self.like(weight)]
            self.scratch(self._row_partials(rows, kept.num_bytes // rows // self.dtype_bytes))
            return gradients

        self.tape.record([x, weight], [out], backward)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Parameter, rows: int
    ) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        out, stream = self.like(x, ACTIVATIONS), self.like(x, ACTIVATIONS)
        rstd, kept = self.floats(rows), stream.detach()

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert rstd
            return self.add_rms_norm_gradients(kept, weight, rows)

        self.tape.record([x, residual, weight], [out, stream], backward)
        return out, stream

    def add_rms_norm_gradients(self, stream: Tensor, weight: Tensor, rows: int) -> list[Tensor]:
        """Gradients of x, of the residual and of the weight."""
        gradients = [self.like(stream), self.like(stream), self.like(weight)]
        self.scratch(self._row_partials(rows, stream.num_bytes // rows // self.dtype_bytes))
        return gradients

    def split(self, x: Tensor, elements: Sequence[int]) -> list[Tensor]:
        """Views of parts of each row; the backward pass joins their gradients."""
        outs = [Tensor(each * self.dtype_bytes, x.memory) for each in elements]

        def backward(incoming: list[Tensor | None], size: int = x.num_bytes) -> Gradients:
            return [self.tape.empty(size, GRADIENTS)]

        self.tape.record([x], outs, backward)
        return outs

    def contiguous(self, x: Tensor) -> Tensor:
        """The reshape of a strided view, which copies; its gradient is a view."""
        out = self.new(self._elements(x))
        self.tape.record([x], [out], lambda incoming: incoming)
        return out

    def rotary(self, q: Tensor, k: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotated q and k; the positions are kept, and the tables elsewhere."""
        outs = [self.like(q, ACTIVATIONS), self.like(k, ACTIVATIONS)]

        def backward(incoming: list[Tensor | None], kept: object = positions) -> Gradients:
            return [None if each is None else self.like(each) for each in incoming]

        self.tape.record([q, k], outs, backward)
        return outs[0], outs[1]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, rows: int, workspace: int) -> Tensor:
        """Flash attention of ``rows`` query heads of tokens; ``workspace`` floats in backward."""
        out, lse = self.like(q, ACTIVATIONS), self.floats(rows)
        kept = [each.detach() for each in (q, k, v, out)]

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert lse
            gradients = [self.like(each) for each in kept[:3]]
            self.scratch(workspace)
            return gradients

        self.tape.record([q, k, v], [out], backward)
        return out

    def packed_attention(
        self, qkv: Tensor, out_elements: int, rows: int, workspace: int, is_copied: bool
    ) -> Tensor:
        """Rotation and flash attention of packed qkv, which is rotated in place or in a copy."""
        rotated = self.like(qkv, ACTIVATIONS) if is_copied else qkv.detach()
        out, lse = self.new(out_elements), self.floats(rows)
        kept = out.detach()

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert lse and kept
            gradient = self.like(rotated)
            self.scratch(workspace)
            return [gradient]

        self.tape.record([qkv], [out], backward)
        return out

    def gated(self, packed: Tensor) -> Tensor:
        """activation(gate) * up of a packed pair."""
        out = self.tape.empty(packed.num_bytes // 2, ACTIVATIONS)
        kept = packed.detach()
        self.tape.record([packed], [out], lambda incoming: [self.like(kept)])
        return out

    def activation(self, x: Tensor, name: str) -> Tensor:
        """An activation, which keeps its input; relu its output."""
        out = self.like(x, ACTIVATIONS)
        if name == "relu":
            kept = out.detach()
            self.tape.record([x], [out], lambda incoming: [kept and incoming[0]])  # in place
        else:
            kept = x.detach()
            self.tape.record([x], [out], lambda incoming: [self.like(kept)])
        return out

    def layer_norm(self, x: Tensor, weight: Parameter, bias: Parameter, rows: int) -> Tensor:
        """The norm of each of ``rows`` rows, with mean and variance."""
        out, kept = self.like(x, ACTIVATIONS), x.detach()
        statistics = [self.floats(rows), self.floats(rows)]

        def backward(incoming: list[Tensor | None]) -> Gradients:
            assert statistics
            return [self.like(kept), self.like(weight), self.like(bias)]

        self.tape.record([x, weight, bias], [out], backward)
        return out

    def scale(self, x: Tensor) -> Tensor:
        """x times a number; nothing is kept."""
        out = self.like(x, ACTIVATIONS)
        self.tape.record([x], [out], lambda incoming: [self._passed_on(incoming[0])])
        return out

    def dropout(self, x: Tensor) -> Tensor:
        """x with random zeros; the mask is kept, a byte for each element."""
        out = self.like(x, ACTIVATIONS)
        mask = self.tape.empty(self._elements(x), ACTIVATIONS)

        def backward(incoming: list[Tensor | None], mask: Tensor = mask) -> Gradients:
            return [self._passed_on(incoming[0])]

        del mask
        self.tape.record([x], [out], backward)
        return out

    def embedding(self, weight: Parameter, elements: int) -> Tensor:
        """Rows of a table."""
        out = self.new(elements)
        self.tape.record([weight], [out], lambda incoming: [self.like(weight)])
        return out

    def rows_of(self, table: Parameter, elements: int) -> Tensor:
        """The first rows of a table, a view; the gradient is a whole table."""
        out = Tensor(elements * self.dtype_bytes, table.memory)
        self.tape.record([table], [out], lambda incoming: [self.like(table)])
        return self.view(out)  # with an axis for the batch

    def contiguous_part(self, rows: Tensor, elements: int) -> Tensor:
        """Some of the rows, a copy; the gradient is of all."""
        out, size = self.new(elements), rows.num_bytes
        self.tape.record([rows], [out], lambda incoming: [self.tape.empty(size, GRADIENTS)])
        return out

    def add_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x + rows, for each row of the batch."""
        out = self.like(x, ACTIVATIONS)

        def backward(incoming: list[Tensor | None], size: int = rows.num_bytes) -> Gradients:
            return [self._passed_on(incoming[0]), self.tape.empty(size, GRADIENTS)]

        self.tape.record([x, rows], [out], backward)
        return out

    def normalized(self, weight: Tensor, rows: int) -> Tensor:
        """Rows of length 1: weight / max(norm, epsilon)."""
        norm = self.new(rows)
        # A parameter is kept as it is: where it is emptied, so is what the operator has kept.
        source = weight if isinstance(weight, Parameter) else weight.detach()
        kept = norm.detach()
        self.tape.record([weight], [norm], lambda incoming: [kept and self.like(source)])
        largest, smaller = self.like(norm, ACTIVATIONS), norm.detach()
        self.tape.record([norm], [largest], lambda incoming: [self.like(smaller)])
        out = self.like(weight, ACTIVATIONS)
        held = [each.detach() for each in (largest, out)]
        self.tape.record(
            [weight, largest], [out], lambda incoming: [self.like(source), self.like(held[0])]
        )
        return out

    def linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, tokens: int, num_rows: int, is_divided: bool
    ) -> Tensor:
        """The head and its loss, a chunk of tokens at a time (ops/loss/linear_cross_entropy.py).

        Args:
            num_rows: of ``weight``, one for each entry of the vocabulary that this rank holds.
            is_divided: whether other ranks hold other entries.
        """
        chunk_bytes = _GPU_CHUNK_BYTES if self.is_gpu else _CPU_CHUNK_BYTES
        chunk = max(1, chunk_bytes // (num_rows * self.dtype_bytes))
        width, elements = self._elements(hidden) // tokens, self._elements(weight)
        sums_in_float32 = self.is_gpu and self.dtype_bytes == 2
        adds_in_place = sums_in_float32 or (not self.is_gpu and self.dtype_bytes == _FLOAT)
        dhidden, dweight = self.like(hidden), None
        losses: list[Tensor] = []
        total = self.floats(1, LOGITS)
        for start, skipped in _chunks(tokens, chunk):
            if skipped:
                losses.append(self.tape.several(skipped, losses[0].num_bytes, LOGITS))
            count = min(chunk, tokens - start)
            logits = self.new(count * num_rows, LOGITS)
            statistics = [self.floats(count, LOGITS) for _ in range(5 if is_divided else 2)]
            losses.append(statistics.pop())
            del statistics
            # The product goes to its rows of dhidden, which takes another copy (set_value).
            self.new(2 * count * width, GRADIENTS)
            if dweight is None:
                product = None if sums_in_float32 else self.new(elements, GRADIENTS)
                dweight = (
                    product if self.dtype_bytes == _FLOAT else self.floats(elements, GRADIENTS)
                )
                del product
            elif not adds_in_place:
                narrow = self.new(elements, GRADIENTS)
                wide = narrow if self.dtype_bytes == _FLOAT else self.floats(elements, GRADIENTS)
                del narrow, wide
            del logits
        del losses
        gradients: list[Tensor | None] = [dhidden, dweight]
        del dhidden, dweight

        def backward(incoming: list[Tensor | None]) -> Gradients:
            of_hidden, of_weight = gradients
            gradients.clear()
            if self.dtype_bytes != _FLOAT:
                of_weight = self.new(elements, GRADIENTS)
            return [of_hidden, of_weight]

        self.tape.record([hidden, weight], [total], backward)
        return total


def _chunks(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """The chunks of a loss that differ: the first, and the last two, one of which may be short.

    Those between them allocate as the last but one does, and leave only their losses.

    Yields:
        the first token of a chunk, and the number of chunks that are left out before it.
    """
    last = -(-tokens // chunk) - 1
    places = sorted({0, max(last - 1, 0), last})
    for before, place in zip((-1, *places), places, strict=False):
        yield place * chunk, place - before - 1
