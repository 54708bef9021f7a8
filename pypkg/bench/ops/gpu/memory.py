"""Cases of the kernels bound by memory, at sizes of large models that exceed the L2 several times.

Liger's kernels are baselines if liger_kernel is installed. They get copies of the inputs, because
their backward passes overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from pypkg.bench.ops.gpu.case import (
    KernelCase,
    Maker,
    Run,
    Tensors,
    filling,
    gradients,
    kernel_case,
    named,
)
from pypkg.bench.ops.work import BACKWARD, FORWARD
from pypkg.bench.ops.work import cross_entropy as cross_entropy_work
from pypkg.bench.ops.work import gated_activation as gated_activation_work
from pypkg.bench.ops.work import rms_norm as rms_norm_work
from pypkg.bench.ops.work import rotary_embedding as rotary_embedding_work


class Baselines:
    """Baselines of torch, with and without torch.compile, and of Liger."""

    def __init__(self, mk: Maker):
        self._use_compile = mk.use_compile
        self._liger = mk.liger

    def forward(
        self,
        name: str,
        plain: Callable[..., Any],
        inputs: Tensors,
        liger: Callable[[Any], Callable[..., Any]] | None = None,
    ) -> dict[str, Run]:
        """Baselines of a forward pass.

        Args:
            name: name of the plain function in the table.
            plain: the function in torch.
            inputs: its arguments.
            liger: selects the function with the same arguments from those of Liger.
        """
        return self._each(_call, name, plain, inputs, liger)

    def backward(
        self,
        name: str,
        plain: Callable[..., Any],
        inputs: Tensors,
        dout: torch.Tensor,
        liger: Callable[[Any], Callable[..., Any]] | None = None,
    ) -> dict[str, Run]:
        """Baselines of a backward pass: the gradients of ``inputs``, given that of the only output.

        The other arguments are those of ``forward``.
        """

        def of(function: Callable[..., Any], inputs: Tensors) -> Run:
            leaves = tuple(x.detach().requires_grad_() for x in inputs)
            return gradients(lambda: function(*leaves), leaves, dout)

        return self._each(of, name, plain, inputs, liger)

    def _each(
        self,
        run_of: Callable[[Callable[..., Any], Tensors], Run],
        name: str,
        plain: Callable[..., Any],
        inputs: Tensors,
        liger: Callable[[Any], Callable[..., Any]] | None,
    ) -> dict[str, Run]:
        """The result of ``run_of`` for the function of each baseline and its inputs."""
        runs = {name: run_of(plain, inputs)}
        if self._use_compile:
            runs["torch.compile"] = run_of(torch.compile(plain, dynamic=False), inputs)
        if self._liger and liger:
            runs["Liger"] = run_of(liger(self._liger), tuple(x.clone() for x in inputs))
        return runs


def _call(function: Callable[..., Any], inputs: Tensors) -> Run:
    def run() -> Tensors:
        with torch.no_grad():
            out = function(*inputs)
        return out if isinstance(out, tuple) else (out,)

    return run


def rms_norm(mk: Maker, rows: int, cols: int) -> Iterator[KernelCase]:
    epsilon, shape, baselines = 1e-6, f"{rows}x{cols}", Baselines(mk)
    x, r, weight = mk.random(rows, cols), mk.random(rows, cols), mk.random(cols)
    y, h, rstd = mk.empty(rows, cols), mk.empty(rows, cols), mk.empty(rows, dtype=torch.float32)
    work, fused = rms_norm_work(rows, cols), rms_norm_work(rows, cols, with_residual=True)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (cols,), weight, epsilon)

    def with_residual(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Tensors:
        h = x + r
        return plain(h, weight), h

    def liger(functional: Any) -> Callable[..., torch.Tensor]:
        return lambda x, weight: functional.liger_rms_norm(x, weight, epsilon, in_place=False)

    def liger_with_residual(functional: Any) -> Callable[..., Tensors]:
        add = functional.liger_fused_add_rms_norm
        return lambda x, r, weight: add(x, r, weight, epsilon, in_place=False)

    arguments = ("rms_norm_forward", x, weight, y, rstd)
    yield kernel_case(
        *("rms_norm+residual", "forward", shape),
        mk.versions((y, h), *arguments, r, h, epsilon=epsilon),
        baselines.forward("add, F.rms_norm", with_residual, (x, r, weight), liger_with_residual),
        fused[FORWARD],
    )
    yield kernel_case(
        *("rms_norm", "forward", shape, mk.versions((y,), *arguments, epsilon=epsilon)),
        *(baselines.forward("F.rms_norm", plain, (x, weight), liger), work[FORWARD]),
    )
    mk.call(*arguments, epsilon=epsilon)()  # rstd of x
    dy, dx, dweight = mk.random(rows, cols), mk.empty(rows, cols), mk.empty(cols)
    backward = ("rms_norm_backward", dy, x, weight, rstd, dx, dweight)
    triton = None
    if mk.triton:
        workspace = mk.empty(mk.triton.rms_norm_backward_workspace(x), dtype=torch.float32)
        triton = mk.call_triton(*backward, workspace)
    compiled = mk.calls(*backward, mk.workspace("rms_norm_backward_workspace", x))
    versions = {**named("CUDA", compiled), "Triton": triton}
    yield kernel_case(
        *("rms_norm", "backward", shape, filling((dx, dweight), versions)),
        *(baselines.backward("F.rms_norm", plain, (x, weight), dy, liger), work[BACKWARD]),
    )


def rotary(mk: Maker, tokens: int, heads: tuple[int, int]) -> Iterator[KernelCase]:
    """The case of the forward pass; the backward pass is the same kernel with -sin."""
    head_dim = 128
    q, k = (mk.random(1, tokens, count, head_dim) for count in heads)
    angles = torch.rand(tokens, head_dim // 2, device=mk.device) * 6
    cos, sin = angles.cos(), angles.sin()

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, -1)
        c, s = cos[None, :, None], sin[None, :, None]
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    def both(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        return turn(q), turn(k)

    def liger(functional: Any) -> Callable[..., Tensors]:
        tables = [torch.cat((x, x), -1)[None].to(q.dtype) for x in (cos, sin)]

        def run(q: torch.Tensor, k: torch.Tensor) -> Tensors:
            turned = functional.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *tables)
            return tuple(x.transpose(1, 2) for x in turned)

        return run

    outputs = mk.empty(*q.shape), mk.empty(*k.shape)
    yield kernel_case(
        *("rotary_embedding", "forward", f"{tokens}x{heads[0]}+{heads[1]}x{head_dim}"),
        mk.versions(outputs, "rotary_embedding", q, k, cos, sin, *outputs),
        Baselines(mk).forward("eager", both, (q, k), liger),
        rotary_embedding_work(1, tokens, sum(heads), head_dim)[FORWARD],
    )


def gated_activation(mk: Maker, rows: int, cols: int, name: str = "swiglu") -> Iterator[KernelCase]:
    gate, up, dout = (mk.random(rows, cols) for _ in range(3))
    out, dgate, dup = (mk.empty(rows, cols) for _ in range(3))
    work, shape, baselines = gated_activation_work(rows, cols), f"{rows}x{cols}", Baselines(mk)
    activation = {"swiglu": "silu", "geglu": "gelu_tanh"}[name]

    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (F.silu(gate) if name == "swiglu" else F.gelu(gate, approximate="tanh")) * up

    def liger(functional: Any) -> Callable[..., torch.Tensor]:
        return getattr(functional, f"liger_{name}")

    forward = ("gated_activation_forward", gate, up, out, activation)
    yield kernel_case(
        *(name, "forward", shape, mk.versions((out,), *forward)),
        *(baselines.forward("eager", plain, (gate, up), liger), work[FORWARD]),
    )
    backward = ("gated_activation_backward", gate, up, dout, dgate, dup, activation)
    yield kernel_case(
        *(name, "backward", shape, mk.versions((dgate, dup), *backward)),
        *(baselines.backward("eager", plain, (gate, up), dout, liger), work[BACKWARD]),
    )


def cross_entropy(mk: Maker, rows: int, cols: int) -> Iterator[KernelCase]:
    logits, shape, baselines = mk.random(rows, cols), f"{rows}x{cols}", Baselines(mk)
    labels = torch.randint(cols, (rows,), device=mk.device, generator=mk.generator)
    loss, lse = (mk.empty(rows, dtype=torch.float32) for _ in range(2))
    dloss = torch.rand(rows, device=mk.device, generator=mk.generator)
    dlogits, work = mk.empty(rows, cols), cross_entropy_work(rows, cols)

    def plain(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    forward = ("cross_entropy_forward", logits, labels, loss, lse)
    yield kernel_case(
        *("cross_entropy", "forward", shape, mk.versions((loss,), *forward)),
        *(baselines.forward("F.cross_entropy", plain, (logits,)), work[FORWARD]),
    )
    mk.call(*forward)()  # lse
    backward = ("cross_entropy_backward", logits, labels, lse, dloss, dlogits)
    yield kernel_case(
        *("cross_entropy", "backward", shape, mk.versions((dlogits,), *backward)),
        *(baselines.backward("F.cross_entropy", plain, (logits,), dloss), work[BACKWARD]),
    )
    yield _both_passes(mk, plain, logits, labels, forward, dlogits)


def _both_passes(
    mk: Maker,
    plain: Callable[[torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor,
    forward: tuple[Any, ...],
    dlogits: torch.Tensor,
) -> KernelCase:
    """The case of both passes. Liger computes the gradient in forward, over the logits."""
    (rows, cols), lse = logits.shape, forward[-1]
    work = cross_entropy_work(rows, cols)
    ones = torch.ones_like(lse)
    calls = mk.call(*forward), mk.call("cross_entropy_backward", logits, labels, lse, ones, dlogits)
    leaf, own = logits.detach().requires_grad_(), logits.clone().requires_grad_()

    def ours() -> None:
        for call in calls:
            call()

    def liger(functional: Any) -> Tensors:
        functional.liger_cross_entropy(own, labels, reduction="none")
        return (own.detach(),)

    baselines = {"F.cross_entropy": lambda: torch.autograd.grad(plain(leaf), leaf, ones)}
    if mk.use_compile:
        compiled = torch.compile(plain, dynamic=False)
        baselines["torch.compile"] = lambda: torch.autograd.grad(compiled(leaf), leaf, ones)
    if mk.liger:
        baselines["Liger"] = partial(liger, mk.liger)
    return kernel_case(
        *("cross_entropy", "forward+backward", f"{rows}x{cols}"),
        filling((dlogits,), {"CUDA": ours}),
        *(baselines, work[FORWARD] + work[BACKWARD]),
    )


def cases(mk: Maker) -> Iterator[KernelCase]:
    if mk.device == "cpu":  # tiny sizes for a dry run of the script
        yield from rms_norm(mk, 64, 256)
        yield from rotary(mk, 32, (4, 2))
        yield from gated_activation(mk, 64, 256)
        yield from gated_activation(mk, 32, 64, "geglu")
        yield from cross_entropy(mk, 32, 1000)
        return
    for cols in (4096, 5120, 8192):
        yield from rms_norm(mk, 16384, cols)
    yield from rotary(mk, 16384, (32, 32))
    yield from rotary(mk, 16384, (32, 8))
    yield from gated_activation(mk, 16384, 11008)
    yield from gated_activation(mk, 16384, 13696, "geglu")
    for rows, cols in ((16384, 32000), (8192, 64000), (4096, 125696), (4096, 151936)):
        yield from cross_entropy(mk, rows, cols)
