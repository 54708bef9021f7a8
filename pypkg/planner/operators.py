"""What each operator of the model allocates, keeps for its backward pass, and hands back.

The counterpart of pypkg/ops and of the Paddle operators that the layers call. Sizes are in
elements; a tensor of the model has ``dtype_bytes`` for each, statistics have four.
"""

from __future__ import annotations

from collections.abc import Sequence

from pypkg.planner.tape import Gradients, Parameter, Tape, Tensor

ACTIVATIONS, GRADIENTS, WORKSPACE, LOGITS = "activations", "gradients", "workspace", "logits"

_FLOAT = 4


class Operators:
    """Operators on ``tape``, for a model whose elements take ``dtype_bytes`` bytes."""

    def __init__(self, tape: Tape, dtype_bytes: int) -> None:
        self.tape, self.dtype_bytes = tape, dtype_bytes

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

    def view(self, x: Tensor) -> Tensor:
        """A reshape of contiguous memory: no copy in either direction."""
        out = x.detach()
        self.tape.record([x], [out], lambda incoming: incoming)
        return out

    def linear(self, x: Tensor, weight: Parameter, bias: Parameter | None, outputs: int) -> Tensor:
        """x @ weight + bias, with ``outputs`` elements."""
        out = self.new(outputs)

        def backward(incoming: list[Tensor | None], x: Tensor = x.detach()) -> Gradients:
            return [self.like(x), self.like(weight)]

        self.tape.record([x, weight], [out], backward)
        return out if bias is None else self.add_bias(out, bias)

    def add_bias(self, x: Tensor, bias: Parameter) -> Tensor:
        """x + bias; nothing is kept."""
        out = self.like(x, ACTIVATIONS)

        def backward(incoming: list[Tensor | None]) -> Gradients:
            return [self._passed_on(incoming[0]), self.like(bias)]

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
        out, rstd = self.like(x, ACTIVATIONS), self.floats(rows)

        def backward(incoming: list[Tensor | None], x: Tensor = x.detach()) -> Gradients:
            assert rstd
            return [self.like(x), self.like(weight)]

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
            gradients = [self.like(kept), self.like(weight)]
            return [gradients[0], self.like(kept), gradients[1]]

        self.tape.record([x, residual, weight], [out, stream], backward)
        return out, stream

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

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated q and k; the tables are kept elsewhere."""
        outs = [self.like(q, ACTIVATIONS), self.like(k, ACTIVATIONS)]

        def backward(incoming: list[Tensor | None]) -> Gradients:
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
            scratch = self.floats(workspace, WORKSPACE)
            del scratch
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
            scratch = self.floats(workspace, WORKSPACE)
            del scratch
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

    def embedding(self, weight: Parameter, elements: int) -> Tensor:
        """Rows of a table."""
        out = self.new(elements)
        self.tape.record([weight], [out], lambda incoming: [self.like(weight)])
        return out

    def rows_of(self, table: Parameter, elements: int) -> Tensor:
        """The first rows of a table, a view; the gradient is a whole table."""
        out = Tensor(elements * self.dtype_bytes, table.memory)
        self.tape.record([table], [out], lambda incoming: [self.like(table)])
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
        kept = [weight.detach(), norm.detach()]
        self.tape.record([weight], [norm], lambda incoming: [kept[0] and self.like(kept[0])])
        largest, smaller = self.like(norm, ACTIVATIONS), norm.detach()
        self.tape.record([norm], [largest], lambda incoming: [self.like(smaller)])
        out = self.like(weight, ACTIVATIONS)
        held = [each.detach() for each in (weight, largest, out)]
        self.tape.record(
            [weight, largest], [out], lambda incoming: [self.like(held[0]), self.like(held[1])]
        )
        return out
