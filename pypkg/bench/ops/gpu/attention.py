"""Benchmark cases of attention: plain and masked, every version of our kernels against SDPA
and FlexAttention. Operations are those of visible pairs of a query and a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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
from pypkg.bench.ops.gpu.kernel_choice import flash_attention_kernel
from pypkg.bench.ops.work import BACKWARD, FORWARD, Work, visible_pairs
from pypkg.bench.ops.work import flash_attention as flash_attention_work

DOCUMENTS = 8  # in a packed sequence
PREFIX = 0.5  # of the sequence
WINDOW = 1024
SOFTCAP = 2.0  # bends scores of normal numbers, so that validation sees it
HOPPER_HEAD_DIM = 128  # wider heads run on the kernels for ampere


@dataclass(frozen=True)
class Shape:
    """mask: full, causal, alibi, prefix, documents, window or softcap, which is no mask but scores
    that are capped; all but full are causal."""

    batch: int
    sequence: int
    heads: int
    heads_k: int
    head_dim: int
    mask: str = "causal"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.heads_k}" if self.heads_k != self.heads else f"{self.heads}"
        return f"{self.batch}x{self.sequence}x{heads}x{self.head_dim} {self.mask}"


class Mask:
    """What a query sees, as our kernel, FlexAttention and a dense matrix have it."""

    def __init__(self, shape: Shape, device: str):
        self.shape, self.device = shape, device
        positions = torch.arange(shape.sequence, device=device)
        self._document = -(-shape.sequence // DOCUMENTS)
        self._starts = (positions // self._document * self._document).to(torch.int32)
        self._window = min(WINDOW, shape.sequence // 4)
        self._prefix = int(shape.sequence * PREFIX)
        self._slopes = 2.0 ** -(8.0 / shape.heads * torch.arange(1, shape.heads + 1, device=device))

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of our kernel."""
        shape = self.shape
        settings: dict[str, Any] = {"causal": shape.mask != "full"}
        if shape.mask == "alibi":
            settings["alibi_slopes"] = self._slopes.float()
        elif shape.mask == "prefix":
            lengths = torch.full([shape.batch], self._prefix, device=self.device)
            settings["prefix_lengths"] = lengths.to(torch.int32)
        elif shape.mask == "documents":
            settings["document_starts"] = self._starts.expand(shape.batch, -1).contiguous()
        elif shape.mask == "window":
            settings["window"] = self._window
        elif shape.mask == "softcap":
            settings["softcap"] = SOFTCAP
        return settings

    def is_visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        if self.shape.mask == "full":
            return i >= 0
        visible = i >= j
        if self.shape.mask == "prefix":
            return visible | (j < self._prefix)
        if self.shape.mask == "documents":
            return visible & (self._starts[i] == self._starts[j])
        if self.shape.mask == "window":
            return visible & (i - j < self._window)
        return visible

    def visible_pairs(self) -> int:
        """Of one head, over the whole batch."""
        shape = self.shape
        size = {"prefix": self._prefix, "window": self._window, "documents": self._document}
        pairs = visible_pairs(shape.mask, shape.sequence, size.get(shape.mask, 0))
        return shape.batch * pairs

    @cached_property
    def dense(self) -> torch.Tensor:
        """To add to scores: [sequence, sequence], or [heads, sequence, sequence] with ALiBi."""
        j = torch.arange(self.shape.sequence, device=self.device)
        hidden = ~self.is_visible(j[:, None], j[None])
        bias = torch.zeros(hidden.shape, device=self.device)
        if self.shape.mask == "alibi":
            bias = self._slopes[:, None, None] * (j[None] - j[:, None])
        return bias.masked_fill(hidden, float("-inf")).to(self.shape.dtype)

    @cached_property
    def flex(self) -> dict[str, Any]:
        """Keyword arguments of flex_attention."""
        length, slopes = self.shape.sequence, self._slopes
        block_mask = create_block_mask(
            lambda b, h, i, j: self.is_visible(i, j), None, None, length, length, self.device
        )
        settings: dict[str, Any] = {"block_mask": block_mask}
        if self.shape.mask == "alibi":
            settings["score_mod"] = lambda score, b, h, i, j: score + slopes[h] * (j - i)
        elif self.shape.mask == "softcap":
            settings["score_mod"] = lambda score, b, h, i, j: SOFTCAP * torch.tanh(score / SOFTCAP)
        return settings


class Baselines:
    """Functions of q, k and v, all [batch, sequence, heads, head_dim], by name."""

    def __init__(self, mk: Maker, mask: Mask):
        self._mask, self._grouped = mask, mask.shape.heads != mask.shape.heads_k
        self.functions: dict[str, Callable[..., torch.Tensor]] = {}
        if mask.shape.mask in ("causal", "full"):
            backends = [SDPBackend.FLASH_ATTENTION]
            backends += [SDPBackend.CUDNN_ATTENTION] if mk.device == "cuda" else []
            for backend in backends:
                name = f"SDPA {backend.name.split('_')[0].lower()}"
                self.functions[name] = lambda *qkv, b=backend: self._sdpa(b, *qkv)
        elif mask.shape.mask == "softcap":
            if mk.device == "cpu":
                self.functions["composition"] = self._composed
        elif mask.shape.mask != "alibi" or mk.device == "cpu":
            # SDPA wants the bias in the dtype of q: far from the diagonal ALiBi's is too coarse.
            self.functions["SDPA, dense mask"] = self._sdpa_dense
        if mk.device == "cuda":
            self._flex_attention = torch.compile(flex_attention, dynamic=False)
            self.functions["FlexAttention"] = self._flex

    def _sdpa(
        self, backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = self._mask.shape.mask == "causal"
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=self._grouped
            )
        return out.transpose(1, 2)

    def _sdpa_dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        bias = self._mask.dense
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=self._grouped)
        return out.transpose(1, 2)

    def _composed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = q.shape[3] ** -0.5 * (q @ k.transpose(2, 3)).float()
        scores = SOFTCAP * torch.tanh(scores / SOFTCAP) + self._mask.dense
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    def _flex(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = self._flex_attention(q, k, v, enable_gqa=self._grouped, **self._mask.flex)
        return out.transpose(1, 2)


def attention(mk: Maker, shape: Shape) -> Iterator[KernelCase]:
    mask = Mask(shape, mk.device)
    q, k, v, dout = (
        mk.random(shape.batch, shape.sequence, heads, shape.head_dim, dtype=shape.dtype)
        for heads in (shape.heads, shape.heads_k, shape.heads_k, shape.heads)
    )
    out = mk.empty(*q.shape, dtype=shape.dtype)
    lse = mk.empty(shape.batch, shape.heads, shape.sequence, dtype=torch.float32)
    settings = {"scale": shape.head_dim**-0.5, **mask.settings()}
    work = flash_attention_work(mask.visible_pairs(), shape.heads, shape.head_dim)
    functions = Baselines(mk, mask).functions
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    forward = mk.calls("flash_attention_forward", q, k, v, out, lse, **settings)
    baselines = {name: _without_gradients(f, (q, k, v)) for name, f in functions.items()}
    yield _case(mk, shape, "forward", forward, (out,), baselines, work[FORWARD])

    forward[""]()
    grads = tuple(mk.empty(*x.shape, dtype=shape.dtype) for x in (q, k, v))
    backward = mk.calls(
        *("flash_attention_backward", dout, q, k, v, out, lse, *grads),
        mk.workspace("flash_attention_backward_workspace", q, k),
        **settings,
    )
    baselines = {
        name: gradients(partial(f, *leaves), leaves, dout) for name, f in functions.items()
    }
    yield _case(mk, shape, "backward", backward, grads, baselines, work[BACKWARD])


def _without_gradients(function: Callable[..., torch.Tensor], inputs: Tensors) -> Run:
    def run() -> Tensors:
        with torch.no_grad():
            return (function(*inputs),)

    return run


def _case(
    mk: Maker,
    shape: Shape,
    pass_name: str,
    calls: dict[str, Callable[[], None]],
    results: Tensors,
    baselines: dict[str, Run],
    work: Work,
) -> KernelCase:
    def on(kernel: str, call: Callable[[], None]) -> Callable[[], None]:
        def chosen() -> None:
            with flash_attention_kernel(kernel):
                call()

        return chosen

    runs: dict[str, Callable[[], None] | None] = {}
    hopper = has_hopper_kernels(mk.device) and shape.head_dim <= HOPPER_HEAD_DIM
    for kernel in ["ampere", "hopper"] if hopper else ["ampere"]:
        runs |= named(kernel, {variant: on(kernel, call) for variant, call in calls.items()})
    yardstick = None
    if shape.mask not in ("causal", "full"):
        yardstick = str(replace(shape, mask="causal"))
    return kernel_case(
        *("flash_attention", pass_name, str(shape)),
        *(filling(results, runs), baselines, work),
        dtype=str(shape.dtype).removeprefix("torch."),
        yardstick=yardstick,
    )


def has_hopper_kernels(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def cases(mk: Maker) -> Iterator[KernelCase]:
    """On a GPU 16k tokens in every call, as attention is usually compared."""
    masks = ("alibi", "prefix", "documents", "window", "softcap")
    if mk.device == "cpu":  # tiny sizes for a dry run of the script
        for mask in ("causal", *masks):
            yield from attention(mk, Shape(1, 64, 4, 2, 64, mask))
        return
    tokens, bfloat16 = 16384, torch.bfloat16
    for sequence in (8192, 2048, 4096, 16384):
        yield from attention(mk, Shape(tokens // sequence, sequence, 16, 16, 128))
    for mask in masks:
        yield from attention(mk, Shape(2, 8192, 16, 16, 128, mask))
    for heads, heads_k, head_dim, mask, dtype in (
        (16, 16, 128, "causal", torch.float16),
        (32, 8, 128, "causal", bfloat16),
        (16, 16, 128, "full", bfloat16),
        (32, 32, 64, "causal", bfloat16),
        (16, 16, 96, "causal", bfloat16),
        (8, 8, 256, "causal", bfloat16),
        (8, 8, 256, "softcap", bfloat16),
    ):
        yield from attention(mk, Shape(4, 4096, heads, heads_k, head_dim, mask, dtype))
